"""The backward of wide heads: the states of all chunks in memory, and one program a chunk and a head.

A state of 128 x 128 beside the products of a chunk is more than the registers of a walk hold. The walks of
`chunk_states` hold nothing else, and leave it in memory before every chunk; `_differentiate` then takes a chunk on its
own, has no state to carry, and computes dq, dk, dv and what flows into the decay from one pass over q, k, v and dy.
Where a state is several tiles of 128 x 128, a program walks one of them, and `tiled_states` takes the chunks.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.linear_attention import tiled_states
from subquad_kernels.linear_attention.chunk_states import MOST, USUAL, Chunks, Size
from subquad_kernels.linear_attention.chunk_tiles import fades_between, find_chunk, load_tile, weigh
from subquad_kernels.triton_launch import QuickLaunch

if TYPE_CHECKING:
    from subquad_kernels.linear_attention.fused import Call
    from subquad_kernels.linear_attention.launches import Launch


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The size of each kernel: of the walk between segments, of that which keeps states, of what takes a chunk.

    A state of more than `tile` rows or columns is walked in tiles, and a chunk is taken by `tiled_states`.
    """

    borders: Size = USUAL
    states: Size = USUAL
    chunks: Size = USUAL
    tile: int = MOST


def backward(
    call: Call,
    launch: Launch,
    kept: Kept,
    final: Tensor,
    boundaries: Tensor,
    dy: Tensor,
    dy_strides: tuple[int, int],
    dfinal: Tensor | None,
) -> dict[str, Tensor | None]:
    """As `fused` has it: gradients in the types of their tensors, those of a decay per head still by token."""
    b, t, h, n = call.b, call.t, call.h, call.n
    chunks = Chunks(call, launch, borders=kept.borders, states=kept.states, tile=kept.tile)
    dinitial = None if call.initial is None else call.states(dfinal)
    states, dstates, dboundaries = chunks.walk_both_ways(boundaries, dy, dy_strides, dfinal, dinitial)
    dq, dk = (call.v.new_empty(b, t, h, n) for _ in range(2))
    dv = torch.empty_like(call.v, memory_format=torch.contiguous_format)
    if max(chunks.constants["PAD_N"], chunks.constants["PAD_P"]) > kept.tile:
        flow, dwrite_gate, ddiagonal = tiled_states.differentiate(
            chunks, kept.chunks, states, dstates, dy, dy_strides, dq, dk, dv
        )
    else:
        flow = None if call.log_decay is None else torch.empty_like(chunks.ages)
        dwrite_gate, ddiagonal = (
            None if gate is None else call.new(b, t, h) for gate in (call.write_gate, call.diagonal)
        )  # fmt: skip
        _differentiate[(chunks.slots * h,)](
            call.q, call.k, call.v, dy, call.table, chunks.ages, chunks.gates, chunks.own, states, dstates,
            dq, dk, dv, flow, dwrite_gate, ddiagonal,
            call.scale, *chunks.sizes, *call.strides, *dy_strides,
            **chunks.constants, num_warps=kept.chunks.num_warps,
        )  # fmt: skip
    if h > call.h_k:
        dq, dk = (part.view(b, t, call.h_k, -1, n).sum(3) for part in (dq, dk))
    return {
        "q": dq,
        "k": dk,
        "v": dv,
        "log_decay": None if flow is None else chunks.differentiate_decay(flow, boundaries, dboundaries, final, dfinal),
        "write_gate": dwrite_gate,
        "diagonal": ddiagonal,
        "initial_state": dinitial,
    }


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment", "h"])
def _differentiate(
    q, k, v, dy, table, ages, gates, own, states, dstates, dq, dk, dv, flow, dwrite_gate, ddiagonal,
    scale, t, b, h, group, chunks, segments, per_segment,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, dy_stride, dy_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, PAD_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk of a head, from the state before it and the gradient of that after it.

    Products for dk and dv have keys as rows: no tile that was just computed is transposed as a left operand, which
    Triton 3.4 to 3.7 miscompile on Hopper. dk mixes by the same rounded numbers as dq, so that in q . dq - k . dk the
    rounding of a chunk's pairs cancels.
    Shapes:  states, dstates: slots h PAD_N PAD_P    dq, dk: b t h n    flow: slots h CHUNK
    """
    program = tl.program_id(0)
    head, slot = program % h, (program // h).to(tl.int64)
    row, limit, _, _, _ = find_chunk(table, slot % chunks, slot // chunks, t, CHUNK, PACKED)
    DIAGONAL: tl.constexpr = own is not None
    tokens, lines, columns = tl.arange(0, CHUNK), tl.arange(0, PAD_N), tl.arange(0, PAD_P)
    is_own = tokens[:, None] == tokens[None, :]
    real = tokens < limit
    at = slot * h + head
    kept = at * (PAD_N * PAD_P) + lines[:, None] * PAD_P + columns[None, :]
    by_token = row * h + head + tokens * h
    to_lines = by_token[:, None] * N + lines[None, :]
    in_lines = real[:, None] & (lines[None, :] < N)
    head_k = head // group
    q += head_k * q_head_stride + row * q_stride
    k += head_k * k_head_stride + row * k_stride
    v += head * v_head_stride + row * v_stride
    dy += head * dy_head_stride + row * dy_stride
    values = load_tile(v, v_stride, tokens, limit, columns, P)
    pulls = load_tile(dy, dy_stride, tokens, limit, columns, P)
    keys = load_tile(k, k_stride, tokens, limit, lines, N)
    queries = load_tile(q, q_stride, tokens, limit, lines, N)
    age = tl.load(ages + at * CHUNK + tokens)
    gate = tl.load(gates + at * CHUNK + tokens)
    until = tl.exp2(tl.load(ages + at * CHUNK + CHUNK - 1) - age)
    diagonal = gate
    if DIAGONAL:
        diagonal = tl.load(own + at * CHUNK + tokens)

    state = tl.load(states + kept)
    fades = fades_between(age[:, None], age[None, :], tokens[:, None], tokens[None, :], 1, DIAGONAL)
    pairs = tl.dot(pulls, tl.trans(values), input_precision=PRECISION) * scale
    mixed = weigh(pairs, fades, gate[None, :], diagonal[None, :], is_own, True, DIAGONAL)
    past = tl.dot(pulls, tl.trans(state), input_precision=PRECISION) * (tl.exp2(age) * scale)[:, None]
    dqueries = tl.dot(mixed.to(v.dtype.element_ty), keys, past, input_precision=PRECISION)
    tl.store(dq + to_lines, dqueries.to(dq.dtype.element_ty), mask=in_lines)
    flows = tl.sum(queries.to(tl.float32) * dqueries, axis=1)

    grad = tl.load(dstates + kept)
    fades = fades_between(age[None, :], age[:, None], tokens[None, :], tokens[:, None], 1, DIAGONAL)
    pairs = tl.dot(values, tl.trans(pulls), input_precision=PRECISION) * scale
    mixed = weigh(pairs, fades, gate[:, None], diagonal[:, None], is_own, True, DIAGONAL)
    dkeys = tl.dot(values, tl.trans(grad), input_precision=PRECISION) * (until * gate)[:, None]
    dkeys = tl.dot(mixed.to(v.dtype.element_ty), queries, dkeys, input_precision=PRECISION)
    tl.store(dk + to_lines, dkeys.to(dk.dtype.element_ty), mask=in_lines)
    if flow is not None:
        tl.store(flow + at * CHUNK + tokens, flows - tl.sum(keys.to(tl.float32) * dkeys, axis=1))

    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
    dvalues = tl.dot(keys, grad, input_precision=PRECISION) * until[:, None]
    dvalues = tl.dot((scores * fades).to(v.dtype.element_ty), pulls, dvalues, input_precision=PRECISION)
    if dwrite_gate is not None or DIAGONAL:  # read again: held until here they would be spilled
        values = load_tile(v, v_stride, tokens, limit, columns, P)
    if dwrite_gate is not None:
        tl.store(dwrite_gate + by_token, tl.sum(values.to(tl.float32) * dvalues, axis=1), mask=real)
    dvalues *= gate[:, None]
    if DIAGONAL:
        own_scores = tl.sum(tl.where(is_own, scores, 0.0), axis=1)
        pulls = load_tile(dy, dy_stride, tokens, limit, columns, P)
        own_pairs = tl.sum(values.to(tl.float32) * pulls.to(tl.float32), axis=1)
        tl.store(ddiagonal + by_token, own_scores * own_pairs, mask=real)
        dvalues += (diagonal * own_scores)[:, None] * pulls.to(tl.float32)
    to = dv + by_token[:, None] * P + columns[None, :]
    tl.store(to, dvalues.to(dv.dtype.element_ty), mask=real[:, None] & (columns[None, :] < P))
