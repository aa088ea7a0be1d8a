"""A Hugging Face data set with a text column; each row is one document."""

from __future__ import annotations

import glob
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from subquad.errors import DataError
from subquad.training.sources.configs import HfConfig
from subquad.training.sources.documents import (
    Bytes,
    Corpus,
    Document,
    document_of_bytes,
    split_documents,
    without_copies,
)
from subquad.training.sources.packed_text import PackedText
from subquad.training.sources.source import DataContext
from subquad.training.sources.streamed import (
    StreamedText,
    all_held_out,
    beginning_of,
    held_out_as,
    held_out_by_hash,
)


class Rows(Protocol):
    """What `datasets` gives: rows in order, and by number unless they are streamed."""

    def __iter__(self) -> Iterator[Mapping[str, object]]: ...

    def __getitem__(self, number: int) -> Mapping[str, object]: ...


def build(config: HfConfig, context: DataContext) -> PackedText | StreamedText:
    """The data set as rows.  Raises: DataError when it, or the package `datasets`, cannot be had."""
    return _stream(config, context) if config.streaming and config.max_bytes is None else _held(config, context)


def _held(config: HfConfig, context: DataContext) -> PackedText:
    documents = rows_of(config, config.split)
    if config.validation_split is not None:
        held_out = rows_of(config, config.validation_split)
        # Held-out rows come first, so that a copy of one is dropped from the training rows.
        distinct = without_copies([*held_out, *documents])
        names = {document.name for document in held_out}
        train = tuple(document for document in distinct if document.name not in names)
        validation = tuple(document for document in distinct if document.name in names)
    else:
        train, validation = split_documents(without_copies(documents), config.validation_fraction)
    return PackedText(Corpus("hf", train, validation, _details(config)), context)


def _stream(config: HfConfig, context: DataContext) -> StreamedText:
    """The data set as it comes. Held-out documents are read now, until there are enough of them."""
    rows = _column(config, config.split)
    is_held_out = held_out_by_hash(config.validation_fraction)
    if config.validation_split is None:
        read = beginning_of(rows, config.text_field, config.validation_bytes, is_held_out, "validation")
    else:
        others = _column(config, config.validation_split)
        held = beginning_of(others, config.text_field, config.validation_bytes, all_held_out, "validation")
        is_held_out = held_out_as(held["validation"])
        read = beginning_of(rows, config.text_field, config.validation_bytes, is_held_out, "train")
        read["validation"] = held["validation"]
    files = sorted(Path(file) for pattern in config.data_files for file in glob.glob(pattern, recursive=True))
    return StreamedText(
        rows,
        PackedText(Corpus("hf", tuple(read["train"]), tuple(read["validation"]), _details(config)), context),
        is_held_out=is_held_out,
        text_field=config.text_field,
        seq_len=context.seq_len,
        lanes=config.lanes,
        shuffle_buffer=config.shuffle_buffer,
        details={"streaming": True, "files": [[file.name, file.stat().st_size] for file in files]},
    )


def _column(config: HfConfig, split: str) -> Any:
    """A `datasets.IterableDataset` of the text alone.  Raises: DataError."""
    rows: Any = _load(config, split)
    first = next(iter(rows), None)
    if first is None:
        raise _no_text(config, split)
    if config.text_field not in first:
        raise _no_column(config, first)
    return rows.select_columns([config.text_field])


def _details(config: HfConfig) -> dict[str, object]:
    """What a fingerprint tells of where the rows came from."""
    return {
        "path": config.path,
        "subset": config.subset,
        "revision": config.revision,
        "datasets": importlib.metadata.version("datasets"),
    }


def rows_of(config: HfConfig, split: str) -> list[Document]:
    """The rows of one split that hold text, up to `max_bytes`."""
    rows = _load(config, split)
    documents: list[Document] = []
    total = 0
    for number, row in enumerate(rows):
        if config.text_field not in row:
            raise _no_column(config, row)
        text = row[config.text_field]
        if not isinstance(text, str):
            raise DataError(
                what=f"column '{config.text_field}' of row {number} holds {type(text).__name__}, not text",
                where="data.text_field",
                mend="name a column of strings",
            )
        document = _document(f"{split}/{number}", text, rows, number, config)
        if config.max_bytes is not None and total + document.num_bytes > config.max_bytes:
            break
        total += document.num_bytes
        documents.append(document)
    if not total:
        raise _no_text(config, split)
    return documents


def _no_column(config: HfConfig, row: Mapping[str, object]) -> DataError:
    return DataError(
        what=f"the rows have no column '{config.text_field}'",
        where="data.text_field",
        mend=f"use one of {', '.join(row)}",
    )


def _no_text(config: HfConfig, split: str) -> DataError:
    return DataError(
        what=f"split '{split}' of {config.path} holds no text"
        + (f" within {config.max_bytes} bytes" if config.max_bytes else ""),
        where="data.path",
        mend="choose another split or text_field, or raise data.max_bytes",
    )


def _document(name: str, text: str, rows: Rows, number: int, config: HfConfig) -> Document:
    """Rows of a stream can be read only once and are kept; those of a data set on disk are read again when needed."""
    if config.streaming:
        return document_of_bytes(name, text.encode())

    def read() -> Bytes:
        return np.frombuffer(str(rows[number][config.text_field]).encode(), dtype=np.uint8)

    return Document(name, len(text.encode()), read)


def _load(config: HfConfig, split: str) -> Rows:
    try:
        import datasets
    except ModuleNotFoundError:
        raise DataError(
            what="the package `datasets` is not installed", where="data.name=hf", mend="pip install 'subquad[hf]'"
        ) from None
    try:
        rows: Rows = datasets.load_dataset(
            config.path,
            config.subset,
            data_files=config.data_files or None,
            split=split,
            revision=config.revision,
            streaming=config.streaming,
        )
    except Exception as error:  # the library raises OSError, ValueError and its own kinds for what a user may mistype
        raise DataError(
            what=f"cannot load {config.path}: {str(error).splitlines()[0]}",
            where=f"data.path={config.path}, split={split}",
            mend="check name, split and data_files; without a network, HF_HUB_OFFLINE=1 reads what was downloaded",
        ) from None
    return rows
