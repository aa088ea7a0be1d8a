"""How far predictions must be widened so that so many of the truths lie inside."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray


def grouped_quantile(scores: Sequence[float] | NDArray[np.float64], groups: Sequence[Hashable], level: float) -> float:
    """The score that a draw from a new group stays below with probability `level`, if groups are exchangeable.

    Every group weighs the same, whatever its size, and one group of infinite scores is added for the new one:
        q = inf { s : sum_g 1/(G+1) * share of g's scores that are <= s  >=  level }
    Infinite when there are fewer than level / (1 - level) groups. Rows of one shape (on other devices, by other
    kernels) are one group: their errors are alike, and counted one by one they would promise too much.

    Source: Lee, Barber and Willett 2023 (hierarchical conformal prediction).
    """
    sizes = Counter(groups)
    weights = np.array([1 / sizes[group] for group in groups]) / (len(sizes) + 1)
    order = np.argsort(np.asarray(scores))
    reached = np.cumsum(weights[order])
    # Sums of 1/3 + 1/3 + 1/3 fall short of 1 by rounding.
    enough = np.flatnonzero(reached >= level - 1e-12)
    return float(np.asarray(scores)[order][enough[0]]) if len(enough) else math.inf


def worst_quantile(scores: Sequence[float] | NDArray[np.float64], groups: Sequence[Hashable], level: float) -> float:
    """The largest `level` quantile among the groups: for groups too few for a guarantee, such as families of devices.

    Nothing is promised about the next group, which may be worse than any so far; with one group this is infinite.
    """
    values, names = np.asarray(scores), np.array([str(group) for group in groups])
    distinct = sorted(set(names))
    if len(distinct) < 2:
        return math.inf
    return max(float(np.quantile(values[names == name], level, method="higher")) for name in distinct)
