"""The backward that walks: once with the states for dq, and once from the end with their gradients for dk and dv.

Where time is cut, `_summarise_gradients` finds what each segment does to the gradient of a state, and the walk for dk
and dv starts from the gradients that enter each. That walk also sums the decay's gradient, over later tokens.
"""

# What Triton compiles has no Python types, and tuples that grow.
# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.linear_attention.chunk_tiles import (
    ages_of,
    count_chunks,
    fades_between,
    find_chunk,
    find_place,
    load_gates,
    load_state,
    load_tile,
    replace_state,
    weigh,
)
from subquad_kernels.triton_launch import QuickLaunch

if TYPE_CHECKING:
    from subquad_kernels.linear_attention.fused import Call
    from subquad_kernels.linear_attention.launches import Launch


def backward(
    call: Call,
    launch: Launch,
    final: Tensor,
    boundaries: Tensor,
    dy: Tensor,
    dy_strides: tuple[int, int],
    dfinal: Tensor | None,
) -> dict[str, Tensor | None]:
    """The gradients, that of a decay per head still by token."""
    call.cut(launch)
    b, t, h, n, tiles = call.b, call.t, call.h, call.n, call.tiles
    dq, dk = (torch.empty(b, t, h, tiles, n, dtype=call.v.dtype, device=call.v.device) for _ in range(2))
    dv = torch.empty_like(call.v, memory_format=torch.contiguous_format)
    # Rows: q . dq of every token, and the gates' gradients; one a tile of values.
    rows, dlog_decay, dwrite_gate, ddiagonal = (
        None if gate is None else call.new(b, t, h, tiles)
        for gate in (call.log_decay, call.log_decay, call.write_gate, call.diagonal)
    )
    dinitial = None if call.initial is None else call.states(dfinal)
    constants = call.constants(launch)
    strides = (*call.strides, *dy_strides)
    _differentiate_q[(call.lanes * call.segments,)](
        call.q, call.k, call.v, call.log_decay, call.write_gate, call.diagonal, call.initial, call.table,
        boundaries, dy, dq, rows,
        call.scale, *call.sizes(), *strides,
        DIAGONAL=call.diagonal is not None, INITIAL=call.initial is not None, **constants,
    )  # fmt: skip
    dboundaries = None
    if call.walks > 1:
        decays = call.new(call.segments - 1, b, h)
        dboundaries = torch.empty_like(boundaries)
        _summarise_gradients[(call.lanes * (call.segments - 1),)](
            call.q, call.log_decay, call.table, dy, dfinal, decays, dboundaries,
            call.scale, *call.sizes(), *call.strides[:2], *dy_strides,
            FINAL=dfinal is not None, **constants,
        )  # fmt: skip
        call.compose(decays, dboundaries, reverse=True)
    _differentiate_kv[(call.lanes * call.walks,)](
        call.q, call.k, call.v, call.log_decay, call.write_gate, call.diagonal, call.table,
        boundaries, dboundaries, final, dy, dfinal, rows, dk, dv, dlog_decay, dwrite_gate, ddiagonal, dinitial,
        call.scale, *call.sizes(), call.walked, *strides,
        DIAGONAL=call.diagonal is not None, INITIAL=call.initial is not None, FINAL=dfinal is not None,
        **constants,
    )  # fmt: skip
    if h * tiles > call.h_k:
        dq, dk = (part.view(b, t, call.h_k, -1, n).sum(3) for part in (dq, dk))
    dlog_decay, dwrite_gate, ddiagonal = (
        None if gradient is None else gradient.sum(3) if tiles > 1 else gradient.view(b, t, h)
        for gradient in (dlog_decay, dwrite_gate, ddiagonal)
    )
    return {
        "q": dq.view(b, t, call.h_k, n),
        "k": dk.view(b, t, call.h_k, n),
        "v": dv,
        "log_decay": dlog_decay,
        "write_gate": dwrite_gate,
        "diagonal": ddiagonal,
        "initial_state": dinitial,
    }


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment", "h"])
def _differentiate_q(
    q, k, v, log_decay, write_gate, diagonal, initial, table, boundaries, dy, dq, rows,
    scale, t, b, h, group, chunks, segments, per_segment,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, dy_stride, dy_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, GATE: tl.constexpr, DIAGONAL: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of a segment, and q . dq of its tokens. The state is held transposed, [TILE_P, N]: values lie inside dy S^T.

    Shapes:  dq: b t h tiles n    rows: b t h tiles
    """
    tile, head, head_k, sequence, segment = find_place(b, h, group, P, TILE_P)
    TILES: tl.constexpr = (P + TILE_P - 1) // TILE_P
    tokens, lines = tl.arange(0, CHUNK), tl.arange(0, PAD_N)
    columns = tile * TILE_P + tl.arange(0, TILE_P)
    offsets = lines[None, :] * P + columns[:, None]
    within = (lines[None, :] < N) & (columns[:, None] < P)
    STATE: tl.constexpr = N * P
    q += head_k * q_head_stride
    k += head_k * k_head_stride
    v += head * v_head_stride
    dy += head * dy_head_stride
    is_own = tokens[:, None] == tokens[None, :]
    place = sequence * h + head
    state = load_state(initial, place, offsets, within & (segment == 0), STATE, INITIAL and not PACKED)
    if segment > 0:
        state = load_state(boundaries, ((segment - 1) * b + sequence) * h + head, offsets, within, STATE, True)
    end = tl.minimum((segment + 1) * per_segment, count_chunks(table, chunks, PACKED))
    for index in tl.range(segment * per_segment, end, num_stages=STAGES):
        row, limit, owner, begins, _ = find_chunk(table, index, sequence, t, CHUNK, PACKED)
        pulls = load_tile(dy + row * dy_stride, dy_stride, tokens, limit, columns, P)
        values = load_tile(v + row * v_stride, v_stride, tokens, limit, columns, P)
        keys = load_tile(k + row * k_stride, k_stride, tokens, limit, lines, N)
        ages, whole = ages_of(log_decay, row * h + head, h, head, tokens, limit, DECAY)
        gates = load_gates(write_gate, row * h + head, h, tokens, limit, GATE)
        own = load_gates(diagonal, row * h + head, h, tokens, limit, DIAGONAL)
        if PACKED:
            state = replace_state(state, begins, initial, owner * h + head, offsets, within, STATE, INITIAL)
        fades = fades_between(ages[:, None], ages[None, :], tokens[:, None], tokens[None, :], DECAY, DIAGONAL)
        mixed = tl.dot(pulls, tl.trans(values), input_precision=PRECISION) * scale
        mixed = weigh(mixed, fades, gates[None, :], own[None, :], is_own, GATE, DIAGONAL)
        past = tl.dot(pulls, state.to(v.dtype.element_ty), input_precision=PRECISION)
        past *= (tl.exp2(ages) * scale)[:, None]
        result = tl.dot(mixed.to(v.dtype.element_ty), keys, past, input_precision=PRECISION)
        place = (row * h + head) * TILES + tile
        mask = (tokens[:, None] < limit) & (lines[None, :] < N)
        at = dq + place * N + tokens[:, None] * (h * TILES * N) + lines[None, :]
        tl.store(at, result.to(dq.dtype.element_ty), mask=mask)
        if DECAY > 0:
            queries = load_tile(q + row * q_stride, q_stride, tokens, limit, lines, N)
            sums = tl.sum(queries.to(tl.float32) * result, axis=1)
            tl.store(rows + place + tokens * (h * TILES), sums, mask=tokens < limit)
        writes_left = tl.exp2(whole - ages) * gates
        keys = (keys.to(tl.float32) * writes_left[:, None]).to(v.dtype.element_ty)
        state = tl.dot(tl.trans(values), keys, state * tl.exp2(whole), input_precision=PRECISION)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment", "h"])
def _summarise_gradients(
    q, log_decay, table, dy, dfinal, decays, writes,
    scale, t, b, h, group, chunks, segments, per_segment, q_stride, q_head_stride, dy_stride, dy_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, FINAL: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """What a segment does to the gradient of the state that leaves it:  G -> decay G + write, of that which enters it.

    Row i of the results is segment i + 1's; final_state's gradient is in the write of its document's last segment.
    Shapes:  decays: segments-1 b h    writes: segments-1 b h n p
    """
    tile, head, head_k, sequence, index_of_row = find_place(b, h, group, P, TILE_P)
    segment = index_of_row + 1
    tokens, lines = tl.arange(0, CHUNK), tl.arange(0, PAD_N)
    columns = tile * TILE_P + tl.arange(0, TILE_P)
    STATE: tl.constexpr = N * P
    offsets = lines[:, None] * P + columns[None, :]
    within = (lines[:, None] < N) & (columns[None, :] < P)
    q += head_k * q_head_stride
    dy += head * dy_head_stride
    left = 1.0
    last = segment == segments - 1
    state = load_state(dfinal, sequence * h + head, offsets, within & last, STATE, FINAL and not PACKED)
    first = segment * per_segment
    end = tl.minimum((segment + 1) * per_segment, count_chunks(table, chunks, PACKED))
    for back in tl.range(0, end - first, num_stages=STAGES):
        index = end - 1 - back
        row, limit, owner, begins, ends = find_chunk(table, index, sequence, t, CHUNK, PACKED)
        queries = load_tile(q + row * q_stride, q_stride, tokens, limit, lines, N)
        pulls = load_tile(dy + row * dy_stride, dy_stride, tokens, limit, columns, P)
        ages, whole = ages_of(log_decay, row * h + head, h, head, tokens, limit, DECAY)
        if PACKED:
            left = tl.where(ends, 0.0, left)
            state = replace_state(state, ends, dfinal, owner * h + head, offsets, within, STATE, FINAL)
        decay = tl.exp2(whole)
        left *= decay
        pulls = (pulls.to(tl.float32) * (tl.exp2(ages) * scale)[:, None]).to(q.dtype.element_ty)
        state = tl.dot(tl.trans(queries), pulls, state * decay, input_precision=PRECISION)
        if PACKED and begins:
            left = 0.0
            state = tl.zeros([PAD_N, TILE_P], tl.float32)
    place = (index_of_row * b + sequence) * h + head
    tl.store(writes + place * STATE + offsets, state, mask=within)
    if tile == 0:
        tl.store(decays + place, left)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment", "walked", "h"])
def _differentiate_kv(
    q, k, v, log_decay, write_gate, diagonal, table,
    boundaries, dboundaries, final, dy, dfinal, rows, dk, dv, dlog_decay, dwrite_gate, ddiagonal, dinitial,
    scale, t, b, h, group, chunks, segments, per_segment, walked,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, dy_stride, dy_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, GATE: tl.constexpr, DIAGONAL: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr,
    FINAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All other gradients of `walked` segments, chunks from last to first; `grad` is that of the state that leaves one.

    Products are taken transposed, [keys, queries]: no tile that was just computed is transposed as a left operand,
    which Triton 3.4 to 3.7 miscompile on Hopper. dk mixes by the same rounded numbers as dq, so that in q . dq - k . dk
    the rounding of a chunk's pairs cancels.
    Shapes:  dk: b t h tiles n    rows, dlog_decay, dwrite_gate, ddiagonal: b t h tiles
    """
    tile, head, head_k, sequence, walk = find_place(b, h, group, P, TILE_P)
    TILES: tl.constexpr = (P + TILE_P - 1) // TILE_P
    tokens, lines = tl.arange(0, CHUNK), tl.arange(0, PAD_N)
    columns = tile * TILE_P + tl.arange(0, TILE_P)
    offsets = lines[:, None] * P + columns[None, :]
    within = (lines[:, None] < N) & (columns[None, :] < P)
    STATE: tl.constexpr = N * P
    q += head_k * q_head_stride
    k += head_k * k_head_stride
    v += head * v_head_stride
    dy += head * dy_head_stride
    dv += head * P
    is_own = tokens[:, None] == tokens[None, :]
    count = count_chunks(table, chunks, PACKED)
    grad = tl.zeros([PAD_N, TILE_P], tl.float32)
    carried = 0.0  # the gradient of the log decay of the token after the current chunk
    for segment_back in range(walked):
        segment = (walk + 1) * walked - 1 - segment_back
        first = segment * per_segment
        end = tl.minimum(first + per_segment, count)
        if segment < segments - 1:
            place = (segment * b + sequence) * h + head
            if dboundaries is not None:
                grad = load_state(dboundaries, place, offsets, within, STATE, True)
            if DECAY > 0:
                left = load_state(boundaries, place, offsets, within, STATE, True)
                carried = tl.sum(grad.to(v.dtype.element_ty).to(tl.float32) * left)
        elif FINAL and not PACKED:
            grad = load_state(dfinal, sequence * h + head, offsets, within, STATE, FINAL)
            if DECAY > 0:
                left = load_state(final, sequence * h + head, offsets, within, STATE, True)
                carried = tl.sum(grad.to(v.dtype.element_ty).to(tl.float32) * left)
        for back in tl.range(0, end - first, num_stages=STAGES):
            index = end - 1 - back
            row, limit, owner, begins, ends = find_chunk(table, index, sequence, t, CHUNK, PACKED)
            queries = load_tile(q + row * q_stride, q_stride, tokens, limit, lines, N)
            keys = load_tile(k + row * k_stride, k_stride, tokens, limit, lines, N)
            values = load_tile(v + row * v_stride, v_stride, tokens, limit, columns, P)
            pulls = load_tile(dy + row * dy_stride, dy_stride, tokens, limit, columns, P)
            ages, whole = ages_of(log_decay, row * h + head, h, head, tokens, limit, DECAY)
            gates = load_gates(write_gate, row * h + head, h, tokens, limit, GATE)
            own = load_gates(diagonal, row * h + head, h, tokens, limit, DIAGONAL)
            if PACKED:
                grad = replace_state(grad, ends, dfinal, owner * h + head, offsets, within, STATE, FINAL)
            if PACKED and ends:
                carried = 0.0
                if FINAL and DECAY > 0:
                    left = load_state(final, owner * h + head, offsets, within, STATE, True)
                    carried = tl.sum(grad.to(v.dtype.element_ty).to(tl.float32) * left)
            rounded = grad.to(v.dtype.element_ty)
            until = tl.exp2(whole - ages)
            fades = fades_between(ages[None, :], ages[:, None], tokens[None, :], tokens[:, None], DECAY, DIAGONAL)

            pairs = tl.dot(values, tl.trans(pulls), input_precision=PRECISION) * scale
            mixed = weigh(pairs, fades, gates[:, None], own[:, None], is_own, GATE, DIAGONAL)
            dkeys = tl.dot(values, tl.trans(rounded), input_precision=PRECISION) * (until * gates)[:, None]
            dkeys = tl.dot(mixed.to(v.dtype.element_ty), queries, dkeys, input_precision=PRECISION)
            place = (row * h + head) * TILES + tile
            by_token = tokens * (h * TILES)
            real = tokens < limit
            mask = real[:, None] & (lines[None, :] < N)
            at = dk + place * N + by_token[:, None] * N + lines[None, :]
            tl.store(at, dkeys.to(dk.dtype.element_ty), mask=mask)
            if DECAY > 0:
                flow = tl.load(rows + place + by_token, mask=real, other=0.0)
                flow -= tl.sum(keys.to(tl.float32) * dkeys, axis=1)
                later = tl.cumsum(flow, reverse=True) + carried
                tl.store(dlog_decay + place + by_token, later, mask=real)
                carried += tl.sum(flow)

            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
            mixed = scores * scale * fades
            dvalues = tl.dot(keys, rounded, input_precision=PRECISION) * until[:, None]
            dvalues = tl.dot(mixed.to(v.dtype.element_ty), pulls, dvalues, input_precision=PRECISION)
            if GATE:
                sums = tl.sum(values.to(tl.float32) * dvalues, axis=1)
                tl.store(dwrite_gate + place + by_token, sums, mask=real)
                dvalues *= gates[:, None]
            if DIAGONAL:
                own_scores = tl.sum(tl.where(is_own, scores, 0.0), axis=1)
                own_pairs = tl.sum(tl.where(is_own, pairs, 0.0), axis=1)
                tl.store(ddiagonal + place + by_token, own_scores * own_pairs, mask=real)
                dvalues += (own * own_scores * scale)[:, None] * pulls.to(tl.float32)
            mask = real[:, None] & (columns[None, :] < P)
            at = dv + row * h * P + tokens[:, None] * h * P + columns[None, :]
            tl.store(at, dvalues.to(dv.dtype.element_ty), mask=mask)

            pulls = (pulls.to(tl.float32) * (tl.exp2(ages) * scale)[:, None]).to(v.dtype.element_ty)
            grad = tl.dot(tl.trans(queries), pulls, grad * tl.exp2(whole), input_precision=PRECISION)
            if PACKED and INITIAL and begins:
                tl.store(dinitial + (owner * h + head) * STATE + offsets, grad, mask=within)
    if INITIAL and not PACKED and walk == 0:
        tl.store(dinitial + (sequence * h + head) * STATE + offsets, grad, mask=within)
