"""T = (I + A)^-1 of a chunk of 64 tokens, A strictly lower triangular, by one warp: blocks of 16, then of 32, then all.

Rows are substituted inside the four diagonal blocks of 16, together. Two inverses with what lies below the first are
the inverse of a block of twice the length,

    [ I + A_0           ]^-1     [       T_0           ]
    [   A_10    I + A_1 ]      = [ -T_1 A_10 T_0   T_1 ]

and the pairs of one length are one product. No power of A is formed: they would reach 1e18 where gates are near 2.
Few products of many blocks are also what compiles fast: Triton looks from each of its products, loads and stores at all
that it is connected with, and here everything is (README.md).
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(16)


@triton.jit
def _split(tile):
    """The leading 11 bits of fp32 values, which tf32 holds, and the rest."""
    high = (tile.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, tile - high


@triton.jit
def _product(left, right, PRECISION: tl.constexpr):
    """left right, with the accuracy of fp32; of TF32 as `tf32x3`, without its care for infinities."""
    if PRECISION == "ieee":
        return tl.dot(left, right, input_precision=PRECISION)
    else:
        left_high, left_low = _split(left)
        right_high, right_low = _split(right)
        total = tl.dot(left_low, right_high, input_precision="tf32")
        total = tl.dot(left_high, right_low, total, input_precision="tf32")
        return tl.dot(left_high, right_high, total, input_precision="tf32")


@triton.jit
def pairs_of(level: tl.constexpr, CHUNK: tl.constexpr):
    """The tokens of the first and of the second block of each pair of blocks of `level` tokens.  [pairs, level]"""
    pairs: tl.constexpr = CHUNK // (2 * level)
    first = tl.arange(0, pairs)[:, None] * (2 * level) + tl.arange(0, level)[None, :]
    return first, first + level


@triton.jit
def invert_blocks(transposed):
    """(I + A)^-1 of blocks of 16, from the transposes of A: row i is e_i - sum_j A_ij row j.  [blocks, 16, 16]"""
    rows = tl.arange(0, BLOCK)
    diagonal = rows[None, :, None] == rows[None, None, :]
    inverse = tl.where(diagonal, 1.0, tl.zeros_like(transposed))
    for row in range(1, BLOCK):
        coefficients = tl.sum(tl.where(rows[None, None, :] == row, transposed, 0.0), axis=2)
        update = tl.sum(coefficients[:, :, None] * inverse, axis=1)
        inverse = tl.where(rows[None, :, None] == row, inverse - update[:, None, :], inverse)
    return inverse


@triton.jit
def halves(blocks):
    """The first and the second block of every pair.  [2 pairs, length, length] -> twice [pairs, length, length]"""
    PAIRS: tl.constexpr = blocks.shape[0] // 2
    LENGTH: tl.constexpr = blocks.shape[1]
    return tl.split(tl.permute(tl.reshape(blocks, [PAIRS, 2, LENGTH, LENGTH]), (0, 2, 3, 1)))


@triton.jit
def below(first, second, system, PRECISION: tl.constexpr):
    """-T_1 A_10 T_0 of every pair.  [pairs, length, length]"""
    return -_product(second, _product(system, first, PRECISION), PRECISION)


@triton.jit
def joined(first, second, low):
    """Blocks of twice the length.  [pairs, length, length] -> [pairs, 2 length, 2 length]"""
    PAIRS: tl.constexpr = first.shape[0]
    LENGTH: tl.constexpr = first.shape[1]
    upper, lower = tl.join(first, tl.zeros_like(first)), tl.join(low, second)
    squares = tl.permute(tl.join(upper, lower), (0, 4, 1, 3, 2))
    return tl.reshape(squares, [PAIRS, 2 * LENGTH, 2 * LENGTH])


@triton.jit
def invert_chunk(transposed, near, far, PRECISION: tl.constexpr):
    """T_0, T_1 and what lies below T_0, from A's blocks: transposed diagonal ones, and those below, of 16 and of 32.

    Shapes:  transposed: 4 16 16    near: 2 16 16    far: 1 32 32    ->  thrice 1 32 32
    """
    first, second = halves(invert_blocks(transposed))
    first, second = halves(joined(first, second, below(first, second, near, PRECISION)))
    return first, second, below(first, second, far, PRECISION)


@triton.jit
def _store(at, plane, tile, TERMS: tl.constexpr):
    for term in tl.static_range(TERMS):
        leading = tile.to(at.dtype.element_ty)
        tl.store(at + term * plane, leading)
        tile -= leading.to(tl.float32)


@triton.jit
def store_inverse(at, plane, inverse, CHUNK: tl.constexpr, TERMS: tl.constexpr):
    """Write T at `at`, and what its type rounds away a plane further where there is a second term."""
    HALF: tl.constexpr = CHUNK // 2
    rows = tl.arange(0, HALF)
    place = at + (rows[:, None] * CHUNK + rows[None, :])[None, :, :]
    first, second, low = inverse
    _store(place, plane, first, TERMS)
    _store(place + HALF * (CHUNK + 1), plane, second, TERMS)
    _store(place + HALF * CHUNK, plane, low, TERMS)
    _store(place + HALF, plane, tl.zeros_like(first), TERMS)
