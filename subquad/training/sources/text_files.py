"""Files of the user's own, memory-mapped: UTF-8 text is one document, JSON Lines and Parquet are one for each row."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from subquad.errors import DataError
from subquad.training.sources.configs import TextFilesConfig
from subquad.training.sources.documents import (
    Corpus,
    Document,
    check_utf8,
    document_of_file,
    split_documents,
    without_copies,
)
from subquad.training.sources.packed_text import PackedText
from subquad.training.sources.rows import documents_of_rows, holds_rows
from subquad.training.sources.source import DataContext


def build(config: TextFilesConfig, context: DataContext) -> PackedText:
    """The files as rows.  Raises: DataError for a missing, unreadable, empty or non-UTF-8 file, a row without text."""
    paths = files_of(config.files, "data.files")
    held_out = files_of(config.validation_files, "data.validation_files")
    paths = [path for path in paths if path not in held_out]
    names = names_of(paths + held_out)
    # Held-out files come first, so that a copy of what they hold is dropped from the training files.
    read = [_documents(path, names[path], config.text_field) for path in held_out + paths]
    held_names = {document.name for documents in read[: len(held_out)] for document in documents}
    documents = without_copies(document for documents in read for document in documents)
    if not documents:
        empty = [str(path) for path in held_out + paths]
        listed = ", ".join(empty[:3]) + (f" and {len(empty) - 3} more" if len(empty) > 3 else "")
        raise DataError(what=f"there is no text in {listed}", where="data.files", mend="name files that hold text")
    if held_out:
        train = tuple(document for document in documents if document.name not in held_names)
        validation = tuple(document for document in documents if document.name in held_names)
    else:
        train, validation = split_documents(documents, config.validation_fraction)
    return PackedText(Corpus("text_files", train, validation), context)


def _documents(path: Path, name: str, text_field: str) -> list[Document]:
    """What a file holds: its rows, or all of it as one document.  Raises: DataError."""
    if holds_rows(path):
        return documents_of_rows(name, path, text_field)
    # Before a lone file is cut in two, so that an error counts bytes from its beginning.
    check_utf8(document_of_file(str(path), path), "data.files")
    return [document_of_file(name, path)]


def files_of(patterns: list[str], where: str) -> list[Path]:
    """The files that paths and globs name, each once, in the order of their paths.  Raises: DataError."""
    found: set[Path] = set()
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        # A path that exists is taken by its letters: it may hold a bracket.
        matches = [expanded] if os.path.exists(expanded) else glob.glob(expanded, recursive=True)
        files = [Path(match).absolute() for match in matches if not os.path.isdir(match)]
        if matches and not files:
            mend = f"write '{pattern}/**/*.txt' for the files in it"
            raise DataError(what=f"{pattern} is a folder", where=where, mend=mend)
        if not files:
            raise DataError(
                what=f"no file matches {pattern}", where=where, mend=f"check the path; we are in {Path.cwd()}"
            )
        found.update(files)
    return sorted(found)


def names_of(paths: list[Path]) -> dict[Path, str]:
    """Names that do not depend on where the corpus lies: paths below the deepest folder that holds them all."""
    if not paths:
        return {}
    root = Path(os.path.commonpath([path.parent for path in paths]))
    return {path: path.relative_to(root).as_posix() for path in paths}
