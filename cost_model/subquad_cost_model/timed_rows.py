"""Rows with what came of them on a device: the table that cost models are fitted to and judged by, kept in parquet.

`MeasurementStore` answers for exact rows and keeps their keys alone; this table keeps the work and the device as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from subquad_cost_model.device import Device
from subquad_cost_model.rows import CostRow

FORMAT_VERSION = 6
READABLE = {
    "1": ("launches", "document_lengths", "padding", "host_s", "queued_s"),
    "2": ("document_lengths", "padding", "host_s", "queued_s"),
    "3": ("padding", "host_s", "queued_s"),
    "4": ("host_s", "queued_s"),
    "5": ("queued_s",),
    "6": (),
}
"""Versions that are read, each with the columns that it lacks: these have their defaults."""
_FORMAT_KEY = b"subquad_cost_model.timed_rows"
Status = Literal["ok", "oom", "unsupported", "wrong"]
STATUSES: tuple[str, ...] = get_args(Status)
_ROW_JSON = ("shape", "options", "document_lengths")


class TimedRowsError(ValueError):
    """A file that holds no table of timed rows of this format, or a table with an impossible row."""


@dataclass(frozen=True, kw_only=True)
class TimedRow:
    """One row on one device.

    `status` is `ok` (timed), `oom`, `unsupported`, or `wrong` (its result was: never timed). Failures are rows too, so
    that what cannot run is known. Seconds are of the repeats (`low_s <= median_s <= high_s`). None: not observed.
    `host_s` is what the host needed to start a small torch operation beside the timed calls (`host_pace`), `queued_s`
    what it needed to queue one of these calls, behind work that keeps the device busy.
    `run_id` and `source` say which session measured it and where the figures come from; `date` is ISO 8601.
    """

    row: CostRow
    device: Device
    status: Status
    median_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    peak_bytes: int | None = None
    max_abs_error: float | None = None
    warm_ups: int | None = None
    repeats: int | None = None
    cold_cache: bool | None = None
    cuda_graph: bool | None = None
    host_s: float | None = None
    queued_s: float | None = None
    clock_median_mhz: float | None = None
    clock_min_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    throttle: str | None = None
    date: str = ""
    run_id: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise TimedRowsError(f"status is {self.status!r}, none of {', '.join(STATUSES)}")
        for name in ("host_s", "queued_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise TimedRowsError(f"{name} is {value}, no seconds of a host ({self.row.key})")
        seconds = (self.low_s, self.median_s, self.high_s)
        if self.status == "ok":
            known = [math.nan if value is None else value for value in seconds]
            if not 0 < known[0] <= known[1] <= known[2] < math.inf:
                raise TimedRowsError(f"not a timing: {' <= '.join(map(str, seconds))} ({self.row.key})")
        elif seconds != (None, None, None):
            raise TimedRowsError(f"status {self.status} with seconds {seconds} ({self.row.key})")

    @property
    def seconds(self) -> float:
        """The median; NaN where it was not timed."""
        return math.nan if self.median_s is None else self.median_s

    def on(self, device: Device) -> Device:
        """The device as this row met it: a captured call waits for no host."""
        return replace(device, host_s=0.0) if self.cuda_graph else device

    @property
    def paced_device(self) -> Device:
        """The device with the host's pace of this timing; as it was probed where the row does not know it."""
        return self.on(self.device if self.host_s is None else replace(self.device, host_s=self.host_s))

    @property
    def doubt(self) -> float:
        """Half the range of the repeats over their median: what a second measurement may differ by; 0 if not timed."""
        if self.median_s is None or self.low_s is None or self.high_s is None:
            return 0.0
        return (self.high_s - self.low_s) / 2 / self.median_s


def timed(rows: Iterable[TimedRow]) -> list[TimedRow]:
    """Those that ran."""
    return [row for row in rows if row.status == "ok"]


def write_timed_rows(path: Path, rows: Sequence[TimedRow]) -> None:
    """Write the table (zstd).  Raises: ModuleNotFoundError without the extra `data`."""
    pa, parquet = _pyarrow()
    columns: dict[str, list[Any]] = {name: [] for name, _ in _schema_of(pa)}
    texts: dict[int, str] = {}  # thousands of rows share one device
    for timed_row in rows:
        for field in fields(CostRow):
            value = getattr(timed_row.row, field.name)
            columns[field.name].append(_json(value) if field.name in _ROW_JSON else value)
        columns["device_name"].append(timed_row.device.name)
        if id(timed_row.device) not in texts:
            texts[id(timed_row.device)] = timed_row.device.to_json()
        columns["device"].append(texts[id(timed_row.device)])
        for name in _PLAIN:
            columns[name].append(getattr(timed_row, name))
    schema = pa.schema(_schema_of(pa), metadata={_FORMAT_KEY: str(FORMAT_VERSION)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns, schema=schema), path, compression="zstd")


def read_timed_rows(path: Path) -> list[TimedRow]:
    """Read a table, or all tables (`*.parquet`) of a folder.

    Raises: TimedRowsError when there is none, or it is cut off, of another format version, or holds an impossible row;
    ModuleNotFoundError without the extra `data`.
    """
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
        if not files:
            raise TimedRowsError(f"{path} holds no *.parquet")
        return [row for file in files for row in read_timed_rows(file)]
    pa, parquet = _pyarrow()
    if not path.is_file():
        raise TimedRowsError(f"there is no table of timed rows at {path}")
    try:
        table = parquet.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise TimedRowsError(f"{path} cannot be read as parquet: {error}") from None
    version = (table.schema.metadata or {}).get(_FORMAT_KEY, b"none").decode()
    if version not in READABLE:
        raise TimedRowsError(f"{path} has format version {version}; this package reads {', '.join(READABLE)}")
    expected, found = dict(_schema_of(pa)), {field.name: field.type for field in table.schema}
    for name in READABLE[version]:
        del expected[name]
    wrong = [f"{name} is {found.get(name, 'missing')}" for name in expected if found.get(name) != expected[name]]
    if wrong:
        raise TimedRowsError(f"{path}: {', '.join(wrong)}")
    rows = []
    for number, record in enumerate(table.to_pylist()):
        try:
            rows.append(_parsed(record))
        except (ValueError, TypeError) as error:
            raise TimedRowsError(f"{path}, row {number}: {error}") from None
    return rows


_PLAIN = tuple(field.name for field in fields(TimedRow) if field.name not in ("row", "device"))


def _schema_of(pa: Any) -> list[tuple[str, Any]]:
    types: Mapping[str, Any] = {
        "str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "Status": pa.string(),
    }  # fmt: skip
    columns = [(f.name, pa.string() if f.name in _ROW_JSON else types[str(f.type)]) for f in fields(CostRow)]
    columns += [("device_name", pa.string()), ("device", pa.string())]
    plain = {f.name: str(f.type).removesuffix(" | None") for f in fields(TimedRow)}
    return columns + [(name, types[plain[name]]) for name in _PLAIN]


def _parsed(record: dict[str, Any]) -> TimedRow:
    row = {f.name: record[f.name] for f in fields(CostRow) if f.name in record}
    row |= {name: json.loads(row[name]) for name in _ROW_JSON if name in row}
    row["document_lengths"] = tuple(row.get("document_lengths", ()))
    return TimedRow(
        row=CostRow(**row),
        device=_device(record["device"]),
        **{name: record[name] for name in _PLAIN if name in record},
    )


def _json(value: object) -> str:
    plain = dict(value) if isinstance(value, Mapping) else value
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


@cache
def _device(text: str) -> Device:
    return Device.from_json(text)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError("tables of timed rows are parquet: pip install 'subquad-cost-model[data]'") from None
    return pyarrow, pyarrow.parquet
