"""Files of many documents: JSON Lines and Parquet, a row each, read from the file whenever they are asked for.

Kept in memory are a place and a length for each row, and of a Parquet file the row group that was read last. So memory
grows with the number of documents (measured in README.md beside this), not with their text.
"""

from __future__ import annotations

import json
import mmap
from array import array
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from subquad.errors import DataError
from subquad.training.sources.documents import Bytes, Document, unreadable

JSON_LINES, PARQUET = (".jsonl", ".ndjson"), (".parquet",)


def holds_rows(path: Path) -> bool:
    """Whether a file is, by its name, one of many documents."""
    return path.suffix.lower() in JSON_LINES + PARQUET


def documents_of_rows(name: str, path: Path, text_field: str) -> list[Document]:
    """The rows of a file that hold text, `NAME:LINE` each, or `NAME:ROW` counted from 1.  Raises: DataError."""
    try:
        rows = (JsonLines if path.suffix.lower() in JSON_LINES else ParquetRows)(path, text_field)
    except OSError as error:
        raise unreadable(path, error) from None
    return [
        Document(f"{name}:{number}", num_bytes, partial(rows.read, index))
        for index, (number, num_bytes) in enumerate(zip(rows.numbers, rows.lengths))
        if num_bytes
    ]


class JsonLines:
    """An object per line; `text_field` is the key of its text. Empty lines are passed over."""

    def __init__(self, path: Path, text_field: str) -> None:
        self._path, self._field = path, text_field
        self.numbers, self.lengths, self._starts = array("q"), array("q"), array("q")
        with path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self.numbers.append(number)
                    self.lengths.append(len(self._text(line, number)))
                    self._starts.append(start)
                start += len(line)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if start else None

    def read(self, index: int) -> Bytes:
        """The text of one row."""
        assert self._map is not None
        start = self._starts[index]
        end = self._map.find(b"\n", start)
        line = self._map[start : end if end >= 0 else len(self._map)]
        return np.frombuffer(self._text(line, self.numbers[index]), dtype=np.uint8)

    def _text(self, line: bytes, number: int) -> bytes:
        where = f"{self._path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                what=f"the line is no JSON: {error}", where=where, mend="write one JSON object per line, in UTF-8"
            ) from None
        return _text_of(row, self._field, where)


class ParquetRows:
    """A table with a column of text."""

    def __init__(self, path: Path, text_field: str) -> None:
        try:
            import pyarrow
            import pyarrow.compute
            import pyarrow.parquet
        except ModuleNotFoundError:
            raise DataError(
                what="the package `pyarrow` is not installed", where=str(path), mend="pip install pyarrow"
            ) from None
        self._path, self._field = path, text_field
        try:
            self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        except pyarrow.ArrowInvalid as error:
            raise DataError(
                what=f"{path} is no Parquet file: {str(error).splitlines()[0]}", where="data.files", mend="leave it out"
            ) from None
        names = self._file.schema_arrow.names
        if text_field not in names:
            raise _no_field(text_field, names, str(path))
        kind = self._file.schema_arrow.field(text_field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise _no_text(text_field, str(kind), str(path))
        self.lengths, self._firsts = array("q"), array("q")  # of row groups
        for group in range(self._file.num_row_groups):
            self._firsts.append(len(self.lengths))
            for chunk in self._column(group).chunks:
                sizes = pyarrow.compute.fill_null(pyarrow.compute.binary_length(chunk), 0)
                self.lengths.extend(sizes.to_pylist())
        self.numbers = range(1, len(self.lengths) + 1)
        self._held: tuple[int, Any] = (-1, None)

    def read(self, index: int) -> Bytes:
        """The text of one row."""
        group = int(np.searchsorted(self._firsts, index, side="right")) - 1
        if self._held[0] != group:
            self._held = (group, self._column(group))
        text: str = self._held[1][index - self._firsts[group]].as_py()
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def _column(self, group: int) -> Any:
        return self._file.read_row_group(group, columns=[self._field]).column(0)


def _text_of(row: object, field: str, where: str) -> bytes:
    if not isinstance(row, dict) or field not in row:
        raise _no_field(field, list(row) if isinstance(row, dict) else [], where)
    if not isinstance(row[field], str):
        raise _no_text(field, type(row[field]).__name__, where)
    try:
        return bytes(row[field], "utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            what=f"the text holds half a character (a surrogate) at {error.start}",
            where=where,
            mend="leave the row out",
        ) from None


def _no_field(field: str, have: list[str], where: str) -> DataError:
    mend = f"use data.text_field={' or '.join(have)}" if have else "write objects with a field of text"
    return DataError(what=f"there is no field '{field}'", where=where, mend=mend)


def _no_text(field: str, kind: str, where: str) -> DataError:
    return DataError(what=f"field '{field}' holds {kind}, not text", where=where, mend="name a field of text")
