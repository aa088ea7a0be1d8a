"""Linear attention of heads that share queries and keys: the states of all chunks in memory, heads inside a program.

What all heads of a group have in common is computed once for several of them: Q K^T of a chunk, and in the backward
the sums over heads, of which

    dQ = (sum over heads of R) K + sum over heads of exp(b) dY S^T        dK likewise

(README.md has R and the rest) multiply with a chunk's keys and queries once. No program writes a head's dq or dk, and
none holds a state while it does so: a state of a chunk has as many bytes in half precision as those would have.

States are those of `chunk_states`. Its walk forward leaves the state before every chunk as if none had entered the
segment, and what the segment does to one that does, from which `compose` finds the states between segments; they are
read beside each chunk's own. Results: a program takes a chunk and several heads, one after the other, and adds in a
fixed order.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.linear_attention.chunk_states import USUAL, Chunks, Size
from subquad_kernels.linear_attention.chunk_tiles import fades_between, find_chunk, load_tile, weigh
from subquad_kernels.linear_attention.declaration import heads_of
from subquad_kernels.triton_launch import QuickLaunch

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Outputs
    from subquad_kernels.linear_attention.fused import Call
    from subquad_kernels.linear_attention.launches import Launch


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The size of each kernel, and the `heads` that a program takes: a divisor of those of a group, or by size.

    `borders` and `states` are the two walks; `queries` and `keys` are the two kernels of the backward.
    """

    heads: int | None = None
    borders: Size = USUAL
    states: Size = USUAL
    read: Size = USUAL
    queries: Size = USUAL
    keys: Size = USUAL


class _Chunks(Chunks):
    """With the heads that a program takes, and how many programs a chunk has."""

    def __init__(self, call: Call, launch: Launch, shared: Shared) -> None:
        super().__init__(call, launch, borders=shared.borders, states=shared.states)
        group = call.h // call.h_k
        self.heads = shared.heads or heads_of(group, self.slots * call.h)
        if group % self.heads:
            raise ValueError(f"{self.heads} heads a program do not divide groups of {group}")
        self.parts = call.h // self.heads


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
    states, dstates, dboundaries = chunks.walk_both_ways(boundaries, dy, dy_strides, dfinal, dinitial)
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
    dwrite_gate, ddiagonal = (
        None if gate is None else call.new(b, t, h) for gate in (call.write_gate, call.diagonal)
    )  # fmt: skip
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
    return {
        "q": dq,
        "k": dk,
        "v": dv,
        "log_decay": chunks.differentiate_decay(flow, boundaries, dboundaries, final, dfinal),
        "write_gate": dwrite_gate,
        "diagonal": ddiagonal,
        "initial_state": dinitial,
    }


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment", "h"])
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
@triton.jit(do_not_specialize=["heads", "t", "b", "chunks", "segments", "per_segment", "h"])
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
@triton.jit(do_not_specialize=["heads", "t", "b", "chunks", "segments", "per_segment", "h"])
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
@triton.jit(do_not_specialize=["heads", "t", "b", "chunks", "segments", "per_segment", "h"])
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
@triton.jit(do_not_specialize=["parts", "t", "b", "chunks", "segments", "per_segment", "h"])
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
