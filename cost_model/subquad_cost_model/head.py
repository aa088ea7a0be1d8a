"""One learned quantity: trees for the logarithm of a ratio, trees for its spread, and how far to widen it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from subquad_cost_model.conformal import grouped_quantile, worst_quantile
from subquad_cost_model.device import Device
from subquad_cost_model.features import CATEGORIES, NAMES, Floats, Vocabulary, feature_matrix, words
from subquad_cost_model.rows import CostRow
from subquad_cost_model.splits import fold, shape_group

if TYPE_CHECKING:
    import lightgbm

FOLDS = 5
LEAST_ROWS, LEAST_SHAPES = 50, 10
"""With fewer shapes no finite interval holds nine in ten of the next."""
SPREAD_FLOOR = 0.01
"""Repeats of a timing differ by this much (0.3 % in the median, 2.8 % at the ninth decile of NVIDIA's tables)."""


@dataclass(frozen=True, kw_only=True)
class Trees:
    """How the trees are grown. Fixed before any figure was looked at, but for their number, which bounds the files."""

    rounds: int = 400
    leaves: int = 63
    learning_rate: float = 0.08
    spread_rounds: int = 100
    spread_leaves: int = 15
    threads: int = 1
    seed: int = 0


USUAL = Trees()


class TooFewRowsError(ValueError):
    """Not enough rows or shapes for a head whose interval means anything."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """Answers z = log(quantity / its bound) for rows on devices, with the half width of an interval.

    `seen_width` and `new_width` are the multiples of the spread that held the share `level` of out-of-fold residuals:
    on devices among the rows (by operator; `""` for all), and on devices of families left out. `reach` are the
    smallest and largest of each axis by kernel.
    """

    point: lightgbm.Booster
    spread: lightgbm.Booster
    vocabulary: Vocabulary
    level: float
    seen_width: Mapping[str, float]
    new_width: float
    lowest: float
    highest: float
    devices: tuple[str, ...]
    kinds: tuple[str, ...]
    reach: Mapping[str, Mapping[str, tuple[int, int]]]

    @classmethod
    def fit(
        cls,
        rows: Sequence[CostRow],
        devices: Sequence[Device],
        z: Floats,
        *,
        level: float = 0.9,
        trees: Trees = USUAL,
    ) -> Head:
        """Fit to rows, their devices and their z.

        Residuals are out of fold, and folds are of whole shapes: for the spread's trees, and for the widths. Those for
        new devices come from models that never saw the device's family.

        Raises: TooFewRowsError with fewer than 50 rows or 10 shapes; ModuleNotFoundError without lightgbm.
        """
        groups = [shape_group(row) for row in rows]
        if len(rows) < LEAST_ROWS or len(set(groups)) < LEAST_SHAPES:
            raise TooFewRowsError(
                f"{len(rows)} rows of {len(set(groups))} shapes are too few: {LEAST_ROWS} and {LEAST_SHAPES} are needed"
            )
        vocabulary = Vocabulary.of(rows)
        features = feature_matrix(rows, devices, vocabulary)
        folds = np.array([fold(group, FOLDS) for group in groups])
        residual = np.abs(z - _out_of_group(features, z, folds, trees, spread=False))
        log_spread = np.log(residual + SPREAD_FLOOR)
        scores = residual / np.exp(_out_of_group(features, log_spread, folds, trees, spread=True))
        seen_width = {"": grouped_quantile(scores, groups, level)}
        for operator in vocabulary.words["operator"]:
            here = [index for index, row in enumerate(rows) if row.operator == operator]
            width = grouped_quantile(scores[here], [groups[index] for index in here], level)
            # Shapes too few for a quantile of their own borrow that of all.
            seen_width[operator] = width if math.isfinite(width) else seen_width[""]
        families = np.array([device.family for device in devices])
        new_width = math.inf
        if len(set(families)) > 1:
            new_residual = np.abs(z - _out_of_group(features, z, families, trees, spread=False))
            new_spread = np.exp(_out_of_group(features, log_spread, families, trees, spread=True))
            new_width = worst_quantile(new_residual / new_spread, list(families), level)
        return cls(
            point=_grow(features, z, trees, spread=False),
            spread=_grow(features, log_spread, trees, spread=True),
            vocabulary=vocabulary,
            level=level,
            seen_width=seen_width,
            new_width=new_width,
            lowest=float(z.min()),
            highest=float(z.max()),
            devices=tuple(sorted({device.name for device in devices})),
            kinds=tuple(sorted({device.kind for device in devices})),
            reach=_reach(rows),
        )

    def predict(self, rows: Sequence[CostRow], device: Device) -> tuple[Floats, Floats]:
        """z of each row, and the half width of its interval (infinite on a device whose family was the only one)."""
        if not rows:
            return np.empty(0), np.empty(0)
        features = feature_matrix(rows, [device] * len(rows), self.vocabulary)
        z = np.clip(_ask(self.point, features), self.lowest, self.highest)
        spread = np.exp(_ask(self.spread, features))
        return z, spread * np.array([self._width(row, device) for row in rows])

    def _width(self, row: CostRow, device: Device) -> float:
        if device.name not in self.devices:
            return self.new_width
        return self.seen_width.get(row.operator, self.seen_width[""])

    def refusal(self, row: CostRow, device: Device) -> str | None:
        """Why the interval of this head holds nothing for the row; None if it does."""
        if device.kind not in self.kinds:
            return f"fitted to {', '.join(self.kinds)}, not {device.kind}"
        if device.name not in self.devices and not math.isfinite(self.new_width):
            return f"fitted to one family of devices, and not to {device.name}"
        for name, word in zip(CATEGORIES, words(row), strict=True):
            if word not in self.vocabulary.words[name]:
                return f"{name} {word} is not among the rows it was fitted to"
        reach = self.reach[words(row)[1]]
        for axis, size in row.shape.items():
            smallest, largest = reach.get(axis, (size, size))
            if not smallest <= size <= largest:
                return f"{axis}={size} is outside of the {smallest} to {largest} it was fitted to"
        return None


def _grow(features: Floats, target: Floats, trees: Trees, *, spread: bool) -> lightgbm.Booster:
    import lightgbm

    parameters: dict[str, Any] = {
        "objective": "regression" if spread else "regression_l1",
        "num_leaves": trees.spread_leaves if spread else trees.leaves,
        "learning_rate": trees.learning_rate,
        # A few hundred rows are a small table, where twenty to a leaf (the usual) would blur everything.
        "min_data_in_leaf": min(20, max(2, len(target) // 200)),
        "min_data_per_group": min(20, max(2, len(target) // 200)),
        "cat_smooth": 1.0,
        "feature_fraction": 0.8,
        "seed": trees.seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": trees.threads,
        "verbosity": -1,
    }
    data = lightgbm.Dataset(
        features,
        target,
        feature_name=[name.replace(" ", "_") for name in NAMES],
        categorical_feature=list(range(len(NAMES) - len(CATEGORIES), len(NAMES))),
        params={"verbosity": -1},
    )
    with warnings.catch_warnings():
        # It warns that it uses the categorical features it was told to use.
        warnings.filterwarnings("ignore", message="categorical_feature in param dict is overridden")
        return lightgbm.train(parameters, data, trees.spread_rounds if spread else trees.rounds)


def _out_of_group(
    features: Floats, target: Floats, groups: NDArray[np.generic], trees: Trees, *, spread: bool
) -> Floats:
    """For each row the answer of trees that saw no row of its group."""
    found = np.empty_like(target)
    for group in np.unique(groups):
        inside = groups == group
        found[inside] = _ask(_grow(features[~inside], target[~inside], trees, spread=spread), features[inside])
    return found


def _ask(booster: lightgbm.Booster, features: Floats) -> Floats:
    return np.asarray(booster.predict(features, num_threads=1), dtype=np.float64)


def _reach(rows: Sequence[CostRow]) -> dict[str, dict[str, tuple[int, int]]]:
    reach: dict[str, dict[str, tuple[int, int]]] = {}
    for row in rows:
        of_kernel = reach.setdefault(words(row)[1], {})
        for axis, size in row.shape.items():
            smallest, largest = of_kernel.get(axis, (size, size))
            of_kernel[axis] = min(smallest, size), max(largest, size)
    return reach
