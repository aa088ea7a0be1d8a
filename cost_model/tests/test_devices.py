"""Shipped devices say what the data sheets say; device files are read back, or refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from subquad_cost_model import CostRow, Device, UnknownDeviceError, load_device, lower_bound_s, shipped_devices

Devices = Callable[..., Device]
Rows = Callable[..., CostRow]


def test_four_devices_are_shipped() -> None:
    assert shipped_devices() == ("a100", "h100", "h200", "l40s")


@pytest.mark.parametrize("name", shipped_devices())
def test_every_shipped_device_is_a_data_sheet_with_its_sources(name: str) -> None:
    device = load_device(name)
    assert (device.kind, device.origin) == ("cuda", "data sheet")
    assert {"bfloat16", "float16", "float32", "float64"} == set(device.matmul_flops_per_s)
    assert device.capability is not None
    assert device.capability >= (8, 0)
    assert device.cache_bytes_per_s > device.bytes_per_s
    assert "data sheet" in device.notes


def test_h100_turns_from_memory_bound_to_compute_bound_near_295_flops_per_byte(make_row: Rows) -> None:
    """989.4 TFLOP/s over 3.35 TB/s, far above the launch and with the cache counted out."""
    h100 = load_device("h100")
    moved = 10**12
    memory_s = lower_bound_s(make_row(bytes_moved=moved), h100)
    assert memory_s == pytest.approx(moved / 3.35e12, rel=1e-3)
    ridge = memory_s * h100.matmul_flops_per_s["bfloat16"] / moved
    assert 290 < ridge < 300
    assert lower_bound_s(make_row(bytes_moved=moved, matmul_flops=280 * moved), h100) == memory_s
    assert lower_bound_s(make_row(bytes_moved=moved, matmul_flops=310 * moved), h100) > memory_s


def test_h200_is_h100_with_more_and_faster_memory() -> None:
    h100, h200 = load_device("h100"), load_device("h200")
    assert h200.matmul_flops_per_s == h100.matmul_flops_per_s
    assert h200.bytes_per_s / h100.bytes_per_s == pytest.approx(4.8 / 3.35)
    assert h200.memory_bytes == 141 * 10**9


def test_names_are_found_in_any_case_and_files_by_their_path(make_device: Devices, tmp_path: Path) -> None:
    assert load_device("H100") == load_device("h100")
    mine = make_device(capability=(9, 0), cache_bytes=10, host_s=5e-6, notes="mine")
    mine.save(tmp_path / "mine.json")
    assert load_device(tmp_path / "mine.json") == mine
    assert load_device(str(tmp_path / "mine.json")) == mine


def test_a_device_file_from_before_the_hosts_pace_knows_none(make_device: Devices) -> None:
    old = json.loads(make_device(host_s=5e-6).to_json())
    del old["host_s"]
    assert Device.from_json(json.dumps(old)) == make_device()
    with pytest.raises(ValueError, match=r"host_s = -1\.0"):
        make_device(host_s=-1.0)


def test_an_unknown_device_is_named_with_the_known_ones() -> None:
    with pytest.raises(UnknownDeviceError, match=r"'h10O'.*did you mean 'h100'\?.*a100, h100, h200, l40s"):
        load_device("h10O")
    with pytest.raises(UnknownDeviceError, match=r"no device file lies there \(shipped"):
        load_device("folder/none.json")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format_version": 2}', '{"format_version": 1}', '{"format_version": 1, "name": "x", "new": 1}'],
)
def test_a_file_that_is_no_device_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"broken\.json is not a device file"):
        load_device(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bytes_per_s": 0.0},
        {"vector_flops_per_s": -1.0},
        {"transcendental_per_s": float("nan")},
        {"matmul_flops_per_s": {}},
        {"matmul_flops_per_s": {"float32": 0.0}},
        {"launch_s": -1e-6},
        {"serial_step_s": float("inf")},
    ],
    ids=str,
)
def test_figures_that_no_device_has_are_refused(make_device: Devices, wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"'planted' has impossible figures: {next(iter(wrong))}|is empty"):
        make_device(**wrong)


def test_the_file_format_has_a_version(make_device: Devices, tmp_path: Path) -> None:
    make_device().save(tmp_path / "mine.json")
    assert json.loads((tmp_path / "mine.json").read_text())["format_version"] == 1
