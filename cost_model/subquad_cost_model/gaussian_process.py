"""What rows leave of a physical sum, as a smooth function of their shapes: an exact Gaussian process of fixed scales.

    f ~ GP(0, K),    M(d) = (1 + d) e^-d,    d = 3^1/2 |x - y|
    K(x, y) = (A_o^2 [same operator] + A_k^2 [same kernel]) M(d)  +  A_f^2 [same kernel] (p_x . p_y) M(d / R)

x are logarithms of lengths and widths, dtype, options and device, each over the distance along which it matters; what a
layout or a length costs the kernels of an operator is mostly shared by them. p are the shares of the terms in the sum:
with factors c_j e^g_j in place of c_j, log(sum c_j x_j) changes by p . g to first order, so the last part of K is what
is left where each factor is off by a g_j of its own, which changes slowly from row to row. What short rows, which wait
for launches, leave is then not expected of long ones, which wait for a unit. A few dozen rows of a kernel are enough,
where trees want hundreds; of thousands the system holds some, and trees learn what it leaves of all (`head`).

Source: Rasmussen and Williams 2006 (sections 2.2, 2.7, 4.2.1); weights of outliers as in Student's t (section 9.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, cholesky
from scipy.linalg.lapack import dtrtri
from scipy.spatial.distance import cdist

from subquad_cost_model.device import Device
from subquad_cost_model.features import Floats
from subquad_cost_model.physics import total
from subquad_cost_model.rows import CostRow
from subquad_cost_model.terms import heads_per_key, multiprocessors, programs

MOST_ROWS = 4000
"""Of one operator: a system of so many takes seconds to solve and megabytes to keep. Of further rows trees learn what
it leaves."""
OPERATOR, KERNEL, FACTOR = 0.2, 0.2, 1.0
"""Amplitudes, as logarithms of seconds, and of factors."""
FACTOR_REACH = 4.0
"""Factors change this much more slowly from row to row than all else that a sum leaves."""
LENGTH, WIDTH, WINDOW, SEGMENT, PARALLEL, SIZE, DEVICE, GROUP, CHOICE = 16.0, 2.0, 4.0, 8.0, 8.0, 12.0, 2.0, 4.0, 4.0
STEPS, PADDED, UNTURNED = 8.0, 4.0, 2.0
"""Octaves of lengths, of widths, of windows, of segments, of waves of programs, of seconds and launches, of bandwidth,
of heads that share a key head; options that differ (two make a word that is another); octaves of dependent steps, of
pairs computed over pairs counted, of columns over columns that are turned.

These and the amplitudes began where the marginal likelihood of half of the rows that S0 does not hold out is largest,
and were rounded by errors out of fold on the others, which hardly change if one of them is halved or doubled. Windows
and segments were two octaves until there were five times the rows: four and eight, and the last coordinate, leave 7.8 %
in place of 7.9 of three of S0's folds (forward and backward together)."""
NOISE, DOUBTED = 0.045, 1.8
"""What repeats of a steady row differ by, and how much more than its own repeats a row in doubt does."""
TAIL, LEAST_WEIGHT = 4.0, 1 / 30
"""Degrees of freedom of the noise, and how little an outlier counts at least."""
DIGITS = 4
"""Of coordinates: what is kept in a file answers as what was fitted."""
SCALES = (
    OPERATOR, KERNEL, FACTOR, FACTOR_REACH,
    LENGTH, WIDTH, WINDOW, SEGMENT, PARALLEL, SIZE, DEVICE, GROUP, CHOICE, STEPS, PADDED, UNTURNED,
)  # fmt: skip
"""What a fit in a file must agree with."""
LENGTHS, WIDTHS = ("b", "t", "s", "m", "documents"), ("k", "v", "n", "p", "w")


def places_of(rows: Sequence[CostRow], devices: Sequence[Device]) -> Floats:
    """Where each row lies, one line each, but for its options and for what a physics head says of it."""
    if not rows:
        return np.empty((0, 0))
    return np.array([_place(row, device) for row, device in zip(rows, devices, strict=True)])


def _coordinates(rows: Sequence[CostRow], places: Floats, parts: Floats, choices: tuple[str, ...]) -> Floats:
    """`places`, the words and truth values of options that matter (`choices`, `name=value`), and the sums."""
    chosen = np.array([_chosen(tuple(row.options.items()), choices) for row in rows], dtype=np.float64)
    sized = np.log2(total(parts)) / SIZE
    found = np.column_stack([places, chosen.reshape(len(rows), -1), sized])
    return np.asarray(np.round(found, DIGITS), dtype=np.float64)


def _shares(parts: Floats) -> Floats:
    """Of each term in its sum, one line each; what the host is ahead, which is less than nothing, is left out."""
    positive = np.maximum(parts, 0)
    return np.asarray(np.round(positive / total(positive)[:, None], DIGITS), dtype=np.float64)


def _place(row: CostRow, device: Device) -> list[float]:
    shape, options = row.shape, row.options
    t = shape.get("t", 1)
    window, segment, turned = (float(options.get(name, 0) or 0) for name in ("window", "segment_len", "pairs"))
    windows = (window or 1, max(1.0, t / window) if window else 1)
    segments = (segment or 1, 1 + t / segment if segment else 1)
    said = (
        row.dtype in ("float32", "float64"),
        0.5 * (row.dtype == "float16"),
        "documents" in shape,
    )
    return [
        *(math.log2(shape.get(axis) or 1) / LENGTH for axis in LENGTHS),
        *(math.log2(shape.get(axis) or 1) / WIDTH for axis in WIDTHS),
        *(math.log2(reach) / WINDOW for reach in windows),
        *(math.log2(reach) / SEGMENT for reach in segments),
        *map(float, said),
        math.log2(programs(row) / multiprocessors(device)) / PARALLEL,
        math.log2(row.launches) / SIZE,
        math.log2(device.bytes_per_s) / DEVICE,
        math.log2(heads_per_key(row)) / GROUP,
        math.log2(max(1, row.serial_steps)) / STEPS,
        math.log2(row.padding) / PADDED,
        math.log2(shape.get("k", 1) / (2 * turned)) / UNTURNED if turned else 0.0,
    ]


Options = tuple[tuple[str, bool | int | float | str], ...]


def _said(options: Options) -> frozenset[str]:
    return frozenset(f"{name}={value}" for name, value in options if isinstance(value, bool | str))


@lru_cache(maxsize=4096)
def _chosen(options: Options, choices: tuple[str, ...]) -> list[float]:
    """Thousands of rows share a few variants."""
    said = _said(options)
    return [(choice in said) / CHOICE for choice in choices]


@dataclass(frozen=True, kw_only=True)
class GaussianProcess:
    """Weights of the rows that it was fitted to, where these lie, the shares of their terms, their operators and
    kernels, and options chosen."""

    places: Floats
    shares: Floats
    choices: tuple[str, ...]
    operators: tuple[str, ...]
    kernels: tuple[str, ...]
    weights: Floats

    @classmethod
    def fit(
        cls, rows: Sequence[CostRow], places: Floats, parts: Floats, target: Floats, doubts: Floats
    ) -> GaussianProcess:
        """Solve (K + noise) weights = target, the noise of a row growing with its doubt and with its own error.

            noise_i = (NOISE^2 + (DOUBTED doubt_i)^2) max(1, (TAIL + r_i^2) / (TAIL + 1))

        r_i is the error of the others about row i (leave one out), over what they expect it to be. `parts` are what
        each term is of the sum of each row (`Physics.parts`).
        """
        operators, kernels = _names(rows)
        variants = {tuple(row.options.items()) for row in rows}
        choices = tuple(sorted({choice for options in variants for choice in _said(options)}))
        places, shares = _coordinates(rows, places, parts, choices), _shares(parts)
        weights = np.zeros(len(rows))
        for operator in dict.fromkeys(operators):
            here = np.array([index for index, name in enumerate(operators) if name == operator])
            of_kernel = [kernels[index] for index in here]
            differing = places[here][:, np.ptp(places[here], axis=0) > 0]
            covariance = _covariance(differing, shares[here], of_kernel, differing, shares[here], of_kernel)
            weights[here] = _solved(covariance, target[here], doubts[here])
        return cls(places=places, shares=shares, choices=choices, operators=operators, kernels=kernels, weights=weights)

    def predict(self, rows: Sequence[CostRow], places: Floats, parts: Floats) -> Floats:
        """The mean at each row: beyond all rows what it is at their edge, 0 for operators that were not among them."""
        places, shares = _coordinates(rows, places, parts, self.choices), _shares(parts)
        places = np.clip(places, *self._edges)
        operators, kernels = _names(rows)
        found = np.zeros(len(rows))
        for operator in dict.fromkeys(operators):
            if operator not in self._rows_of:
                continue
            asked = np.array([index for index, name in enumerate(operators) if name == operator])
            here = self._rows_of[operator]
            of_asked, of_here = [kernels[i] for i in asked], [self.kernels[i] for i in here]
            covariance = _covariance(
                places[asked], shares[asked], of_asked, self.places[here], self.shares[here], of_here
            )
            # Row by row, and not as a product, whose rounding depends on how many rows are asked.
            found[asked] = (covariance * self.weights[here]).sum(axis=1)
        return found

    @cached_property
    def _edges(self) -> tuple[Floats, Floats]:
        return self.places.min(axis=0), self.places.max(axis=0)

    @cached_property
    def _rows_of(self) -> Mapping[str, NDArray[np.intp]]:
        """By operator, where its rows are."""
        operators = np.array(self.operators)
        return {operator: np.flatnonzero(operators == operator) for operator in set(self.operators)}


def _solved(covariance: Floats, target: Floats, doubts: Floats) -> Floats:
    """The weights of the rows of one operator, as `fit` says."""
    noise = NOISE**2 + (DOUBTED * np.minimum(doubts, 1)) ** 2
    factor = cholesky(covariance + np.diag(noise), lower=True)
    inverse, _ = dtrtri(factor, lower=True)
    surprise = cho_solve((factor, True), target) ** 2 / (inverse**2).sum(axis=0)
    noise = noise * np.clip((TAIL + surprise) / (TAIL + 1), 1, 1 / LEAST_WEIGHT)
    return np.asarray(cho_solve(cho_factor(covariance + np.diag(noise), lower=True), target), dtype=np.float64)


def _covariance(
    places: Floats,
    shares: Floats,
    kernels: Sequence[str],
    others: Floats,
    shares_of_others: Floats,
    kernels_of_others: Sequence[str],
) -> Floats:
    """Of rows of one operator with others of it."""
    distances = np.sqrt(3) * cdist(places, others)
    alike = _matern(distances)
    covariance = OPERATOR**2 * alike
    left, right = np.array(kernels), np.array(kernels_of_others)
    for kernel in dict.fromkeys(kernels):
        mine, theirs = left == kernel, right == kernel
        same = np.ix_(mine, theirs)
        of_factors = _inner(shares[mine], shares_of_others[theirs]) * _matern(distances[same] / FACTOR_REACH)
        covariance[same] += KERNEL**2 * alike[same] + FACTOR**2 * of_factors
    return np.asarray(covariance, dtype=np.float64)


def _matern(distances: Floats) -> Floats:
    return np.asarray((1 + distances) * np.exp(-distances), dtype=np.float64)


def _inner(some: Floats, others: Floats) -> Floats:
    """Products of each line with each other one, rounded alike however many are asked (a matrix product is not)."""
    squares = (some**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)
    return np.asarray((squares - cdist(some, others, "sqeuclidean")) / 2, dtype=np.float64)


def _names(rows: Sequence[CostRow]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(row.operator for row in rows), tuple(f"{row.operator}/{row.kernel}" for row in rows)
