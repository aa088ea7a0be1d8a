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
"""Keys and values of a tile where one token is decoded: a pipeline of four stages has three of them on their way."""
STEP_PROGRAMS = 256
"""Programs of one token into which few heads are split: two for each of 132 processors. With 1,024, of which not all
run at once, 16 sequences of 16 heads take a tenth longer on an H200, and one sequence 3 %."""
MOST_ROWS = 64
"""Summaries of such a tile, and query heads of a program."""
LEAST_TILES = 8
"""Tiles of a cache that is split: what that saves is more than the second launch, which weighs the parts."""
MOST_SPLITS = 256


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


@dataclass(frozen=True, kw_only=True)
class StepLaunch:
    """How one token is decoded: summaries of a tile and query heads of a program (powers of two, 16 or more, what a
    product of matrices takes), warps, stages of the pipeline of tiles, and splits of the cache.

    With `rows` 1 the whole cache is one tile and no key head has several query heads. Changes speed, never results
    beyond rounding.
    """

    tile_n: int
    rows: int = 16
    num_warps: int = 4
    num_stages: int = 4
    splits: int = 1

    def parts(self, count: int) -> tuple[int, int]:
        """Into how many parts a cache of so many summaries is split, none of them empty, and summaries of a part."""
        tiles = ceil_div(count, self.tile_n)
        span = max(1, ceil_div(tiles, self.splits)) * self.tile_n
        return max(1, ceil_div(count, span)), span


def step_launch(b: int, h: int, h_kv: int, k: int, v: int, count: int, *, element_bytes: int) -> StepLaunch:
    """The launch for b sequences that see so many summaries each."""
    tile_n = min(MOST_ROWS, STEP_BYTES // (2 * max(padded(k), padded(v)) * element_bytes))
    groups = h // h_kv
    if groups == 1 and count <= tile_n:
        return StepLaunch(tile_n=tile_n, rows=1, num_warps=1)
    tile_n, exact = max(16, tile_n), element_bytes > 2
    rows = 16 if exact else min(MOST_ROWS, padded(groups))  # products without tensor cores: operands live in registers
    tiles, programs = ceil_div(count, tile_n), b * h_kv * ceil_div(groups, rows)
    splits = min(MOST_SPLITS, tiles, ceil_div(STEP_PROGRAMS, programs)) if tiles >= LEAST_TILES else 1
    return StepLaunch(tile_n=tile_n, rows=rows, splits=splits, num_stages=3 if exact else 4)


def step_of(workload: Workload) -> tuple[int, int]:
    """Parts of the cache (a ring counts as full) where one token is decoded, and tiles of a part."""
    b, h, h_kv, k, v, m = (workload.shape[axis] for axis in ("b", "h", "h_kv", "k", "v", "m"))
    launch = step_launch(b, h, h_kv, k, v, m, element_bytes=workload.element_bytes)
    splits, span = launch.parts(m)
    return splits, span // launch.tile_n


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
