"""A Gaussian process as plain lists, for the files that keep one: fits and profiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from subquad_cost_model.gaussian_process import SCALES, GaussianProcess


def process_record(process: GaussianProcess) -> dict[str, Any]:
    """Its scales, options, and a line per row: operator, kernel, weight, place and shares."""
    places, shares = (
        [[value if value % 1 else int(value) for value in row] for row in of.tolist()]  # 0, not 0.0
        for of in (process.places, process.shares)
    )
    rows = zip(process.operators, process.kernels, process.weights.tolist(), places, shares, strict=True)
    return {"scales": list(SCALES), "choices": list(process.choices), "rows": [list(row) for row in rows]}


def process_from_record(record: Mapping[str, Any]) -> GaussianProcess:
    """What `process_record` was given.  Raises: ValueError where the scales are not this package's."""
    if record["scales"] != list(SCALES):
        raise ValueError("its Gaussian process has other scales than this package's: fit it again")
    operators, kernels, weights, places, shares = zip(*record["rows"], strict=True)
    return GaussianProcess(
        places=np.array(places, dtype=np.float64),
        shares=np.array(shares, dtype=np.float64),
        choices=tuple(record["choices"]),
        operators=operators,
        kernels=kernels,
        weights=np.array(weights, dtype=np.float64),
    )
