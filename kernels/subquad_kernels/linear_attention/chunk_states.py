"""The states of all chunks in memory: what lets a program take a chunk on its own, whatever came before it.

`walk` goes over a segment of time with a head's state in registers and leaves the state before every chunk, as an
operand of half precision; gradients of states are found the same way, from the end, on queries and dy. The gates of a
chunk are summed once (`_prepare`) and lie by head from then on. The decay's gradient is a sum over later tokens, which
`_differentiate_decay` takes from what flows in and out of each (README.md).
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.linear_attention.chunk_tiles import (
    ages_of,
    count_chunks,
    find_chunk,
    load_gates,
    load_state,
    load_tile,
    replace_state,
)
from subquad_kernels.tile_sizes import padded
from subquad_kernels.triton_launch import QuickLaunch
from subquad_kernels.triton_precision import fp32_products

if TYPE_CHECKING:
    from subquad_kernels.linear_attention.fused import Call
    from subquad_kernels.linear_attention.launches import Launch


@dataclass(frozen=True, kw_only=True)
class Size:
    """How one kernel runs; `registers` caps those of a lane."""

    num_warps: int = 4
    num_stages: int = 2
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """As a launch takes them."""
        cap = {} if self.registers is None else {"maxnreg": self.registers}
        return {"STAGES": self.num_stages, "num_warps": self.num_warps} | cap


USUAL = Size()
MOST = 128
"""Rows and columns of a state that a walk holds at most."""


class Chunks:
    """The chunks of one direction: their gates by head, and what every kernel is told of them."""

    def __init__(self, call: Call, launch: Launch, *, borders: Size, states: Size, tile: int = MOST) -> None:
        call.cut(launch)
        self.call, self.borders, self.states, self.tile = call, borders, states, tile
        self.slots = call.b * call.chunks
        self.sizes = (call.t, call.b, call.h, call.h // call.h_k, call.chunks, call.segments, call.chunks_per_segment)
        packed = call.table is not None
        self.constants: dict[str, Any] = {
            "N": call.n, "P": call.p, "PAD_N": padded(call.n), "PAD_P": padded(call.p), "CHUNK": launch.chunk,
            "PACKED": packed, "PRECISION": fp32_products() if call.v.dtype == torch.float32 else "ieee",
        }  # fmt: skip
        ages, gates, own = call.new(3, self.slots, call.h, launch.chunk).unbind()
        self.ages, self.gates, self.own = ages, gates, None if call.diagonal is None else own
        _prepare[(self.slots * call.h,)](
            ages, gates, self.own, call.log_decay, call.write_gate, call.diagonal, call.table,
            call.t, call.h, call.chunks,
            CHUNK=launch.chunk, DECAY=call.decay, GATE=call.write_gate is not None, PACKED=packed, num_warps=1,
        )  # fmt: skip

    def walk(
        self,
        tiles: tuple[Tensor, Tensor],
        strides: tuple[int, ...],
        outer: Tensor | None,
        borders: Tensor,
        *,
        decays: Tensor | None = None,
        lefts: Tensor | None = None,
        keep: bool = True,
        last: Tensor | None = None,
        reverse: bool = False,
    ) -> Tensor:
        """The state before every chunk, as an operand, `outer` entering from without and what leaves going to `last`.

        `borders` holds the states between segments. With `decays` both are filled instead, with what each segment does
        to a state, and the states of chunks are those of which none enters; `lefts` says what is left of one there.
        Shapes:  tiles: keys and values, or queries and dy    outer, last: states h n p    borders: segments-1 b h n p
                 decays: segments-1 b h    lefts: slots h    ->  slots h PAD_N*PAD_P, or nothing unless `keep`
        """
        call, segments = self.call, self.call.segments
        width = self.constants["PAD_N"] * self.constants["PAD_P"]
        states = call.v.new_empty(self.slots * keep, call.h, width)
        size = self.states if keep else self.borders
        rows, columns = (min(self.tile, self.constants[name]) for name in ("PAD_N", "PAD_P"))
        tiles_of_state = width // (rows * columns)
        _walk[(tiles_of_state * call.h * call.b * (segments if keep else segments - 1),)](
            *tiles, self.ages, self.gates, call.table, outer, borders, decays, lefts, states, last,
            call.scale, *self.sizes, *strides,
            GIVEN=outer is not None, KEEP=keep, LAST=last is not None, REVERSE=reverse,
            TILE_N=rows, TILE_P=columns, **self.constants, **size.options(),
        )  # fmt: skip
        return states

    def walk_both_ways(
        self,
        boundaries: Tensor,
        dy: Tensor,
        dy_strides: tuple[int, int],
        dfinal: Tensor | None,
        dinitial: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state before every chunk, the gradient of that after it, and the gradients of those between segments.

        The forward has left the states between segments; from the end a first walk finds what segments do.
        """
        call = self.call
        states = self.walk((call.k, call.v), call.strides[2:], call.initial, boundaries)
        back: dict[str, Any] = {"tiles": (call.q, dy), "strides": (*call.strides[:2], *dy_strides), "outer": dfinal}
        dboundaries = torch.empty_like(boundaries)
        if call.segments > 1:
            decays = call.new(call.segments - 1, call.b, call.h)
            self.walk(**back, borders=dboundaries, decays=decays, keep=False, reverse=True)
            call.compose(decays, dboundaries, reverse=True)
        return states, self.walk(**back, borders=dboundaries, last=dinitial, reverse=True), dboundaries

    def differentiate_decay(
        self, flow: Tensor, boundaries: Tensor, dboundaries: Tensor, final: Tensor, dfinal: Tensor | None
    ) -> Tensor | None:
        """The decay's gradient by token, from what every token's reads take and its writes give.

        Shapes:  flow: slots h CHUNK    ->  b t h, or nothing where nothing decays
        """
        call = self.call
        if call.log_decay is None:
            return None
        dlog_decay = call.new(call.b, call.t, call.h)
        _differentiate_decay[(call.h * call.b * call.segments,)](
            call.v, flow, call.table, boundaries, dboundaries, final, dfinal, dlog_decay,
            *self.sizes, FINAL=dfinal is not None, **self.constants, num_warps=4,
        )  # fmt: skip
        return dlog_decay


@QuickLaunch
@triton.jit(do_not_specialize=["t", "chunks", "h"])
def _prepare(
    ages, gates, own, log_decay, write_gate, diagonal, table, t, h, chunks,
    CHUNK: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Summed log decays, write gates and diagonals of a chunk, by head; past its end the last sum, and zeros.

    Shapes:  ages, gates, own: slots h CHUNK
    """
    program = tl.program_id(0)
    head, slot = program % h, program // h
    sequence = (slot // chunks).to(tl.int64)
    tokens = tl.arange(0, CHUNK)
    row, limit, _, _, _ = find_chunk(table, slot % chunks, sequence, t, CHUNK, PACKED)
    sums, whole = ages_of(log_decay, row * h + head, h, head, tokens, limit, DECAY)
    at = program.to(tl.int64) * CHUNK + tokens
    tl.store(ages + at, tl.where(tokens < limit, sums, whole))
    tl.store(gates + at, load_gates(write_gate, row * h + head, h, tokens, limit, GATE))
    if own is not None:
        tl.store(own + at, load_gates(diagonal, row * h + head, h, tokens, limit, True))


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment", "h"])
def _walk(
    x, y, ages, gates, table, outer, borders, decays, lefts, states, last,
    scale, t, b, h, group, chunks, segments, per_segment, x_stride, x_head_stride, y_stride, y_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, PAD_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, GIVEN: tl.constexpr, KEEP: tl.constexpr, LAST: tl.constexpr,
    REVERSE: tl.constexpr, STAGES: tl.constexpr, TILE_N: tl.constexpr, TILE_P: tl.constexpr,
):  # fmt: skip
    """A head's state over a segment:  S' = exp(B) S + (exp(B - b) w K)^T V,  or from the end with q, dy and exp(b).

    A program has a tile of the state, [TILE_N, TILE_P], which no other one's asks for.
    KEEP: every chunk's is left. Where `decays` are given, no state enters but from without, and what the segment does
    to one is left: a decay, and a write which becomes the state between segments in `compose`.
    Shapes:  decays: segments-1 b h    borders: segments-1 b h n p    lefts: slots h    states: slots h PAD_N PAD_P
    """
    program = tl.program_id(0)
    tile = 0
    tokens, lines, columns = tl.arange(0, CHUNK), tl.arange(0, TILE_N), tl.arange(0, TILE_P)
    ACROSS: tl.constexpr = PAD_P // TILE_P
    TILES: tl.constexpr = PAD_N // TILE_N * ACROSS
    if TILES > 1:
        tile, program = program % TILES, program // TILES
        lines += tile // ACROSS * TILE_N
        columns += tile % ACROSS * TILE_P
    head = program % h
    sequence = ((program // h) % b).to(tl.int64)
    border = program // (h * b)
    segment = border
    if REVERSE and not KEEP:
        segment += 1  # the first has no use for what it does
    STATE: tl.constexpr = N * P
    offsets = lines[:, None] * P + columns[None, :]
    within = (lines[:, None] < N) & (columns[None, :] < P)
    kept = lines[:, None] * PAD_P + columns[None, :]
    x += (head // group) * x_head_stride
    y += head * y_head_stride
    outermost = segment == (segments - 1 if REVERSE else 0)
    left = tl.where(outermost, 0.0, 1.0)
    state = load_state(outer, sequence * h + head, offsets, within & outermost, STATE, GIVEN and not PACKED)
    if decays is None and not outermost:
        before = segment if REVERSE else segment - 1
        state = load_state(borders, (before * b + sequence) * h + head, offsets, within, STATE, True)
    first = segment * per_segment
    end = tl.minimum(first + per_segment, count_chunks(table, chunks, PACKED))
    for step in tl.range(0, end - first, num_stages=STAGES):
        index = end - 1 - step if REVERSE else first + step
        row, limit, owner, begins, ends = find_chunk(table, index, sequence, t, CHUNK, PACKED)
        at = (sequence * chunks + index) * h + head
        xs = load_tile(x + row * x_stride, x_stride, tokens, limit, lines, N)
        ys = load_tile(y + row * y_stride, y_stride, tokens, limit, columns, P)
        age = tl.load(ages + at * CHUNK + tokens)
        whole = tl.load(ages + at * CHUNK + CHUNK - 1)
        if REVERSE:
            factors = tl.exp2(age) * scale
            enters, leaves = ends, begins
        else:
            factors = tl.exp2(whole - age) * tl.load(gates + at * CHUNK + tokens)
            enters, leaves = begins, ends
        if PACKED:
            left = tl.where(enters, 0.0, left)
            state = replace_state(state, enters, outer, owner * h + head, offsets, within, STATE, GIVEN)
        if KEEP:
            tl.store(states + at * (PAD_N * PAD_P) + kept, state.to(states.dtype.element_ty))
        if lefts is not None:
            tl.store(lefts + at, left)
        decay = tl.exp2(whole)
        left *= decay
        ys = (ys.to(tl.float32) * factors[:, None]).to(x.dtype.element_ty)
        state = tl.dot(tl.trans(xs), ys, state * decay, input_precision=PRECISION)
        if PACKED and LAST and leaves:
            tl.store(last + (owner * h + head) * STATE + offsets, state, mask=within)
    if LAST and not PACKED and segment == (0 if REVERSE else segments - 1):
        tl.store(last + (sequence * h + head) * STATE + offsets, state, mask=within)
    if decays is not None and border < segments - 1:
        place = (border * b + sequence) * h + head
        tl.store(borders + place * STATE + offsets, state, mask=within)
        if tile == 0:
            tl.store(decays + place, left)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment", "h"])
def _differentiate_decay(
    v, flow, table, boundaries, dboundaries, final, dfinal, dlog_decay,
    t, b, h, group, chunks, segments, per_segment,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, PAD_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """dg_t of a segment: q . dq - k . dk of its tokens from t on, and <G, S> where the segment or a document ends.

    Shapes:  flow: slots h CHUNK    dlog_decay: b t h
    """
    program = tl.program_id(0)
    head = program % h
    sequence = ((program // h) % b).to(tl.int64)
    segment = program // (h * b)
    tokens = tl.arange(0, CHUNK)
    STATE: tl.constexpr = N * P
    carried = 0.0
    if segment < segments - 1:
        carried = _product(v, boundaries, dboundaries, (segment * b + sequence) * h + head, STATE)
    elif FINAL and not PACKED:
        carried = _product(v, final, dfinal, sequence * h + head, STATE)
    first = segment * per_segment
    end = tl.minimum(first + per_segment, count_chunks(table, chunks, PACKED))
    for step in range(0, end - first):
        index = end - 1 - step
        row, limit, owner, _, ends = find_chunk(table, index, sequence, t, CHUNK, PACKED)
        if PACKED and ends:
            carried = 0.0
            if FINAL:
                carried = _product(v, final, dfinal, owner * h + head, STATE)
        flows = tl.load(flow + ((sequence * chunks + index) * h + head) * CHUNK + tokens)
        later = tl.cumsum(flows, reverse=True) + carried
        tl.store(dlog_decay + row * h + head + tokens * h, later, mask=tokens < limit)
        carried += tl.sum(flows)


@triton.jit
def _product(v, states, gradients, place, STATE: tl.constexpr):
    """<G, S> with G rounded to the type of v, as the chunk before it has it: their products with its keys cancel."""
    BLOCK: tl.constexpr = 1024 if STATE <= 16384 else 4096
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for base in tl.static_range(0, STATE, BLOCK):
        inside = base + columns < STATE
        at = place * STATE + base + columns
        rounded = tl.load(gradients + at, mask=inside, other=0.0).to(v.dtype.element_ty).to(tl.float32)
        total += rounded * tl.load(states + at, mask=inside, other=0.0)
    return tl.sum(total)
