"""Time cut into segments that are walked side by side, where sequences times heads are too few programs for a device.

A segment of whole chunks acts on the transposed state S [p, n] that enters it as  S' = S M + W: every row of S by
itself, whatever the row. So the walk over a segment's chunks finds its own map: from states of zeros it ends in W, and
from the rows of the identity with values of zeros in M. Three launches:  a walk of every segment but the last finds the
maps;  `compose` takes the state through them;  the walk proper starts every segment from the state that enters it.
Backward the same from the last segment to the first, with the gradient of the state. Exact: no decay is divided by, and
a document begins a segment of its own.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.delta_rule.declaration import CHUNK, chunks_a_segment
from subquad_kernels.delta_rule.tiles import load
from subquad_kernels.tile_sizes import ceil_div, padded
from subquad_kernels.triton_chunks import chunk_at, lay_out, taken
from subquad_kernels.triton_launch import QuickLaunch
from subquad_kernels.triton_precision import fp32_products

Scan = Callable[[tuple[int], Tensor | None, Tensor | None], None]
"""Launches so many programs of a scan; with the states that enter segments, or to find maps."""

_TILE_P = 16
"""Rows of a state that a program of `compose` takes through the maps."""
_TILE_K = 32
"""Rows of a map that it loads at once."""


@dataclass(frozen=True)
class Segments:
    """How the walks of one call divide time, in tiles of `tile_p` columns of v and as many rows of a map.

    `chunks` a segment at most; `slots` segments of all sequences or, packed, the most that its documents can have.
    Packed and cut, `table` lists the segments (`lay_out`) and `starts` has each document's first.
    """

    v: Tensor
    n: int
    bounds: Tensor | None
    tile_p: int
    chunks: int
    slots: int
    table: Tensor | None = None
    starts: Tensor | None = None

    @classmethod
    def of(cls, v: Tensor, n: int, bounds: Tensor | None, tile_p: int, *, programs: int, least: int) -> Segments:
        """Segments for about so many programs, of at least so many chunks.  Shapes:  v: b t h p"""
        b, t, heads, p = v.shape
        lines = heads * ceil_div(p, tile_p)
        chunks = chunks_a_segment(b, t, lines, packed=bounds is not None, programs=programs, least=least)
        if bounds is None:
            return cls(v, n, bounds, tile_p, chunks, b * ceil_div(ceil_div(t, CHUNK), chunks))
        slots = bounds.shape[0] - 1
        if chunks >= ceil_div(t, CHUNK):
            return cls(v, n, bounds, tile_p, chunks, slots)
        slots += t // (chunks * CHUNK)
        return cls(v, n, bounds, tile_p, chunks, slots, *lay_out(bounds, slots, chunks * CHUNK, least=1))

    @property
    def cut(self) -> bool:
        """Whether a sequence may have more than one segment."""
        return self.chunks < ceil_div(self.v.shape[1], CHUNK)

    def walk(self, scan: Scan, edge: Tensor | None, *, reversed: bool) -> None:
        """Launch a scan of all segments, from the states of `edge` (None: zeros) at the ends of sequences.

        Shapes:  edge: states h n p    maps: slots h p+n n (the rows of W, then those of M)    entering: slots h p n
        """
        heads, p = self.v.shape[2:]
        entering = None
        if self.cut:
            maps = self.v.new_empty(self.slots, heads, p + self.n, self.n, dtype=torch.float32)
            scan(self._programs(ceil_div(p, self.tile_p) + ceil_div(self.n, self.tile_p)), None, maps)
            entering = self._compose(maps, edge, reversed=reversed)
        scan(self._programs(ceil_div(p, self.tile_p)), entering, None)

    def _programs(self, tiles: int) -> tuple[int]:
        return (self.slots * self.v.shape[2] * tiles,)

    def _compose(self, maps: Tensor, edge: Tensor | None, *, reversed: bool) -> Tensor:
        """The state that enters every segment."""
        b, t, heads, p = self.v.shape
        n, states = self.n, b if self.bounds is None else self.bounds.shape[0] - 1
        entering = maps.new_empty(self.slots, heads, p, n)
        compose[(states * heads * ceil_div(p, _TILE_P),)](
            maps, edge, self.starts, entering, ceil_div(t, CHUNK), self.chunks, heads,
            N=n, PAD_N=padded(n), P=p, TILE_P=_TILE_P, TILE_K=min(_TILE_K, padded(n)), PACKED=self.bounds is not None,
            GIVEN=edge is not None, BACK=reversed, PRECISION=fp32_products(), num_warps=4,
        )  # fmt: skip
        return entering


@triton.jit
def segment_of(table, bounds, offsets, place, t, chunks, per, CHUNK: tl.constexpr, PACKED: tl.constexpr,
               CUT: tl.constexpr):  # fmt: skip
    """Sequence, first row, tokens and first chunk of a segment, and whether its sequence begins or ends with it."""
    if PACKED and CUT:
        first, length, document, begins, ends = chunk_at(table, place)
        sequence = document.to(tl.int64)
        chunk = tl.load(offsets + sequence).to(tl.int64) + (first - tl.load(bounds + sequence)) // CHUNK
    elif PACKED:
        sequence = place.to(tl.int64)
        start = tl.load(bounds + sequence)
        first = start.to(tl.int64)
        length = tl.load(bounds + sequence + 1) - start
        chunk = tl.load(offsets + sequence).to(tl.int64)
        begins, ends = place >= 0, place >= 0
    else:
        segments = tl.cdiv(chunks, per)
        sequence = (place // segments).to(tl.int64)
        segment = place % segments
        first = sequence * t + segment * per * CHUNK
        length = tl.minimum(t - segment * per * CHUNK, per * CHUNK)
        chunk = sequence * chunks + segment * per
        begins, ends = segment == 0, segment == segments - 1
    return sequence, first, length, chunk, begins, ends


@triton.jit
def is_taken(table, slots, place, PACKED: tl.constexpr, CUT: tl.constexpr):
    """Whether a document has this segment: packed, there are places for the most that any documents have."""
    inside = place >= 0
    if PACKED and CUT:
        inside = place < taken(table, slots)
    return inside


@triton.jit
def start_of_map(values, keys, TILES: tl.constexpr, TILE_P: tl.constexpr):
    """What a walk that finds a map begins with: zeros in the tiles of p, in those after them rows of the identity."""
    return tl.where(values[:, None] - TILES * TILE_P == keys[None, :], 1.0, 0.0)


@triton.jit
def store_map(maps, slot, head, heads, values, keys, state, N: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr,
              TILE_P: tl.constexpr):  # fmt: skip
    """Write what the walk that finds a map ends with; its rows as `start_of_map` counts them."""
    of_map = values >= TILES * TILE_P
    rows = tl.where(of_map, values - (TILES * TILE_P - P), values)
    in_rows = (values < P) | (of_map & (rows < P + N))
    place = maps + (slot.to(tl.int64) * heads + head) * ((P + N) * N)
    tl.store(place + rows[:, None] * N + keys[None, :], state, mask=in_rows[:, None] & (keys < N)[None, :])


@QuickLaunch
@triton.jit(do_not_specialize=["chunks", "per", "heads"])
def compose(
    maps, edge, starts, entering, chunks, per, heads,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr, TILE_K: tl.constexpr,
    PACKED: tl.constexpr, GIVEN: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take rows of a sequence's state through the maps of its segments, and keep what enters each."""
    tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    program = tl.program_id(0)
    tile, head, sequence = program % tiles, program // tiles % heads, (program // (tiles * heads)).to(tl.int64)
    if PACKED:
        first = tl.load(starts + sequence)
        count = tl.load(starts + sequence + 1) - first
        slot = first.to(tl.int64)
    else:
        count = tl.cdiv(chunks, per)
        slot = sequence * count
    if BACK:
        slot += count - 1
    values, keys, span = tile * TILE_P + tl.arange(0, TILE_P), tl.arange(0, PAD_N), tl.arange(0, TILE_K)
    in_p, in_n = values < P, keys < N
    within = in_p[:, None] & in_n[None, :]
    rows = values[:, None] * N + keys[None, :]
    state = tl.zeros([TILE_P, PAD_N], tl.float32)
    if GIVEN:
        at = (sequence * heads + head) * (N * P) + keys[None, :] * P + values[:, None]
        state = tl.load(edge + at, mask=within, other=0.0).to(tl.float32)
    tl.store(entering + (slot * heads + head) * (P * N) + rows, state, mask=within)
    for _ in range(count - 1):
        tl.debug_barrier()  # what was stored is seen by all lanes
        here = entering + (slot * heads + head) * (P * N)
        found = maps + (slot * heads + head) * ((P + N) * N)
        state = tl.load(found + rows, mask=within, other=0.0)
        for k in tl.static_range(0, PAD_N, TILE_K):
            inner = k + span
            left = load(here, values, N, inner, in_p, inner < N)
            right = load(found + P * N, inner, N, keys, inner < N, in_n)
            state = tl.dot(left, right, state, input_precision=PRECISION)
        slot += -1 if BACK else 1
        tl.store(entering + (slot * heads + head) * (P * N) + rows, state, mask=within)
