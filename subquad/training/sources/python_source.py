"""The source text of the running Python's standard library: real text that is on every machine."""

from __future__ import annotations

import os
import platform
import sysconfig
from pathlib import Path

from subquad.errors import DataError
from subquad.training.sources.configs import PythonSourceConfig
from subquad.training.sources.documents import (
    Corpus,
    Document,
    by_hash_of_name,
    document_of_file,
    first_byte_not_utf8,
    split_documents,
    without_copies,
)
from subquad.training.sources.packed_text import PackedText
from subquad.training.sources.source import DataContext

LEFT_OUT = frozenset(
    {
        "site-packages", "dist-packages", "__pycache__",  # not the standard library
        "test", "tests", "idle_test", "lib2to3",  # their data files are deliberately odd Python
        "encodings", "pydoc_data",  # generated tables, nearly alike: cheap bits that say nothing about a model
    }
)  # fmt: skip
GENERATED = "_sysconfigdata"
"""Written when Python is built: differs from machine to machine."""


def build(config: PythonSourceConfig, context: DataContext) -> PackedText:
    """The standard library as rows.  Raises: DataError."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = library_documents(root)
    if config.max_bytes is not None:
        documents = fitting(documents, config.max_bytes)
    if len(documents) < 2:
        raise DataError(
            what=f"{len(documents)} source files found, two are needed",
            where=f"data.name=python_source, {root}" + (f", max_bytes={config.max_bytes}" if config.max_bytes else ""),
            mend="raise data.max_bytes" if config.max_bytes else "use data=text_files with files of your own",
        )
    train, validation = split_documents(documents, config.validation_fraction)
    details: dict[str, object] = {"python": platform.python_version()}
    return PackedText(Corpus("python_source", train, validation, details), context)


def library_documents(root: Path) -> list[Document]:
    """The library's modules in the order of their names, each text once, without tests and generated tables."""
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        paths += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith(GENERATED)]
    documents = [document_of_file(path.relative_to(root).as_posix(), path) for path in sorted(paths)]
    # PEP 263 lets an old module declare another encoding; there is none today, and it would not be worth a failure.
    return without_copies(document for document in documents if first_byte_not_utf8(document) is None)


def fitting(documents: list[Document], max_bytes: int) -> list[Document]:
    """As many documents as fit, taken in the order of their names' hashes; the answer keeps the documents' order."""
    taken: set[str] = set()
    for document in by_hash_of_name(documents):
        if document.num_bytes <= max_bytes:
            max_bytes -= document.num_bytes
            taken.add(document.name)
    return [document for document in documents if document.name in taken]
