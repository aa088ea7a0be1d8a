"""A kernel of few rows or none is taken to be like those that do such work, however many rows these have."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import planted
import pytest

from subquad_cost_model import CostRow, LearnedEstimator, TimedRow, Trees, lower_bound_s
from subquad_cost_model.features import Vocabulary, feature_matrix
from subquad_cost_model.physics import Physics
from subquad_cost_model.terms import SECONDS, Terms
from subquad_cost_model.work_alone import FEW, WorkAlone

DEVICE = planted.DEVICES[1]
SMALL = Trees(rounds=60, leaves=7, spread_rounds=20, spread_leaves=5)


def drawn(seed: int, count: int, operator: str, *, multiplies: bool) -> list[CostRow]:
    """Rows of a kernel that multiplies matrices, or only moves bytes."""
    draw = random.Random(seed)
    shapes = [(2 ** draw.randrange(5), 64 * draw.randint(4, 64), 2 ** draw.randrange(1, 5)) for _ in range(count)]
    rows = [planted.row("only", b, t, h, operator=operator) for b, t, h in shapes]
    return [one if multiplies else replace(one, matmul_flops=0, transcendental_ops=0, vector_flops=0) for one in rows]


def truth(row: CostRow) -> float:
    """Over the bound: what multiplies takes six times as long, what moves bytes one and a half times."""
    return 6.0 if row.matmul_flops else 1.5


def timings(rows: list[CostRow]) -> list[TimedRow]:
    def one(row: CostRow) -> TimedRow:
        seconds = truth(row) * lower_bound_s(row, DEVICE)
        return replace(planted.timed_row(row, DEVICE), low_s=seconds, median_s=seconds, high_s=seconds)

    return [one(row) for row in rows]


MOST = [row for name in "abcdef" for row in drawn(ord(name), 80, name, multiplies=False)]
OTHERS = [row for name in "xyz" for row in drawn(ord(name), 20, name, multiplies=True)]


def test_an_operator_never_measured_is_expected_to_reach_what_kernels_reach_that_do_such_work() -> None:
    learned = LearnedEstimator.fit(timings(MOST + OTHERS), trees=SMALL)
    for multiplies in (True, False):
        new = drawn(7, 40, "new", multiplies=multiplies)
        ratios = [
            estimate.seconds / (truth(row) * lower_bound_s(row, DEVICE))
            for row, estimate in zip(new, learned.predict(new, DEVICE), strict=True)
        ]
        assert np.median(np.abs(np.log(ratios))) < 0.1
        assert all(estimate.source == "bound" for estimate in learned.predict(new, DEVICE)), (
            "its interval is no model's"
        )


def asked(rows: list[CostRow]) -> tuple[np.ndarray, Terms]:
    devices = [DEVICE] * len(rows)
    return feature_matrix(rows, devices, Vocabulary.of(rows)), Terms.count(SECONDS, rows, devices)


def test_names_say_nothing_and_each_kernel_weighs_the_same() -> None:
    shapes = drawn(1, 20, "slow", multiplies=True)
    rows = [replace(row, operator=name) for name in ("slow", "other", *["fast"] * 20) for row in shapes]
    z = np.array([math.log(2 if row.operator == "fast" else 8) for row in rows])
    work_alone = WorkAlone.fit(*asked(rows), z)
    assert work_alone is not None and work_alone.settled == ("fast/only", "other/only", "slow/only")
    new = drawn(4, 60, "new", multiplies=True)
    nothing = Physics(terms=SECONDS, kernels={}, pooled={}, kinds={})
    found, renamed = (
        work_alone.mixed(np.zeros(len(new)), *asked([replace(row, operator=name) for row in new]), nothing)
        for name in ("new", "newer")
    )
    assert found.tolist() == renamed.tolist()
    assert np.median(found) == pytest.approx(math.log(8), abs=0.1), "two kernels of twenty rows against one of 400"


def test_few_rows_have_half_a_say_and_enough_rows_all() -> None:
    rows = drawn(1, 20, "a", multiplies=True) + drawn(2, FEW - 1, "few", multiplies=True)
    features, terms = asked(rows)
    work_alone = WorkAlone.fit(features, terms, np.full(len(rows), 2.0))
    assert work_alone is not None and work_alone.settled == ("a/only",)
    known = Physics(terms=SECONDS, kernels={"a/only": (), "few/only": ()}, pooled={}, kinds={})
    found = work_alone.mixed(np.zeros(len(rows)), features, terms, known)
    assert found.tolist() == pytest.approx([0.0] * 20 + [1.0] * (FEW - 1))
    assert WorkAlone.fit(*asked(rows[20:]), np.zeros(FEW - 1)) is None
