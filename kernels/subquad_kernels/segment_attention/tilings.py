"""The tiles of `tiled`, and how many of them its launches compute, in plain integers: no torch, no triton."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from subquad_kernels.tile_sizes import ceil_div, padded
from subquad_kernels.workload import Workload, counted_documents

Stage = Literal["forward", "query_gradients", "summary_gradients"]

PROGRAMS = 1024
"""Programs that fill a large GPU with room to even out unequal ones: about four for each place on 132 processors."""

SPLIT_T = 1024
"""Queries that one program of the summaries' gradients takes at least, when they are split to fill the device."""

STEP_BYTES = 16_384
"""Keys and values that a program of one token asks for at once: eight programs a processor hide the way to memory."""
MOST_ROWS = 64
"""Summaries of its tile of narrow heads: a cache seldom has many more."""
LEAST_TILES = 4
"""Tiles of a split of a long cache: their time is about that of the second launch, which weighs the parts."""
MOST_SPLITS = 64


@dataclass(frozen=True)
class Tiling:
    """How one kernel is launched: tile lengths in queries and in summaries, warps, and stages of its pipeline."""

    tile_t: int
    tile_n: int
    num_warps: int
    num_stages: int


def tiling(stage: Stage, exact: bool, width: int, t: int) -> Tiling:
    """The tiles of a kernel for the wider of the two head widths, padded to a power of two; `exact` is float32.

    Chosen so that on compute capability 9.0 no loop spills registers.
    """
    if exact:  # products without tensor cores: operands live in registers
        return Tiling(32, 32, 8, 1) if width <= 64 else Tiling(16, 16, 8, 1)
    pipeline = 3 if width <= 128 else 2
    if stage == "summary_gradients":
        if width <= 128:
            return Tiling(64, 128, 8, 3 if width <= 64 else 2)
        return Tiling(16, 64, 8, 2)
    if t <= 16:  # decoding: the least that a product takes
        return Tiling(16, 64 if width <= 128 else 32, 4, pipeline)
    if stage == "forward":
        return Tiling(128, 64 if width <= 128 else 32, 8, pipeline)
    if width <= 64:
        return Tiling(64, 64, 4, 2)
    return Tiling(128 if width <= 128 else 64, 64 if width <= 128 else 32, 8, 2)


def parts_of(programs: int, t: int) -> int:
    """Parts of time for which summaries' gradients are computed apart, so that programs fill the device."""
    return max(1, min(ceil_div(PROGRAMS, programs), t // SPLIT_T))


def step_tile(key_width: int, value_width: int, element_bytes: int) -> int:
    """Summaries of a tile where one token is decoded."""
    widest = max(padded(key_width), padded(value_width))
    return min(MOST_ROWS, STEP_BYTES // (2 * widest * element_bytes))


def step_splits(count: int, heads: int, tile_n: int, wanted: int | None = None) -> tuple[int, int]:
    """Into how many parts a cache of so many summaries is split where one token is decoded, and summaries of a part.

    `heads` are those of all sequences. None is empty.
    """
    tiles = ceil_div(count, tile_n)
    splits = wanted or min(MOST_SPLITS, max(1, tiles // LEAST_TILES), ceil_div(PROGRAMS, heads))
    span = max(1, ceil_div(tiles, splits)) * tile_n
    return max(1, ceil_div(count, span)), span


@dataclass(frozen=True)
class Walk:
    """What programs of one launch compute: matrix products' FLOPs of all, and tiles that the longest one walks."""

    flops: int
    longest: int


def walks(workload: Workload) -> tuple[Walk, ...]:
    """Of queries over their summaries, and backward of summaries over their queries as well. (One token has a kernel
    of its own, `tiled_step`.)
    """
    shape, segment_len = workload.shape, int(workload.options["segment_len"])
    b, t, h, h_kv, m = (shape[axis] for axis in ("b", "t", "h", "h_kv", "m"))
    k, v = padded(shape["k"]), padded(shape["v"])
    exact, backward = workload.dtype == "float32", workload.phase == "backward"
    documents = _documents(workload)
    tiles = tiling("query_gradients" if backward else "forward", exact, max(k, v), t)
    met = _tiles_of_summaries(documents, t, segment_len, m, tiles)
    products = 2 * k + v if backward else k + v
    found = [Walk(2 * tiles.tile_t * tiles.tile_n * products * sum(met) * b * h, max(met))]
    count = ceil_div(t, segment_len) if "documents" in shape else m + (t - 1) // segment_len
    if not backward or not count:
        return tuple(found)
    tiles = tiling("summary_gradients", exact, max(k, v), t)
    parts = parts_of(ceil_div(count, tiles.tile_n) * b * h_kv, t)
    part = ceil_div(t, parts * tiles.tile_t)
    met = _tiles_of_queries(documents, count, segment_len, m, tiles)
    flops = 2 * tiles.tile_t * tiles.tile_n * 2 * (k + v) * sum(met) * b * h
    return (*found, Walk(flops, h // h_kv * min(part, max(met, default=0))))


def _documents(workload: Workload) -> list[tuple[int, int]]:
    """Where each document begins and ends; tokens after the last boundary are a document of their own."""
    t = workload.shape["t"]
    borders = [0, *(min(end, t) for end in accumulate(counted_documents(workload))), t]
    return [(begin, end) for begin, end in pairwise(borders) if begin < end]


def _tiles_of_summaries(
    documents: Sequence[tuple[int, int]], t: int, segment_len: int, m: int, tiles: Tiling
) -> list[int]:
    """How many each tile of queries walks: from the first that its first row may see to the last that its last sees,
    whatever documents lie between.
    """
    met, ends = [], [end for _, end in documents]
    for row in range(0, t, tiles.tile_t):
        last = min(row + tiles.tile_t, t) - 1
        low, begin = (documents[bisect_right(ends, token)][0] for token in (row, last))
        seen = ceil_div(begin, segment_len) + m + (last - begin) // segment_len - ceil_div(low, segment_len)
        met.append(ceil_div(seen, tiles.tile_n))
    return met


def _tiles_of_queries(
    documents: Sequence[tuple[int, int]], count: int, segment_len: int, m: int, tiles: Tiling
) -> list[int]:
    """How many each tile of summaries walks that holds any: from the first query that sees one of them to the end of
    the last one's document. Summary j of a document that begins at s stands in stretch j + 1 + (s - 1) // segment_len.
    """
    seen: dict[int, tuple[int, int]] = {}
    for begin, end in documents:
        number = min(m + (end - begin) // segment_len, count)
        first = 1 + (begin - 1) // segment_len
        for tile in range(first // tiles.tile_n, ceil_div(first + number, tiles.tile_n) if number else 0):
            inside = max(0, tile * tiles.tile_n - first)  # of the document's summaries, the tile's first
            earliest = begin + max(0, (inside + 1 - m) * segment_len)
            seen[tile] = min(earliest, seen.get(tile, (end, end))[0]), end
    return [max(0, ceil_div(end, tiles.tile_t) - earliest // tiles.tile_t) for earliest, end in seen.values()]
