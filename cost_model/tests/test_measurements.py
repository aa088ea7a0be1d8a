"""The record survives crashes, concurrent writers and upgrades."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from subquad_cost_model import CostRow, Device, Measurement, MeasurementStore, Timing

Rows = Callable[..., CostRow]
Devices = Callable[..., Device]
TIMING = Timing(low_s=1e-3, median_s=2e-3, high_s=3e-3, repeats=5)

WRITER = """
import sys
from pathlib import Path
from subquad_cost_model import Measurement, MeasurementStore
store = MeasurementStore(Path(sys.argv[1]))
for index in range(100):
    store.add(Measurement(row_key=f"{sys.argv[2]}-{index}" + "x" * 5000, device_name="planted", versions={},
                          low_s=1.0, median_s=2.0, high_s=3.0, peak_bytes=index, date="2025-01-01T00:00:00+00:00"))
"""


@pytest.fixture
def filled(tmp_path: Path, make_row: Rows, make_device: Devices) -> Path:
    path = tmp_path / "measurements.jsonl"
    store = MeasurementStore(path)
    for t in (1, 2, 3):
        store.add(Measurement.of(make_row(shape={"t": t}), make_device(), TIMING))
    return path


def test_what_was_added_is_found_by_another_reader(filled: Path, make_row: Rows, make_device: Devices) -> None:
    found = MeasurementStore(filled).find(make_row(shape={"t": 2}), make_device())
    assert found is not None
    assert (found.low_s, found.median_s, found.high_s) == (1e-3, 2e-3, 3e-3)
    assert found.date.endswith("+00:00")
    assert all(json.loads(line)["format_version"] == 1 for line in filled.read_text().splitlines())


@pytest.mark.parametrize("cut_bytes", [1, 2, 40, 150])
def test_a_record_cut_off_anywhere_in_its_last_line_keeps_the_others(
    filled: Path, make_row: Rows, make_device: Devices, cut_bytes: int
) -> None:
    whole = filled.read_bytes()
    filled.write_bytes(whole[:-cut_bytes])
    if cut_bytes == 1:
        # Only the newline is missing: the line itself is complete and may be used until the next append.
        assert len(MeasurementStore(filled)) == 3
    else:
        with pytest.warns(UserWarning, match=r"1 line\(s\) are no measurements") as caught:
            store = MeasurementStore(filled)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            store.reload()  # warned once, not at every read
        assert len(caught) == 1
        assert (len(store), store.unreadable_lines) == (2, 1)


def test_appending_after_a_crash_does_not_join_the_torn_line(
    filled: Path, make_row: Rows, make_device: Devices
) -> None:
    filled.write_bytes(filled.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="no measurements"):
        store = MeasurementStore(filled)
    store.add(Measurement.of(make_row(shape={"t": 9}), make_device(), TIMING))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = MeasurementStore(filled)
    assert len(again) == 3
    assert again.find(make_row(shape={"t": 9}), make_device()) is not None
    assert again.find(make_row(shape={"t": 3}), make_device()) is None


def test_lines_of_another_format_version_are_ignored(filled: Path, make_row: Rows, make_device: Devices) -> None:
    lines = filled.read_text().splitlines()
    lines[1] = lines[1].replace('"format_version": 1', '"format_version": 2')
    filled.write_text("\n".join(lines) + "\n")
    with pytest.warns(UserWarning, match="of format version 1"):
        store = MeasurementStore(filled)
    assert len(store) == 2
    assert store.find(make_row(shape={"t": 2}), make_device()) is None


def test_measurements_under_other_versions_are_ignored_and_counted(
    filled: Path, make_row: Rows, make_device: Devices
) -> None:
    store, upgraded = MeasurementStore(filled), make_device(versions={"torch": "2.14.0"})
    assert store.find(make_row(shape={"t": 1}), upgraded) is None
    assert (store.stale(upgraded), store.stale(make_device()), store.stale(make_device(name="other"))) == (3, 0, 0)
    store.add(Measurement.of(make_row(shape={"t": 1}), upgraded, TIMING))
    assert store.find(make_row(shape={"t": 1}), upgraded) is not None
    assert store.find(make_row(shape={"t": 1}), make_device(name="other")) is None


def test_a_later_measurement_of_a_row_replaces_the_earlier(filled: Path, make_row: Rows, make_device: Devices) -> None:
    slower = Timing(low_s=4e-3, median_s=5e-3, high_s=6e-3, repeats=5)
    MeasurementStore(filled).add(Measurement.of(make_row(shape={"t": 1}), make_device(), slower))
    store = MeasurementStore(filled)
    found = store.find(make_row(shape={"t": 1}), make_device())
    assert found is not None
    assert (found.median_s, len(store), len(filled.read_text().splitlines())) == (5e-3, 3, 4)


def test_two_processes_append_at_once_and_no_line_is_lost_or_mixed(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in ("one", "two")]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = MeasurementStore(path)
    assert len(store) == 200
    assert len(path.read_bytes().splitlines()) == 200
    assert sorted({m.row_key[:3] for m in store}) == ["one", "two"]


def test_without_a_path_nothing_is_written(tmp_path: Path, make_row: Rows, make_device: Devices) -> None:
    store = MeasurementStore(None)
    store.add(Measurement.of(make_row(), make_device(), TIMING))
    store.reload()
    assert store.find(make_row(), make_device()) is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", [(0.0, 1.0, 2.0), (2.0, 1.0, 3.0), (1.0, float("nan"), 2.0)])
def test_a_timing_out_of_order_is_no_measurement(seconds: tuple[float, float, float]) -> None:
    low_s, median_s, high_s = seconds
    with pytest.raises(ValueError, match="not a timing"):
        Measurement(
            row_key="",
            device_name="",
            versions={},
            low_s=low_s,
            median_s=median_s,
            high_s=high_s,
            peak_bytes=0,
            date="",
        )
