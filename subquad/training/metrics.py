"""What a run records as it goes: metrics.csv, and which samples each step consumed."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TextIO

COLUMNS = (
    "step", "train/loss", "val/loss", "val/bits_per_byte", "tokens_per_s", "mfu", "learning_rate", "gradient_norm",
    "seconds",
)  # fmt: skip
"""Of every `metrics.csv`; gradient norms by family of the model's mixers and held-out losses by position follow."""
SAMPLE_COLUMNS = ("step", "sample_ids")
MAX_RECORDED_IDS = 5_000_000
"""Sample numbers that a rank records (tens of megabytes); what comes later is known from the seed all the same."""


class CsvRecord:
    """A CSV file with a row per step, in rising order; rows are in the file when `flush` returns.

    Opened with `resume_at`, it drops the rows of later steps: the resumed run writes them again. What another version
    recorded in other columns is kept as far as columns are called the same.
    """

    def __init__(self, path: Path, columns: Sequence[str], resume_at: int | None = None) -> None:
        self._columns = tuple(columns)
        if resume_at is None or not path.exists():
            self._file: TextIO = path.open("w", newline="", encoding="utf-8")
            self._writer = csv.writer(self._file)
            self._writer.writerow(self._columns)
            self._file.flush()
            return
        kept = [
            [row.get(column, "") for column in self._columns]
            for row in read_rows(path)
            if int(row[self._columns[0]]) <= resume_at
        ]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self._columns, *kept])
        temporary.replace(path)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)

    def append(self, values: Mapping[str, object]) -> None:
        """Add a row; a column without a value stays empty."""
        self._writer.writerow([_text(values.get(column)) for column in self._columns])

    def flush(self) -> None:
        """Hand the rows to the system, so that they outlive this process."""
        self._file.flush()

    def close(self) -> None:
        """Write what is left."""
        self._file.close()


class SampleRecord:
    """The sample numbers that one rank consumed, a row per step."""

    def __init__(self, path: Path, resume_at: int | None = None) -> None:
        path.parent.mkdir(exist_ok=True)
        self._record = CsvRecord(path, SAMPLE_COLUMNS, resume_at)
        self._recorded = 0

    def append(self, step: int, sample_ids: Sequence[int]) -> None:
        """Add a step, unless enough is recorded."""
        self._recorded += len(sample_ids)
        if self._recorded <= MAX_RECORDED_IDS:
            self._record.append({"step": step, "sample_ids": " ".join(map(str, sample_ids))})

    def flush(self) -> None:
        """Hand the rows to the system."""
        self._record.flush()

    def close(self) -> None:
        """Write what is left."""
        self._record.close()


def drop_samples_of_other_ranks(folder: Path, recording: Collection[int], resume_at: int) -> None:
    """Drop later steps from the records of ranks that no longer keep one: others consume those samples again."""
    for path in folder.glob("rank-*.csv"):
        if int(path.stem.removeprefix("rank-")) not in recording:
            SampleRecord(path, resume_at).close()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a record, cells by column; a last row that was cut off is no row."""
    text = path.read_text(encoding="utf-8")
    columns, *rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines())) or [[]]
    return [dict(zip(columns, row)) for row in rows if len(row) == len(columns)]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv; an empty cell is no key."""
    return [{column: float(cell) for column, cell in row.items() if cell} for row in read_rows(path)]


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)
