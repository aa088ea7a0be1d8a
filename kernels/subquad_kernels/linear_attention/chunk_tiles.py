"""What every Triton kernel of linear attention says of a chunk: where it lies, its tiles, its gates, its decays."""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from subquad_kernels.triton_chunks import chunk_at, taken

_LOG2_E = tl.constexpr(math.log2(math.e))
_LEAST = tl.constexpr(-128.0)
"""exp of it is 0 in fp32: a smaller log decay does nothing more, and would take digits from the sums it enters."""


@triton.constexpr_function
def _in_tensor_memory():
    """Whether what a loop carries from product to product lies in tensor memory: of capabilities 10 and 11."""
    return cuda_capability_geq(10) and not cuda_capability_geq(12)


@triton.jit
def find_place(b, h, group, P: tl.constexpr, TILE_P: tl.constexpr):
    """Tile, head, its head of q and k, sequence (64 bits) and segment (or walk); neighbours share q and k."""
    program = tl.program_id(0)
    TILES: tl.constexpr = (P + TILE_P - 1) // TILE_P
    tile = program % TILES
    head = (program // TILES) % h
    sequence = ((program // (TILES * h)) % b).to(tl.int64)
    return tile, head, head // group, sequence, program // (TILES * h * b)


@triton.jit
def count_chunks(table, chunks, PACKED: tl.constexpr):
    """How many chunks there are; when packed only the device knows."""
    if PACKED:
        chunks = taken(table, chunks)
    return chunks


@triton.jit
def find_chunk(table, index, sequence, t, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """First row (64 bits) and length of a chunk, its state (64 bits), and whether that begins or ends with it."""
    if PACKED:
        row, limit, document, begins, ends = chunk_at(table, index)
        state = document.to(tl.int64)
    else:
        row = sequence * t + index * CHUNK
        limit = tl.minimum(CHUNK, t - index * CHUNK)
        state = sequence
        begins, ends = False, False
    return row, limit, state, begins, ends


@triton.jit
def load_tile(at, stride, tokens, limit, columns, WIDTH: tl.constexpr):
    """A tile of a chunk's rows, zeros past its end and past the last column.  [CHUNK, columns]"""
    mask = (tokens[:, None] < limit) & (columns[None, :] < WIDTH)
    return tl.load(at + tokens[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_state(states, owner, offsets, within, STATE: tl.constexpr, GIVEN: tl.constexpr):
    """A state in fp32, zeros where none is given.  [PAD_N, TILE_P], or transposed as the offsets are"""
    state = tl.zeros(offsets.shape, tl.float32)
    if GIVEN:
        state = tl.load(states + owner * STATE + offsets, mask=within, other=0.0).to(tl.float32)
    return state


@triton.jit
def replace_state(state, here, states, owner, offsets, within, STATE: tl.constexpr, GIVEN: tl.constexpr):
    """The state that a walk carries, or where `here` the one that is given to a document in its place.

    Triton 3.6 fails an assertion of its own where a branch loads what takes the place of tensor memory, and 3.7.1 does
    in a loop with stages: there it is loaded ahead of the branch, and none is read where it is not `here`.
    """
    if GIVEN and _in_tensor_memory():
        given = load_state(states, owner, offsets, within & here, STATE, GIVEN)
        if here:
            state = given
    elif here:
        state = load_state(states, owner, offsets, within, STATE, GIVEN)
    return state


@triton.jit
def load_gates(gates, at, h, tokens, limit, GIVEN: tl.constexpr):
    """The gates of a chunk in fp32, ones where there are none, zeros past its end.  [CHUNK]"""
    if GIVEN:
        values = tl.load(gates + at + tokens * h, mask=tokens < limit, other=0.0).to(tl.float32)
    else:
        values = tl.where(tokens < limit, 1.0, 0.0)
    return values


@triton.jit
def ages_of(log_decay, at, h, head, tokens, limit, DECAY: tl.constexpr):
    """Log decays (base 2) summed from the chunk's first token on, and over all of it.  [CHUNK], scalar"""
    if DECAY == 0:
        ages = tokens * 0.0
        whole = 0.0
    elif DECAY == 2:
        rate = tl.maximum(tl.load(log_decay + head).to(tl.float32), _LEAST) * _LOG2_E
        ages = rate * tl.minimum(tokens + 1, limit).to(tl.float32)
        whole = rate * limit.to(tl.float32)
    else:
        rates = tl.load(log_decay + at + tokens * h, mask=tokens < limit, other=0.0).to(tl.float32)
        rates = tl.maximum(rates, _LEAST) * _LOG2_E
        ages = tl.cumsum(rates)
        # The last age itself: a sum in another order would be off by the rounding of both.
        whole = tl.sum(tl.where(tokens == limit - 1, ages, 0.0))
    return ages, whole


@triton.jit
def fades_between(later_ages, ages, later, tokens, DECAY: tl.constexpr, STRICT: tl.constexpr):
    """exp(b_i - b_j) for j <= i (j < i if strict), else 0; masked before exp, so that no exponent is positive."""
    if STRICT:
        visible = later > tokens
    else:
        visible = later >= tokens
    if DECAY == 0:
        fades = tl.where(visible, 1.0, 0.0)
    else:
        fades = tl.exp2(tl.where(visible, later_ages - ages, float("-inf")))
    return fades


@triton.jit
def weigh(products, fades, gates, own, is_own, GATE: tl.constexpr, DIAGONAL: tl.constexpr):
    """products o M: faded and gated below the diagonal, weighed by `own` on it."""
    weighed = products * fades
    if GATE:
        weighed = weighed * gates
    if DIAGONAL:
        weighed = tl.where(is_own, products * own, weighed)
    return weighed
