"""The forward kernels of the fused scan: what a segment does to a state, and the scan itself."""

# What Triton compiles has no Python types, and tuples that grow.
# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from subquad_kernels.selective_scan.tiles import (
    apart,
    beside,
    by_fours,
    channels_of_rows,
    load_chunk,
    load_maps,
    load_marks,
    load_vector,
    load_vectors,
    place_of_program,
    places_of_sums,
    restart,
    row_of,
    sigmoid,
    states_at_edge,
    states_of_tile,
    step_and_slope,
    store_sums,
    sum_of_parts,
    sums_in_lanes,
    through_segment,
)
from subquad_kernels.triton_launch import QuickLaunch


@triton.jit
def summarise(
    x, dt, A, B, dt_bias, initial, marks, decays, writes, slot, tile, sequence, segment, begin, end,
    t, c, b, x_stride, dt_stride, B_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, AHEAD: tl.constexpr, EVICT: tl.constexpr,
    INITIAL: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """What a segment does to the state that enters it:  h -> decay h + write."""
    channels = tile * TILE_C + by_fours(TILE_C)
    columns = by_fours(PAD_N)
    in_c, in_n = channels < c, columns < N
    state_size = c * N
    bias = load_vector(dt_bias, channels, in_c, BIAS)
    at = tl.arange(0, CHUNK)[:, None]  # tokens of a chunk
    local = tl.arange(0, TILE_C)[None, :]
    steps_at = slot
    drives_at = steps_at + CHUNK * TILE_C
    B_table = drives_at + CHUNK * TILE_C

    rates, offsets, within = states_of_tile(A, tile, c, N, PAD_N, TILE_C, SUB)
    states = tl.zeros([TILE_C, PAD_N], tl.float32)
    ROWS_A_LANE: tl.constexpr = max(1, CHUNK * TILE_C // 128)
    age = tl.zeros([CHUNK // ROWS_A_LANE, TILE_C], tl.float32)  # the sum of steps
    kept = begin >= 0  # no document starts in this segment
    raws, values = tl.zeros([CHUNK, TILE_C], dt.dtype.element_ty), tl.zeros([CHUNK, TILE_C], x.dtype.element_ty)
    map_rows = tl.zeros([CHUNK, PAD_N], B.dtype.element_ty)
    # A chunk's loads are under way while the one before it is computed; there is none before the first.
    for ahead in range(begin, end + CHUNK, CHUNK):
        next_raws = load_chunk(dt, dt_stride, sequence, ahead, end, t, channels, in_c, CHUNK, AHEAD, EVICT, True)
        next_values = load_chunk(x, x_stride, sequence, ahead, end, t, channels, in_c, CHUNK, AHEAD, EVICT, True)
        next_map_rows = load_chunk(B, B_stride, sequence, ahead, end, t, columns, in_n, CHUNK, AHEAD, "", True)
        chunk_start = ahead - CHUNK
        limit = end - chunk_start
        if chunk_start >= begin:
            step, _ = step_and_slope(raws, bias[None, :], (at < limit) & in_c[None, :], SOFTPLUS)
            age += sum_of_parts(step, ROWS_A_LANE)
            tl.store(steps_at + (at * TILE_C + local), step)
            tl.store(drives_at + (at * TILE_C + local), step * values.to(tl.float32))
            tl.store(B_table + (at * PAD_N + columns[None, :]), map_rows.to(tl.float32))
            tl.debug_barrier()
            for group in range(CHUNK // GROUP):
                base = group * GROUP
                tags = load_marks(marks, chunk_start, base, limit, GROUP, PACKED)
                steps, drives = load_vectors(steps_at + base * TILE_C, 2, GROUP, CHUNK, TILE_C, PAD_N, SUB)
                maps = load_maps(B_table + base * PAD_N, 1, GROUP, CHUNK, TILE_C, PAD_N, SUB)
                factors, pushes = apart(tl.exp2(steps * rates[:, :, None])), apart(drives * maps)
                for i in tl.static_range(GROUP):
                    if PACKED:
                        states = restart(states, tags[i], initial, state_size, offsets, within, INITIAL)
                    states = factors[i] * states + pushes[i]
                    if PACKED:
                        kept = kept & ((tags[i] & 1) == 0)
            tl.debug_barrier()
        raws, values, map_rows = next_raws, next_values, next_map_rows
    # The sum of the steps changes its layout through the scratch.
    tl.store(steps_at + tl.arange(0, TILE_C), tl.sum(age, axis=0))
    tl.debug_barrier()
    decay = tl.exp2(apart(load_vectors(steps_at, 1, 1, CHUNK, TILE_C, PAD_N, SUB))[0] * rates)
    if PACKED:
        decay = tl.where(kept, decay, 0.0)
    summary = (segment * b + sequence) * state_size
    tl.store(decays + summary + offsets, decay, mask=within)
    tl.store(writes + summary + offsets, states, mask=within)


@triton.jit
def walk(
    x, dt, A, B, C, D, z, dt_bias, initial, marks, decays, writes, y, final, boundaries, ungated, slot,
    tile, sequence, segment, begin, end, t, c, b, x_stride, dt_stride, B_stride, C_stride, z_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, AHEAD: tl.constexpr, EVICT: tl.constexpr,
    INITIAL: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """The scan of one segment, from the state that the segments before it leave; its own last state is kept."""
    PARTS: tl.constexpr = TILE_C // SUB
    LANES: tl.constexpr = max(1, PAD_N // 4)  # that share a channel
    WIDTH: tl.constexpr = min(LANES, GROUP * PARTS)  # sums of a channel that are stored beside each other
    channels = tile * TILE_C + by_fours(TILE_C)
    columns = by_fours(PAD_N)
    in_c, in_n = channels < c, columns < N
    state_size = c * N
    bias = load_vector(dt_bias, channels, in_c, BIAS)
    skip = load_vector(D, channels, in_c, SKIP)
    at = tl.arange(0, CHUNK)[:, None]  # tokens of a chunk
    local = tl.arange(0, TILE_C)[None, :]
    steps_at = slot + TILE_C * PAD_N
    drives_at = steps_at + CHUNK * TILE_C
    totals_at = drives_at + CHUNK * TILE_C
    B_table = totals_at + CHUNK * TILE_C
    C_table = B_table + CHUNK * PAD_N
    by_state = channels_of_rows(TILE_C, SUB)[:, None] * PAD_N + columns[None, :]

    rates, offsets, within = states_of_tile(A, tile, c, N, PAD_N, TILE_C, SUB)
    states = states_at_edge(initial, sequence * state_size, offsets, within, segment == 0, INITIAL and not PACKED)
    if segment > 0:
        states = tl.load(writes + sequence * state_size + offsets, mask=within, other=0.0)  # where the first ended
        for between in range(1, segment):
            states = through_segment(states, decays, writes, (between * b + sequence) * state_size, offsets, within)

    raws, values = tl.zeros([CHUNK, TILE_C], dt.dtype.element_ty), tl.zeros([CHUNK, TILE_C], x.dtype.element_ty)
    map_rows, read_rows = tl.zeros([CHUNK, PAD_N], B.dtype.element_ty), tl.zeros([CHUNK, PAD_N], C.dtype.element_ty)
    # A chunk's loads are under way while the one before it is computed; there is none before the first.
    for ahead in range(begin, end + CHUNK, CHUNK):
        next_raws = load_chunk(dt, dt_stride, sequence, ahead, end, t, channels, in_c, CHUNK, AHEAD, EVICT, True)
        next_values = load_chunk(x, x_stride, sequence, ahead, end, t, channels, in_c, CHUNK, AHEAD, EVICT, True)
        next_map_rows = load_chunk(B, B_stride, sequence, ahead, end, t, columns, in_n, CHUNK, AHEAD, "", True)
        next_read_rows = load_chunk(C, C_stride, sequence, ahead, end, t, columns, in_n, CHUNK, AHEAD, "", True)
        chunk_start = ahead - CHUNK
        limit = end - chunk_start
        if chunk_start >= begin:
            gates = load_chunk(z, z_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, AHEAD, EVICT, GATE)
            row = row_of(sequence, chunk_start, t, AHEAD)
            y_at, ungated_at = y + row * c, ungated
            if GATE:
                ungated_at = ungated + row * c
            step, _ = step_and_slope(raws, bias[None, :], (at < limit) & in_c[None, :], SOFTPLUS)
            tl.store(steps_at + (at * TILE_C + local), step)
            tl.store(drives_at + (at * TILE_C + local), step * values.to(tl.float32))
            tl.store(B_table + (at * PAD_N + columns[None, :]), map_rows.to(tl.float32))
            tl.store(C_table + (at * PAD_N + columns[None, :]), read_rows.to(tl.float32))
            tl.store(slot + by_state, states)
            tl.debug_barrier()

            for group in range(CHUNK // GROUP):
                base = group * GROUP
                tags = load_marks(marks, chunk_start, base, limit, GROUP, PACKED)
                steps, drives = load_vectors(steps_at + base * TILE_C, 2, GROUP, CHUNK, TILE_C, PAD_N, SUB)
                maps, reads = load_maps(B_table + base * PAD_N, 2, GROUP, CHUNK, TILE_C, PAD_N, SUB)
                factors, pushes, passed = apart(tl.exp2(steps * rates[:, :, None])), apart(drives * maps), ()
                for i in tl.static_range(GROUP):
                    if PACKED:
                        states = restart(states, tags[i], initial, state_size, offsets, within, INITIAL)
                    states = factors[i] * states + pushes[i]
                    passed += (states,)
                    if PACKED and (tags[i] & 2) != 0:
                        tl.store(final + (tags[i] >> 2).to(tl.int64) * state_size + offsets, states, mask=within)
                store_sums(totals_at + base * TILE_C, sums_in_lanes(beside(passed) * reads, LANES), PARTS, WIDTH)
            tl.debug_barrier()

            away = at * AHEAD
            mask = (at < limit) & in_c[None, :]
            total = tl.load(totals_at + places_of_sums(at * PARTS, local, SUB, PARTS, WIDTH))
            total += skip[None, :] * values.to(tl.float32)
            if GATE:
                tl.store(ungated_at + (away * c + channels[None, :]), total, mask=mask)
                gate = gates.to(tl.float32)
                total = total * gate * sigmoid(gate)
            tl.store(y_at + (away * c + channels[None, :]), total.to(y.dtype.element_ty), mask=mask)
            if chunk_start > 0:  # the state that entered, as boundaries lie: n c
                boundary = tl.load(slot + (columns[:, None] + local * PAD_N))
                if PACKED:
                    boundary = tl.where((tl.load(marks + chunk_start) & 1) != 0, 0.0, boundary)
                place = ((chunk_start // CHUNK - 1) * b + sequence) * state_size
                tl.store(
                    boundaries + place + (columns[:, None] * c + channels[None, :]),
                    boundary,
                    mask=in_n[:, None] & in_c[None, :],
                )
            tl.debug_barrier()
        raws, values, map_rows, read_rows = next_raws, next_values, next_map_rows, next_read_rows
    if segment == 0 and end < t:
        tl.store(writes + sequence * state_size + offsets, states, mask=within)
    if not PACKED and end == t:
        tl.store(final + sequence * state_size + offsets, states, mask=within)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "first_len", "segment_len", "scanned"])
def scan(
    x, dt, A, B, C, D, z, dt_bias, initial, marks, decays, writes, y, final, boundaries, ungated, scratch,
    t, c, b, first_len, segment_len, scanned, x_stride, dt_stride, B_stride, C_stride, z_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, AHEAD: tl.constexpr, EVICT: tl.constexpr,
    INITIAL: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """One segment, scanned if nothing is missing of the state that enters it, else summarised for a later launch.

    `scanned` segments were scanned before this launch: 0 or 1. What the first leaves is row 0 of `writes`; row k of
    both tables is segment k's summary. The last has none.
    Shapes:  decays, writes: segments-1 b c n
    """
    tile, sequence, index = place_of_program(c, b, TILE_C)
    segment = scanned + index
    begin = tl.where(segment > 0, first_len + (segment - 1) * segment_len, 0)
    end = tl.minimum(first_len + segment * segment_len, t)
    slot = scratch + tl.program_id(0).to(tl.int64) * (CHUNK * (3 * TILE_C + 2 * PAD_N) + TILE_C * PAD_N)
    if segment > 0 and scanned == 0:
        # In groups of four: no slower than eight, and Triton's time to compile grows faster than operations.
        summarise(
            x, dt, A, B, dt_bias, initial, marks, decays, writes, slot, tile, sequence, segment, begin, end,
            t, c, b, x_stride, dt_stride, B_stride,
            N, PAD_N, TILE_C, CHUNK, min(GROUP, 4), SOFTPLUS, BIAS, PACKED, AHEAD, EVICT, INITIAL, SUB,
        )  # fmt: skip
    else:
        walk(
            x, dt, A, B, C, D, z, dt_bias, initial, marks, decays, writes, y, final, boundaries, ungated, slot,
            tile, sequence, segment, begin, end, t, c, b, x_stride, dt_stride, B_stride, C_stride, z_stride,
            N, PAD_N, TILE_C, CHUNK, GROUP, SOFTPLUS, BIAS, PACKED, AHEAD, EVICT, INITIAL, SKIP, GATE, SUB,
        )  # fmt: skip
