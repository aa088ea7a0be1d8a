"""What a kernel takes by its work alone: for one of which few rows are known, or none.

    z = log(seconds / bound) = trees(x_j / bound, what the units take and in which ratios, programs, launches)

x_j are the terms of a physical sum. The trees know no names, neither of operators nor of kernels, nor axes, which mean
another thing to each (with these, operators left out were further off). They are grown on kernels with rows enough,
each of which weighs the same however many these are: they say what kernels reach that do such work, where pooled
factors are mostly of those of which most was measured.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from subquad_cost_model.bound import BoundTerms
from subquad_cost_model.features import NUMBERS, Floats
from subquad_cost_model.physics import Physics
from subquad_cost_model.terms import ELEMENT_BYTES, HOST, SECONDS, Terms
from subquad_cost_model.trees import USUAL, ask, grow

if TYPE_CHECKING:
    import lightgbm

FEW = 12
"""Of a kernel with fewer rows in a phase its sum and its work alone say half each."""
TREES = replace(USUAL, rounds=100, leaves=15)
UNITS = SECONDS[: -len(HOST)]
COUNTED = (
    *(f"log2 {name}" for name in BoundTerms._fields),
    "log2 bound_s", "log2 bound / launch", "log2 matmul / memory", "log2 transcendental / matmul",
    "log2 vector / memory", "log2 serial / bound", "log2 bytes / cache", "log2 heads per sm", "log2 waves",
)  # fmt: skip
NAMES = (*COUNTED, *(f"{term} over bound" for term in UNITS), "log2 launches", "wide", "packed")


@dataclass(frozen=True, kw_only=True)
class WorkAlone:
    """Trees that see no names, and the kernels that had rows enough, which need none of them."""

    trees: lightgbm.Booster
    settled: tuple[str, ...]

    @classmethod
    def fit(cls, features: Floats, terms: Terms, z: Floats) -> WorkAlone | None:
        """Of rows with their features (`feature_matrix`) and terms; None where no kernel has rows enough."""
        kernels = [kernel for kernel, _ in terms.keys]
        counts = Counter(kernels)
        here = [place for place, kernel in enumerate(kernels) if counts[kernel] >= FEW]
        if not here:
            return None
        weights = np.array([len(here) / counts[kernels[place]] for place in here])
        trees = grow(_work(features, terms)[here], NAMES, z[here], TREES, weights=weights / weights.mean())
        return cls(trees=trees, settled=tuple(sorted({kernels[place] for place in here})))

    def mixed(self, z: Floats, features: Floats, terms: Terms, physics: Physics) -> Floats:
        """z by their sum of kernels with rows enough, by their work alone of those never measured, half of each of
        all others."""
        share = {kernel: 0.5 for kernel in physics.kernels} | dict.fromkeys(self.settled, 0.0)
        by_work = np.array([share.get(kernel, 1.0) for kernel, _ in terms.keys])
        here = np.flatnonzero(by_work)
        if not len(here):
            return z
        found = z.copy()
        found[here] += by_work[here] * (ask(self.trees, _work(features, terms)[here]) - z[here])
        return found


def _work(features: Floats, terms: Terms) -> Floats:
    bound_s = np.exp2(features[:, NUMBERS.index("log2 bound_s")])
    said = [(math.log2(row.launches), row.dtype in ELEMENT_BYTES, "documents" in row.shape) for row in terms.rows]
    counted = features[:, [NUMBERS.index(name) for name in COUNTED]]
    return np.column_stack([counted, terms.lines[:, : len(UNITS)] / bound_s[:, None], np.array(said, dtype=np.float64)])
