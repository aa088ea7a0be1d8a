"""T = (I + A)^-1 of a chunk of 64 tokens, A strictly lower triangular, in blocks of 16 by one warp.

Rows are substituted inside the four diagonal blocks, together; the six blocks below follow from products of blocks,
T_10 = -T_11 A_10 T_00 and so on. No power of A is formed: they would reach 1e18 where gates are near 2.
"""

# What Triton compiles has no Python types, and tuples that grow.
# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(16)


@triton.jit
def _substitute(inverse, transposed, row):
    """Row `row` of (I + A)^-1 from the rows before it:  T_row = e_row - sum_j A_row,j T_j."""
    rows = tl.arange(0, BLOCK)
    coefficients = tl.sum(tl.where(rows[None, :] == row, transposed, 0.0), axis=1)
    update = tl.sum(coefficients[:, None] * inverse, axis=0)
    return tl.where(rows[:, None] == row, inverse - update[None, :], inverse)


@triton.jit
def _split(tile):
    """The leading 11 bits of fp32 values, which tf32 holds, and the rest."""
    high = (tile.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, tile - high


@triton.jit
def _product(left, right, PRECISION: tl.constexpr):
    """[16, 16] times [16, 16], with the accuracy of fp32; of TF32 as `tf32x3`, without its care for infinities."""
    if PRECISION == "ieee":
        return tl.dot(left, right, input_precision=PRECISION)
    else:
        left_high, left_low = _split(left)
        right_high, right_low = _split(right)
        total = tl.dot(left_low, right_high, input_precision="tf32")
        total = tl.dot(left_high, right_low, total, input_precision="tf32")
        return tl.dot(left_high, right_high, total, input_precision="tf32")


@triton.jit
def invert_diagonal(a00, a11, a22, a33):
    """The inverses of the four diagonal blocks of I + A, from the transposes of A's."""
    rows = tl.arange(0, BLOCK)
    t00 = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
    t11, t22, t33 = t00, t00, t00
    for row in range(1, BLOCK):
        t00 = _substitute(t00, a00, row)
        t11 = _substitute(t11, a11, row)
        t22 = _substitute(t22, a22, row)
        t33 = _substitute(t33, a33, row)
    return t00, t11, t22, t33


@triton.jit
def invert_below(diagonal, a10, a21, a32, a20, a31, a30, PRECISION: tl.constexpr):
    """All blocks of T, row by row, from those on its diagonal and the blocks of A below it."""
    t00, t11, t22, t33 = diagonal
    t10 = -_product(t11, _product(a10, t00, PRECISION), PRECISION)
    t21 = -_product(t22, _product(a21, t11, PRECISION), PRECISION)
    t32 = -_product(t33, _product(a32, t22, PRECISION), PRECISION)
    t20 = -_product(t22, _product(a20, t00, PRECISION) + _product(a21, t10, PRECISION), PRECISION)
    t31 = -_product(t33, _product(a31, t11, PRECISION) + _product(a32, t21, PRECISION), PRECISION)
    t30 = _product(a30, t00, PRECISION) + _product(a31, t10, PRECISION) + _product(a32, t20, PRECISION)
    return t00, t10, t11, t20, t21, t22, -_product(t33, t30, PRECISION), t31, t32, t33


@triton.jit
def store_inverse(at, plane, inverse, CHUNK: tl.constexpr, TERMS: tl.constexpr):
    """Write T at `at`, and what its type rounds away a plane further where there is a second term."""
    rows = tl.arange(0, BLOCK)
    for r in tl.static_range(4):
        for c in tl.static_range(4):
            place = at + (rows + r * BLOCK)[:, None] * CHUNK + (rows + c * BLOCK)[None, :]
            rest = inverse[r * (r + 1) // 2 + c] if c <= r else tl.zeros([BLOCK, BLOCK], tl.float32)
            for term in tl.static_range(TERMS):
                leading = rest.to(at.dtype.element_ty)
                tl.store(place + term * plane, leading)
                rest -= leading.to(tl.float32)
