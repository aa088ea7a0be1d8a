"""A sequence split over ranks gives the outputs and the gradients of the whole one; see `sequence_ranks.py`."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from functools import cache

import pytest
from sequence_ranks import OPERATORS, main

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["sequence_ranks"])
TOLERANCE = 1e-12
"""Of float64 sums of some dozens of terms in another order, relative to the largest value."""

Errors = Callable[[int], list[dict[str, float]]]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Errors:
    """What every rank found, by case: `errors(3)` are those of three ranks, which are started once."""

    @cache
    def of(ranks: int) -> list[dict[str, float]]:
        folder = tmp_path_factory.mktemp(f"{ranks}-ranks")
        results = [folder / f"{rank}.json" for rank in range(ranks)]
        processes = [
            FORKS.Process(target=main, args=(rank, ranks, str(folder / "store"), str(result)))
            for rank, result in enumerate(results)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(200)
        assert [process.exitcode for process in processes] == [0] * ranks, "the ranks have printed why"
        return [json.loads(result.read_text()) for result in results]

    return of


@pytest.mark.parametrize("packed", ["", ", packed"], ids=["whole", "packed"])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_an_operator_on_parts_is_the_operator(ranks: int, name: str, packed: str, errors: Errors) -> None:
    found = [of_rank[f"{name}{packed}"] for of_rank in errors(ranks)]
    assert max(found) < TOLERANCE, found
