"""The bound is what the slowest unit needs, plus the launch, and never more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subquad_cost_model import CostRow, Device, lower_bound_s

Rows = Callable[..., CostRow]
Devices = Callable[..., Device]
WORK = ("matmul_flops", "vector_flops", "transcendental_ops", "bytes_moved", "serial_steps", "launches")
amounts = st.fixed_dictionaries({name: st.integers(int(name == "launches"), 10**12) for name in WORK})
reused = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.mark.parametrize(
    ("work", "expected_s"),
    [
        ({}, 1e-6),
        ({"matmul_flops": 10**9}, 1e-6 + 1e-3),
        ({"matmul_flops": 10**9, "dtype": "float32"}, 1e-6 + 1e-2),
        ({"vector_flops": 10**8}, 1e-6 + 1e-2),
        ({"transcendental_ops": 10**6}, 1e-6 + 1e-3),
        ({"bytes_moved": 10**9}, 1e-6 + 1e-2),
        ({"serial_steps": 10**5}, 1e-6 + 1e-4),
        ({"matmul_flops": 10**9, "bytes_moved": 10**9, "serial_steps": 10**5}, 1e-6 + 1e-2),
        ({"launches": 1001}, 1e-6 + 1e-3),
        ({"launches": 1001, "bytes_moved": 10**9}, 1e-6 + 1e-2),
    ],
)
def test_the_unit_that_needs_longest_sets_the_bound(
    make_row: Rows, make_device: Devices, work: dict[str, int], expected_s: float
) -> None:
    assert lower_bound_s(make_row(**work), make_device()) == pytest.approx(expected_s, rel=1e-12)


@reused
@given(work=amounts, grown=st.sampled_from(WORK))
def test_more_work_never_takes_less(make_row: Rows, make_device: Devices, work: dict[str, int], grown: str) -> None:
    device = make_device(cache_bytes=10**6, cache_bytes_per_s=1e12)
    more = {**work, grown: 2 * work[grown] + 1}
    assert lower_bound_s(make_row(**more), device) >= lower_bound_s(make_row(**work), device)


@reused
@given(work=amounts)
def test_a_device_that_works_its_units_one_after_another_is_never_faster_than_the_bound(
    make_row: Rows, make_device: Devices, work: dict[str, int]
) -> None:
    """Truth planted: every unit at its ceiling, inputs in the cache beforehand, no overlap."""
    row, device = make_row(**work), make_device(cache_bytes=10**7, cache_bytes_per_s=1e12)
    cached = min(row.bytes_moved, 10**7)
    serial_s = (
        row.launches * 1e-6
        + row.matmul_flops / 1e12
        + row.vector_flops / 1e10
        + row.transcendental_ops / 1e9
        + cached / 1e12
        + (row.bytes_moved - cached) / 1e11
        + row.serial_steps * 1e-9
    )
    assert lower_bound_s(row, device) <= serial_s * (1 + 1e-12)


def test_traffic_that_fits_the_cache_is_bounded_by_the_cache(make_row: Rows, make_device: Devices) -> None:
    device = make_device(cache_bytes=10**6, cache_bytes_per_s=1e12)
    assert lower_bound_s(make_row(bytes_moved=10**6), device) == pytest.approx(1e-6 + 1e-6)
    # 10^9 bytes, of which 10^6 may be in the cache: the others cross the bus.
    assert lower_bound_s(make_row(bytes_moved=10**9), device) == pytest.approx(1e-6 + 0.999e9 / 1e11)


def test_traffic_in_a_cache_of_unknown_speed_is_free(make_row: Rows, make_device: Devices) -> None:
    assert lower_bound_s(make_row(bytes_moved=10**6), make_device(cache_bytes=10**6)) == pytest.approx(1e-6)


def test_a_narrow_dtype_is_never_bounded_above_a_wider_one(make_row: Rows, make_device: Devices) -> None:
    """CPUs without 16-bit units: the kernel that converts to fp32 must not beat the bound."""
    device = make_device(matmul_flops_per_s={"float32": 1e11, "bfloat16": 1e9, "float16": 1e9, "float64": 5e10})
    for dtype in ("bfloat16", "float16", "float32"):
        assert lower_bound_s(make_row(matmul_flops=10**9, dtype=dtype), device) == pytest.approx(1e-6 + 1e-2)
    assert lower_bound_s(make_row(matmul_flops=10**9, dtype="float64"), device) == pytest.approx(1e-6 + 2e-2)


def test_a_dtype_the_device_does_not_list_gets_its_fastest_rate(make_row: Rows, make_device: Devices) -> None:
    assert lower_bound_s(make_row(matmul_flops=10**9, dtype="float8"), make_device()) == pytest.approx(1e-6 + 1e-3)
