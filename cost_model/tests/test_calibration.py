"""A few rows of a device correct a model of others; the file that keeps this is refused where it does not hold."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
from scipy.optimize import minimize

from subquad_cost_model import (
    CostRow,
    Device,
    Estimate,
    LearnedEstimator,
    RooflineEstimator,
    TimedRow,
    Trees,
    calibration,
)
from subquad_cost_model.calibration import OUTLIER, PULL, CalibratedEstimator, _overhead, _weights
from subquad_cost_model.metrics import coverage, error_factor
from subquad_cost_model.profile_files import ProfileError, load_profile, profile_or_source, save_profile

HERE = planted.device("here", (9, 0), scale=0.7)


class Truth:
    """A source that knows the planted seconds, but for a factor by kernel and an overhead."""

    def __init__(self, factors: dict[str, float], overhead_s: float = 0.0, name: str = "truth") -> None:
        self.name, self._factors, self._overhead_s = name, factors, overhead_s

    def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
        """Seconds from which overhead and factor are missing, in an interval of ten either way."""
        found = [(planted.truth_s(row, device) - self._overhead_s) / self._factors[row.kernel] for row in rows]
        return [Estimate(seconds=s, low_s=s / 10, high_s=s * 10, peak_bytes=7, source="bound") for s in found]


def rows(seed: int, shapes: int, *, noise: float = 0.02, on: Device = HERE) -> list[TimedRow]:
    found: dict[str, TimedRow] = {}
    draw = random.Random(seed)
    while len(found) < 2 * shapes:
        b, t, h = 2 ** draw.randrange(5), round(2 ** draw.uniform(6, 14)), draw.choice((4, 16, 32))
        for kernel in planted.KERNELS:
            row = planted.row(kernel, b, t, h)
            found[row.key] = planted.timed_row(row, on, draw.gauss(0, noise))
    return list(found.values())


def factor_off(estimator: Any, judged: Sequence[TimedRow]) -> float:
    found = [estimate.seconds for estimate in estimator.predict([row.row for row in judged], HERE)]
    return error_factor(found, [row.seconds for row in judged])


def test_a_factor_per_kernel_is_found_from_sixteen_shapes() -> None:
    source = Truth({"wide": 3.0, "narrow": 0.5})
    calibrated = CalibratedEstimator.fit(rows(0, 16), HERE, source)
    assert calibrated.corrections["forward"].kind in ("kernels", "overhead", "process")
    judged = rows(1, 60, noise=0.0)
    assert factor_off(source, judged) > 1.9
    assert factor_off(calibrated, judged) < 1.12


def test_an_overhead_per_call_is_found() -> None:
    source = Truth({"wide": 1.0, "narrow": 1.0}, overhead_s=2.5e-6)
    calibrated = CalibratedEstimator.fit(rows(2, 24, noise=0.005), HERE, source)
    assert calibrated.corrections["forward"].kind == "overhead"
    assert factor_off(calibrated, rows(3, 60, noise=0.0)) < factor_off(source, rows(3, 60, noise=0.0))


def test_a_captured_row_is_what_a_source_says_without_a_host() -> None:
    """A source that lets eager calls wait for ever is right of captured ones."""

    class Waiting(Truth):
        def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
            late = 1.0 if device.host_s == 0.0 else 50.0
            return [replace(e, seconds=late * e.seconds) for e in super().predict(rows, device)]

    factors = dict.fromkeys(planted.KERNELS, 1.3)
    captured = [replace(row, cuda_graph=True) for row in rows(3, 16)]
    beside = (planted.device("other", (9, 0), scale=1.0),)
    calibrated = CalibratedEstimator.fit(captured, HERE, Waiting(factors), beside=beside)
    judged = rows(4, 30)
    found = calibrated.predict([row.row for row in judged], replace(HERE, host_s=0.0))
    assert error_factor([one.seconds for one in found], [row.seconds for row in judged]) < 1.05


def test_a_unit_that_is_slower_than_the_source_expects_is_found() -> None:
    """Which no factor per kernel can say: rows that wait for memory, or to be launched, are as expected."""
    expected = replace(
        HERE,
        matmul_flops_per_s={"bfloat16": 3 * HERE.matmul_flops_per_s["bfloat16"]},
        transcendental_per_s=3 * HERE.transcendental_per_s,
        serial_step_s=HERE.serial_step_s / 3,  # as many multiprocessors
    )

    class Source(Truth):
        def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
            return super().predict(rows, expected)

    source, judged = Source({"wide": 1.0, "narrow": 1.0}), rows(20, 80, noise=0.0)
    calibrated = CalibratedEstimator.fit(rows(19, 16), HERE, source)
    found = calibrated.corrections["forward"]
    assert found.kind == "process"
    assert found.errors["process"] < 0.6 * min(found.errors["kernels"], found.errors["overhead"])
    assert factor_off(source, judged) > 1.25
    assert factor_off(calibrated, judged) < 1.08


def test_rows_of_one_operator_beyond_a_thousand_are_left_to_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, source = rows(21, 12), Truth({"wide": 1.0, "narrow": 1.0})
    monkeypatch.setattr(calibration, "MOST_ROWS", len(measured) - 1)
    assert "process" not in CalibratedEstimator.fit(measured, HERE, source).corrections["forward"].errors


def test_devices_of_one_family_share_what_each_of_them_taught() -> None:
    sibling = planted.device("sibling", (9, 0), scale=1.1)
    source = Truth({"wide": 3.0, "narrow": 0.5})
    measured = [*rows(22, 10), *rows(23, 10, on=sibling)]
    calibrated = CalibratedEstimator.fit(measured, HERE, source, alike=[sibling])
    judged = rows(24, 40, noise=0.0, on=sibling)
    found = [estimate.seconds for estimate in calibrated.predict([row.row for row in judged], sibling)]
    assert error_factor(found, [row.seconds for row in judged]) < 1.12


def test_a_source_that_is_right_stays_nearly_as_it_is() -> None:
    source = Truth({"wide": 1.0, "narrow": 1.0})
    calibrated = CalibratedEstimator.fit(rows(4, 30), HERE, source)
    assert factor_off(calibrated, rows(5, 40, noise=0.0)) < 1.02


def test_a_learned_model_of_other_devices_is_better_here_when_calibrated() -> None:
    elsewhere = planted.table(seed=6, shapes=120)
    trees = LearnedEstimator.fit(elsewhere, trees=Trees(rounds=80, leaves=15), physics=False)
    source = replace(trees, abstains=False)
    calibrated = CalibratedEstimator.fit(rows(7, 16), HERE, source, beside=planted.DEVICES)
    judged = rows(8, 60, noise=0.0)
    assert factor_off(calibrated, judged) < factor_off(source, judged)


def test_intervals_hold_the_stated_share_of_new_shapes() -> None:
    source = Truth({"wide": 2.0, "narrow": 0.7})
    held = []
    for seed in range(20):
        calibrated = CalibratedEstimator.fit(rows(100 + seed, 40, noise=0.1), HERE, source)
        judged = rows(200 + seed, 30, noise=0.1)
        held.append(coverage(calibrated.predict([r.row for r in judged], HERE), [r.seconds for r in judged]))
    assert 0.86 < np.mean(held) < 0.97


def test_weights_are_those_of_a_general_optimiser() -> None:
    draw = np.random.default_rng(9)
    logs = draw.normal(size=(40, 3))
    log_s = 0.3 + logs @ np.array([0.7, 0.0, 0.4]) + 0.05 * draw.normal(size=40)

    def loss(parameters: np.ndarray[Any, Any]) -> float:
        w, b = parameters[:3], parameters[3]
        return float(((log_s - b - logs @ w) ** 2).sum() + ((w - 1 / 3) ** 2).sum())

    best = minimize(loss, np.full(4, 0.3), bounds=[(0, None)] * 3 + [(None, None)], method="L-BFGS-B", tol=1e-14)
    assert _weights(logs, log_s) == pytest.approx(best.x[:3], abs=2e-4)


def test_overheads_are_those_of_a_general_optimiser() -> None:
    draw = np.random.default_rng(10)
    source_s = np.exp(draw.uniform(-14, -6, 30))
    seconds = (2e-6 + 1.7 * source_s) * np.exp(0.1 * draw.normal(size=30))

    def loss(logs: np.ndarray[Any, Any]) -> float:
        errors = [math.log(t / (math.exp(logs[0]) + math.exp(logs[1]) * f)) for t, f in zip(seconds, source_s)]
        errors += [PULL * (logs[0] - math.log(1e-6)), PULL * (logs[1] - math.log(1.5))]
        return sum(2 * OUTLIER**2 * (math.sqrt(1 + (error / OUTLIER) ** 2) - 1) for error in errors)

    best = minimize(loss, [-13.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14}).x
    overhead_s, factor = _overhead(np.log(source_s), np.log(seconds), (1e-6, 1.5))
    assert overhead_s == pytest.approx(math.exp(best[0]), rel=1e-3)
    assert factor == pytest.approx(math.exp(best[1]), rel=1e-3)
    assert 1e-6 < overhead_s < 2.2e-6  # between where it is pulled to and the truth
    assert factor == pytest.approx(1.7, rel=0.1)


def test_a_kernel_that_was_not_measured_is_left_to_the_source() -> None:
    source = RooflineEstimator()
    calibrated = CalibratedEstimator.fit([r for r in rows(11, 20) if r.row.kernel == "wide"], HERE, source)
    other = planted.row("narrow", 2, 512, 4)
    (found,), (before,) = calibrated.predict([other], HERE), source.predict([other], HERE)
    assert (found.seconds, found.low_s, found.high_s, found.source) == (
        before.seconds, before.low_s, before.high_s, "bound",
    )  # fmt: skip
    assert "not among" in found.note


def test_another_device_and_another_phase_are_left_to_the_source() -> None:
    source = RooflineEstimator()
    calibrated = CalibratedEstimator.fit(rows(12, 20), HERE, source)
    wide, backward = planted.row("wide", 2, 512, 4), planted.row("wide", 2, 512, 4, phase="backward")
    assert calibrated.predict([wide], planted.DEVICES[0])[0].source == "bound"
    assert calibrated.predict([backward], HERE)[0].source == "bound"
    assert calibrated.predict([wide], HERE)[0].source == "model"


def test_beyond_what_was_measured_the_sources_interval_counts_as_well() -> None:
    source = RooflineEstimator()
    calibrated = CalibratedEstimator.fit(rows(13, 20), HERE, source)
    far = planted.row("wide", 64, 131072, 32)
    (found,), (before,) = calibrated.predict([far], HERE), source.predict([far], HERE)
    assert found.high_s >= before.high_s
    assert "beyond" in found.note


def test_too_few_shapes_correct_nothing() -> None:
    assert CalibratedEstimator.fit(rows(14, 4), HERE, RooflineEstimator()).corrections == {}


def test_few_shapes_correct_seconds_and_promise_no_narrower_interval() -> None:
    source = Truth({"wide": 3.0, "narrow": 3.0})
    calibrated = CalibratedEstimator.fit(rows(15, 6), HERE, source)
    row = planted.row("wide", 4, 1000, 16)
    (found,), (before,) = calibrated.predict([row], HERE), source.predict([row], HERE)
    assert calibrated.corrections["forward"].width == math.inf
    assert found.seconds == pytest.approx(planted.truth_s(row, HERE), rel=0.3)
    assert found.low_s <= before.low_s and found.high_s >= before.high_s


def test_rows_of_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match="say nothing about"):
        CalibratedEstimator.fit(rows(16, 6, on=planted.DEVICES[0]), HERE, RooflineEstimator())


# --- the file -----------------------------------------------------------------------


def saved(path: Path, source: Any = None) -> CalibratedEstimator:
    measured = rows(17, 20)
    calibrated = CalibratedEstimator.fit(measured, HERE, source or Truth({"wide": 2.0, "narrow": 1.0}))
    save_profile(path, calibrated, [row.row for row in measured], {"regret": 0.1})
    return calibrated


def test_a_profile_says_the_same_after_it_was_read(tmp_path: Path) -> None:
    calibrated = saved(tmp_path / "profile.json")
    again = load_profile(tmp_path / "profile.json", calibrated.source, HERE)
    asked = [row.row for row in rows(18, 20)]
    assert again.corrections["forward"].process is not None, "the most that a profile has to keep"
    assert again.predict(asked, HERE) == calibrated.predict(asked, HERE)
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def changed(content: dict[str, Any], key: str, value: Any) -> str:
    return json.dumps(content | {key: value})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda content: "{", "is no profile"),
        (lambda content: "[]", "is no profile"),
        (lambda content: changed(content, "format_version", 99), "format version 99"),
        (lambda content: changed(content, "corrections", {"forward": {}}), "is no profile"),
        (lambda content: changed(content, "source", "another"), "corrects another, not truth"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_and_the_source_answers(tmp_path: Path, spoil: Any, said: str) -> None:
    path = tmp_path / "profile.json"
    source = saved(path).source
    path.write_text(spoil(json.loads(path.read_text())))
    with pytest.raises(ProfileError, match=said):
        load_profile(path, source)
    with pytest.warns(UserWarning, match="truth is used as it is"):
        assert profile_or_source(path, source) is source


def test_a_profile_holds_for_one_device_its_versions_and_one_source(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    source = saved(path).source
    with pytest.raises(ProfileError, match="made for here, not for one"):
        load_profile(path, source, planted.DEVICES[0])
    with pytest.raises(ProfileError, match="not torch 9"):
        load_profile(path, source, replace(HERE, versions={"torch": "9"}))
    with pytest.raises(ProfileError, match="other seconds"):
        load_profile(path, Truth({"wide": 2.1, "narrow": 1.0}))
    with pytest.raises(ProfileError, match="no profile at"):
        load_profile(tmp_path / "none.json", source)
