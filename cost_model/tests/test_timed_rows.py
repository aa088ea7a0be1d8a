"""Tables of timed rows come back as they were written; what is no such table is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad_cost_model import CostRow, Device, TimedRow, TimedRowsError, read_timed_rows, timed, write_timed_rows

Rows = Callable[..., CostRow]
Devices = Callable[..., Device]


@pytest.fixture
def table(make_row: Rows, make_device: Devices) -> list[TimedRow]:
    device = make_device(capability=(9, 0))
    slow = make_row(shape={"b": 2, "t": 7}, options={"causal": True, "decay": "scalar", "scale": 0.5}, saved_bytes=9)
    return [
        TimedRow(row=slow, device=device, status="ok", low_s=1e-3, median_s=2e-3, high_s=3e-3, peak_bytes=5,
                 clock_median_mhz=1980.0, cold_cache=True, host_s=5e-6, queued_s=3e-4, repeats=50,
                 date="2026-11-24", source="here"),
        TimedRow(row=make_row(), device=device, status="oom", throttle="power"),
        TimedRow(row=make_row(), device=make_device(name="other"), status="wrong", max_abs_error=0.5),
    ]  # fmt: skip


def test_a_written_table_comes_back_whole(table: list[TimedRow], tmp_path: Path) -> None:
    write_timed_rows(tmp_path / "new" / "rows.parquet", table)
    assert read_timed_rows(tmp_path / "new" / "rows.parquet") == table
    write_timed_rows(tmp_path / "new" / "more.parquet", table[:1])
    assert read_timed_rows(tmp_path / "new") == [table[0], *table]


def test_only_what_ran_is_timed(table: list[TimedRow]) -> None:
    assert timed(table) == table[:1]
    assert table[0].seconds == 2e-3
    assert table[1].seconds != table[1].seconds  # not a number


@given(seconds=st.lists(st.floats(1e-9, 1e3), min_size=3, max_size=3), flops=st.integers(0, 2**60))
def test_figures_keep_every_digit(seconds: list[float], flops: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    low_s, median_s, high_s = sorted(seconds)
    row = CostRow(operator="o", kernel="k", phase="forward", dtype="float32", shape={"t": 1}, matmul_flops=flops)
    device = Device(name="d", kind="cpu", origin="probed", matmul_flops_per_s={"float32": 1e9 / 3}, bytes_per_s=1e10,
                    vector_flops_per_s=1e9, transcendental_per_s=1e8, launch_s=0.0, serial_step_s=0.0,
                    memory_bytes=1)  # fmt: skip
    one = TimedRow(row=row, device=device, status="ok", low_s=low_s, median_s=median_s, high_s=high_s)
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    write_timed_rows(path, [one])
    assert read_timed_rows(path) == [one]


def test_a_missing_a_cut_off_and_a_foreign_file_are_refused(table: list[TimedRow], tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    with pytest.raises(TimedRowsError, match="there is no table of timed rows at"):
        read_timed_rows(path)
    with pytest.raises(TimedRowsError, match=r"holds no \*.parquet"):
        read_timed_rows(tmp_path)
    write_timed_rows(path, table)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TimedRowsError, match="cannot be read as parquet"):
        read_timed_rows(path)
    parquet.write_table(pa.table({"seconds": [1.0]}), path)
    with pytest.raises(TimedRowsError, match="has format version none; this package reads 1"):
        read_timed_rows(path)


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    parquet.write_table(change(parquet.read_table(path)), path)


def test_another_version_a_missing_column_and_a_wrong_type_are_named(table: list[TimedRow], tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_timed_rows(path, table)
    rewrite(path, lambda t: t.replace_schema_metadata({"subquad_cost_model.timed_rows": "7"}))
    with pytest.raises(TimedRowsError, match="has format version 7"):
        read_timed_rows(path)
    write_timed_rows(path, table)
    rewrite(path, lambda t: t.drop_columns(["median_s"]))
    with pytest.raises(TimedRowsError, match="median_s is missing"):
        read_timed_rows(path)
    write_timed_rows(path, table)
    rewrite(path, lambda t: t.set_column(t.column_names.index("repeats"), "repeats", pa.array(["a", "b", "c"])))
    with pytest.raises(TimedRowsError, match="repeats is string"):
        read_timed_rows(path)


def test_an_impossible_row_is_named_by_its_number(table: list[TimedRow], tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_timed_rows(path, table)
    rewrite(path, lambda t: t.set_column(t.column_names.index("status"), "status", pa.array(["ok", "ok", "wrong"])))
    with pytest.raises(TimedRowsError, match="row 1: not a timing"):
        read_timed_rows(path)


@pytest.mark.parametrize(
    "bad",
    [
        {"status": "slow"}, {"low_s": 3e-3}, {"high_s": None}, {"median_s": float("nan")}, {"status": "oom"},
        {"host_s": 0.0}, {"host_s": float("nan")}, {"queued_s": -1.0},
    ],
    ids=str,
)
def test_a_row_cannot_say_what_cannot_be(table: list[TimedRow], bad: dict[str, Any]) -> None:
    with pytest.raises(TimedRowsError):
        replace(table[0], **bad)


def test_families_tell_designs_apart(make_device: Devices) -> None:
    b200, b300, a100, l40s = (make_device(capability=c).family for c in ((10, 0), (10, 3), (8, 0), (8, 9)))
    assert b200 == b300
    assert len({b200, a100, l40s}) == 3
    assert make_device(kind="cpu", name="a cpu").family == "a cpu"


def test_a_table_of_the_first_version_is_read_with_one_launch_a_row(table: list[TimedRow], tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_timed_rows(path, table)
    whole = parquet.read_table(path)
    old = whole.drop_columns(["launches"]).replace_schema_metadata({b"subquad_cost_model.timed_rows": b"1"})
    parquet.write_table(old, path)
    assert read_timed_rows(path) == table
    assert {row.row.launches for row in read_timed_rows(path)} == {1}
    parquet.write_table(whole.drop_columns(["launches"]), path)
    with pytest.raises(TimedRowsError, match="launches is missing"):
        read_timed_rows(path)


def test_a_table_from_before_the_pace_of_the_host_is_read_without_one(table: list[TimedRow], tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_timed_rows(path, table)
    whole = parquet.read_table(path)
    for version, lacking in ((b"4", ("host_s", "queued_s")), (b"5", ("queued_s",))):
        old = whole.drop_columns(list(lacking)).replace_schema_metadata({b"subquad_cost_model.timed_rows": version})
        parquet.write_table(old, path)
        assert read_timed_rows(path) == [replace(row, **dict.fromkeys(lacking)) for row in table]
    parquet.write_table(whole.drop_columns(["host_s"]), path)
    with pytest.raises(TimedRowsError, match="host_s is missing"):
        read_timed_rows(path)


def test_a_rows_pace_stands_before_that_of_the_probe(table: list[TimedRow]) -> None:
    probed = replace(table[0], device=replace(table[0].device, host_s=9e-6))
    assert probed.paced_device == replace(probed.device, host_s=5e-6)
    assert replace(probed, host_s=None).paced_device.host_s == 9e-6
    assert replace(table[0], host_s=None).paced_device.host_s is None


def test_doubt_is_half_the_range_of_the_repeats(table: list[TimedRow]) -> None:
    assert table[0].doubt == pytest.approx(0.5)
    assert table[1].doubt == 0
