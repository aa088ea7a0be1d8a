"""Decays per key channel between the tokens of a chunk, which meet at powers of two: no exponent is ever positive.

A token of the second block of a pair of blocks of 2^level reads one of the first: the decay between them is that from
the first's end to the reader, times that from the writer to the first's end. Both are sums of log decays over a range
of tokens, a matrix of zeros and ones times the chunk's log decays; so nothing cancels, however fast a channel decays.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def decays(summed, g, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """exp of the log decays summed over each row's range: sums as exact as the products that decays take part in.

    An fp32 log decay is two bf16 numbers but for 2^-17 of it.  [CHUNK, CHUNK], [CHUNK, N]
    """
    if g.dtype != tl.float32:
        total = tl.dot(summed.to(g.dtype), g)
    elif tl.float32 == PRODUCT:
        total = tl.dot(summed.to(tl.float32), g, input_precision=PRECISION)
    else:
        high = g.to(PRODUCT)
        total = tl.dot(summed.to(PRODUCT), high)
        total = tl.dot(summed.to(PRODUCT), (g - high.to(tl.float32)).to(PRODUCT), total)
    return tl.exp2(total * _LOG2_E)


@triton.jit
def sums(summed, terms, total, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """Terms summed over each row's range, added to total.  [CHUNK, CHUNK], [CHUNK, N]"""
    return tl.dot(summed.to(PRODUCT), terms.to(PRODUCT), total, input_precision=PRECISION)


@triton.jit
def until(token, summed, BEFORE: tl.constexpr):
    """The log decays between the chunk's start and a token's read: the token's own is among them unless BEFORE."""
    if BEFORE:
        return summed < token
    else:
        return summed <= token


@triton.jit
def ranges(token, summed, level, BEFORE: tl.constexpr):
    """What to sum in blocks of 2^level: up to a token of a second block of a pair, after a token of a first one."""
    later = ((token >> level) & 1) != 0
    inside = (token >> level) == (summed >> level)
    return inside & tl.where(later, until(token, summed, BEFORE), summed > token)


@triton.jit
def meet(later, earlier, level):
    """Pairs of tokens in the second and the first block of a pair of blocks of 2^level."""
    return (((later >> level) & 1) != 0) & ((later >> level) == (earlier >> level) + 1)
