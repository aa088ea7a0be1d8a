"""Gradient-boosted trees as every head grows them: LightGBM, one thread, the same rows the same trees."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from subquad_cost_model.features import CATEGORIES, Floats

if TYPE_CHECKING:
    import lightgbm


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


def grow(
    features: Floats,
    names: Sequence[str],
    target: Floats,
    trees: Trees,
    *,
    spread: bool = False,
    weights: Floats | None = None,
) -> lightgbm.Booster:
    """Trees for the median of the target, or for its mean where it is a `spread`; columns named as words are words."""
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
        weight=weights,
        feature_name=[name.replace(" ", "_") for name in names],
        categorical_feature=[place for place, name in enumerate(names) if name in CATEGORIES],
        params={"verbosity": -1},
    )
    with warnings.catch_warnings():
        # It warns that it uses the categorical features it was told to use.
        warnings.filterwarnings("ignore", message="categorical_feature in param dict is overridden")
        return lightgbm.train(parameters, data, trees.spread_rounds if spread else trees.rounds)


def ask(booster: lightgbm.Booster, features: Floats) -> Floats:
    """One answer a line."""
    return np.asarray(booster.predict(features, num_threads=1), dtype=np.float64)
