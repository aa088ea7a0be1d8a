"""Sizes of tiles in plain integers are those that triton computes."""

from __future__ import annotations

import random

import pytest

from subquad_kernels.tile_sizes import ceil_div, padded, power_of_two

triton = pytest.importorskip("triton")


def test_sizes_are_those_of_triton() -> None:
    drawn = random.Random(0)
    for length in [1, 2, 3, 4, 15, 16, 17, *(drawn.randrange(1, 1 << 20) for _ in range(50))]:
        assert power_of_two(length) == triton.next_power_of_2(length)
        assert padded(length) == max(16, triton.next_power_of_2(length))
        part = drawn.randrange(1, 300)
        assert ceil_div(length, part) == triton.cdiv(length, part)
    assert ceil_div(0, 7) == 0
