"""What the kernels of the fused scan share: where a program works, how it loads a chunk, steps, and sums that leave."""

# What Triton compiles has no Python types, and tuples that grow.
# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
FIRST_AXES_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))
"""Which of the axes of an access that are equally contiguous Triton spreads over lanes."""


@triton.jit
def row_of(sequence, token, t, AHEAD: tl.constexpr):
    """The row of a token that is counted from where the scan of its sequence begins; the next is AHEAD rows on."""
    return sequence * t + (token if AHEAD > 0 else t - 1 - token)


@triton.jit
def place_of_program(c, b, TILE_C: tl.constexpr):
    """Tile, sequence (64 bits) and segment of this program; neighbours differ in the tile and share their B and C."""
    program = tl.program_id(0)
    tiles = tl.cdiv(c, TILE_C)
    tile = program % tiles
    sequence = ((program // tiles) % b).to(tl.int64)
    return tile, sequence, program // (tiles * b)


@triton.jit
def load_vector(vector, columns, within, GIVEN: tl.constexpr):
    """A tile of D or dt_bias in fp32, zeros where it is not given."""
    tile = tl.zeros(columns.shape, tl.float32)
    if GIVEN:
        tile = tl.load(vector + columns, mask=within, other=0.0).to(tl.float32)
    return tile


@triton.jit
def by_fours(COUNT: tl.constexpr):
    """The numbers below COUNT, written so that Triton knows but four of them to be neighbours.

    A lane then holds four elements of a row of tokens in any type, as many as it stores of fp32. Of bfloat16 it would
    load eight, and Triton gives all tiles of a shape, states among them, the layout of the widest.
    """
    place = tl.arange(0, COUNT)
    return place // 4 * 4 + place % 4


@triton.jit
def load_chunk(
    table, stride, sequence, start, end, t, columns, within,
    CHUNK: tl.constexpr, AHEAD: tl.constexpr, EVICT: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """The rows of a chunk of tokens, in their own type; zeros from token `end` on; () if not given."""
    tile = ()
    if GIVEN:
        near = table + row_of(sequence, start, t, AHEAD) * stride  # offsets from here fit 32 bits
        at = tl.arange(0, CHUNK)[:, None]
        mask = (start + at < end) & within[None, :]
        tile = tl.load(near + (at * AHEAD * stride + columns[None, :]), mask=mask, other=0.0, eviction_policy=EVICT)
    return tile


@triton.jit
def channels_of_rows(TILE_C: tl.constexpr, SUB: tl.constexpr):
    """Which channel of a tile each row of its states is: SUB rows lie on lanes, and a lane holds neighbours."""
    row = tl.arange(0, TILE_C)
    return row % SUB * (TILE_C // SUB) + row // SUB


@triton.jit
def states_of_tile(A, tile, c, N: tl.constexpr, PAD_N: tl.constexpr, TILE_C: tl.constexpr, SUB: tl.constexpr):
    """A log2(e) of a tile, where its states lie in a table of c by N, and which there are.  [TILE_C, PAD_N]"""
    columns = tl.arange(0, PAD_N)[None, :]
    channels = (tile * TILE_C + channels_of_rows(TILE_C, SUB))[:, None]
    offsets = channels * N + columns
    within = (channels < c) & (columns < N)
    return tl.load(A + offsets, mask=within, other=0.0).to(tl.float32) * LOG2_E, offsets, within


@triton.jit
def states_at_edge(states, place, offsets, within, here, GIVEN: tl.constexpr):
    """What a sequence begins (or, backward, ends) with: the given states where its edge is `here`, else zeros."""
    found = tl.zeros(offsets.shape, tl.float32)
    if GIVEN and here:
        found = tl.load(states + place + offsets, mask=within, other=0.0).to(tl.float32)
    return found


@triton.jit
def through_segment(states, decays, writes, place, offsets, within):
    """What a segment does to states that enter it:  h -> decay h + write."""
    decay = tl.load(decays + place + offsets, mask=within, other=0.0)
    return decay * states + tl.load(writes + place + offsets, mask=within, other=0.0)


@triton.jit
def load_marks(marks, start, first, limit, GROUP: tl.constexpr, PACKED: tl.constexpr):
    """The marks of GROUP tokens, counted from token `start` as rows are; empty when not packed."""
    tags = ()
    if PACKED:
        for i in tl.static_range(GROUP):
            tags += (tl.load(marks + start + first + i, mask=first + i < limit, other=0),)
    return tags


@triton.jit
def _reciprocal(number):
    """1 / number from 1 on, to 5e-7: a division spends four more instructions to be safe near the largest number."""
    root = tl.rsqrt(number)
    return root * root


@triton.jit
def step_and_slope(raw, bias, valid, SOFTPLUS: tl.constexpr):
    """Step size and its derivative by `raw`, both with full relative precision however small; 0 past the end.

    softplus(u) = max(u, 0) + log(1 + e),  e = exp(-|u|);  log(1 + e) = 2 artanh(s),  s = e / (2 + e) <= 1/3, of which
    seven terms leave 2e-8. A token with step 0 changes no state.
    """
    step = raw.to(tl.float32) + bias
    slope = tl.full(raw.shape, 1.0, tl.float32)
    if SOFTPLUS:
        e = tl.exp2(-tl.abs(step) * LOG2_E)
        s = e * _reciprocal(2.0 + e)
        q = s * s
        series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
        slope = tl.where(step >= 0, 1.0, e) * _reciprocal(1.0 + e)
        step = tl.maximum(step, 0.0) + 2.0 * s * series
    return tl.where(valid, step, 0.0), tl.where(valid, slope, 0.0)


@triton.jit
def sigmoid(z):
    return _reciprocal(1.0 + tl.exp2(-z * LOG2_E))


@triton.jit
def restart(state, tag, initial, state_size, offsets, within, INITIAL: tl.constexpr):
    """The state before a document's first token: its initial state or zero; other tokens keep theirs.  [TILE_C, N]"""
    if INITIAL:
        if (tag & 1) != 0:
            place = (tag >> 2).to(tl.int64) * state_size
            state = tl.load(initial + place + offsets, mask=within, other=0.0).to(tl.float32)
    else:
        state = tl.where((tag & 1) != 0, 0.0, state)
    return state


@triton.jit
def apart(tiles):
    """The tiles, a power of two, that lie beside each other along the last of three axes."""
    COUNT: tl.constexpr = tiles.shape[2]
    parts = (tl.reshape(tiles, [tiles.shape[0], tiles.shape[1]]) if COUNT == 1 else tiles,)
    for level in tl.static_range(6):
        if 2**level < COUNT:
            evens, odds = (), ()
            for i in tl.static_range(len(parts)):
                pairs = parts[i]
                if 2 ** (level + 1) < COUNT:
                    pairs = tl.reshape(pairs, [tiles.shape[0], tiles.shape[1], COUNT // 2 ** (level + 1), 2])
                even, odd = tl.split(pairs)
                evens += (even,)
                odds += (odd,)
            parts = evens + odds
    return parts


@triton.jit
def beside(tiles):
    """A power of two of tiles along a new last axis: the inverse of `apart`."""
    COUNT: tl.constexpr = len(tiles)
    for _ in tl.static_range(5):
        if len(tiles) > 1:
            pairs = ()
            for i in tl.static_range(len(tiles) // 2):
                pairs += (tl.join(tiles[i], tiles[len(tiles) // 2 + i]),)
            tiles = pairs
    return tl.reshape(tiles[0], [tiles[0].shape[0], tiles[0].shape[1], COUNT])


@triton.jit
def pairs(first, second):
    """Tiles of both in turn along the last axis: the first of `first`, the first of `second`, and so on."""
    return tl.reshape(tl.join(first, second), [first.shape[0], first.shape[1], 2 * first.shape[2]])


@triton.jit
def _tables(rows, TABLES: tl.constexpr):
    """The rows of one table; of two, each apart.  [TILE_C, PAD_N, rows * TABLES] -> [TILE_C, PAD_N, rows]"""
    found = rows
    if TABLES == 2:
        found = tl.split(tl.reshape(rows, [rows.shape[0], rows.shape[1], rows.shape[2] // 2, 2]))
    return found


@triton.jit
def by_lanes(tile):
    """For accesses that Triton is to spread over lanes from the last axis on, in any version; its own inverse."""
    if FIRST_AXES_FIRST:
        tile = tl.permute(tile, (2, 1, 0, 3) if len(tile.shape) == 4 else (2, 1, 0))
    return tile


@triton.jit
def load_vectors(
    table, TABLES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, TILE_C: tl.constexpr, PAD_N: tl.constexpr,
    SUB: tl.constexpr,
):  # fmt: skip
    """ROWS of each of TABLES of the scratch, a number for each channel: one access.  -> [TILE_C, PAD_N, ROWS] each

    Each lane loads what its states need, as it would row by row; what lies beside each other in its channels, at once.
    """
    PARTS: tl.constexpr = TILE_C // SUB
    LANES: tl.constexpr = max(1, PAD_N // 4)
    row = tl.arange(0, TABLES * ROWS)
    row = (row % TABLES * CHUNK + row // TABLES) * TILE_C
    # Not told where rows of states are neighbours, Triton loads them on the lanes that have those states.
    at = tl.max_contiguous(row[:, None] + tl.arange(0, SUB)[None, :] * PARTS, [1, 1])
    at = tl.broadcast_to(at[:, :, None, None] + tl.arange(0, PARTS), [TABLES * ROWS, SUB, LANES, PARTS])
    rows = by_lanes(tl.load(table + by_lanes(at)))
    rows = tl.reshape(tl.permute(rows, (3, 1, 2, 0)), [TILE_C, LANES, 1, TABLES * ROWS])
    rows = tl.broadcast_to(rows, [TILE_C, LANES, PAD_N // LANES, TABLES * ROWS])
    return _tables(tl.reshape(rows, [TILE_C, PAD_N, TABLES * ROWS]), TABLES)


@triton.jit
def load_maps(
    table, TABLES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, TILE_C: tl.constexpr, PAD_N: tl.constexpr,
    SUB: tl.constexpr,
):  # fmt: skip
    """ROWS of each of TABLES of the scratch, a number for each column of states.  -> [TILE_C, PAD_N, ROWS] each"""
    LANES: tl.constexpr = max(1, PAD_N // 4)
    row = tl.arange(0, TABLES * ROWS)
    row = (row % TABLES * CHUNK + row // TABLES) * PAD_N
    at = (row[:, None] + tl.arange(0, LANES)[None, :] * (PAD_N // LANES))[:, None, :, None]
    at = tl.broadcast_to(at + tl.arange(0, PAD_N // LANES), [TABLES * ROWS, SUB, LANES, PAD_N // LANES])
    rows = by_lanes(tl.load(table + by_lanes(at)))
    rows = tl.reshape(tl.permute(rows, (1, 2, 3, 0)), [1, SUB, PAD_N, TABLES * ROWS])
    rows = tl.broadcast_to(rows, [TILE_C // SUB, SUB, PAD_N, TABLES * ROWS])
    return _tables(tl.reshape(rows, [TILE_C, PAD_N, TABLES * ROWS]), TABLES)


@triton.jit
def _fold(one, other, STEP: tl.constexpr):
    """Half of a sum of both: elements whose place has the bit STEP get what `one` holds with and without it, the rest
    what `other` does. Each lane sends what it will not go on with: one exchange, where two sums would take two.

    A sum of integers less one's own is what the partner sent; compilers leave the exchange alone.
    """
    HALVES: tl.constexpr = one.numel // (2 * STEP)
    second = (tl.arange(0, 2) == 1)[None, :, None]
    first_tile, second_tile = tl.reshape(one, [HALVES, 2, STEP]), tl.reshape(other, [HALVES, 2, STEP])
    sent = tl.where(second, first_tile, second_tile).to(tl.int32, bitcast=True)
    received = (tl.sum(sent, axis=1, keep_dims=True) - sent).to(tl.float32, bitcast=True)
    return tl.reshape(tl.where(second, second_tile, first_tile) + received, one.shape)


@triton.jit
def fold(tiles, STEP: tl.constexpr, REST: tl.constexpr):
    """Fold the last axis, all but the tiles REST apart: place p holds what tile (p // STEP) % count sums to over the
    places that differ from p in those bits. Eight tiles of eight rows exchange seven times, where eight sums would 24.

    Shapes:  rows columns count*REST  ->  rows columns REST  (of one place the tiles lie beside each other)
    """
    FOLDED: tl.constexpr = tiles.shape[2] // REST
    for level in tl.static_range(6):
        if 2**level < FOLDED:
            even, odd = tl.split(tl.reshape(tiles, [tiles.shape[0], tiles.shape[1], tiles.shape[2] // 2, 2]))
            tiles = _fold(even, odd, STEP * 2**level * even.shape[2])
    return tiles


@triton.jit
def sums_in_lanes(tiles, LANES: tl.constexpr):
    """What each lane holds of sums over n.  [TILE_C, PAD_N, count] -> [TILE_C, LANES, count]"""
    return tl.sum(tl.reshape(tiles, [tiles.shape[0], LANES, tiles.shape[1] // LANES, tiles.shape[2]]), axis=2)


@triton.jit
def sums_in_rows(tiles, PARTS: tl.constexpr):
    """What each lane holds of sums over channels.  [TILE_C, PAD_N, count] -> [SUB, PAD_N, count]"""
    return tl.sum(tl.reshape(tiles, [PARTS, tiles.shape[0] // PARTS, tiles.shape[1], tiles.shape[2]]), axis=0)


@triton.jit
def sum_of_parts(tile, PARTS: tl.constexpr):
    """What the lanes hold of a tile's sums over its rows, each of its own.  [rows, columns] -> [rows/PARTS, columns]"""
    return tl.sum(tl.reshape(tile, [PARTS, tile.shape[0] // PARTS, tile.shape[1]]), axis=0)


@triton.jit
def store_sums(table, sums, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums over n of what lanes summed, WIDTH of one row beside each other: `places_of_sums` says where.

    Whole tiles are folded first and their parts last, and all that are folded alike at once: as many exchanges, and
    fewer operations for Triton.  Shapes:  sums: TILE_C LANES count
    """
    tl.static_assert(PARTS <= WIDTH)
    SUB: tl.constexpr = sums.shape[0] // PARTS
    LANES: tl.constexpr = sums.shape[1]
    ROWS: tl.constexpr = sums.shape[2] * PARTS // WIDTH
    parts = tl.permute(tl.reshape(fold(sums, PARTS, ROWS), [PARTS, SUB, LANES * ROWS]), (1, 2, 0))
    tile = fold(parts, ROWS, 1)
    if WIDTH < LANES:
        tile = tl.sum(tl.reshape(tile, [SUB, LANES // WIDTH, WIDTH * ROWS]), axis=1)
    tile = tl.permute(tl.reshape(tile, [SUB, WIDTH, ROWS]), (2, 0, 1))
    spots = tl.arange(0, ROWS)[:, None, None] * (SUB * WIDTH) + tl.arange(0, SUB)[None, :, None] * WIDTH
    # Not told that sums are neighbours, Triton stores them from the lanes on which they are.
    spots = tl.max_contiguous(spots + tl.arange(0, WIDTH), [1, 1, 1])
    tl.store(table + by_lanes(spots), by_lanes(tile))


@triton.jit
def places_of_sums(sums, local, SUB: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Where `store_sums` left the sums of channels `local` of a tile, `sums` counting those of their first part."""
    # `sums` is a multiple of PARTS: said apart, Triton sees that parts are neighbours.
    return (sums // WIDTH) * (SUB * WIDTH) + sums % WIDTH + (local // PARTS * WIDTH + local % PARTS)
