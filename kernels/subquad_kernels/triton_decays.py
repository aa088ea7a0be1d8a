"""Decays per key channel between the tokens of a chunk, which meet at powers of two: no exponent is ever positive.

A token of the second block of a pair of blocks of 2^level reads one of the first: the decay between them is that from
the first's end to the reader, times that from the writer to the first's end. Both are sums of log decays over a range
of tokens, a matrix of zeros and ones times the chunk's log decays; so nothing cancels, however fast a channel decays.

Blocks whose decays are mild need no halving: measured from the block's start, a writer's decay is the inverse of one
that is bounded, and one product serves all pairs of the block. `whole_level` says how long such blocks may be.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_MILD = tl.constexpr(60.0)
"""Nats within a block that is taken whole: exp of them leaves fp32 and bf16 room for 1e12 times as much."""


@triton.jit
def totals(summed, terms, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """Terms summed over each row's range, as exact as the products that they take part in.

    An fp32 term is two bf16 numbers but for 2^-17 of it.  [CHUNK, CHUNK], [CHUNK, N]
    """
    if terms.dtype != tl.float32:
        return tl.dot(summed.to(terms.dtype), terms)
    elif tl.float32 == PRODUCT:
        return tl.dot(summed.to(tl.float32), terms, input_precision=PRECISION)
    else:
        high = terms.to(PRODUCT)
        total = tl.dot(summed.to(PRODUCT), high)
        return tl.dot(summed.to(PRODUCT), (terms - high.to(tl.float32)).to(PRODUCT), total)


@triton.jit
def decays(summed, g, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """exp of the log decays summed over each row's range.  [CHUNK, CHUNK], [CHUNK, N]"""
    return tl.exp2(totals(summed, g, PRODUCT, PRECISION) * _LOG2_E)


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


@triton.jit
def whole_level(least, LEVELS: tl.constexpr):
    """The largest level, LEVELS at most, of whose blocks none can decay by more than `_MILD`; 0, one token, always is.

    `least` is the least log decay of a token.
    """
    level = 0
    for doubled in tl.static_range(1, LEVELS + 1):
        level += (least * (1 << doubled) >= -_MILD).to(tl.int32)
    return level


@triton.jit
def within(token, other, level, BEFORE: tl.constexpr):
    """Pairs inside one block of 2^level, where `token` reads `other`; also what to sum from its start to the read."""
    return ((token >> level) == (other >> level)) & until(token, other, BEFORE)


@triton.jit
def whole_decays(
    token, other, g, entered, level, WHOLE: tl.constexpr, BEFORE: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """exp of the log decays from the start of a block of 2^level to each token's read, and the inverse to its write.

    The first times the second of an earlier token of the block is the decay between them. `entered` are the sums from
    the chunk's start, which serve where the chunk is one block (WHOLE). One token needs none.
    """
    written = g.to(tl.float32)
    if not WHOLE:
        entered = totals(within(token, other, level, BEFORE) & (level > 0), g, PRODUCT, PRECISION)
        written = tl.where(level > 0, written, 0.0)
    written = entered + written if BEFORE else entered
    return tl.exp2(entered * _LOG2_E), tl.exp2(written * -_LOG2_E)
