"""How tokens of a chunk meet where every key channel decays by itself: mild blocks whole, longer ones at powers of two.

Two blocks of 2^level tokens make a pair, and its middle m is the first block's end. What token i reads of token j goes
through it, e^{b_i - b_j} = e^{b_i - b_m} e^{b_m - b_j}: one matrix product a level. If i lies in the second block and
j in the first, no exponent is positive, whatever the decays. If both lie in one block, one exponent is positive, at
most the block's own decay: exact too while that is mild, that is, while the factor fits the products' type. So all
pairs of tokens whose pair of blocks is mild are taken by one product, at the chunk's `lowest` level, and the others
level by level above it. Ordinary decays take one product of the whole chunk, violent ones six (`lowest` is 0).
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lowest_level(decays, MILD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr):
    """The highest level whose blocks all keep 2^-MILD or more of every channel.

    decays: [ROWS, COLUMNS], base 2 logarithms
    """
    lowest = 0
    for level in tl.static_range(1, LEVELS):
        decays = tl.sum(tl.reshape(decays, [ROWS >> level, 2, COLUMNS]), axis=1)
        least = tl.min(tl.min(decays, axis=1), axis=0)
        lowest = tl.where(least >= -MILD, level, lowest)
    return lowest


@triton.jit
def middle(token, level):
    """The end of the first block of a token's pair."""
    return (((token >> level) | 1) << level) - 1


@triton.jit
def bound(level, lowest, MILD: tl.constexpr):
    """What an exponent of a pair that is taken cannot exceed; those of other pairs are cut off, to stay finite."""
    return tl.where((level == lowest) & (level > 0), MILD + 1.0, 0.0)


@triton.jit
def factor(exponent, most):
    """2 to an exponent, cut off at its bound."""
    return tl.exp2(tl.minimum(exponent.to(tl.float32), most))


@triton.jit
def reads(token, other, level, lowest):
    """Which tokens each reads at a level: all of its pair's first block; where it is the lowest, all before it.

    Limits are found for each token, not for each pair: pairs of a chunk fill a program's registers.
    """
    first = (token >> level >> 1) << level << 1
    half = middle(token, level)
    last = tl.where(level == lowest, token - 1, tl.where(token > half, half, -1))
    return (other[None, :] >= first[:, None]) & (other[None, :] <= last[:, None])


@triton.jit
def read_by(token, other, level, lowest):
    """The same pairs, seen from the token that is read."""
    half = middle(token, level)
    first = tl.where(level == lowest, token + 1, tl.where(token <= half, half + 1, other.shape[0]))
    last = half + (1 << level)
    return (other[None, :] >= first[:, None]) & (other[None, :] <= last[:, None])
