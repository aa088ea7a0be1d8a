"""Linear attention of heads that share queries and keys: the states of all chunks in memory, heads inside a program.

What all heads of a group have in common is computed once for several of them: Q K^T of a chunk, and in the backward
the sums over heads, of which

    dQ = (sum over heads of R) K + sum over heads of exp(b) dY S^T        dK likewise

(README.md has R and the rest) multiply with a chunk's keys and queries once. No program writes a head's dq or dk, and
none holds a state while it does so: a state of a chunk has as many bytes in half precision as those would have.

States: `_walk` goes over a segment of time with a head's state in registers. Forward it leaves the state before every
chunk as if none had entered the segment, and what the segment does to one that does, from which `compose` finds the
states between segments; they are read beside each chunk's own. In the backward those are known: it walks once more
from them. Gradients of states are found from the end, on queries and dy, and take two walks. Results: a program takes
a chunk and several heads, one after the other, and adds in a fixed order. The gates of a chunk are summed once
(`_prepare`) and lie by head from then on.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"

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
    fades_between,
    find_chunk,
    load_gates,
    load_state,
    load_tile,
    walk_stages,
    weigh,
)
from subquad_kernels.linear_attention.declaration import heads_of
from subquad_kernels.tile_sizes import padded
from subquad_kernels.triton_launch import QuickLaunch
from subquad_kernels.triton_precision import fp32_products

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Outputs
    from subquad_kernels.linear_attention.fused import Call, Launch


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


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The size of each kernel, and the `heads` that a program takes: a divisor of those of a group, or by size.

    `borders` and `states` are the two walks; `queries` and `keys` are the two kernels of the backward.
    """

    heads: int | None = None
    borders: Size = Size()
    states: Size = Size()
    read: Size = Size()
    queries: Size = Size()
    keys: Size = Size()


class _Chunks:
    """The chunks of one direction: their gates by head, and what every kernel is told of them."""

    def __init__(self, call: Call, launch: Launch, shared: Shared) -> None:
        call.cut(launch)
        self.call, self.shared = call, shared
        self.slots = call.b * call.chunks
        group = call.h // call.h_k
        self.heads = shared.heads or heads_of(group, self.slots * call.h)
        if group % self.heads:
            raise ValueError(f"{self.heads} heads a program do not divide groups of {group}")
        self.parts = call.h // self.heads
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
        size = self.shared.states if keep else self.shared.borders
        _walk[(call.h * call.b * (segments if keep else segments - 1),)](
            *tiles, self.ages, self.gates, call.table, outer, borders, decays, lefts, states, last,
            call.scale, *self.sizes, *strides,
            GIVEN=outer is not None, KEEP=keep, LAST=last is not None, REVERSE=reverse,
            **self.constants, **size.options(),
        )  # fmt: skip
        return states


def forward(call: Call, launch: Launch, shared: Shared) -> Outputs:
    """As `fused` has it:  y: b t h p    final_state: states h n p    boundaries: segments-1 b h n p"""
    chunks = _Chunks(call, launch, shared)
    y = torch.empty_like(call.v, memory_format=torch.contiguous_format)
    final = call.states(call.initial)
    rows = (call.segments - 1, call.b, call.h)
    boundaries, decays, lefts = call.new(*rows, call.n, call.p), call.new(*rows), call.new(chunks.slots, call.h)
    entering = torch.empty_like(boundaries, dtype=call.v.dtype)
    states = chunks.walk(
        (call.k, call.v), call.strides[2:], call.initial, boundaries, decays=decays, lefts=lefts, last=final
    )  # fmt: skip
    if call.segments > 1:
        call.compose(decays, boundaries, reverse=False, copies=entering)
        _finish[(chunks.slots * call.h,)](
            chunks.ages, call.table, lefts, boundaries, final, *chunks.sizes, **chunks.constants, num_warps=4
        )  # fmt: skip
    _read_heads[(chunks.slots * chunks.parts,)](
        call.q, call.k, call.v, call.table, chunks.ages, chunks.gates, chunks.own, states, lefts, entering, y,
        call.scale, chunks.heads, *chunks.sizes, *call.strides,
        CUT=call.segments > 1, **chunks.constants, **shared.read.options(),
    )  # fmt: skip
    return y, final, boundaries


def backward(
    call: Call,
    launch: Launch,
    shared: Shared,
    final: Tensor,
    boundaries: Tensor,
    dy: Tensor,
    dy_strides: tuple[int, int],
    dfinal: Tensor | None,
) -> dict[str, Tensor | None]:
    """As `fused` has it: gradients in the types of their tensors, those of a decay per head still by token."""
    b, t, h, h_k, n = call.b, call.t, call.h, call.h_k, call.n
    chunks = _Chunks(call, launch, shared)
    slots, parts = chunks.slots, chunks.parts
    dinitial = None if call.initial is None else call.states(dfinal)
    states = chunks.walk((call.k, call.v), call.strides[2:], call.initial, boundaries)
    back: dict[str, Any] = {"tiles": (call.q, dy), "strides": (*call.strides[:2], *dy_strides), "outer": dfinal}
    dboundaries = torch.empty_like(boundaries)
    if call.segments > 1:
        decays = call.new(call.segments - 1, b, h)
        chunks.walk(**back, borders=dboundaries, decays=decays, keep=False, reverse=True)
        call.compose(decays, dboundaries, reverse=True)
    dstates = chunks.walk(**back, borders=dboundaries, last=dinitial, reverse=True)
    # Sums over a program's heads.
    dqueries, dkeys = call.new(2, slots, parts, launch.chunk, chunks.constants["PAD_N"]).unbind()
    mixed = call.new(slots, parts, launch.chunk, launch.chunk)
    flow = torch.empty_like(chunks.ages)
    _differentiate_queries[(slots * parts,)](
        call.q, call.k, call.v, dy, call.table, chunks.ages, chunks.gates, chunks.own, states, mixed, dqueries, flow,
        call.scale, chunks.heads, *chunks.sizes, *call.strides, *dy_strides,
        **chunks.constants, **shared.queries.options(),
    )  # fmt: skip
    dv = torch.empty_like(call.v, memory_format=torch.contiguous_format)
    dlog_decay, dwrite_gate, ddiagonal = (
        None if gate is None else call.new(b, t, h) for gate in (call.log_decay, call.write_gate, call.diagonal)
    )
    _differentiate_keys[(slots * parts,)](
        call.q, call.k, call.v, dy, call.table, chunks.ages, chunks.gates, chunks.own, dstates,
        dkeys, flow, dv, dwrite_gate, ddiagonal,
        call.scale, chunks.heads, *chunks.sizes, *call.strides, *dy_strides,
        **chunks.constants, **shared.keys.options(),
    )  # fmt: skip
    dq, dk = (call.v.new_empty(b, t, h_k, n) for _ in range(2))
    _mix[(2 * slots * h_k,)](
        call.q, call.k, call.table, mixed, dqueries, dkeys, dq, dk,
        parts // h_k, *chunks.sizes, *call.strides[:4], **chunks.constants, num_warps=8,
    )  # fmt: skip
    if dlog_decay is not None:
        _differentiate_decay[(h * b * call.segments,)](
            call.v, flow, call.table, boundaries, dboundaries, final, dfinal, dlog_decay,
            *chunks.sizes, FINAL=dfinal is not None, **chunks.constants, num_warps=4,
        )  # fmt: skip
    return {
        "q": dq,
        "k": dk,
        "v": dv,
        "log_decay": dlog_decay,
        "write_gate": dwrite_gate,
        "diagonal": ddiagonal,
        "initial_state": dinitial,
    }


@QuickLaunch
@triton.jit(do_not_specialize=["t", "chunks"])
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
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment"])
def _walk(
    x, y, ages, gates, table, outer, borders, decays, lefts, states, last,
    scale, t, b, h, group, chunks, segments, per_segment, x_stride, x_head_stride, y_stride, y_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, PAD_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, GIVEN: tl.constexpr, KEEP: tl.constexpr, LAST: tl.constexpr,
    REVERSE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A head's state over a segment:  S' = exp(B) S + (exp(B - b) w K)^T V,  or from the end with q, dy and exp(b).

    KEEP: every chunk's is left. Where `decays` are given, no state enters but from without, and what the segment does
    to one is left: a decay, and a write which becomes the state between segments in `compose`.
    Shapes:  decays: segments-1 b h    borders: segments-1 b h n p    lefts: slots h    states: slots h PAD_N PAD_P
    """
    program = tl.program_id(0)
    head = program % h
    sequence = ((program // h) % b).to(tl.int64)
    border = program // (h * b)
    segment = border
    if REVERSE and not KEEP:
        segment += 1  # the first has no use for what it does
    tokens, lines, columns = tl.arange(0, CHUNK), tl.arange(0, PAD_N), tl.arange(0, PAD_P)
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
    for step in tl.range(0, end - first, num_stages=walk_stages(STAGES, PACKED and GIVEN)):
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
        if PACKED and enters:
            left = 0.0
            state = load_state(outer, owner * h + head, offsets, within, STATE, GIVEN)
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
        tl.store(decays + place, left)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment"])
def _finish(
    ages, table, lefts, boundaries, final, t, b, h, group, chunks, segments, per_segment,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, PAD_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """final_state of what ends with a chunk: added is what is left there of the state that entered its segment."""
    program = tl.program_id(0).to(tl.int64)
    head, slot = program % h, program // h
    sequence, index = slot // chunks, slot % chunks
    _, limit, owner, _, ends = find_chunk(table, index, sequence, t, CHUNK, PACKED)
    if not PACKED:
        ends = index == chunks - 1
    left = tl.load(lefts + program, mask=ends & (limit > 0), other=0.0)
    if left > 0.0:
        left *= tl.exp2(tl.load(ages + program * CHUNK + CHUNK - 1))
        place = ((index // per_segment - 1) * b + sequence) * h + head
        for base in range(0, N * P, 1024):
            columns = base + tl.arange(0, 1024)
            inside = columns < N * P
            at = final + (owner * h + head) * (N * P) + columns
            entered = tl.load(boundaries + place * (N * P) + columns, mask=inside, other=0.0)
            tl.store(at, tl.load(at, mask=inside, other=0.0) + left * entered, mask=inside)


@triton.jit
def _heads(table, heads, t, h, group, chunks, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """A program's slot (64 bits), part, first head and the one after its last, their head of q and k, row, length.

    Neighbours share a chunk's q and k. A slot that no document needs has no heads.
    """
    program = tl.program_id(0)
    parts = h // heads
    part, slot = program % parts, (program // parts).to(tl.int64)
    row, limit, _, _, _ = find_chunk(table, slot % chunks, slot // chunks, t, CHUNK, PACKED)
    first = part * heads
    end = first + tl.where(limit > 0, heads, 0)
    return slot, part, first, end, first // group, row, limit


@triton.jit
def _load_own(own, at):
    """The diagonal of a chunk, where one is given."""
    values = 1.0
    if own is not None:
        values = tl.load(own + at)
    return values


@QuickLaunch
@triton.jit(do_not_specialize=["heads", "t", "b", "chunks", "segments", "per_segment"])
def _read_heads(
    q, k, v, table, ages, gates, own, states, lefts, entering, y,
    scale, heads, t, b, h, group, chunks, segments, per_segment,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    CUT: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, PAD_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y of a chunk for several heads, from its own states and from what is left of those that entered its segment.

    Shapes:  entering: segments-1 b h n p    lefts: slots h
    """
    slot, _, first, end, head_k, row, limit = _heads(table, heads, t, h, group, chunks, CHUNK, PACKED)
    DIAGONAL: tl.constexpr = own is not None
    tokens, lines, columns = tl.arange(0, CHUNK), tl.arange(0, PAD_N), tl.arange(0, PAD_P)
    kept = lines[:, None] * PAD_P + columns[None, :]
    is_own = tokens[:, None] == tokens[None, :]
    queries = load_tile(q + head_k * q_head_stride + row * q_stride, q_stride, tokens, limit, lines, N)
    keys = load_tile(k + head_k * k_head_stride + row * k_stride, k_stride, tokens, limit, lines, N)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    mask = (tokens[:, None] < limit) & (columns[None, :] < P)
    within = (lines[:, None] < N) & (columns[None, :] < P)
    border = tl.maximum((slot % chunks) // per_segment - 1, 0)  # before the first segment's, nothing of it is left
    entered = entering + (border * b + slot // chunks) * h * (N * P) + lines[:, None] * P + columns[None, :]
    for head in tl.range(first, end, num_stages=STAGES):
        at = slot * h + head
        values = load_tile(v + head * v_head_stride + row * v_stride, v_stride, tokens, limit, columns, P)
        state = tl.load(states + at * (PAD_N * PAD_P) + kept)
        age = tl.load(ages + at * CHUNK + tokens)
        gate = tl.load(gates + at * CHUNK + tokens)
        fades = fades_between(age[:, None], age[None, :], tokens[:, None], tokens[None, :], 1, DIAGONAL)
        diagonal = _load_own(own, at * CHUNK + tokens[None, :])
        mixed = weigh(scores, fades, gate[None, :], diagonal, is_own, True, DIAGONAL)
        if CUT:
            before = tl.load(entered + head * (N * P), mask=within, other=0.0)
            past = tl.dot(queries, before, input_precision=PRECISION) * tl.load(lefts + at)
            past = tl.dot(queries, state, past, input_precision=PRECISION)
        else:
            past = tl.dot(queries, state, input_precision=PRECISION)
        past *= (tl.exp2(age) * scale)[:, None]
        result = tl.dot(mixed.to(v.dtype.element_ty), values, past, input_precision=PRECISION)
        to = y + (row * h + head) * P + tokens[:, None] * (h * P) + columns[None, :]
        tl.store(to, result.to(y.dtype.element_ty), mask=mask)


@QuickLaunch
@triton.jit(do_not_specialize=["heads", "t", "b", "chunks", "segments", "per_segment"])
def _differentiate_queries(
    q, k, v, dy, table, ages, gates, own, states, mixed, dqueries, flow,
    scale, heads, t, b, h, group, chunks, segments, per_segment,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, dy_stride, dy_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, PAD_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over several heads of R and of exp(b) dY S^T, and of every head q . dq, less k . dk inside the chunk.

    No product feeds another: what R multiplies comes once all heads are added.
    Shapes:  mixed: slots parts CHUNK CHUNK    dqueries: slots parts CHUNK PAD_N    flow: slots h CHUNK
    """
    slot, part, first, end, head_k, row, limit = _heads(table, heads, t, h, group, chunks, CHUNK, PACKED)
    DIAGONAL: tl.constexpr = own is not None
    tokens, lines, columns = tl.arange(0, CHUNK), tl.arange(0, PAD_N), tl.arange(0, PAD_P)
    kept = lines[:, None] * PAD_P + columns[None, :]
    is_own = tokens[:, None] == tokens[None, :]
    queries = load_tile(q + head_k * q_head_stride + row * q_stride, q_stride, tokens, limit, lines, N)
    keys = load_tile(k + head_k * k_head_stride + row * k_stride, k_stride, tokens, limit, lines, N)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    total = tl.zeros([CHUNK, CHUNK], tl.float32)
    result = tl.zeros([CHUNK, PAD_N], tl.float32)
    for head in tl.range(first, end, num_stages=STAGES):
        at = slot * h + head
        pulls = load_tile(dy + head * dy_head_stride + row * dy_stride, dy_stride, tokens, limit, columns, P)
        values = load_tile(v + head * v_head_stride + row * v_stride, v_stride, tokens, limit, columns, P)
        state = tl.load(states + at * (PAD_N * PAD_P) + kept)
        age = tl.load(ages + at * CHUNK + tokens)
        gate = tl.load(gates + at * CHUNK + tokens)
        pairs = tl.dot(pulls, tl.trans(values), input_precision=PRECISION)
        fades = fades_between(age[:, None], age[None, :], tokens[:, None], tokens[None, :], 1, DIAGONAL)
        diagonal = _load_own(own, at * CHUNK + tokens[None, :])
        pairs = weigh(pairs, fades, gate[None, :], diagonal, is_own, True, DIAGONAL)
        total += pairs
        pairs *= scores
        since = tl.exp2(age) * scale
        past = tl.dot(queries, state, input_precision=PRECISION) * pulls.to(tl.float32)
        pulls = (pulls.to(tl.float32) * since[:, None]).to(q.dtype.element_ty)
        result = tl.dot(pulls, tl.trans(state), result, input_precision=PRECISION)
        flows = tl.sum(pairs, 1) - tl.sum(pairs, 0) + tl.sum(past, 1) * since
        tl.store(flow + at * CHUNK + tokens, flows)
    place = slot * (h // heads) + part
    to = place * CHUNK + tokens[:, None]
    tl.store(mixed + to * CHUNK + tokens[None, :], total * scale)
    tl.store(dqueries + to * PAD_N + lines[None, :], result)


@QuickLaunch
@triton.jit(do_not_specialize=["heads", "t", "b", "chunks", "segments", "per_segment"])
def _differentiate_keys(
    q, k, v, dy, table, ages, gates, own, dstates, dkeys, flow, dv, dwrite_gate, ddiagonal,
    scale, heads, t, b, h, group, chunks, segments, per_segment,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, dy_stride, dy_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, PAD_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sum over several heads of exp(B - b) w V G'^T; of every head dv and its gates' gradients; the rest of k . dk.

    Products have keys as rows: no tile that was just computed is transposed as a left operand, which Triton 3.4 to 3.7
    miscompile on Hopper.
    Shapes:  dkeys: slots parts CHUNK PAD_N    flow: slots h CHUNK    dwrite_gate, ddiagonal: b t h
    """
    slot, part, first, end, head_k, row, limit = _heads(table, heads, t, h, group, chunks, CHUNK, PACKED)
    DIAGONAL: tl.constexpr = own is not None
    tokens, lines, columns = tl.arange(0, CHUNK), tl.arange(0, PAD_N), tl.arange(0, PAD_P)
    kept = lines[:, None] * PAD_P + columns[None, :]
    real = tokens < limit
    mask = real[:, None] & (columns[None, :] < P)
    is_own = tokens[:, None] == tokens[None, :]
    queries = load_tile(q + head_k * q_head_stride + row * q_stride, q_stride, tokens, limit, lines, N)
    keys = load_tile(k + head_k * k_head_stride + row * k_stride, k_stride, tokens, limit, lines, N)
    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
    if DIAGONAL:
        own_scores = tl.sum(tl.where(is_own, scores, 0.0), axis=1)
    result = tl.zeros([CHUNK, PAD_N], tl.float32)
    for head in tl.range(first, end, num_stages=STAGES):
        at = slot * h + head
        pulls = load_tile(dy + head * dy_head_stride + row * dy_stride, dy_stride, tokens, limit, columns, P)
        values = load_tile(v + head * v_head_stride + row * v_stride, v_stride, tokens, limit, columns, P)
        grad = tl.load(dstates + at * (PAD_N * PAD_P) + kept)
        age = tl.load(ages + at * CHUNK + tokens)
        gate = tl.load(gates + at * CHUNK + tokens)
        until = tl.exp2(tl.load(ages + at * CHUNK + CHUNK - 1) - age)
        fades = fades_between(age[None, :], age[:, None], tokens[None, :], tokens[:, None], 1, DIAGONAL)
        mixed = (scores * fades).to(v.dtype.element_ty)
        writes = (values.to(tl.float32) * (until * gate)[:, None]).to(v.dtype.element_ty)
        result = tl.dot(writes, tl.trans(grad), result, input_precision=PRECISION)
        dvalues = tl.dot(keys, grad, input_precision=PRECISION)
        between = tl.sum(values.to(tl.float32) * dvalues, axis=1) * until * gate
        tl.store(flow + at * CHUNK + tokens, tl.load(flow + at * CHUNK + tokens) - between)
        dvalues *= until[:, None]
        dvalues = tl.dot(mixed, pulls, dvalues, input_precision=PRECISION)
        by_token = row * h + head + tokens * h
        if dwrite_gate is not None:
            tl.store(dwrite_gate + by_token, tl.sum(values.to(tl.float32) * dvalues, axis=1), mask=real)
        dvalues *= gate[:, None]
        if DIAGONAL:
            own_pairs = tl.sum(values.to(tl.float32) * pulls.to(tl.float32), axis=1)
            tl.store(ddiagonal + by_token, own_scores * own_pairs, mask=real)
            dvalues += (tl.load(own + at * CHUNK + tokens) * own_scores)[:, None] * pulls.to(tl.float32)
        to = dv + (row * h + head) * P + tokens[:, None] * (h * P) + columns[None, :]
        tl.store(to, dvalues.to(dv.dtype.element_ty), mask=mask)
    to = (slot * (h // heads) + part) * CHUNK + tokens[:, None]
    tl.store(dkeys + to * PAD_N + lines[None, :], result)


@QuickLaunch
@triton.jit(do_not_specialize=["parts", "t", "b", "chunks", "segments", "per_segment"])
def _mix(
    q, k, table, mixed, dqueries, dkeys, dq, dk,
    parts, t, b, h, group, chunks, segments, per_segment, q_stride, q_head_stride, k_stride, k_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, PAD_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a chunk, or dk: the parts of a group's heads are added, and R, rounded once, mixes keys or queries.

    R is read transposed for dk: a computed tile may not be transposed as a left operand.
    Shapes:  dq, dk: b t h_k n
    """
    program = tl.program_id(0)
    heads = h // group
    for_keys, place = program % 2 == 1, program // 2
    head, slot = place % heads, (place // heads).to(tl.int64)
    row, limit, _, _, _ = find_chunk(table, slot % chunks, slot // chunks, t, CHUNK, PACKED)
    tokens, lines = tl.arange(0, CHUNK), tl.arange(0, PAD_N)
    if for_keys:
        at, stride, summed, into = q + head * q_head_stride + row * q_stride, q_stride, dkeys, dk
        pairs = tokens[:, None] + tokens[None, :] * CHUNK
    else:
        at, stride, summed, into = k + head * k_head_stride + row * k_stride, k_stride, dqueries, dq
        pairs = tokens[:, None] * CHUNK + tokens[None, :]
    total = tl.zeros([CHUNK, CHUNK], tl.float32)
    result = tl.zeros([CHUNK, PAD_N], tl.float32)
    for part in range(parts):
        first = ((slot * heads + head) * parts + part) * CHUNK
        total += tl.load(mixed + first * CHUNK + pairs)
        result += tl.load(summed + (first + tokens[:, None]) * PAD_N + lines[None, :])
    others = load_tile(at, stride, tokens, limit, lines, N)
    result = tl.dot(total.to(q.dtype.element_ty), others, result, input_precision=PRECISION)
    to = into + (row * heads + head) * N + tokens[:, None] * (heads * N) + lines[None, :]
    tl.store(to, result.to(into.dtype.element_ty), mask=(tokens[:, None] < limit) & (lines[None, :] < N))


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment"])
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
    BLOCK: tl.constexpr = 1024
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for base in tl.static_range(0, STATE, BLOCK):
        inside = base + columns < STATE
        at = place * STATE + base + columns
        rounded = tl.load(gradients + at, mask=inside, other=0.0).to(v.dtype.element_ty).to(tl.float32)
        total += rounded * tl.load(states + at, mask=inside, other=0.0)
    return tl.sum(total)
