"""Estimators recover planted devices, keep their intervals in order, and say where a figure comes from."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from subquad_cost_model import (
    ConstantEstimator,
    CostRow,
    Device,
    Efficiency,
    Estimate,
    Estimator,
    MeasuredEstimator,
    Measurement,
    MeasurementStore,
    RooflineEstimator,
    Timing,
    coverage,
    error_factor,
    lower_bound_s,
)

Rows = Callable[..., CostRow]
Devices = Callable[..., Device]


def rows_of_all_kinds(make_row: Rows, count: int = 200) -> list[CostRow]:
    draw = random.Random(0)
    return [
        make_row(
            matmul_flops=int(10 ** draw.uniform(3, 13)),
            vector_flops=int(10 ** draw.uniform(3, 11)),
            transcendental_ops=int(10 ** draw.uniform(0, 10)),
            bytes_moved=int(10 ** draw.uniform(3, 11)),
            serial_steps=draw.randrange(1, 4096),
            dtype=draw.choice(["bfloat16", "float32", "float64"]),
            shape={"b": 1, "t": index + 1},
        )
        for index in range(count)
    ]


def timing(median_s: float, spread: float = 1.1) -> Timing:
    return Timing(low_s=median_s / spread, median_s=median_s, high_s=median_s * spread, repeats=5)


def test_roofline_recovers_a_device_that_reaches_a_constant_part_of_its_ceilings(
    make_row: Rows, make_device: Devices
) -> None:
    rows, device = rows_of_all_kinds(make_row), make_device()
    truth_s = [lower_bound_s(row, device) / 0.4 for row in rows]
    estimates = RooflineEstimator(Efficiency(worst=0.1, typical=0.4, best=1.0)).predict(rows, device)
    assert error_factor([estimate.seconds for estimate in estimates], truth_s) == pytest.approx(1, rel=1e-9)


def test_roofline_intervals_cover_every_efficiency_that_they_state(make_row: Rows, make_device: Devices) -> None:
    rows, device, draw = rows_of_all_kinds(make_row), make_device(), random.Random(1)
    truth_s = [lower_bound_s(row, device) / 10 ** draw.uniform(-3, 0.3) for row in rows]
    assert coverage(RooflineEstimator().predict(rows, device), truth_s) == 1
    beyond_s = [lower_bound_s(row, device) / 2.1 for row in rows]
    assert coverage(RooflineEstimator().predict(rows, device), beyond_s) == 0


def test_the_estimate_from_a_data_sheet_is_the_bound(make_row: Rows, make_device: Devices) -> None:
    rows, device = rows_of_all_kinds(make_row), make_device(origin="data sheet")
    for row, estimate in zip(rows, RooflineEstimator().predict(rows, device), strict=True):
        assert estimate.seconds == estimate.low_s == lower_bound_s(row, device)
        assert estimate.high_s == pytest.approx(1000 * estimate.low_s)
        assert estimate.source == "bound"
        assert estimate.peak_bytes == row.bytes_moved + row.saved_bytes


@pytest.mark.parametrize("bad", [{"worst": 0.0}, {"typical": 3.0}, {"best": 0.05}])
def test_efficiencies_out_of_order_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="not an interval of efficiencies"):
        Efficiency(**bad)


def test_an_interval_that_does_not_hold_its_estimate_is_refused() -> None:
    with pytest.raises(ValueError, match="not an interval"):
        Estimate(seconds=1.0, low_s=1.1, high_s=2.0, peak_bytes=0, source="model")


def test_constant_answers_the_geometric_mean_of_its_operator(make_row: Rows, make_device: Devices) -> None:
    device = make_device()
    rows = [make_row(shape={"t": t}) for t in (1, 2)]
    scan = make_row(operator="selective_scan")
    measurements = [Measurement.of(row, device, timing(s)) for row, s in zip([*rows, scan], [1e-4, 1e-2, 5e-3])]
    estimates = ConstantEstimator.fit(measurements).predict([rows[1], scan, make_row(operator="other")], device)
    assert [estimate.seconds for estimate in estimates] == pytest.approx([1e-3, 5e-3, 1e-3])
    assert estimates[0].low_s == pytest.approx(1e-4 / 1.1)
    assert estimates[0].high_s == pytest.approx(1e-2 * 1.1)
    assert all(estimate.source == "constant" for estimate in estimates)


def test_roofline_beats_the_constant_on_a_device_with_varying_efficiency(make_row: Rows, make_device: Devices) -> None:
    rows, device, draw = rows_of_all_kinds(make_row), make_device(), random.Random(2)
    truth_s = [lower_bound_s(row, device) / draw.uniform(0.1, 0.6) for row in rows]
    seen = [Measurement.of(row, device, timing(s)) for row, s in zip(rows, truth_s, strict=True)]
    models: list[Estimator] = [ConstantEstimator.fit(seen), RooflineEstimator()]
    constant, roofline = (error_factor([e.seconds for e in m.predict(rows, device)], truth_s) for m in models)
    assert roofline < 4 < constant


def test_measured_rows_are_answered_from_the_record_and_others_by_the_fallback(
    make_row: Rows, make_device: Devices
) -> None:
    device, rows = make_device(), [make_row(shape={"t": t}, bytes_moved=t * 10**6) for t in (1, 2, 3)]
    store = MeasurementStore()
    store.add(Measurement.of(rows[1], device, timing(7e-3), peak_bytes=42))
    estimates = MeasuredEstimator(store, RooflineEstimator()).predict(rows, device)
    assert [estimate.source for estimate in estimates] == ["bound", "measured", "bound"]
    assert (estimates[1].seconds, estimates[1].peak_bytes) == (7e-3, 42)
    assert (estimates[1].low_s, estimates[1].high_s) == pytest.approx((7e-3 / 1.1, 7.7e-3))
    assert [estimates[0], estimates[2]] == RooflineEstimator().predict([rows[0], rows[2]], device)


@pytest.mark.parametrize(
    "changed",
    [{"kernel_version": "2"}, {"phase": "backward"}, {"dtype": "float32"}, {"options": {"window": 8}}, {"kernel": "x"}],
    ids=str,
)
def test_a_measurement_answers_for_its_very_row_only(
    make_row: Rows, make_device: Devices, changed: dict[str, object]
) -> None:
    store, device = MeasurementStore(), make_device()
    store.add(Measurement.of(make_row(), device, timing(1e-3)))
    (estimate,) = MeasuredEstimator(store, RooflineEstimator()).predict([make_row(**changed)], device)
    assert estimate.source == "bound"


def test_a_reopened_record_gives_the_same_answers(make_row: Rows, make_device: Devices, tmp_path: Path) -> None:
    path, device = tmp_path / "new" / "measurements.jsonl", make_device()
    MeasurementStore(path).add(Measurement.of(make_row(), device, timing(1e-3)))
    (estimate,) = MeasuredEstimator(MeasurementStore(path), RooflineEstimator()).predict([make_row()], device)
    assert (estimate.source, estimate.seconds) == ("measured", 1e-3)
