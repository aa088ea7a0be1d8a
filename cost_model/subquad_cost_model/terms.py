"""The terms of a physical sum: what a row asks of a device's units, launches, steps and programs; and of its memory.

    x_j(row, device), in seconds (`SECONDS`), or in bytes (`BYTES`)

They are counted once for the rows of a table; fits to parts of it, and questions about others, take their lines.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from subquad_cost_model.bound import bound_terms, launches_s, matmul_ceiling
from subquad_cost_model.device import Device
from subquad_cost_model.features import EXP_PER_SM_AND_STEP, TILE, Floats
from subquad_cost_model.rows import CostRow

SECONDS = (
    "start", "launches", "packed", "matmul", "exact matmul", "vector", "exponentials", "memory",
    "memory in fp32", "kept", "steps", "keys", "documents", "idle", "waves", "bound", "host", "clears",
)  # fmt: skip
STARTS = ("start", "launches", "packed", "documents", "blocks")
"""Terms of what a call costs before its size matters: small rows say nothing of the others."""
HOST = ("host", "clears")
"""The last terms: a kernel takes as long as they do where that is longer than all others together."""
BYTES = ("blocks", "moved", "kept", "row of scores", "scalars", "states", "states of chunks", "cache", "scores")
STEP = 500
"""Dependent instructions of a walk's step, which loads a tile, multiplies it and waits: a microsecond on an H100."""
HOST_LAUNCH_S, CLEARED = 2e-5, 192
"""What the host needs to start one of torch's kernels; caches that the device overwrites before a timed call, at most,
so that the host is ahead of it: 96 buffers of two caches (`subquad measure`). What a kernel takes that waits for the
host is what queueing it took less that: 1.00 of it in the median of 341 rows of an H200 (quartiles 0.99 and 1.02)."""
ELEMENT_BYTES = {"float64": 8, "float32": 4}
"""Kernels composed of torch's own compute in fp32 whatever the dtype."""
MOST_FUSED = 16
"""Launches of a kernel that is written as one: a few before and after it, and where it cuts time or keeps states."""
Keys = tuple[str, str]


@dataclass(frozen=True)
class Terms:
    """Terms of rows on their devices, one line each, and the names under which factors of these may be found.

    `names` are `SECONDS` or `BYTES`; a row's keys are its kernel, and that with its dtypes.
    `wide_lines` and `wide_keys` are those of float16 as if it were float32, and the others' again.
    """

    names: tuple[str, ...]
    rows: Sequence[CostRow]
    lines: Floats
    wide_lines: Floats
    keys: Sequence[Keys]
    wide_keys: Sequence[Keys]
    paces_s: Sequence[float | None]

    @classmethod
    def count(cls, names: tuple[str, ...], rows: Sequence[CostRow], devices: Sequence[Device]) -> Terms:
        """Count them all."""
        of_row = _seconds if names == SECONDS else _bytes

        def line(row: CostRow, device: Device) -> tuple[list[float], Keys]:
            return of_row(row, device), _keys(row)

        plain = [line(row, device) for row, device in zip(rows, devices, strict=True)]
        wide = [
            line(replace(row, dtype="float32"), device) if row.dtype == "float16" else same
            for row, device, same in zip(rows, devices, plain, strict=True)
        ]
        lines, wide_lines = (np.array([one for one, _ in of]).reshape(len(rows), len(names)) for of in (plain, wide))
        keys, wide_keys = ([named for _, named in of] for of in (plain, wide))
        return cls(names, rows, lines, wide_lines, keys, wide_keys, [device.host_s for device in devices])

    def take(self, here: Sequence[int]) -> Terms:
        """Those of some rows."""
        return Terms(
            self.names,
            [self.rows[index] for index in here],
            self.lines[here],
            self.wide_lines[here],
            [self.keys[index] for index in here],
            [self.wide_keys[index] for index in here],
            [self.paces_s[index] for index in here],
        )

    def computed(self, exact: Collection[str], host_s: float | None) -> tuple[Floats, Sequence[Keys]]:
        """Lines and keys in the dtypes that kernels compute in: `exact` ones compute float16 as float32.

        What the host needs is at its pace, relative to the usual `host_s`, if anything is known of either.
        """
        is_exact = [keys[0] in exact for keys in self.keys]
        found = np.where(np.array(is_exact, dtype=bool)[:, None], self.wide_lines, self.lines)
        if "host" in self.names and host_s is not None:
            paces_s = [host_s if pace_s is None else pace_s for pace_s in self.paces_s]
            found[:, self.names.index("host")] *= np.array(paces_s) / host_s
        pairs = zip(is_exact, self.keys, self.wide_keys, strict=True)
        return found, [wide if wider else keys for wider, keys, wide in pairs]


def _keys(row: CostRow) -> Keys:
    kernel = f"{row.operator}/{row.kernel}"
    return kernel, f"{kernel}, {'wide' if row.dtype in ELEMENT_BYTES else 'half'}"


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
        0.0 if documents else -head_start_s(device),
    ]


def head_start_s(device: Device) -> float:
    """How long a device is busy at most before a timed call, so that the host is ahead of it."""
    return CLEARED * device.cache_bytes / device.bytes_per_s


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


def heads_per_key(row: CostRow) -> float:
    """How many heads share a key head; 1 where each has its own."""
    heads = row.shape.get("h", 1)
    return heads / (row.shape.get("h_kv") or row.shape.get("h_k") or heads)


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
