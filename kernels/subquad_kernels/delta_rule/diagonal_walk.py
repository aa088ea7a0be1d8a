"""The walk over chunks where decays have become factors: what reads and leaves states, and the gradients of both.

With W what the system solves for and V' = beta V; the terms in brackets are those of `remove` and `insert`:

    R  = V' + reading S              [R = pairs V' + reading S]
    W  = T R
    Y  = scale (entering S + scores W [+ scores_k V'])
    S' = kept S + leaving^T W        [+ leaving_k^T V']

States are transposed, [TILE_P, N]: they and what was computed from them are left operands of products, which stay in
registers. Chunks lie one after the other with 64 rows each, zeros past a sequence's end, except `v`, `dy` and `writes`.
"""

# What Triton compiles has no Python types, and tuples that grow.
# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from subquad_kernels.delta_rule.segments import is_taken, segment_of, start_of_map, store_map
from subquad_kernels.delta_rule.tiles import (
    chunk_of,
    fetch_transposed,
    load,
    load_transposed,
    store,
    store_transposed,
)
from subquad_kernels.triton_launch import QuickLaunch


@triton.jit
def _block(tensor, rows, columns, width: tl.constexpr, in_columns):
    """Rows of a chunk that lie one after the other; those past its end are zeros.  [rows, columns]"""
    return tl.load(tensor + rows[:, None] * width + columns[None, :], mask=in_columns[None, :], other=0.0)


@triton.jit
def _block_transposed(tensor, rows, columns, width: tl.constexpr, in_columns):
    """The same as [columns, rows]."""
    return tl.load(tensor + rows[None, :] * width + columns[:, None], mask=in_columns[:, None], other=0.0)


@QuickLaunch
@triton.jit(do_not_specialize=["slots", "t", "chunks", "heads", "per", "segment_slots"])
def scan(
    v, gates, reading, leaving, kept, inverses, pairs, leaving_k, initial, entering, bounds, offsets, segments,
    final, writes, boundaries, maps, slots, t, chunks, heads, per, segment_slots, v_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, CUT: tl.constexpr, MAPS: tl.constexpr, FREE: tl.constexpr, INITIAL: tl.constexpr,
    TERMS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of a segment: W of each, the state that enters it, and the last state; or find its map (MAPS)."""
    tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    walked: tl.constexpr = tiles + (N + TILE_P - 1) // TILE_P if MAPS else tiles
    program = tl.program_id(0)
    tile, head, place = program % walked, program // walked % heads, program // (walked * heads)
    if not is_taken(segments, segment_slots, place, PACKED, CUT):
        return
    sequence, first, length, chunk, _, ends = segment_of(
        segments, bounds, offsets, place, t, chunks, per, CHUNK, PACKED, CUT
    )
    if MAPS and ends:
        return
    values, keys = tile * TILE_P + tl.arange(0, TILE_P), tl.arange(0, PAD_N)
    in_p, in_n, span = values < P, keys < N, tl.arange(0, CHUNK)  # no value belongs to the identity's rows
    square = span[:, None] * CHUNK + span[None, :]
    within = in_p[:, None] & in_n[None, :]
    state_at = (sequence * heads + head) * (N * P) + keys[None, :] * P + values[:, None]
    dtype: tl.constexpr = v.dtype.element_ty

    state = tl.zeros([TILE_P, PAD_N], tl.float32)
    if MAPS:
        state = start_of_map(values, keys, tiles, TILE_P)
    elif CUT:
        state = load(entering + (place.to(tl.int64) * heads + head) * (P * N), values, N, keys, in_p, in_n)
    elif INITIAL:
        state = tl.load(initial + state_at, mask=within, other=0.0).to(tl.float32)
    v += first * v_stride + head * P
    writes += (first * heads + head) * P
    plane = slots.to(tl.int64) * heads * (CHUNK * CHUNK)
    # A chunk's place in a tensor takes 64 bits, a token's place in its chunk does not.
    value_step, write_step = v_stride.to(tl.int64) * CHUNK, heads.to(tl.int64) * (CHUNK * P)
    for c in tl.range(0, tl.cdiv(length, CHUNK), num_stages=STAGES):
        size = tl.minimum(length - c * CHUNK, CHUNK)
        rows, in_t = tl.minimum(span, size - 1), span < size
        at = (chunk + c) * heads + head
        if not MAPS:
            store(boundaries + at * (P * N), values, N, keys, in_p, in_n, state)
        value = fetch_transposed(v + c * value_step, rows, v_stride, values, in_p)
        gate = tl.load(gates + at * CHUNK + span)
        # Tokens past the end repeat the last one with a closed gate.
        fresh = value.to(tl.float32) * gate[None, :]
        if FREE:
            own = fresh.to(dtype)
            fresh = tl.dot(own, tl.trans(tl.load(pairs + at * (CHUNK * CHUNK) + square)), input_precision=PRECISION)
        reader = _block(reading + at * (CHUNK * N), span, keys, N, in_n)
        fresh = tl.dot(state.to(dtype), tl.trans(reader), fresh, input_precision=PRECISION).to(dtype)
        inverse = tl.load(inverses + at * (CHUNK * CHUNK) + square)
        write = tl.dot(fresh, tl.trans(inverse), input_precision=PRECISION)
        if TERMS == 2:
            inverse = tl.load(inverses + plane + at * (CHUNK * CHUNK) + square)
            write = tl.dot(fresh, tl.trans(inverse), write, input_precision=PRECISION)
        if not MAPS:
            store_transposed(writes + c * write_step, span, heads * P, values, in_t, in_p, write)
        state *= tl.load(kept + at * N + keys, mask=in_n, other=0.0)[None, :]
        left = _block(leaving + at * (CHUNK * N), span, keys, N, in_n)
        state = tl.dot(write.to(dtype), left, state, input_precision=PRECISION)
        if FREE:
            left = _block(leaving_k + at * (CHUNK * N), span, keys, N, in_n)
            state = tl.dot(own, left, state, input_precision=PRECISION)
    if MAPS:
        store_map(maps, place, head, heads, values, keys, state, N, P, tiles, TILE_P)
    elif ends:
        tl.store(final + state_at, state, mask=within)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "chunks", "heads"])
def read(
    v, gates, entering, scores, scores_k, writes, boundaries, table, y, t, chunks, heads, v_stride, scale,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, FREE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y of one chunk, head and tile of p."""
    tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    program = tl.program_id(0)
    tile, head, chunk = program % tiles, program // tiles % heads, program // (tiles * heads)
    first, size = chunk_of(table, chunk, t, chunks, CHUNK, PACKED)
    values, keys, span = tile * TILE_P + tl.arange(0, TILE_P), tl.arange(0, PAD_N), tl.arange(0, CHUNK)
    in_p, in_n, in_t = values < P, keys < N, span < size
    at = chunk.to(tl.int64) * heads + head
    square = at * (CHUNK * CHUNK) + span[:, None] * CHUNK + span[None, :]
    place = (first * heads + head) * P

    query = _block(entering + at * (CHUNK * N), span, keys, N, in_n)
    state = load_transposed(boundaries + at * (P * N), values, N, keys, in_p, in_n)
    result = tl.dot(query, state, input_precision=PRECISION)
    write = load(writes + place, span, heads * P, values, in_t, in_p)
    result = tl.dot(tl.load(scores + square), write, result, input_precision=PRECISION)
    if FREE:
        value = load(v + first * v_stride + head * P, span, v_stride, values, in_t, in_p)
        value = (value.to(tl.float32) * tl.load(gates + at * CHUNK + span)[:, None]).to(v.dtype.element_ty)
        result = tl.dot(tl.load(scores_k + square), value, result, input_precision=PRECISION)
    store(y + place, span, heads * P, values, in_t, in_p, result * scale)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "chunks", "heads"])
def read_back(
    dy, scores, table, dwrites, t, chunks, heads, scale,
    P: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale scores^T dY, the gradient by y of what the scores multiplied.  dwrites: chunks h 64 p"""
    tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    program = tl.program_id(0)
    tile, head, chunk = program % tiles, program // tiles % heads, program // (tiles * heads)
    first, size = chunk_of(table, chunk, t, chunks, CHUNK, PACKED)
    values, span = tile * TILE_P + tl.arange(0, TILE_P), tl.arange(0, CHUNK)
    in_p, in_t, every = values < P, span < size, span < CHUNK
    at = chunk.to(tl.int64) * heads + head
    turned = tl.load(scores + at * (CHUNK * CHUNK) + span[None, :] * CHUNK + span[:, None])
    pull = load(dy + (first * heads + head) * P, span, heads * P, values, in_t, in_p).to(turned.dtype)
    result = tl.dot(turned, pull, input_precision=PRECISION) * scale
    store(dwrites + at * (CHUNK * P), span, P, values, every, in_p, result)


@QuickLaunch
@triton.jit(do_not_specialize=["slots", "t", "chunks", "heads", "per", "segment_slots"])
def scan_back(
    dy, entering, reading, leaving, kept, inverses, dwrites, dfinal, passed, bounds, offsets, segments,
    dinitial, dstates, maps, slots, t, chunks, heads, per, segment_slots, scale,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, CUT: tl.constexpr, MAPS: tl.constexpr, FINAL: tl.constexpr, TERMS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk a segment's chunks from last to first, or find its map (MAPS).

    `dwrites` holds dW by y and is left holding dR = T^T dW; `passed` the gradients of states that leave segments.
    """
    tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    walked: tl.constexpr = tiles + (N + TILE_P - 1) // TILE_P if MAPS else tiles
    program = tl.program_id(0)
    tile, head, place = program % walked, program // walked % heads, program // (walked * heads)
    if not is_taken(segments, segment_slots, place, PACKED, CUT):
        return
    sequence, first, length, chunk, begins, _ = segment_of(
        segments, bounds, offsets, place, t, chunks, per, CHUNK, PACKED, CUT
    )
    if MAPS and begins:
        return
    values, keys = tile * TILE_P + tl.arange(0, TILE_P), tl.arange(0, PAD_N)
    in_p, in_n, span = values < P, keys < N, tl.arange(0, CHUNK)  # no value belongs to the identity's rows
    every = span < CHUNK
    square = span[:, None] * CHUNK + span[None, :]
    within = in_p[:, None] & in_n[None, :]
    state_at = (sequence * heads + head) * (N * P) + keys[None, :] * P + values[:, None]
    dtype: tl.constexpr = dwrites.dtype.element_ty

    dstate = tl.zeros([TILE_P, PAD_N], tl.float32)
    if MAPS:
        dstate = start_of_map(values, keys, tiles, TILE_P)
    elif CUT:
        dstate = load(passed + (place.to(tl.int64) * heads + head) * (P * N), values, N, keys, in_p, in_n)
    elif FINAL:
        dstate = tl.load(dfinal + state_at, mask=within, other=0.0).to(tl.float32)
    dy += (first * heads + head) * P
    plane = slots.to(tl.int64) * heads * (CHUNK * CHUNK)
    pull_step = heads.to(tl.int64) * (CHUNK * P)
    steps = tl.cdiv(length, CHUNK)
    for back in tl.range(0, steps, num_stages=STAGES):
        c = steps - 1 - back
        rows = tl.minimum(span, length - c * CHUNK - 1)
        at = (chunk + c) * heads + head
        if not MAPS:
            store(dstates + at * (P * N), values, N, keys, in_p, in_n, dstate)
        left = _block(leaving + at * (CHUNK * N), span, keys, N, in_n)
        dwrite = _block_transposed(dwrites + at * (CHUNK * P), span, values, P, in_p).to(tl.float32)
        dwrite = tl.dot(dstate.to(dtype), tl.trans(left), dwrite, input_precision=PRECISION).to(dtype)
        inverse = tl.load(inverses + at * (CHUNK * CHUNK) + square)
        dfresh = tl.dot(dwrite, inverse, input_precision=PRECISION)
        if TERMS == 2:
            inverse = tl.load(inverses + plane + at * (CHUNK * CHUNK) + square)
            dfresh = tl.dot(dwrite, inverse, dfresh, input_precision=PRECISION)
        if not MAPS:
            store_transposed(dwrites + at * (CHUNK * P), span, P, values, every, in_p, dfresh)
        dstate *= tl.load(kept + at * N + keys, mask=in_n, other=0.0)[None, :]
        # Queries past the end are zeros: what the last row of dy, repeated, meets there.
        pull = fetch_transposed(dy + c * pull_step, rows, heads * P, values, in_p)
        query = _block(entering + at * (CHUNK * N), span, keys, N, in_n)
        dstate = tl.dot((pull.to(tl.float32) * scale).to(dtype), query, dstate, input_precision=PRECISION)
        reader = _block(reading + at * (CHUNK * N), span, keys, N, in_n)
        dstate = tl.dot(dfresh.to(dtype), reader, dstate, input_precision=PRECISION)
    if MAPS:
        store_map(maps, place, head, heads, values, keys, dstate, N, P, tiles, TILE_P)
    elif begins:
        tl.store(dinitial + state_at, dstate, mask=within)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "chunks", "heads"])
def pull_scores(
    written, gates, dy, dfresh, table, dscores, dpairs, t, chunks, heads, written_stride, scale,
    P: tl.constexpr, PAD_P: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr,
    VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale dY X^T and dR X^T, the gradients of both scores with what was written: X = W, or V' (VALUES)."""
    program = tl.program_id(0)
    head, chunk = program % heads, program // heads
    first, size = chunk_of(table, chunk, t, chunks, CHUNK, PACKED)
    span = tl.arange(0, CHUNK)
    in_t, every = span < size, span < CHUNK
    at = program.to(tl.int64)
    dtype: tl.constexpr = written.dtype.element_ty
    dscore = tl.zeros([CHUNK, CHUNK], tl.float32)
    dpair = tl.zeros([CHUNK, CHUNK], tl.float32)
    for start in tl.range(0, PAD_P, TILE_P, num_stages=1):
        values = start + tl.arange(0, TILE_P)
        in_p = values < P
        right = load_transposed(written + first * written_stride + head * P, span, written_stride, values, in_t, in_p)
        if VALUES:
            right = (right.to(tl.float32) * tl.load(gates + at * CHUNK + span)[None, :]).to(dtype)
        pull = load(dy + (first * heads + head) * P, span, heads * P, values, in_t, in_p).to(dtype)
        fresh = load(dfresh + at * (CHUNK * P), span, P, values, every, in_p)
        dscore = tl.dot(pull, right, dscore, input_precision=PRECISION)
        dpair = tl.dot(fresh, right, dpair, input_precision=PRECISION)
    square = at * (CHUNK * CHUNK) + span[:, None] * CHUNK + span[None, :]
    tl.store(dscores + square, (dscore * scale).to(dtype))
    tl.store(dpairs + square, dpair.to(dtype))


@QuickLaunch
@triton.jit(do_not_specialize=["t", "chunks", "heads"])
def pull_reads(
    dy, dfresh, boundaries, table, dentering, dreading, t, chunks, heads, scale,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, PAD_P: tl.constexpr, TILE_P: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale dY S^T and dR S^T, the gradients of what reads the state that enters.  chunks h 64 n"""
    program = tl.program_id(0)
    head, chunk = program % heads, program // heads
    first, size = chunk_of(table, chunk, t, chunks, CHUNK, PACKED)
    span, keys = tl.arange(0, CHUNK), tl.arange(0, PAD_N)
    in_t, in_n, every = span < size, keys < N, span < CHUNK
    at = program.to(tl.int64)
    dtype: tl.constexpr = boundaries.dtype.element_ty
    dquery = tl.zeros([CHUNK, PAD_N], tl.float32)
    dreader = tl.zeros([CHUNK, PAD_N], tl.float32)
    for start in tl.range(0, PAD_P, TILE_P, num_stages=1):
        values = start + tl.arange(0, TILE_P)
        in_p = values < P
        state = load(boundaries + at * (P * N), values, N, keys, in_p, in_n)
        pull = load(dy + (first * heads + head) * P, span, heads * P, values, in_t, in_p).to(dtype)
        fresh = load(dfresh + at * (CHUNK * P), span, P, values, every, in_p)
        dquery = tl.dot(pull, state, dquery, input_precision=PRECISION)
        dreader = tl.dot(fresh, state, dreader, input_precision=PRECISION)
    store(dentering + at * (CHUNK * N), span, N, keys, every, in_n, dquery * scale)
    store(dreading + at * (CHUNK * N), span, N, keys, every, in_n, dreader)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "chunks", "heads"])
def pull_writes(
    written, gates, boundaries, dstates, table, dleaving, dkept, t, chunks, heads, written_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, PAD_P: tl.constexpr, TILE_P: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X dS'^T, the gradient of what writes X = W, or V' (VALUES); with W also that of what a state keeps, sum_p S dS'.

    Shapes:  dleaving: chunks h 64 n    dkept: chunks h n
    """
    program = tl.program_id(0)
    head, chunk = program % heads, program // heads
    first, size = chunk_of(table, chunk, t, chunks, CHUNK, PACKED)
    span, keys = tl.arange(0, CHUNK), tl.arange(0, PAD_N)
    in_t, in_n, every = span < size, keys < N, span < CHUNK
    at = program.to(tl.int64)
    dtype: tl.constexpr = written.dtype.element_ty
    total = tl.zeros([CHUNK, PAD_N], tl.float32)
    along = tl.zeros([PAD_N], tl.float32)
    for start in tl.range(0, PAD_P, TILE_P, num_stages=1):
        values = start + tl.arange(0, TILE_P)
        in_p = values < P
        left = load(written + first * written_stride + head * P, span, written_stride, values, in_t, in_p)
        if VALUES:
            left = (left.to(tl.float32) * tl.load(gates + at * CHUNK + span)[:, None]).to(dtype)
        dstate = load(dstates + at * (P * N), values, N, keys, in_p, in_n)
        total = tl.dot(left, dstate, total, input_precision=PRECISION)
        if not VALUES:
            state = load(boundaries + at * (P * N), values, N, keys, in_p, in_n)
            along += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=0)
    store(dleaving + at * (CHUNK * N), span, N, keys, every, in_n, total)
    if not VALUES:
        tl.store(dkept + at * N + keys, along, mask=in_n)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "chunks", "heads"])
def pull_values(
    v, gates, dy_values, pairs, leaving_k, dfresh, dstates, table, dv, dgate, t, chunks, heads, v_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, PAD_P: tl.constexpr, TILE_P: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, GATE: tl.constexpr, FREE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dV = beta dV' and dbeta = v . dV', where dV' = dR [= pairs^T dR + scale scores_k^T dY + leaving_k dS'^T]."""
    program = tl.program_id(0)
    head, chunk = program % heads, program // heads
    first, size = chunk_of(table, chunk, t, chunks, CHUNK, PACKED)
    span, keys = tl.arange(0, CHUNK), tl.arange(0, PAD_N)
    in_t, in_n, every = span < size, keys < N, span < CHUNK
    at = program.to(tl.int64)
    gate = tl.load(gates + at * CHUNK + span)
    dbeta = tl.zeros([CHUNK], tl.float32)
    for start in tl.range(0, PAD_P, TILE_P, num_stages=1):
        values = start + tl.arange(0, TILE_P)
        in_p = values < P
        fresh = load(dfresh + at * (CHUNK * P), span, P, values, every, in_p)
        result = fresh.to(tl.float32)
        if FREE:
            result = load(dy_values + at * (CHUNK * P), span, P, values, every, in_p).to(tl.float32)
            turned = tl.load(pairs + at * (CHUNK * CHUNK) + span[None, :] * CHUNK + span[:, None])
            result = tl.dot(turned, fresh, result, input_precision=PRECISION)
            left = _block(leaving_k + at * (CHUNK * N), span, keys, N, in_n)
            dstate = load_transposed(dstates + at * (P * N), values, N, keys, in_p, in_n)
            result = tl.dot(left, dstate, result, input_precision=PRECISION)
        if GATE:
            value = load(v + first * v_stride + head * P, span, v_stride, values, in_t, in_p)
            dbeta += tl.sum(result * value.to(tl.float32), axis=1)
        store(dv + (first * heads + head) * P, span, heads * P, values, in_t, in_p, result * gate[:, None])
    if GATE:
        tl.store(dgate + (first + span) * heads + head, dbeta, mask=in_t)
