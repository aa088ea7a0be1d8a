"""What a physical sum leaves is learned from few rows, shared within an operator, and does not run away beyond them."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import planted
import pytest

from subquad_cost_model import CostRow
from subquad_cost_model.gaussian_process import GaussianProcess, places_of

DEVICE = planted.DEVICES[1]


def drawn(seed: int, count: int, kernel: str = "wide", longest: int = 4096) -> list[CostRow]:
    draw = random.Random(seed)
    return [
        planted.row(kernel, draw.randint(1, 16), draw.randint(64, longest), 8, k=draw.choice([32, 64, 128, 256]))
        for _ in range(count)
    ]


def left(row: CostRow) -> float:
    """Narrow heads cost more, long sequences less: what no sum of the bound's parts says."""
    return 0.4 * math.sin(math.log2(row.shape["k"])) - 0.05 * math.log2(row.shape["t"])


def fitted(rows: list[CostRow], target: list[float], doubts: list[float] | None = None) -> GaussianProcess:
    places, sums = places_of(rows, [DEVICE] * len(rows)), np.full(len(rows), 1e-3)
    return GaussianProcess.fit(rows, places, sums, np.array(target), np.array(doubts or [0.0] * len(rows)))


def answers(process: GaussianProcess, rows: list[CostRow]) -> np.ndarray:
    return process.predict(rows, places_of(rows, [DEVICE] * len(rows)), np.full(len(rows), 1e-3))


def test_forty_rows_are_enough_for_a_smooth_function_of_lengths_and_widths() -> None:
    rows, new = drawn(0, 40), drawn(1, 40)
    errors = answers(fitted(rows, [left(row) for row in rows]), new) - [left(row) for row in new]
    assert np.abs(errors).max() < 0.08


def test_kernels_of_an_operator_share_what_they_leave_and_other_operators_do_not() -> None:
    rows = drawn(2, 60)
    process = fitted(rows, [left(row) for row in rows])
    alike = [replace(row, kernel="narrow") for row in drawn(3, 20)]
    assert np.corrcoef(answers(process, alike), [left(row) for row in alike])[0, 1] > 0.9
    assert answers(process, [replace(row, operator="other") for row in alike]) == pytest.approx(0)


def test_an_option_and_heads_that_share_a_key_head_matter_where_rows_say_so() -> None:
    def chosen(row: CostRow, place: int) -> CostRow:
        shared = {"h_kv": 8 if place % 4 < 2 else 1}
        return replace(row, options={"decay": ("none", "token")[place % 2]}, shape={**row.shape, **shared})

    def truth(row: CostRow) -> float:
        return 0.3 * (row.options["decay"] == "token") - 0.2 * (row.shape["h_kv"] == 1)

    rows, new = ([chosen(row, place) for place, row in enumerate(drawn(seed, 60))] for seed in (7, 8))
    errors = answers(fitted(rows, [truth(row) for row in rows]), new) - [truth(row) for row in new]
    assert np.abs(errors).max() < 0.1


def test_rows_in_doubt_and_outliers_count_less() -> None:
    rows = drawn(4, 60)
    wrong = [left(row) + (1.5 if place % 10 == 0 else 0) for place, row in enumerate(rows)]
    new = drawn(5, 30)
    truth = np.array([left(row) for row in new])
    doubted = fitted(rows, wrong, [1.0 if place % 10 == 0 else 0.0 for place in range(len(rows))])
    believed = fitted(rows, wrong)
    assert np.abs(answers(doubted, new) - truth).max() < 0.15
    assert np.median(np.abs(answers(believed, new) - truth)) < 0.1


def test_beyond_the_rows_it_stays_what_it_is_at_their_edge() -> None:
    rows = drawn(6, 60)
    process = fitted(rows, [left(row) for row in rows])
    longest = max(row.shape["t"] for row in rows)
    edge, beyond, far = (planted.row("wide", 16, t, 8) for t in (longest, 8 * longest, 4096 * longest))
    assert answers(process, [beyond]) == pytest.approx(answers(process, [edge]), abs=0.02)
    assert answers(process, [far]) == pytest.approx(answers(process, [beyond]), abs=1e-9)
