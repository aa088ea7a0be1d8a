"""The physics head: a quantity as a sum of what the row asks of a device, each part times a factor of the kernel.

    seconds = max(sum over j of  c_kj x_j(row, device),  what the host needs beyond its head start),    c >= 0

x_j are seconds that the units work, launches, steps that wait for each other, waves of programs; k is the kernel. What
the host needs is by its pace, where a device knows it: over the usual one of the rows of the fit. Such
a sum goes on beyond what was measured: twice the tokens of a linear operator take twice the time. What options cost a
kernel beyond it is left to `gaussian_process`. Bytes at the peak are a sum alike, of other terms.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.optimize import nnls

from subquad_cost_model.bound import bound_terms, launches_s, matmul_ceiling
from subquad_cost_model.device import Device
from subquad_cost_model.features import EXP_PER_SM_AND_STEP, TILE, Floats, words
from subquad_cost_model.rows import CostRow
from subquad_cost_model.splits import LENGTHS, fold

SECONDS = (
    "start", "launches", "packed", "matmul", "exact matmul", "vector", "exponentials", "memory",
    "memory in fp32", "kept", "steps", "keys", "documents", "idle", "waves", "bound", "host", "head start",
)  # fmt: skip
STARTS = ("start", "launches", "packed", "documents", "blocks")
"""Terms of what a call costs before its size matters: small rows say nothing of the others."""
HOST = ("host", "head start")
"""The last terms: a kernel takes as long as they do where that is longer than all others together."""
BYTES = ("blocks", "moved", "kept", "row of scores", "scalars", "states", "states of chunks", "cache", "scores")
STEP = 500
"""Dependent instructions of a walk's step, which loads a tile, multiplies it and waits: a microsecond on an H100."""
HOST_LAUNCH_S, CLEARED = 2e-5, 64
"""What the host needs to start one of torch's kernels; caches that the device overwrites before a timed call, at most,
so that the host runs ahead of it."""
ELEMENT_BYTES = {"float64": 8, "float32": 4}
"""Kernels composed of torch's own compute in fp32 whatever the dtype."""
PULL = 1.0
"""How firmly a kernel's factors are held near those of all kernels: the square of it counts like so many rows."""
FIRM = 0.1
"""How firmly what a call of a fused kernel costs to begin with is held, as a share of itself, or of one launch where
that is more: long rows say nothing of it, and a few of them would have short ones begin with their milliseconds."""
LEAST = 1e-12
"""A sum is a little more than nothing."""
LEAST_ROWS = 6
"""Of a kernel with fewer rows only the level is its own, and so it is for the wide dtypes of a kernel."""
MOST = 100.0
"""No unit is slower than its ceiling by more: a term that hardly shows in the rows would take any factor."""
LEAST_WIDTH, WIDTH_PULL = 20, 4.0
"""So many rows of one width give a fused kernel factors of its own for it: tiles, warps and registers are others. They
are held near those of its dtypes as if by 16 rows, for they are asked of other lengths."""
MOST_FUSED = 8
"""Launches of a kernel that is written as one: a few more before and after."""
OUTLIER = 0.15
"""Log errors beyond this count by their size, not its square."""
FINEST_DOUBT = 0.05
"""Rows whose repeats lie closer together than this are equally good."""


@dataclass(frozen=True, kw_only=True)
class Physics:
    """Factors by kernel (with its operator), and those pooled over a kind of kernels for one that was never measured.

    A kernel has factors of its own for half precision, or for float32 and wider, where either has rows enough, and a
    fused one for each width (padded to a power of two) of these that has.
    Kinds are `fused` (a few launches a call) and `composed`, and `kinds` says which a kernel is.
    `terms` says of what the sum is made: `SECONDS` or `BYTES`; `host_s` is the usual pace of the host, None if no row
    knew one. `exact` are the kernels that compute float16 as they compute float32, whose factors are its then.
    """

    terms: tuple[str, ...]
    kernels: Mapping[str, tuple[float, ...]]
    pooled: Mapping[str, tuple[float, ...]]
    kinds: Mapping[str, str]
    host_s: float | None = None
    exact: tuple[str, ...] = ()

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

        x_i are the terms of the host or the others, whichever say more so far. s_j is the size of the term in these
        rows, c0 the factors of its kind at levels of this kernel: one for what a call costs to begin with, one for what
        grows, one for each of the host's. Those of a kernel's dtypes and widths are held near the kernel's in turn.
        """
        paces_s = [device.host_s for device in devices if device.host_s is not None]
        host_s = statistics.median(paces_s) if paces_s else None
        own, weights = _own(terms), 1 / np.maximum(doubts, FINEST_DOUBT)
        most = np.array([math.inf if t in (*STARTS, "host") else 1.0 if t == "head start" else MOST for t in terms])

        def factors(here: Sequence[int], near: Floats, pull: float, firm: float = 0.0) -> Floats:
            held = np.where(begins, firm, 0.0)
            return _factors(values[here], own, quantity[here], weights[here], near, pull, most, held)

        everywhere = range(len(rows))
        of_kernel = _by(_name, rows, everywhere)
        exact: tuple[str, ...] = ()
        if terms == SECONDS:
            halves = _values(terms, rows, devices, host_s)
            wides = _values(terms, [_wide(row) for row in rows], devices, host_s)
            of_both = (halves, wides, quantity)
            exact = tuple(name for name, here in of_kernel.items() if _computes_wide(rows, here, *of_both))
            rows = [_computed(row, exact) for row in rows]
        values = _values(terms, rows, devices, host_s)
        kinds = {name: _kind(max(rows[index].launches for index in here)) for name, here in of_kernel.items()}
        of_kind = _by(lambda row: kinds[_name(row)], rows, everywhere)
        begins, hosts = np.isin(terms, STARTS), np.isin(terms, HOST)
        pooled = {kind: factors(here, hosts.astype(np.float64), 0.05) for kind, here in of_kind.items()}
        for kind, here in of_kind.items():
            device, host = _sides(values[here], own, pooled[kind])
            if not (host > device).any():
                pooled[kind][own:] = 0  # nothing says that the host ever matters
        groups = np.array([begins, ~begins & ~hosts, *np.eye(len(terms), dtype=bool)[own:]])
        kernels: dict[str, Floats] = {}
        for kernel, here in of_kernel.items():
            near = pooled[kinds[kernel]]
            parts, ones = values[here] @ (near * groups).T, np.ones(len(groups))
            firm = FIRM if kinds[kernel] == "fused" and terms == SECONDS else 0.0
            held = firm * np.eye(len(groups))[0]
            levels = _factors(parts, 2, quantity[here], weights[here], ones, PULL, math.inf * ones, held)
            kernels[kernel] = near * (levels @ groups)
            if len(here) < LEAST_ROWS:
                continue
            kernels[kernel] = factors(here, kernels[kernel], PULL, firm)
            for dtypes, those in _by(_of_dtypes, rows, here).items():
                if len(those) < LEAST_ROWS:
                    continue
                kernels[dtypes] = factors(those, kernels[kernel], PULL, firm)
                for width, them in _by(_of_width, rows, those).items():
                    if len(them) >= LEAST_WIDTH and kinds[kernel] == "fused":
                        kernels[width] = factors(them, kernels[dtypes], WIDTH_PULL, firm)
        found, of_kinds = ({name: tuple(f.tolist()) for name, f in of.items()} for of in (kernels, pooled))
        return cls(terms=terms, kernels=found, pooled=of_kinds, kinds=kinds, host_s=host_s, exact=exact)

    def predict(self, rows: Sequence[CostRow], devices: Sequence[Device]) -> Floats:
        """The sum of each row on its device.

        A kernel that was never measured is taken to be like the fastest of its operator and kind, unless the factors
        of that kind say more.
        """
        rows = [_computed(row, self.exact) for row in rows]
        values = _values(self.terms, rows, devices, self.host_s)
        return np.array([self._sum(row, value) for row, value in zip(rows, values, strict=True)], dtype=np.float64)

    def _sum(self, row: CostRow, values: Floats) -> float:
        def of(factors: Sequence[float]) -> float:
            return float(_longer(values, _own(self.terms), np.array(factors)))

        for name in (_of_width(row), _of_dtypes(row), _name(row)):
            if name in self.kernels:
                return of(self.kernels[name])
        kind, operator = _kind(row.launches), f"{row.operator}/"
        usual = of(self.pooled.get(kind, next(iter(self.pooled.values()))))
        rivals = [
            of(factors)
            for name, factors in self.kernels.items()
            if name.startswith(operator) and self.kinds.get(name) == kind
        ]
        return max(usual, min(rivals, default=usual))


def _kind(launches: int) -> str:
    return "fused" if launches <= MOST_FUSED else "composed"


def _name(row: CostRow) -> str:
    return f"{row.operator}/{row.kernel}"


def _of_dtypes(row: CostRow) -> str:
    return f"{_name(row)}, {'wide' if row.dtype in ELEMENT_BYTES else 'half'}"


def _of_width(row: CostRow) -> str:
    width = max(row.shape.get(axis, 1) for axis in ("k", "v", "n", "p"))
    return f"{_of_dtypes(row)}, {1 << (width - 1).bit_length()}"


def _wide(row: CostRow) -> CostRow:
    return replace(row, dtype="float32") if row.dtype == "float16" else row


def _computed(row: CostRow, exact: Collection[str]) -> CostRow:
    """The row in the dtype that its kernel computes in."""
    return _wide(row) if _name(row) in exact else row


def _computes_wide(
    rows: Sequence[CostRow], here: Sequence[int], halves: Floats, wides: Floats, quantity: Floats
) -> bool:
    """Whether factors of its float32 rows are off on those of float16 by less than half of what bfloat16's are."""
    of_dtype = _by(lambda row: row.dtype, rows, here)
    asked = of_dtype.get("float16", [])
    if min(map(len, (asked, of_dtype.get("bfloat16", ()), of_dtype.get("float32", ())))) < LEAST_ROWS:
        return False

    def off(values: Floats, dtype: str) -> float:
        known = of_dtype[dtype]
        far, nothing = np.full(values.shape[1], math.inf), np.zeros(values.shape[1])
        found = _factors(values[known], values.shape[1], quantity[known], np.ones(len(known)), nothing, 0.1, far)
        return float(np.median(np.abs(np.log(np.maximum(values[asked] @ found, LEAST) / quantity[asked]))))

    as_half = off(halves, "bfloat16")
    return as_half > OUTLIER and off(wides, "float32") < as_half / 2


def _by(name: Callable[[CostRow], str], rows: Sequence[CostRow], here: Sequence[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for index in here:
        found[name(rows[index])].append(index)
    return found


def _own(terms: tuple[str, ...]) -> int:
    """How many terms are not the host's."""
    return len(terms) - sum(term in HOST for term in terms)


def layout(row: CostRow) -> str:
    """A short name of what a kernel is compiled for: all but batch and lengths."""
    widths = tuple(sorted((axis, size) for axis, size in row.shape.items() if axis not in LENGTHS))
    return _short_name((*words(row), "documents" in row.shape, *widths))


@lru_cache(maxsize=16_384)
def _short_name(what: tuple[object, ...]) -> str:
    return format(fold(repr(what), 1 << 40), "x")


def _factors(
    values: Floats,
    own: int,
    quantity: Floats,
    weights: Floats,
    near: Floats,
    pull: float,
    most: Floats,
    firm: Floats | float = 0.0,
) -> Floats:
    """Near `near` and at most `most`; weights of any scale. The first `own` values are not the host's.

    Factors are held near `near` by as much as their terms show in the rows, or by `firm` of their own size if that is
    more (of 1 where they are smaller).
    """
    weights = weights / weights.mean()
    relative, current = values / quantity[:, None], weights
    device, host = _sides(relative, own, near)
    # Where nothing is known of the device yet, rows wait that took no longer than the host is expected to need.
    waits = host > (device if near[:own].any() else 1.0)
    found = near
    for _ in range(8):
        ratios = np.where(waits[:, None] == (np.arange(len(near)) >= own), relative, 0.0)
        sizes = np.sqrt((ratios**2).mean(axis=0)) + 1e-12
        held = np.maximum(pull, firm / (sizes * np.maximum(near, 1)))
        system = np.vstack([ratios / sizes * current[:, None], np.diag(held)])
        solved, _ = nnls(system, np.concatenate([current, held * sizes * near]), maxiter=2000)
        found = np.minimum(solved / sizes, most)
        device, host = _sides(relative, own, found)
        waits, predicted = host > device, np.maximum(np.maximum(device, host), 1e-9)
        # Twice too much is a relative error of 1, half of it one of 1/2: the square root makes them alike.
        errors = np.abs(np.log(predicted))
        current = weights * np.sqrt(np.minimum(1, OUTLIER / np.maximum(errors, 1e-3)) * np.minimum(1, 1 / predicted))
    return np.asarray(found, dtype=np.float64)


def _sides(values: Floats, own: int, factors: Floats) -> tuple[Floats, Floats]:
    return values[..., :own] @ factors[:own], values[..., own:] @ factors[own:]


def _longer(values: Floats, own: int, factors: Floats) -> Floats:
    return np.maximum(np.maximum(*_sides(values, own, factors)), LEAST)


def _values(
    terms: tuple[str, ...], rows: Sequence[CostRow], devices: Sequence[Device], host_s: float | None
) -> Floats:
    of_row = _seconds if terms == SECONDS else _bytes
    found = np.array([of_row(row, device) for row, device in zip(rows, devices, strict=True)]).reshape(-1, len(terms))
    if "host" in terms and host_s is not None:
        found[:, terms.index("host")] *= [(device.host_s or host_s) / host_s for device in devices]
    return found


def _seconds(row: CostRow, device: Device) -> list[float]:
    terms, shape = bound_terms(row, device), row.shape
    documents = shape.get("documents", 0)
    longest, uneven = _documents(row)
    uneven *= row.padding
    # A query's program walks all keys that it sees, or all summaries.
    summaries = shape.get("t", 1) // int(row.options.get("segment_len", 1)) + shape.get("m", 0) if "m" in shape else 0
    keys = shape.get("s", summaries) / max(1, documents)
    window = int(row.options.get("window", 0))
    if window:
        # A window that looks ahead as well holds its tokens to either side.
        keys = min(keys, window if row.options.get("causal", True) else 2 * window - 1)
    step_s = STEP * device.serial_step_s
    # Packed attention in one launch starts as many programs for each document as for the longest that there could be.
    started = documents * programs(row) if "s" in shape and row.launches == 1 else 0
    exact, composed = row.dtype in ELEMENT_BYTES, row.launches > MOST_FUSED
    matmul_s = terms.matmul_s * uneven
    if not composed and row.padding == 1.0 and shape.get("t", 1) > 1:
        matmul_s *= max(1.0, TILE * tiles(row) / (shape.get("b", 1) * shape["t"]))
    exact_s = matmul_s if exact else row.matmul_flops * uneven / matmul_ceiling("float32", device) if composed else 0.0
    wide_s = 4 * row.bytes_moved / ELEMENT_BYTES.get(row.dtype, 2) / device.bytes_per_s
    return [
        device.launch_s,
        launches_s(row, device),
        device.launch_s if documents else 0.0,
        0.0 if exact else matmul_s,
        exact_s,
        terms.vector_s * uneven,
        terms.transcendental_s * uneven,
        terms.memory_s,
        wide_s,
        row.saved_bytes / device.bytes_per_s,
        row.serial_steps * (longest if composed or not row.matmul_flops else 1.0) * step_s,
        math.ceil(keys * longest / TILE) * step_s,
        documents * device.launch_s,
        started / multiprocessors(device) * device.launch_s,
        math.ceil(programs(row) / multiprocessors(device)) * step_s,
        max(terms.memory_s, matmul_s, uneven * max(terms.vector_s, terms.transcendental_s)),
        row.launches * HOST_LAUNCH_S if composed else 0.0,
        # Where documents are packed, kernels of torch's own wait for the device to hear how long they are.
        0.0 if documents else -CLEARED * device.cache_bytes / device.bytes_per_s,
    ]


def tiles(row: CostRow) -> float:
    """Tiles of tokens of one head in all sequences or documents; those of unknown lengths end in the middle of one."""
    shape = row.shape
    if row.document_lengths:
        return sum(-(-length // TILE) for length in row.document_lengths)
    return shape.get("b", 1) * -(-shape.get("t", 1) // TILE) + shape.get("documents", 0) / 2


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
