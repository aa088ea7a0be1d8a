"""The sampler spreads out, takes both ends, goes on where it stopped, and asks about what a model doubts."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import planted
import pytest

from subquad_cost_model import CostRow, Device, Estimate, LearnedEstimator, Trees, lower_bound_s
from subquad_cost_model.sampler import OPEN, Cell, Sampler
from subquad_cost_model.shape_groups import is_held_out

DEVICE = planted.DEVICES[1]


def pool(count: int, *, seed: int = 0, operators: Sequence[str] = ("mix",)) -> list[Cell]:
    draw = random.Random(seed)
    found: dict[str, Cell] = {}
    while len(found) < count:
        b, t, h = (
            draw.randint(1, 16),
            round(math.exp(draw.uniform(math.log(128), math.log(32768)))),
            draw.choice((4, 16)),
        )
        operator = draw.choice(operators)
        rows = [
            planted.row(kernel, b, t, h, phase=phase, operator=operator)
            for phase in ("forward", "backward")
            for kernel in planted.KERNELS
        ]
        found[rows[0].key] = Cell(tuple(rows))
    return list(found.values())


def test_every_cell_comes_once() -> None:
    cells = pool(60, operators=("mix", "other"))
    assert sorted(Sampler(cells, DEVICE).filling()) == list(range(60))


def test_the_smallest_and_the_largest_come_first() -> None:
    cells = pool(60)
    first, second = itertools.islice(Sampler(cells, DEVICE).filling(), 2)
    bound_s = [sum(lower_bound_s(row, DEVICE) for row in cell.rows) for cell in cells]
    assert bound_s[first] == min(bound_s)
    assert bound_s[second] == max(bound_s)


def test_groups_take_turns() -> None:
    cells = pool(60, operators=("mix", "other"))
    first = [cells[index].group for index in itertools.islice(Sampler(cells, DEVICE).filling(), 20)]
    assert sorted(first[::2]) == [first[0]] * 10
    assert sorted(first[1::2]) == [first[1]] * 10
    assert first[0] != first[1]


def test_each_is_the_farthest_from_all_before_it() -> None:
    # One axis, so that distances are known without the sampler: log2(b + 1) alone differs, and what follows from it.
    sizes = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144)
    cells = [
        Cell((CostRow(operator="o", kernel="k", phase="forward", dtype="float32", shape={"b": b}),)) for b in sizes
    ]
    order = list(Sampler(cells, DEVICE).filling())
    places = [math.log2(b + 1) for b in sizes]
    for taken in range(2, len(sizes)):
        radius = [min(abs(place - places[index]) for index in order[:taken]) for place in places]
        assert radius[order[taken]] == pytest.approx(max(radius))


def test_what_is_measured_covers_the_pool_better_than_a_random_choice() -> None:
    cells = pool(300)
    logs = np.array([[math.log2(size) for size in cell.rows[0].shape.values()] for cell in cells])
    logs = (logs - logs.min(0)) / np.maximum(logs.max(0) - logs.min(0), 1e-9)

    def radius(chosen: Sequence[int]) -> float:
        return float(np.linalg.norm(logs[:, None] - logs[None, list(chosen)], axis=2).min(1).max())

    chosen = list(itertools.islice(Sampler(cells, DEVICE).filling(), 24))
    drawn = [radius(random.Random(seed).sample(range(300), 24)) for seed in range(20)]
    assert radius(chosen) < min(drawn)


def test_a_seed_decides_and_another_run_goes_on_with_what_is_missing() -> None:
    cells = pool(80)
    order = list(Sampler(cells, DEVICE, seed=3).filling())
    assert list(Sampler(cells, DEVICE, seed=3).filling()) == order
    rest = list(Sampler(cells, DEVICE, seed=3).filling(done=order[:30]))
    assert sorted(rest) == sorted(order[30:])
    # The ends are known, so nothing but distance decides from the first on.
    assert rest[0] == order[30]


def test_a_third_of_a_pool_is_enough_for_a_model_of_the_rest() -> None:
    cells = pool(240, seed=5)
    chosen = list(itertools.islice(Sampler(cells, DEVICE).filling(), 80))
    rows = [planted.timed_row(row, DEVICE) for index in chosen for row in cells[index].rows]
    model = LearnedEstimator.fit(rows, trees=Trees(rounds=100, leaves=15))
    rest = [row for index in set(range(240)) - set(chosen) for row in cells[index].rows]
    errors = [
        abs(math.log(estimate.seconds / planted.truth_s(row, DEVICE)))
        for row, estimate in zip(rest, model.predict(rest, DEVICE), strict=True)
    ]
    assert np.median(errors) < 0.1


class Doubtful:
    """The same seconds everywhere; its doubt grows with `b`."""

    name = "doubtful"

    def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
        """Intervals of a factor 1.2 ** b either way."""
        return [
            Estimate(
                seconds=1e-3,
                low_s=1e-3 * 1.2 ** -row.shape["b"],
                high_s=1e-3 * 1.2 ** row.shape["b"],
                peak_bytes=0,
                source="model",
            )
            for row in rows
        ]


def test_a_model_is_asked_where_it_doubts_most_and_never_about_held_out_shapes() -> None:
    cells = pool(100)
    chosen = Sampler(cells, DEVICE).informative(Doubtful(), count=10, done=range(20))
    expected = sorted(
        (index for index in range(20, 100) if not is_held_out(cells[index].rows[0])),
        key=lambda index: (-cells[index].rows[0].shape["b"], index),
    )
    assert chosen == expected[:10]
    assert any(is_held_out(cell.rows[0]) for cell in cells)


def test_a_cell_that_a_run_meets_often_comes_first() -> None:
    cells = [cell for cell in pool(60) if not is_held_out(cell.rows[0])]
    weights = [1.0] * len(cells)
    weights[7] = 1000.0
    assert Sampler(cells, DEVICE).informative(Doubtful(), count=1, weights=weights) == [7]


def test_an_interval_that_is_open_below_is_a_large_doubt_and_no_failure() -> None:
    class Open:
        name = "open"

        def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
            return [
                Estimate(seconds=row.shape["b"], low_s=0, high_s=math.inf, peak_bytes=0, source="model") for row in rows
            ]

    cells = [cell for cell in pool(40) if not is_held_out(cell.rows[0])]
    largest = max(range(len(cells)), key=lambda index: (cells[index].rows[0].shape["b"], -index))
    assert OPEN > 1
    assert Sampler(cells, DEVICE).informative(Open(), count=1) == [largest]


def test_a_cell_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="one row"):
        Cell(())
