"""The chunks of heads whose state is several tiles: gradients by tiles of keys, and by tiles of values.

The states of all chunks lie in memory (`kept_states`). What a chunk's pairs are to each other is a sum over columns of
values, or of keys: a program of `_differentiate_keys` has a tile of dq and dk and goes over the columns of values, one
of `_differentiate_values` has a tile of dv and goes over the columns of keys. Pairs are computed again by each program
of a chunk, 64 x 64 a tile; no gradient is written in parts but those of the gates, which are a number a token.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.linear_attention.chunk_states import Chunks, Size
from subquad_kernels.linear_attention.chunk_tiles import fades_between, find_chunk, load_tile, weigh
from subquad_kernels.triton_launch import QuickLaunch

_ACROSS = 64
"""Columns that a step of a loop takes: two tiles of states and two of tokens beside each other in shared memory."""


def differentiate(
    chunks: Chunks,
    size: Size,
    states: Tensor,
    dstates: Tensor,
    dy: Tensor,
    dy_strides: tuple[int, int],
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Fill dq, dk and dv; what flows in and out of every token, and the gradients of the write gate and the diagonal.

    Shapes:  dq, dk: b t h n    dv: b t h p    ->  slots h CHUNK, b t h, b t h, each where it is asked for
    """
    call, constants = chunks.call, chunks.constants
    rows, columns = (min(chunks.tile, constants[name]) for name in ("PAD_N", "PAD_P"))
    tiles_n, tiles_p = constants["PAD_N"] // rows, constants["PAD_P"] // columns
    flow = None if call.log_decay is None else call.new(tiles_n, *chunks.ages.shape)
    dwrite_gate, ddiagonal = (
        None if gate is None else call.new(tiles_p, call.b, call.t, call.h) for gate in (call.write_gate, call.diagonal)
    )
    given = (call.table, chunks.ages, chunks.gates, chunks.own)
    numbers = (call.scale, *chunks.sizes, chunks.slots, *call.strides, *dy_strides)
    _differentiate_keys[(chunks.slots * call.h * tiles_n,)](
        call.q, call.k, call.v, dy, *given, states, dstates, dq, dk, flow, *numbers,
        TILE=rows, STEP=min(_ACROSS, constants["PAD_P"]), **constants, **size.options(),
    )  # fmt: skip
    _differentiate_values[(chunks.slots * call.h * tiles_p,)](
        call.q, call.k, call.v, dy, *given, dstates, dv, dwrite_gate, ddiagonal, *numbers,
        TILE=columns, STEP=min(_ACROSS, constants["PAD_N"]), **constants, **size.options(),
    )  # fmt: skip
    return _sum_of(flow), _sum_of(dwrite_gate), _sum_of(ddiagonal)


def _sum_of(parts: Tensor | None) -> Tensor | None:
    """Over tiles, the first axis."""
    if parts is None or parts.shape[0] == 1:
        return None if parts is None else parts[0]
    return torch.sum(parts, 0, out=parts.new_empty(parts.shape[1:]))


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment", "slots"])
def _differentiate_keys(
    q, k, v, dy, table, ages, gates, own, states, dstates, dq, dk, flow,
    scale, t, b, h, group, chunks, segments, per_segment, slots,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, dy_stride, dy_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, PAD_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """TILE columns of a chunk's dq and dk, from the states before it and the gradients of those after it.

    Both kinds of pairs are summed, so that no tile that was just computed is transposed as a left operand, and both
    are mixed by the same rounded numbers: in q . dq - k . dk the rounding of a chunk's pairs cancels.
    Shapes:  states, dstates: slots h PAD_N PAD_P    dq, dk: b t h n    flow: tiles slots h CHUNK
    """
    TILES: tl.constexpr = PAD_N // TILE
    tile, program = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    head, slot = program % h, (program // h).to(tl.int64)
    row, limit, _, _, _ = find_chunk(table, slot % chunks, slot // chunks, t, CHUNK, PACKED)
    DIAGONAL: tl.constexpr = own is not None
    tokens, lines = tl.arange(0, CHUNK), tile * TILE + tl.arange(0, TILE)
    at = slot * h + head
    v += head * v_head_stride + row * v_stride
    dy += head * dy_head_stride + row * dy_stride
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)  # [queries, keys]
    turned = tl.zeros([CHUNK, CHUNK], tl.float32)  # [keys, queries]
    past = tl.zeros([CHUNK, TILE], tl.float32)
    later = tl.zeros([CHUNK, TILE], tl.float32)
    for first in tl.range(0, PAD_P, STEP, num_stages=STAGES):
        columns = first + tl.arange(0, STEP)
        values = load_tile(v, v_stride, tokens, limit, columns, P)
        pulls = load_tile(dy, dy_stride, tokens, limit, columns, P)
        kept = at * (PAD_N * PAD_P) + lines[:, None] * PAD_P + columns[None, :]
        pairs = tl.dot(pulls, tl.trans(values), pairs, input_precision=PRECISION)
        turned = tl.dot(values, tl.trans(pulls), turned, input_precision=PRECISION)
        past = tl.dot(pulls, tl.trans(tl.load(states + kept)), past, input_precision=PRECISION)
        later = tl.dot(values, tl.trans(tl.load(dstates + kept)), later, input_precision=PRECISION)

    is_own = tokens[:, None] == tokens[None, :]
    age = tl.load(ages + at * CHUNK + tokens)
    gate = tl.load(gates + at * CHUNK + tokens)
    until = tl.exp2(tl.load(ages + at * CHUNK + CHUNK - 1) - age)
    diagonal = gate
    if DIAGONAL:
        diagonal = tl.load(own + at * CHUNK + tokens)
    head_k = head // group
    to = (row * h + head + tokens * h)[:, None] * N + lines[None, :]
    mask = (tokens[:, None] < limit) & (lines[None, :] < N)
    fades = fades_between(age[:, None], age[None, :], tokens[:, None], tokens[None, :], 1, DIAGONAL)
    mixed = weigh(pairs * scale, fades, gate[None, :], diagonal[None, :], is_own, True, DIAGONAL)
    keys = load_tile(k + head_k * k_head_stride + row * k_stride, k_stride, tokens, limit, lines, N)
    past *= (tl.exp2(age) * scale)[:, None]
    dqueries = tl.dot(mixed.to(v.dtype.element_ty), keys, past, input_precision=PRECISION)
    tl.store(dq + to, dqueries.to(dq.dtype.element_ty), mask=mask)

    fades = fades_between(age[None, :], age[:, None], tokens[None, :], tokens[:, None], 1, DIAGONAL)
    mixed = weigh(turned * scale, fades, gate[:, None], diagonal[:, None], is_own, True, DIAGONAL)
    queries = load_tile(q + head_k * q_head_stride + row * q_stride, q_stride, tokens, limit, lines, N)
    later *= (until * gate)[:, None]
    dkeys = tl.dot(mixed.to(v.dtype.element_ty), queries, later, input_precision=PRECISION)
    tl.store(dk + to, dkeys.to(dk.dtype.element_ty), mask=mask)
    if flow is not None:
        flows = tl.sum(queries.to(tl.float32) * dqueries, axis=1) - tl.sum(keys.to(tl.float32) * dkeys, axis=1)
        tl.store(flow + (tile.to(tl.int64) * slots * h + at) * CHUNK + tokens, flows)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment", "slots"])
def _differentiate_values(
    q, k, v, dy, table, ages, gates, own, dstates, dv, dwrite_gate, ddiagonal,
    scale, t, b, h, group, chunks, segments, per_segment, slots,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, dy_stride, dy_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, PAD_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """TILE columns of a chunk's dv, and their part of the gates' gradients.

    Shapes:  dstates: slots h PAD_N PAD_P    dv: b t h p    dwrite_gate, ddiagonal: tiles b t h
    """
    TILES: tl.constexpr = PAD_P // TILE
    tile, program = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    head, slot = program % h, (program // h).to(tl.int64)
    row, limit, _, _, _ = find_chunk(table, slot % chunks, slot // chunks, t, CHUNK, PACKED)
    DIAGONAL: tl.constexpr = own is not None
    tokens, columns = tl.arange(0, CHUNK), tile * TILE + tl.arange(0, TILE)
    at = slot * h + head
    head_k = head // group
    q += head_k * q_head_stride + row * q_stride
    k += head_k * k_head_stride + row * k_stride
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)  # [keys, queries]
    dvalues = tl.zeros([CHUNK, TILE], tl.float32)
    for first in tl.range(0, PAD_N, STEP, num_stages=STAGES):
        lines = first + tl.arange(0, STEP)
        keys = load_tile(k, k_stride, tokens, limit, lines, N)
        queries = load_tile(q, q_stride, tokens, limit, lines, N)
        grad = tl.load(dstates + at * (PAD_N * PAD_P) + lines[:, None] * PAD_P + columns[None, :])
        scores = tl.dot(keys, tl.trans(queries), scores, input_precision=PRECISION)
        dvalues = tl.dot(keys, grad, dvalues, input_precision=PRECISION)

    age = tl.load(ages + at * CHUNK + tokens)
    gate = tl.load(gates + at * CHUNK + tokens)
    dvalues *= tl.exp2(tl.load(ages + at * CHUNK + CHUNK - 1) - age)[:, None]
    scores *= scale
    fades = fades_between(age[None, :], age[:, None], tokens[None, :], tokens[:, None], 1, DIAGONAL)
    pulls = load_tile(
        dy + head * dy_head_stride + row * dy_stride, dy_stride, tokens, limit, columns, P
    )  # fmt: skip
    dvalues = tl.dot((scores * fades).to(v.dtype.element_ty), pulls, dvalues, input_precision=PRECISION)
    real = tokens < limit
    by_token = row * h + head + tokens * h
    if dwrite_gate is not None or DIAGONAL:
        values = load_tile(v + head * v_head_stride + row * v_stride, v_stride, tokens, limit, columns, P)
        part = tile.to(tl.int64) * b * t * h + by_token
    if dwrite_gate is not None:
        tl.store(dwrite_gate + part, tl.sum(values.to(tl.float32) * dvalues, axis=1), mask=real)
    dvalues *= gate[:, None]
    if DIAGONAL:
        diagonal = tl.load(own + at * CHUNK + tokens)
        own_scores = tl.sum(tl.where(tokens[:, None] == tokens[None, :], scores, 0.0), axis=1)
        own_pairs = tl.sum(values.to(tl.float32) * pulls.to(tl.float32), axis=1)
        tl.store(ddiagonal + part, own_scores * own_pairs, mask=real)
        dvalues += (diagonal * own_scores)[:, None] * pulls.to(tl.float32)
    to = dv + by_token[:, None] * P + columns[None, :]
    tl.store(to, dvalues.to(dv.dtype.element_ty), mask=real[:, None] & (columns[None, :] < P))
