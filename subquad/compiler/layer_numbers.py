"""Numbers of layers as people write them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

WRITTEN_OUT = 4
"""A series of so many is as short in full."""


def layer_numbers(layers: Iterable[int]) -> str:
    """Rising numbers, each once; of a long series with equal steps the beginning and the end: `0,2,..,26`."""
    numbers = list(dict.fromkeys(layers))
    steps = {after - before for before, after in pairwise(numbers)}
    if len(numbers) > WRITTEN_OUT and len(steps) == 1:
        return f"{numbers[0]},{numbers[1]},..,{numbers[-1]}"
    return ",".join(map(str, numbers))
