"""The record of measurements: one JSON line each, only ever appended to."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from subquad_cost_model.device import Device
from subquad_cost_model.measure import Timing
from subquad_cost_model.rows import CostRow

FORMAT_VERSION = 1
# An append takes milliseconds; who holds the lock for longer is stuck, and waiting on would hide it.
LOCK_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How long one row took on one device with given versions of the software.

    `low_s`, `median_s` and `high_s` are of the repeats; `peak_bytes` is 0 where it was not observed; `date` is
    ISO 8601 in UTC.
    """

    row_key: str
    device_name: str
    versions: Mapping[str, str]
    low_s: float
    median_s: float
    high_s: float
    peak_bytes: int
    date: str

    def __post_init__(self) -> None:
        if not 0 < self.low_s <= self.median_s <= self.high_s:
            raise ValueError(f"not a timing: {self.low_s} <= {self.median_s} <= {self.high_s}")

    @classmethod
    def of(cls, row: CostRow, device: Device, timing: Timing, *, peak_bytes: int = 0) -> Measurement:
        """The timing of this row on this device, dated now."""
        return cls(
            row_key=row.key,
            device_name=device.name,
            versions=dict(device.versions),
            low_s=timing.low_s,
            median_s=timing.median_s,
            high_s=timing.high_s,
            peak_bytes=peak_bytes,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )


class MeasurementStore:
    """Measurements by device, versions and row, kept in a file, or in memory alone when `path` is None.

    Several processes may append at once. A process sees what others wrote before it opened the store or called
    `reload`. Later measurements of a row replace earlier ones in answers, never in the file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.unreadable_lines = 0
        self._entries: dict[tuple[str, frozenset[tuple[str, str]], str], Measurement] = {}
        self._warned = False
        self.reload()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(tuple(self._entries.values()))

    def find(self, row: CostRow, device: Device) -> Measurement | None:
        """The latest measurement of exactly this row, on this device, under the same versions."""
        return self._entries.get((device.name, frozenset(device.versions.items()), row.key))

    def stale(self, device: Device) -> int:
        """How many rows were measured on this device under other versions: they are not answered from."""
        versions = frozenset(device.versions.items())
        return sum(name == device.name and of_it != versions for name, of_it, _ in self._entries)

    def add(self, measurement: Measurement) -> None:
        """Remember it, and append it to the file.

        Raises: OSError when the file cannot be written, TimeoutError when another process holds its lock for a minute.
        """
        if self.path is not None:
            line = json.dumps({"format_version": FORMAT_VERSION, **asdict(measurement)}, sort_keys=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock(self.path), self.path.open("ab+") as file:
                _drop_torn_tail(file)
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        self._remember(measurement)

    def reload(self) -> None:
        """Read the file again, with what other processes appended since.

        Lines that are no measurement of this format version (cut off by a crash, or written by another version of
        this package) are counted in `unreadable_lines`, warned of once, and otherwise ignored.
        """
        if self.path is None or not self.path.exists():
            return
        self.unreadable_lines = 0
        for line in self.path.read_bytes().splitlines():
            try:
                measurement = _parsed(line)
            except (ValueError, TypeError):
                self.unreadable_lines += 1
            else:
                self._remember(measurement)
        if self.unreadable_lines and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.path}: {self.unreadable_lines} line(s) are no measurements of format version {FORMAT_VERSION} "
                "(cut off, or from another version) and are ignored; the others are used",
                stacklevel=2,
            )

    def _remember(self, measurement: Measurement) -> None:
        versions = frozenset(measurement.versions.items())
        self._entries[measurement.device_name, versions, measurement.row_key] = measurement

    @staticmethod
    def _lock(path: Path) -> FileLock:
        return FileLock(path.with_name(path.name + ".lock"), timeout=LOCK_TIMEOUT_S)


def _parsed(line: bytes) -> Measurement:
    content = json.loads(line)
    if not isinstance(content, dict) or content.pop("format_version", None) != FORMAT_VERSION:
        raise ValueError("not a line of this format version")
    return Measurement(**content)


def _drop_torn_tail(file: BinaryIO) -> None:
    """Cut off what follows the last newline: a process died while it wrote that, so it is no measurement."""
    size = file.seek(0, os.SEEK_END)
    keep = size
    while keep > 0:
        file.seek(keep - 1)
        if file.read(1) == b"\n":
            break
        keep -= 1
    if keep < size:
        file.truncate(keep)
    file.seek(0, os.SEEK_END)
