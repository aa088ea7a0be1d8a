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
    places, parts = places_of(rows, [DEVICE] * len(rows)), np.full((len(rows), 1), 1e-3)
    return GaussianProcess.fit(rows, places, parts, np.array(target), np.array(doubts or [0.0] * len(rows)))


def answers(process: GaussianProcess, rows: list[CostRow]) -> np.ndarray:
    return process.predict(rows, places_of(rows, [DEVICE] * len(rows)), np.full((len(rows), 1), 1e-3))


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


def test_columns_that_are_not_turned_matter_where_rows_say_so() -> None:
    def chosen(row: CostRow, place: int) -> CostRow:
        return replace(row, options={"pairs": (5, 16)[place % 2]})

    def truth(row: CostRow) -> float:
        return 0.2 * (row.options["pairs"] == 5)

    rows, new = ([chosen(row, place) for place, row in enumerate(drawn(seed, 90, longest=512))] for seed in (11, 12))
    errors = answers(fitted(rows, [truth(row) for row in rows]), new) - [truth(row) for row in new]
    assert np.abs(errors).mean() < 0.01, "without it, it is 0.1"


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


def test_a_factor_that_one_width_has_holds_for_long_rows_and_not_for_the_launch_of_short_ones() -> None:
    launch_s = 1e-5

    def parts(rows: list[CostRow]) -> np.ndarray:
        return np.array([[launch_s, row.matmul_flops / 1e14] for row in rows])

    def truth(rows: list[CostRow]) -> np.ndarray:
        slower = np.array([[1, 4 if row.shape["k"] == 256 else 1] for row in rows])
        return np.asarray(np.log((slower * parts(rows)).sum(axis=1) / parts(rows).sum(axis=1)))

    rows = drawn(9, 60, longest=512)
    places = places_of(rows, [DEVICE] * len(rows))
    process = GaussianProcess.fit(rows, places, parts(rows), truth(rows), np.zeros(len(rows)))
    new = [planted.row("wide", b, t, 8, k=k) for k in (64, 256) for b, t in ((1, 64), (1, 512), (16, 8192))]
    assert np.ptp(truth(new)[3:]) > 1, "from a launch alone to four times as long"
    found = process.predict(new, places_of(new, [DEVICE] * len(new)), parts(new))
    assert np.abs(found - truth(new)).max() < 0.2


def test_an_answer_does_not_depend_on_what_else_is_asked() -> None:
    rows, draw = drawn(10, 60), np.random.default_rng(0)
    places, parts = places_of(rows, [DEVICE] * len(rows)), draw.uniform(0, 1e-3, (len(rows), 17))
    process = GaussianProcess.fit(rows, places, parts, np.array([left(row) for row in rows]), np.zeros(len(rows)))
    together = process.predict(rows, places, parts)
    alone = [process.predict([row], places[[i]], parts[[i]])[0] for i, row in enumerate(rows)]
    assert together.tolist() == alone
