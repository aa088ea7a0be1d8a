"""The released rows of our kernels can be read, and a model fitted to a part of them beats the bounds elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pytest

from subquad_cost_model import (
    ConstantEstimator,
    Estimator,
    LearnedEstimator,
    Measurement,
    RooflineEstimator,
    Timing,
    Trees,
)
from subquad_cost_model.evaluate import Verdict, evaluate, judge
from subquad_cost_model.shape_groups import fold, shape_group
from subquad_cost_model.splits import Split
from subquad_cost_model.timed_rows import TimedRow, read_timed_rows, timed

ROWS = Path(__file__).parents[1] / "data"
SMALL = Trees(rounds=30, spread_rounds=8, leaves=7, spread_leaves=3)


@lru_cache(maxsize=1)
def verdicts_of(split: str) -> list[Verdict]:
    rows = timed(read_timed_rows(ROWS))
    if split == "S0":  # in the usual suite: half of the shapes take half of the time
        rows = [row for row in rows if fold(shape_group(row.row), 2, "half") == 0]
    return list(kernels_left_out(rows) if split == "S3" else evaluate(rows, [split], trees=SMALL))


def kernels_left_out(rows: Sequence[TimedRow]) -> Iterator[Verdict]:
    """S3, with one kernel of every operator left out at a time: fewer fits than kernels, and each knows less."""
    names = [(row.row.operator, row.row.kernel) for row in rows]
    turns: dict[tuple[str, str], int] = {}
    for _, kernels in groupby(sorted(set(names)), itemgetter(0)):
        turns |= {kernel: turn for turn, kernel in enumerate(kernels)}
    for turn in sorted(set(turns.values())):
        seen = tuple(index for index, name in enumerate(names) if turns[name] != turn)
        estimators = fitted([rows[index] for index in seen])
        for left_out in [name for name in turns if turns[name] == turn]:
            judged = tuple(index for index, name in enumerate(names) if name == left_out)
            split = Split(name="S3", held_out="/".join(left_out), fit=seen, judge=judged)
            yield from judge(rows, split, lambda *_, found=estimators: found)


def fitted(rows: Sequence[TimedRow]) -> Mapping[str, Estimator]:
    timings = [Timing(low_s=row.seconds, median_s=row.seconds, high_s=row.seconds, repeats=1) for row in rows]
    measured = [Measurement.of(row.row, row.device, timing) for row, timing in zip(rows, timings, strict=True)]
    return {
        "learned, always": replace(LearnedEstimator.fit(rows, trees=SMALL), abstains=False),
        "roofline": RooflineEstimator(),
        "constant": ConstantEstimator.fit(measured),
    }


def test_released_rows_hold_every_phase_of_every_operator_on_a_probed_device() -> None:
    rows = timed(read_timed_rows(ROWS))
    phases = {(row.row.operator, row.row.phase) for row in rows}
    operators = {operator for operator, _ in phases}
    assert {"softmax_attention", "segment_attention", "selective_scan", "linear_attention", "delta_rule"} <= operators
    sequences = operators - {"cached_attention"}  # which decodes alone
    expected = {(operator, phase) for operator in sequences for phase in ("forward", "backward", "decode")}
    assert phases == expected | {("cached_attention", "decode")}
    assert all(row.device.origin == "probed" and row.device.versions["triton"] for row in rows)


def test_peaks_and_intervals_are_learned_from_the_recorded_rows() -> None:
    found = {verdict.selector: verdict for verdict in verdicts_of("S0")}
    learned, roofline = found["learned"], found["roofline"]
    assert learned.peak_error and roofline.peak_error and learned.covered and learned.width and roofline.width
    assert learned.peak_error.median < roofline.peak_error.median / 4
    assert 0.87 <= learned.covered <= 0.99
    assert learned.width < roofline.width / 10


# A fit takes some fifteen seconds of a core: S3 has one for each kernel of the operator that has most, S4 leaves out
# thirteen operators, S6 two devices, of which it gives back few rows or many, and fits with and without those.
LONG = {"S3": 900, "S4": 1500, "S6": 1500}
SLOW = [
    pytest.param(name, marks=[pytest.mark.slow, pytest.mark.timeout(LONG.get(name, 300))])
    for name in ("S1", "S2", "S3", "S4", "S5", "S6")
]


@pytest.mark.parametrize("split", ["S0", *SLOW])
def test_the_learned_model_beats_roofline_and_constant_on_what_it_did_not_see(split: str) -> None:
    verdicts = verdicts_of(split)
    wins: dict[str, list[float]] = {"roofline": [], "constant": []}
    for held_out in dict.fromkeys(verdict.held_out for verdict in verdicts):
        found = {verdict.selector: verdict for verdict in verdicts if verdict.held_out == held_out}
        error = {name: verdict.error.median for name, verdict in found.items() if verdict.error is not None}
        for name, of_it in wins.items():
            of_it.append(error[name] - error["learned, always"])
        if split in ("S3", "S4"):
            continue  # a kernel or operator that was never measured is not told from its rivals
        lost = {name: verdict.regret.mean for name, verdict in found.items() if verdict.regret is not None}
        if found["learned"].cells > 50:
            assert lost["learned"] < min(lost["roofline"], lost["constant"], lost["random"]) / 10
            assert lost["learned, at most 3 measured"] <= lost["learned"]
    for name, of_it in wins.items():
        # On most held-out kernels and operators, and on all shapes, layouts, lengths and devices.
        assert sum(win > 0 for win in of_it) > (0.6 if split in ("S3", "S4") else 0.999) * len(of_it), (name, wins)
