"""The physics head: a quantity as a sum of what the row asks of a device, each part times a factor of the kernel.

    seconds = sum over j of  c_kj x_j(row, device),    c >= 0

x_j are seconds that the units work, launches, steps that wait for each other, waves of programs; k is the kernel. Such
a sum goes on beyond what was measured: twice the tokens of a linear operator take twice the time. What widths, dtypes
and options cost a kernel beyond it is left to `gaussian_process`. Bytes at the peak are a sum alike, of other terms.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.optimize import nnls

from subquad_cost_model.bound import bound_terms, launches_s
from subquad_cost_model.device import Device
from subquad_cost_model.features import EXP_PER_SM_AND_STEP, TILE, Floats, words
from subquad_cost_model.rows import CostRow
from subquad_cost_model.splits import LENGTHS, fold

SECONDS = (
    "start", "launches", "host", "packed", "matmul", "exact matmul", "vector", "exponentials", "memory",
    "memory in fp32", "kept", "steps", "keys", "documents", "idle", "waves", "bound",
)  # fmt: skip
STARTS = ("start", "launches", "host", "packed", "documents", "blocks")
"""Terms of what a call costs before its size matters: small rows say nothing of the others."""
BYTES = ("blocks", "moved", "kept", "row of scores", "scalars", "states", "states of chunks", "cache", "scores")
STEP = 500
"""Dependent instructions of a walk's step, which loads a tile, multiplies it and waits: a microsecond on an H100."""
HOST_LAUNCH_S, HEAD_START_S = 8e-6, 4e-3
"""What the host needs to start a kernel, and how far ahead of the device `measure` lets it run."""
ELEMENT_BYTES = {"float64": 8, "float32": 4}
"""Kernels composed of torch's own compute in fp32 whatever the dtype."""
PULL = 1.0
"""How firmly a kernel's factors are held near those of all kernels: the square of it counts like so many rows."""
LEAST = 1e-12
"""A sum is a little more than nothing."""
LEAST_ROWS = 6
"""Of a kernel with fewer rows only the level is its own, and so it is for the wide dtypes of a kernel."""
MOST_FUSED = 8
"""Launches of a kernel that is written as one: a few more before and after."""
OUTLIER = 0.15
"""Log errors beyond this count by their size, not its square."""
FINEST_DOUBT = 0.05
"""Rows whose repeats lie closer together than this are equally good."""


@dataclass(frozen=True, kw_only=True)
class Physics:
    """Factors by kernel (with its operator), and those pooled over a kind of kernels for one that was never measured.

    A kernel has factors of its own for half precision, or for float32 and wider, where either has rows enough.
    Kinds are `fused` (a few launches a call) and `composed`, and `kinds` says which a kernel is.
    `terms` says of what the sum is made: `SECONDS` or `BYTES`.
    """

    terms: tuple[str, ...]
    kernels: Mapping[str, tuple[float, ...]]
    pooled: Mapping[str, tuple[float, ...]]
    kinds: Mapping[str, str]

    @classmethod
    def fit(
        cls,
        terms: tuple[str, ...],
        rows: Sequence[CostRow],
        devices: Sequence[Device],
        quantity: Floats,
        doubts: Floats,
    ) -> Physics:
        """Non-negative least squares of relative errors, row i weighing 1 / doubts_i, outliers less at each round.

            min over c >= 0:  sum_i w_i (c x_i / y_i - 1)^2  +  PULL^2 sum_j (s_j (c_j - c0_j))^2

        s_j is the size of the term in these rows, c0 the factors of its kind at two levels of this kernel: one for what
        a call costs to begin with, one for what grows. Those of a kernel's dtypes are held near the kernel's in turn.
        """
        values = _values(terms, rows, devices)
        weights = 1 / np.maximum(doubts, FINEST_DOUBT)
        weights = _mean_one(weights)
        of_kernel: dict[str, list[int]] = defaultdict(list)
        of_kind: dict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            of_kernel[words(row)[1]].append(index)
        kinds = {name: _kind(max(rows[index].launches for index in here)) for name, here in of_kernel.items()}
        for index, row in enumerate(rows):
            of_kind[kinds[words(row)[1]]].append(index)
        pooled = {
            kind: _factors(values[here], quantity[here], weights[here], np.zeros(len(terms)), 0.05)
            for kind, here in of_kind.items()
        }
        kernels = {}
        for kernel, here in of_kernel.items():
            near = pooled[kinds[kernel]]
            if len(here) < LEAST_ROWS:
                level = np.median(quantity[here] / np.maximum(values[here] @ near, 1e-15))
                kernels[kernel] = tuple((near * level).tolist())
                continue
            begins = np.isin(terms, STARTS)
            parts = np.column_stack([values[here] @ (near * begins), values[here] @ (near * ~begins)])
            begin, grow = _factors(parts, quantity[here], _mean_one(weights[here]), np.ones(2), PULL)
            near = near * np.where(begins, begin, grow)
            near = _factors(values[here], quantity[here], _mean_one(weights[here]), near, PULL)
            kernels[kernel] = tuple(near.tolist())
            of_dtypes: dict[str, list[int]] = defaultdict(list)
            for index in here:
                of_dtypes[_by_dtype(rows[index])].append(index)
            for name, those in of_dtypes.items():
                if len(those) >= LEAST_ROWS:
                    own = _factors(values[those], quantity[those], _mean_one(weights[those]), near, PULL)
                    kernels[name] = tuple(own.tolist())
        of_kinds = {kind: tuple(factors.tolist()) for kind, factors in pooled.items()}
        return cls(terms=terms, kernels=kernels, pooled=of_kinds, kinds=kinds)

    def predict(self, rows: Sequence[CostRow], devices: Sequence[Device]) -> Floats:
        """The sum of each row on its device.

        A kernel that was never measured is taken to be like the fastest of its operator and kind, unless the factors
        of that kind say more.
        """
        values = _values(self.terms, rows, devices)
        return np.array([self._sum(row, value) for row, value in zip(rows, values, strict=True)], dtype=np.float64)

    def _sum(self, row: CostRow, values: Floats) -> float:
        kernel = words(row)[1]
        if kernel in self.kernels:
            return float(values @ np.array(self.kernels.get(_by_dtype(row), self.kernels[kernel]))) + LEAST
        kind, operator = _kind(row.launches), f"{row.operator}/"
        usual = float(values @ np.array(self.pooled.get(kind, next(iter(self.pooled.values())))))
        rivals = [
            float(values @ np.array(factors))
            for name, factors in self.kernels.items()
            if name.startswith(operator) and self.kinds.get(name) == kind
        ]
        return max(usual, min(rivals, default=usual)) + LEAST


def _kind(launches: int) -> str:
    return "fused" if launches <= MOST_FUSED else "composed"


def _by_dtype(row: CostRow) -> str:
    return f"{words(row)[1]}, {'wide' if row.dtype in ELEMENT_BYTES else 'half'}"


def _mean_one(weights: Floats) -> Floats:
    return np.asarray(weights / weights.mean(), dtype=np.float64)


def layout(row: CostRow) -> str:
    """A short name of what a kernel is compiled for: all but batch and lengths."""
    widths = tuple(sorted((axis, size) for axis, size in row.shape.items() if axis not in LENGTHS))
    return _short_name((*words(row), "documents" in row.shape, *widths))


@lru_cache(maxsize=16_384)
def _short_name(what: tuple[object, ...]) -> str:
    return format(fold(repr(what), 1 << 40), "x")


def _factors(values: Floats, quantity: Floats, weights: Floats, near: Floats, pull: float) -> Floats:
    ratios = values / quantity[:, None]
    sizes = np.sqrt((ratios**2).mean(axis=0)) + 1e-12
    found, current = near, weights
    for _ in range(12):
        system = np.vstack([ratios / sizes * current[:, None], pull * np.eye(len(sizes))])
        solved, _ = nnls(system, np.concatenate([current, pull * sizes * near]), maxiter=2000)
        found = solved / sizes
        predicted = np.maximum(values @ found, 1e-15)
        errors = np.abs(np.log(predicted / quantity))
        # Twice too much is a relative error of 1, half of it one of 1/2: the square root makes them alike.
        damped = np.minimum(1, OUTLIER / np.maximum(errors, 1e-3)) * np.minimum(1, quantity / predicted)
        current = weights * np.sqrt(damped)
    return np.asarray(found, dtype=np.float64)


def _values(terms: tuple[str, ...], rows: Sequence[CostRow], devices: Sequence[Device]) -> Floats:
    of_row = _seconds if terms == SECONDS else _bytes
    return np.array([of_row(row, device) for row, device in zip(rows, devices, strict=True)]).reshape(-1, len(terms))


def _seconds(row: CostRow, device: Device) -> list[float]:
    terms, shape = bound_terms(row, device), row.shape
    documents = shape.get("documents", 0)
    longest, uneven = _documents(row)
    uneven *= row.padding
    # A query's program walks all keys that it sees, or all summaries.
    summaries = shape.get("t", 1) // int(row.options.get("segment_len", 1)) + shape.get("m", 0) if "m" in shape else 0
    keys = shape.get("s", summaries) / max(1, documents)
    window = int(row.options.get("window", 0))
    keys = min(keys, window) if window else keys
    step_s = STEP * device.serial_step_s
    # Packed attention in one launch starts as many programs for each document as for the longest that there could be.
    started = documents * programs(row) if "s" in shape and row.launches == 1 else 0
    exact = row.dtype in ("float32", "float64")
    wide_s = 4 * row.bytes_moved / ELEMENT_BYTES.get(row.dtype, 2) / device.bytes_per_s
    return [
        device.launch_s,
        launches_s(row, device),
        max(0.0, row.launches * HOST_LAUNCH_S - HEAD_START_S),
        device.launch_s if documents else 0.0,
        0.0 if exact else terms.matmul_s * uneven,
        terms.matmul_s * uneven if exact else 0.0,
        terms.vector_s * uneven,
        terms.transcendental_s * uneven,
        terms.memory_s,
        wide_s,
        row.saved_bytes / device.bytes_per_s,
        row.serial_steps * longest * step_s,
        math.ceil(keys * longest / TILE) * step_s,
        documents * device.launch_s,
        started / multiprocessors(device) * device.launch_s,
        math.ceil(programs(row) / multiprocessors(device)) * step_s,
        max(terms.memory_s, uneven * max(terms.matmul_s, terms.vector_s, terms.transcendental_s)),
    ]


def programs(row: CostRow) -> int:
    """So many run at once if there is room: a tile of tokens of one head each, and one more for each document's end."""
    shape = row.shape
    tiles = shape.get("b", 1) * math.ceil(shape.get("t", 1) / TILE) + shape.get("documents", 0)
    return _heads(shape) * tiles


def multiprocessors(device: Device) -> int:
    """Of a GPU, from what its special-function units reach."""
    return max(1, round(device.transcendental_per_s * device.serial_step_s / EXP_PER_SM_AND_STEP))


def _documents(row: CostRow) -> tuple[float, float]:
    """How much longer than the average the longest document is, and how many more pairs than counted have they all.

    Where lengths are known, pairs were counted for them. Where they are not, for equal parts of t, but they are parts
    of a stick broken at random: the longest of D is 1 + ... + 1/D times the average, and sums of squares are
    2 D / (D + 1) times those of equal parts. Only attention's work grows in pairs.
    """
    documents, window = row.shape.get("documents", 0), int(row.options.get("window", 0))
    if not documents:
        return 1.0, 1.0
    average = row.shape["t"] / documents
    if row.document_lengths:
        return max(row.document_lengths) / average, 1.0
    pairs = row.shape.keys() & {"s", "m"} and average < (window or math.inf)
    longest = sum(1 / place for place in range(1, documents + 1))
    return longest, 2 * documents / (documents + 1) if pairs else 1.0


def _bytes(row: CostRow, device: Device) -> list[float]:
    shape = row.shape
    b, t, heads = shape.get("b", 1), shape.get("t", 1), _heads(shape)
    tokens = b * t * heads
    sequences = shape.get("documents", 0) or b
    wide, high = shape.get("p", shape.get("v", 1)), shape.get("n", shape.get("k", 1))
    state = 4 * heads * (TILE if "c" in shape else wide) * high
    chunks = b * math.ceil(t / TILE) + shape.get("documents", 0)
    keys, element = shape.get("s", shape.get("m", 0)), {"float64": 8, "float32": 4}.get(row.dtype, 2)
    return [
        512.0,
        float(row.bytes_moved),
        float(row.saved_bytes),
        4.0 * tokens * TILE,
        4.0 * tokens,
        float(sequences * state),
        float(chunks * state),
        # Under a window less of a cache is read than is held.
        float(element * b * keys * shape.get("h_kv", 0) * (shape.get("k", 0) + shape.get("v", 0))),
        4.0 * tokens * min(keys, int(row.options.get("window", 0)) or keys),
    ]


def _heads(shape: Mapping[str, int]) -> int:
    """Channels stand in for heads where an operator has none, in groups of 64."""
    return shape["h"] if "h" in shape else math.ceil(shape.get("c", TILE) / 64)
