"""The backward kernels of the fused scan: what a segment does to a state's gradient, and all gradients."""

# What Triton compiles has no Python types, and tuples that grow.
# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from subquad_kernels.selective_scan.tiles import (
    LN_2,
    apart,
    beside,
    by_fours,
    channels_of_rows,
    fold,
    load_chunk,
    load_maps,
    load_marks,
    load_vector,
    load_vectors,
    pairs,
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
    sums_in_rows,
    through_segment,
)
from subquad_kernels.triton_launch import QuickLaunch


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "segments", "segment_len", "has_final"])
def summarise_gradients(
    dt, A, C, z, dt_bias, marks, dy, dfinal, decays, writes, scratch,
    t, c, b, segments, segment_len, has_final, dt_stride, C_stride, z_stride, dy_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, AHEAD: tl.constexpr, EVICT: tl.constexpr,
    FINAL: tl.constexpr, GATE: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """What a segment does to the gradient of the state it leaves:  g -> decay g + write, for the state that enters it.

    Row k of the results is segment k + 1's; final_state's gradient is in the write of the last.
    Shapes:  decays, writes: segments-1 b c n
    """
    tile, sequence, index = place_of_program(c, b, TILE_C)
    segment = index + 1
    channels = tile * TILE_C + by_fours(TILE_C)
    columns = by_fours(PAD_N)
    in_c, in_n = channels < c, columns < N
    state_size = c * N
    bias = load_vector(dt_bias, channels, in_c, BIAS)
    at = tl.arange(0, CHUNK)[:, None]  # tokens of a chunk
    local = tl.arange(0, TILE_C)[None, :]
    steps_at = scratch + tl.program_id(0).to(tl.int64) * (CHUNK * (2 * TILE_C + PAD_N))
    pulls_at = steps_at + CHUNK * TILE_C
    C_table = pulls_at + CHUNK * TILE_C

    rates, offsets, within = states_of_tile(A, tile, c, N, PAD_N, TILE_C, SUB)
    ends = (segment == segments - 1) & (has_final != 0)
    carried = states_at_edge(dfinal, sequence * state_size, offsets, within, ends, not PACKED)
    begin = segment * segment_len
    end = tl.minimum(begin + segment_len, t)
    ROWS_A_LANE: tl.constexpr = max(1, CHUNK * TILE_C // 128)
    age = tl.zeros([CHUNK // ROWS_A_LANE, TILE_C], tl.float32)
    kept = begin >= 0
    chunks = tl.cdiv(end - begin, CHUNK)
    for reverse_chunk in range(chunks):
        chunk_start = begin + (chunks - 1 - reverse_chunk) * CHUNK
        limit = end - chunk_start
        raws = load_chunk(dt, dt_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, AHEAD, EVICT, True)
        results = load_chunk(dy, dy_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, AHEAD, EVICT, True)
        gates = load_chunk(z, z_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, AHEAD, EVICT, GATE)
        read_rows = load_chunk(C, C_stride, sequence, chunk_start, end, t, columns, in_n, CHUNK, AHEAD, "", True)
        step, _ = step_and_slope(raws, bias[None, :], (at < limit) & in_c[None, :], SOFTPLUS)
        age += sum_of_parts(step, ROWS_A_LANE)
        pull = results.to(tl.float32)
        if GATE:
            gate = gates.to(tl.float32)
            pull = pull * gate * sigmoid(gate)
        tl.store(steps_at + (at * TILE_C + local), step)
        tl.store(pulls_at + (at * TILE_C + local), pull)
        tl.store(C_table + (at * PAD_N + columns[None, :]), read_rows.to(tl.float32))
        tl.debug_barrier()
        for reverse_group in range(CHUNK // GROUP):
            base = CHUNK - GROUP - reverse_group * GROUP
            tags = load_marks(marks, chunk_start, base, limit, GROUP, PACKED)
            steps, pulls = load_vectors(steps_at + base * TILE_C, 2, GROUP, CHUNK, TILE_C, PAD_N, SUB)
            reads = load_maps(C_table + base * PAD_N, 1, GROUP, CHUNK, TILE_C, PAD_N, SUB)
            factors, pulled, read = apart(tl.exp2(steps * rates[:, :, None])), apart(pulls), apart(reads)
            for i in tl.static_range(GROUP - 1, -1, -1):
                if PACKED and FINAL and (tags[i] & 2) != 0:
                    document_at = (tags[i] >> 2).to(tl.int64) * state_size
                    carried += tl.load(dfinal + document_at + offsets, mask=within, other=0.0).to(tl.float32)
                carried = factors[i] * (carried + pulled[i] * read[i])
                if PACKED:
                    carried = tl.where((tags[i] & 1) != 0, 0.0, carried)
                    kept = kept & ((tags[i] & 1) == 0)
        tl.debug_barrier()
    tl.store(steps_at + tl.arange(0, TILE_C), tl.sum(age, axis=0))
    tl.debug_barrier()
    decay = tl.exp2(apart(load_vectors(steps_at, 1, 1, CHUNK, TILE_C, PAD_N, SUB))[0] * rates)
    if PACKED:
        decay = tl.where(kept, decay, 0.0)
    summary = (index * b + sequence) * state_size
    tl.store(decays + summary + offsets, decay, mask=within)
    tl.store(writes + summary + offsets, carried, mask=within)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "segments", "segment_len", "has_final"])
def differentiate(
    x, dt, A, B, C, D, z, dt_bias, initial, marks, boundaries, ungated, dy, dfinal, decays, writes,
    dx, ddt, dz, dmaps, drates, dchannels, dinitial, scratch,
    t, c, b, segments, segment_len, has_final, x_stride, dt_stride, B_stride, C_stride, z_stride, dy_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, AHEAD: tl.constexpr, EVICT: tl.constexpr,
    FINAL: tl.constexpr, GATE: tl.constexpr, SKIP: tl.constexpr, INITIAL: tl.constexpr, SUB: tl.constexpr,
    SCRATCH: tl.constexpr,
):  # fmt: skip
    """All gradients of one segment: chunks from last to first, in a chunk groups from last to first.

    `carried` is what the token after the current one sends back, decay_{t+1} g_{t+1}. Vectors of a whole chunk are made
    first and left in `scratch`, which only this program touches and the caches hold.
    """
    PARTS: tl.constexpr = TILE_C // SUB
    SUMS: tl.constexpr = 2 * PARTS  # of a token, over n: for its drives, then for its steps
    LANES: tl.constexpr = max(1, PAD_N // 4)  # that share a channel
    WIDTH: tl.constexpr = min(LANES, GROUP * SUMS)
    FOLDED: tl.constexpr = min(GROUP, SUB // 2)  # tokens whose sums over channels are taken together
    tile, sequence, segment = place_of_program(c, b, TILE_C)
    channels = tile * TILE_C + by_fours(TILE_C)
    columns = by_fours(PAD_N)
    in_c, in_n = channels < c, columns < N
    state_size = c * N
    bias = load_vector(dt_bias, channels, in_c, BIAS)
    skip = load_vector(D, channels, in_c, SKIP)

    # scratch: the states that enter the groups of a chunk, then tables of its vectors, one row a token
    VECTOR: tl.constexpr = CHUNK * TILE_C
    MAP: tl.constexpr = CHUNK * PAD_N
    slots = scratch + tl.program_id(0).to(tl.int64) * SCRATCH
    steps_at = slots + (CHUNK // GROUP) * TILE_C * PAD_N
    drives_at = steps_at + VECTOR
    pulls_at = drives_at + VECTOR
    slopes_at = pulls_at + VECTOR
    B_table = slopes_at + VECTOR
    C_table = B_table + MAP
    sums_at = C_table + MAP
    by_state = channels_of_rows(TILE_C, SUB)[:, None] * PAD_N + columns[None, :]

    rates, offsets, within = states_of_tile(A, tile, c, N, PAD_N, TILE_C, SUB)
    ends = (segment == segments - 1) & (has_final != 0)
    carried = states_at_edge(dfinal, sequence * state_size, offsets, within, ends, not PACKED)
    rate_grads = tl.zeros([TILE_C, PAD_N], tl.float32)
    for later in range(segments - 1 - segment):
        summary = ((segments - 2 - later) * b + sequence) * state_size
        carried = through_segment(carried, decays, writes, summary, offsets, within)

    begin = segment * segment_len
    end = tl.minimum(begin + segment_len, t)
    ROWS_A_LANE: tl.constexpr = max(1, CHUNK * TILE_C // 128)
    skip_grads = tl.zeros([CHUNK // ROWS_A_LANE, TILE_C], tl.float32)
    bias_grads = tl.zeros([CHUNK // ROWS_A_LANE, TILE_C], tl.float32)
    dB = dmaps + tile.to(tl.int64) * 2 * b * t * N
    # Rows of a tile of sums over channels: of every token that of dC, then that of dB.
    map_rows_at = tl.arange(0, 2 * FOLDED)[:, None]
    map_tokens = map_rows_at % FOLDED
    map_places = tl.where(map_rows_at < FOLDED, b.to(tl.int64) * t * N, 0) + map_tokens * AHEAD * N + columns[None, :]
    chunks = tl.cdiv(end - begin, CHUNK)
    at = tl.arange(0, CHUNK)[:, None]  # tokens of a chunk
    local = tl.arange(0, TILE_C)[None, :]
    for reverse_chunk in range(chunks):
        chunk_start = begin + (chunks - 1 - reverse_chunk) * CHUNK
        limit = end - chunk_start
        row = row_of(sequence, chunk_start, t, AHEAD)
        x_at, dx_at, ddt_at, dz_at = x + row * x_stride, dx + row * c, ddt + row * c, dz
        if GATE:
            dz_at = dz + row * c

        # The vectors of the chunk, and the state that enters it.
        raws = load_chunk(dt, dt_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, AHEAD, EVICT, True)
        values = load_chunk(x, x_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, AHEAD, EVICT, True)
        results = load_chunk(dy, dy_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, AHEAD, EVICT, True)
        gates = load_chunk(z, z_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, AHEAD, EVICT, GATE)
        totals = load_chunk(ungated, c, sequence, chunk_start, end, t, channels, in_c, CHUNK, AHEAD, EVICT, GATE)
        map_rows = load_chunk(B, B_stride, sequence, chunk_start, end, t, columns, in_n, CHUNK, AHEAD, "", True)
        read_rows = load_chunk(C, C_stride, sequence, chunk_start, end, t, columns, in_n, CHUNK, AHEAD, "", True)
        swapped = columns[:, None] * c + channels[None, :]
        place = ((chunk_start // CHUNK - 1) * b + sequence) * state_size
        inside = in_n[:, None] & in_c[None, :] & (chunk_start > 0)
        entering = tl.load(boundaries + place + swapped, mask=inside, other=0.0)
        if INITIAL and not PACKED and chunk_start == 0:
            ordered = channels[None, :] * N + columns[:, None]
            entering = tl.load(initial + sequence * state_size + ordered, mask=in_n[:, None] & in_c[None, :], other=0.0)
            entering = entering.to(tl.float32)
        tl.store(slots + (columns[:, None] + local * PAD_N), entering)
        away = at * AHEAD
        mask = (at < limit) & in_c[None, :]
        value, pull = values.to(tl.float32), results.to(tl.float32)
        if GATE:
            gate = gates.to(tl.float32)
            opened = sigmoid(gate)
            gate_grad = pull * totals * opened * (1.0 + gate * (1.0 - opened))
            tl.store(dz_at + (away * c + channels[None, :]), gate_grad.to(dz.dtype.element_ty), mask=mask)
            pull = pull * gate * opened
        step, slope = step_and_slope(raws, bias[None, :], mask, SOFTPLUS)
        skip_grads += sum_of_parts(pull * value, ROWS_A_LANE)
        tl.store(steps_at + (at * TILE_C + local), step)
        tl.store(drives_at + (at * TILE_C + local), step * value)
        tl.store(pulls_at + (at * TILE_C + local), pull)
        tl.store(slopes_at + (at * TILE_C + local), slope)
        tl.store(B_table + (at * PAD_N + columns[None, :]), map_rows.to(tl.float32))
        tl.store(C_table + (at * PAD_N + columns[None, :]), read_rows.to(tl.float32))
        tl.debug_barrier()

        # The states that enter the groups.
        states = tl.load(slots + by_state)
        for group in range(CHUNK // GROUP - 1):
            for i in range(GROUP):
                token = group * GROUP + i
                if PACKED:
                    tag = tl.load(marks + chunk_start + token, mask=token < limit, other=0)
                    states = restart(states, tag, initial, state_size, offsets, within, INITIAL)
                ahead, drive = load_vectors(steps_at + token * TILE_C, 2, 1, CHUNK, TILE_C, PAD_N, SUB)
                push = drive * load_maps(B_table + token * PAD_N, 1, 1, CHUNK, TILE_C, PAD_N, SUB)
                states = apart(tl.exp2(ahead * rates[:, :, None]))[0] * states + apart(push)[0]
            tl.store(slots + (group + 1) * (TILE_C * PAD_N) + by_state, states)

        for reverse_group in range(CHUNK // GROUP):
            base = CHUNK - GROUP - reverse_group * GROUP
            tags = load_marks(marks, chunk_start, base, limit, GROUP, PACKED)
            steps, drives = load_vectors(steps_at + base * TILE_C, 2, GROUP, CHUNK, TILE_C, PAD_N, SUB)
            pulls = load_vectors(pulls_at + base * TILE_C, 1, GROUP, CHUNK, TILE_C, PAD_N, SUB)
            maps, reads = load_maps(B_table + base * PAD_N, 2, GROUP, CHUNK, TILE_C, PAD_N, SUB)
            states = tl.load(slots + (CHUNK // GROUP - 1 - reverse_group) * (TILE_C * PAD_N) + by_state)

            # The states before every token of the group, and their gradients behind every token.
            decay, pushes = tl.exp2(steps * rates[:, :, None]), drives * maps
            factors, pushed, pulled, before, grads = apart(decay), apart(pushes), apart(pulls * reads), (), ()
            for i in tl.static_range(GROUP):
                if PACKED:
                    states = restart(states, tags[i], initial, state_size, offsets, within, INITIAL)
                before += (states,)
                states = factors[i] * states + pushed[i]
            entered = beside(before)
            read_sums = sums_in_rows(pulls * (decay * entered + pushes), PARTS)
            for i in tl.static_range(GROUP - 1, -1, -1):
                if PACKED and FINAL:
                    document_at = (tags[i] >> 2).to(tl.int64) * state_size
                    final_grad = tl.load(dfinal + document_at + offsets, mask=within & ((tags[i] & 2) != 0), other=0.0)
                    carried += final_grad.to(tl.float32)
                grads = (carried + pulled[i],) + grads  # noqa: RUF005
                carried = grads[0] * factors[i]
                if PACKED:
                    if INITIAL:
                        document_at = (tags[i] >> 2).to(tl.int64) * state_size
                        tl.store(dinitial + document_at + offsets, carried, mask=within & ((tags[i] & 1) != 0))
                    carried = tl.where((tags[i] & 1) != 0, 0.0, carried)

            # What these are with all tokens of the group together: sums over n, over tokens and over channels.
            grad = beside(grads)
            exponents = grad * decay * entered
            of_rates = apart(steps * exponents)
            for i in tl.static_range(GROUP - 1, -1, -1):
                rate_grads += of_rates[i]
            drive_sums = sums_in_lanes(grad * maps, LANES)
            step_sums = sums_in_lanes(exponents * rates[:, :, None], LANES)
            store_sums(sums_at + base * (SUMS * SUB), pairs(drive_sums, step_sums), PARTS, WIDTH)
            both_sums = tl.join(read_sums, sums_in_rows(drives * grad, PARTS))
            both_sums = tl.reshape(both_sums, [SUB, PAD_N, GROUP // FOLDED, FOLDED, 2])
            both_sums = tl.reshape(tl.permute(both_sums, (0, 1, 2, 4, 3)), [SUB, PAD_N, 2 * GROUP])
            folded = apart(fold(both_sums, PAD_N, GROUP // FOLDED))
            for k in tl.static_range(GROUP // FOLDED):
                both = folded[k]
                if 2 * FOLDED < SUB:
                    both = tl.sum(tl.reshape(both, [SUB // (2 * FOLDED), 2 * FOLDED, PAD_N]), axis=0)
                first = base + k * FOLDED
                at_token = dB + (row + first * AHEAD) * N
                tl.store(at_token + map_places, both, mask=in_n[None, :] & (map_tokens < limit - first))
        tl.debug_barrier()

        # The gradients of the chunk's vectors.
        away = at * AHEAD
        mask = (at < limit) & in_c[None, :]
        spots = at * TILE_C + local
        drive_grad = tl.load(sums_at + places_of_sums(at * SUMS, local, SUB, PARTS, WIDTH))
        step_grad = tl.load(sums_at + places_of_sums(at * SUMS + PARTS, local, SUB, PARTS, WIDTH))
        value = tl.load(x_at + (away * x_stride + channels[None, :]), mask=mask, other=0.0).to(tl.float32)
        raw_grad = (step_grad * LN_2 + drive_grad * value) * tl.load(slopes_at + spots)  # `rates` are A log2 e
        bias_grads += sum_of_parts(raw_grad, ROWS_A_LANE)
        tl.store(ddt_at + (away * c + channels[None, :]), raw_grad.to(ddt.dtype.element_ty), mask=mask)
        input_grad = drive_grad * tl.load(steps_at + spots) + skip[None, :] * tl.load(pulls_at + spots)
        tl.store(dx_at + (away * c + channels[None, :]), input_grad.to(dx.dtype.element_ty), mask=mask)

    part = sequence * segments + segment
    if INITIAL and not PACKED and segment == 0:
        tl.store(dinitial + sequence * state_size + offsets, carried, mask=within)
    tl.store(drates + part * state_size + offsets, rate_grads, mask=within)
    sums = dchannels + part * c + channels
    tl.store(sums, tl.sum(skip_grads, axis=0), mask=in_c)
    tl.store(sums + b.to(tl.int64) * segments * c, tl.sum(bias_grads, axis=0), mask=in_c)
