"""What decays per key channel do inside a chunk: to tokens that meet, to states that enter and leave, to gradients.

Everything else the diagonal kernel does (`fused_diagonal.py`) is free of decays: it multiplies what `relate` writes.
Chunks lie one after the other, each with 64 rows; those past a sequence's end are zeros.
"""

# What Triton compiles has no Python types, and tuples that grow.
# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from subquad_kernels.delta_rule.inverse import BLOCK, invert_below, invert_diagonal, store_inverse
from subquad_kernels.delta_rule.tiles import chunk_of, load, store
from subquad_kernels.triton_decays import meet, ranges, until
from subquad_kernels.triton_decays import sums as summed
from subquad_kernels.triton_launch import QuickLaunch

_LOG2_E = tl.constexpr(1.4426950408889634)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "chunks", "heads"])
def accumulate(
    log_decay, table, sums, t, chunks, heads,
    N: tl.constexpr, TILE_N: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Sums of log2 decays up to each token of its chunk; one decay per head is repeated for every channel.

    Shapes:  sums: chunks h 64 n
    """
    tiles: tl.constexpr = (N + TILE_N - 1) // TILE_N
    program = tl.program_id(0)
    tile, head, chunk = program % tiles, program // tiles % heads, program // (tiles * heads)
    first, size = chunk_of(table, chunk, t, chunks, CHUNK, PACKED)
    span, keys = tl.arange(0, CHUNK), tile * TILE_N + tl.arange(0, TILE_N)
    in_t, in_n = span < size, keys < N
    if VECTOR:
        found = load(log_decay + (first * heads + head) * N, span, heads * N, keys, in_t, in_n)
    else:
        row = tl.load(log_decay + (first + span) * heads + head, mask=in_t, other=0.0)
        found = tl.where(in_n[None, :], row[:, None], 0.0)
    # Below -160 exp2 is 0 in fp32: sums stay finite.
    found = tl.maximum(found.to(sums.dtype.element_ty) * _LOG2_E, -160.0)
    place = (chunk.to(tl.int64) * heads + head) * (CHUNK * N)
    store(sums + place, span, N, keys, span < CHUNK, in_n, tl.cumsum(found, 0))


@triton.jit
def _sums(sums, rows, keys, N: tl.constexpr):
    """The sums up to these rows of a chunk, 0 before the first.  [rows, keys]"""
    inside = (rows >= 0)[:, None] & (keys < N)[None, :]
    return tl.load(sums + rows[:, None] * N + keys[None, :], mask=inside, other=0.0)


@triton.jit
def _between(sums, own, span, keys, level, N: tl.constexpr):
    """The decay between a token, up to which the sums are `own`, and the end of the first of its pair of blocks."""
    ends = _sums(sums, (((span >> level) | 1) << level) - 1, keys, N)
    return _power(-tl.abs(own - ends))


@triton.jit
def _power(exponent):
    """2 to a sum of log2 decays or a difference of two, which has fp64 where inputs are fp32."""
    return tl.exp2(exponent.to(tl.float32))


@triton.jit
def _gates(gate, first, head, heads, in_t, CHUNK: tl.constexpr, GATE: tl.constexpr):
    """A chunk's write gates, 1 where there are none, 0 past its end.  [CHUNK]"""
    found = tl.where(in_t, 1.0, 0.0)
    if GATE:
        found = tl.load(gate + (first + tl.arange(0, CHUNK)) * heads + head, mask=in_t, other=0.0).to(tl.float32)
    return found


@QuickLaunch
@triton.jit(do_not_specialize=["t", "chunks", "heads"])
def relate(
    q, reader, written, sums, gate, table, scores, pairs, entering, reading, leaving, kept, gates,
    t, chunks, heads, group, reader_group, written_group, q_stride, reader_stride, written_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_N: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    PACKED: tl.constexpr, GATE: tl.constexpr, FREE: tl.constexpr, SYSTEM: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a chunk's queries and readers with what is written, and each as the chunk's ends see them.

    A reader is `remove`, before the token's own decay (FREE), or -beta k, after it. SYSTEM: what is written is what
    the system solves for; then `pairs` is A, of fp32, and queries, readers and what is kept of a state are stored too.
    Shapes:  scores, pairs: chunks h 64 64    entering, reading, leaving: chunks h 64 n    kept: chunks h n
             gates: chunks h 64
    """
    program = tl.program_id(0)
    head, chunk = program % heads, program // heads
    first, size = chunk_of(table, chunk, t, chunks, CHUNK, PACKED)
    span = tl.arange(0, CHUNK)
    token, other, in_t, every = span[:, None], span[None, :], span < size, span < CHUNK
    place = program.to(tl.int64) * CHUNK
    q += first * q_stride + head // group * N
    reader += first * reader_stride + head // reader_group * N
    written += first * written_stride + head // written_group * N
    sums += place * N
    beta = _gates(gate, first, head, heads, in_t, CHUNK, GATE)
    if SYSTEM:
        tl.store(gates + place + span, beta)

    score = tl.zeros([CHUNK, CHUNK], tl.float32)
    pair = tl.zeros([CHUNK, CHUNK], tl.float32)
    for start in tl.range(0, PAD_N, TILE_N, num_stages=1):
        keys = start + tl.arange(0, TILE_N)
        in_n = keys < N
        upto = _sums(sums, span, keys, N)
        short = _sums(sums, span - 1, keys, N) if FREE else upto
        query = load(q, span, q_stride, keys, in_t, in_n).to(tl.float32)
        read = load(reader, span, reader_stride, keys, in_t, in_n).to(tl.float32)
        key = load(written, span, written_stride, keys, in_t, in_n).to(tl.float32)
        score += tl.where(token == other, tl.sum(query * key, axis=1)[:, None], 0.0)
        for level in tl.range(0, LEVELS, disable_licm=True):
            after = _between(sums, upto, span, keys, level, N)
            before = _between(sums, short, span, keys, level, N) if FREE else after
            keyed = (key * after).to(PRODUCT)
            met = tl.dot((query * after).to(PRODUCT), tl.trans(keyed), input_precision=PRECISION)
            score += tl.where(meet(token, other, level), met, 0.0)
            met = tl.dot((read * before).to(PRODUCT), tl.trans(keyed), input_precision=PRECISION)
            pair += tl.where(meet(token, other, level), met, 0.0)
        rest = _power(tl.load(sums + (CHUNK - 1) * N + keys, mask=in_n, other=0.0)[None, :] - upto)
        store(leaving + place * N, span, N, keys, every, in_n, key * rest)
        if SYSTEM:
            after = _power(upto)
            store(entering + place * N, span, N, keys, every, in_n, query * after)
            before = _power(short) if FREE else after * -beta[:, None]
            store(reading + place * N, span, N, keys, every, in_n, read * before)
            within = _power(tl.load(sums + (CHUNK - 1) * N + keys, mask=in_n, other=0.0))
            tl.store(kept + program.to(tl.int64) * N + keys, within, mask=in_n)
    if SYSTEM:
        pair = -pair if FREE else pair * beta[:, None]
    square = token * CHUNK + other
    tl.store(scores + place * CHUNK + square, score.to(scores.dtype.element_ty))
    tl.store(pairs + place * CHUNK + square, pair.to(pairs.dtype.element_ty))


@QuickLaunch
@triton.jit(do_not_specialize=["count"])
def invert(systems, inverses, count, CHUNK: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """T = (I + A)^-1 of every chunk and head, by one warp.

    Shapes:  systems: count 64 64    inverses: terms count 64 64
    """
    program = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    systems += program * (CHUNK * CHUNK) + rows[:, None] * CHUNK + rows[None, :]
    turned = systems - rows[:, None] * (CHUNK - 1) + rows[None, :] * (CHUNK - 1)
    row: tl.constexpr = BLOCK * CHUNK
    step: tl.constexpr = row + BLOCK
    diagonal = invert_diagonal(
        tl.load(turned), tl.load(turned + step), tl.load(turned + 2 * step), tl.load(turned + 3 * step)
    )
    inverse = invert_below(
        diagonal,
        tl.load(systems + row), tl.load(systems + row + step), tl.load(systems + row + 2 * step),
        tl.load(systems + 2 * row), tl.load(systems + 2 * row + step),
        tl.load(systems + 3 * row), PRECISION,
    )  # fmt: skip
    store_inverse(inverses + program * (CHUNK * CHUNK), count.to(tl.int64) * (CHUNK * CHUNK), inverse, CHUNK, TERMS)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "chunks", "heads"])
def differentiate(
    q, reader, written, sums, gate, table, dscores, dpairs, dentering, dreading, dleaving, dkept,
    dq_before, dreader_before, ddecay_before, dq, dreader, dwritten, ddecay, dgate,
    t, chunks, heads, group, reader_group, written_group, q_stride, reader_stride, written_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_N: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    PACKED: tl.constexpr, GATE: tl.constexpr, FREE: tl.constexpr, SYSTEM: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's queries, readers, what is written and log decays, from those of all `relate` wrote.

    `dpairs` is that of readers with what is written. Where the reader is -beta k, its gradient joins that of the key
    written, and `dgate` is added to. Without SYSTEM queries, readers and decays have gradients already, `.._before`.
    An exponent's gradient is the product's with its factor: positive sums of ranges, nothing cancels.
    """
    program = tl.program_id(0)
    head, chunk = program % heads, program // heads
    first, size = chunk_of(table, chunk, t, chunks, CHUNK, PACKED)
    span = tl.arange(0, CHUNK)
    token, other, in_t, every = span[:, None], span[None, :], span < size, span < CHUNK
    place = program.to(tl.int64) * CHUNK
    own = (first * heads + head) * N
    q += first * q_stride + head // group * N
    reader += first * reader_stride + head // reader_group * N
    written += first * written_stride + head // written_group * N
    sums += place * N
    beta = _gates(gate, first, head, heads, in_t, CHUNK, GATE)
    dscores += place * CHUNK
    dpairs += place * CHUNK
    square, turned = token * CHUNK + other, other * CHUNK + token
    dbeta = tl.zeros([CHUNK], tl.float32)
    for start in tl.range(0, PAD_N, TILE_N, num_stages=1):
        keys = start + tl.arange(0, TILE_N)
        in_n = keys < N
        upto = _sums(sums, span, keys, N)
        short = _sums(sums, span - 1, keys, N) if FREE else upto
        query = load(q, span, q_stride, keys, in_t, in_n).to(tl.float32)
        key = load(written, span, written_stride, keys, in_t, in_n).to(tl.float32)
        if FREE:
            read = load(reader, span, reader_stride, keys, in_t, in_n).to(tl.float32)
        else:
            read = key * -beta[:, None]

        # What reads: the state that enters, and earlier tokens.
        if SYSTEM:
            query_grad = load(dentering + place * N, span, N, keys, every, in_n).to(tl.float32) * _power(upto)
            read_grad = load(dreading + place * N, span, N, keys, every, in_n).to(tl.float32) * _power(short)
            within = _power(tl.load(sums + (CHUNK - 1) * N + keys, mask=in_n, other=0.0))
            within *= tl.load(dkept + program.to(tl.int64) * N + keys, mask=in_n, other=0.0)
            decay_grad = tl.zeros([CHUNK, TILE_N], tl.float32) + within[None, :]
            decay_grad = summed(until(other, token, False), query * query_grad, decay_grad, PRODUCT, PRECISION)
            decay_grad = summed(until(other, token, FREE), read * read_grad, decay_grad, PRODUCT, PRECISION)
        else:
            query_grad = load(dq_before + own, span, heads * N, keys, in_t, in_n)
            read_grad = load(dreader_before + own, span, heads * N, keys, in_t, in_n)
            decay_grad = load(ddecay_before + own, span, heads * N, keys, in_t, in_n)
        itself = tl.load(dscores + span * (CHUNK + 1)).to(tl.float32)[:, None]
        query_grad += itself * key
        for level in tl.range(0, LEVELS, disable_licm=True):
            after = _between(sums, upto, span, keys, level, N)
            before = _between(sums, short, span, keys, level, N) if FREE else after
            keyed = (key * after).to(PRODUCT)
            later = meet(token, other, level)
            pull = tl.load(dscores + square, mask=later, other=0.0).to(PRODUCT)
            part = tl.dot(pull, keyed, input_precision=PRECISION) * after
            query_grad += part
            terms = query * part
            pull = tl.load(dpairs + square, mask=later, other=0.0).to(PRODUCT)
            part = tl.dot(pull, keyed, input_precision=PRECISION) * before
            read_grad += part
            if FREE:
                removed = ranges(other, token, level, True)
                decay_grad = summed(removed, read * part, decay_grad, PRODUCT, PRECISION)
            else:
                terms += read * part
            decay_grad = summed(ranges(other, token, level, False), terms, decay_grad, PRODUCT, PRECISION)
        store(dq + own, span, heads * N, keys, in_t, in_n, query_grad)
        if FREE:
            store(dreader + own, span, heads * N, keys, in_t, in_n, read_grad)

        # What was written: for the state that leaves, and for later tokens.
        rest = _power(tl.load(sums + (CHUNK - 1) * N + keys, mask=in_n, other=0.0)[None, :] - upto)
        key_grad = load(dleaving + place * N, span, N, keys, every, in_n).to(tl.float32) * rest
        decay_grad = summed(token > other, key * key_grad, decay_grad, PRODUCT, PRECISION)
        key_grad += itself * query
        if not FREE:
            dbeta -= tl.sum(key * read_grad, axis=1)
            key_grad -= beta[:, None] * read_grad
        for level in tl.range(0, LEVELS, disable_licm=True):
            after = _between(sums, upto, span, keys, level, N)
            before = _between(sums, short, span, keys, level, N) if FREE else after
            earlier = meet(other, token, level)
            pull = tl.load(dscores + turned, mask=earlier, other=0.0).to(PRODUCT)
            part = tl.dot(pull, (query * after).to(PRODUCT), input_precision=PRECISION)
            pull = tl.load(dpairs + turned, mask=earlier, other=0.0).to(PRODUCT)
            part = tl.dot(pull, (read * before).to(PRODUCT), part, input_precision=PRECISION) * after
            key_grad += part
            decay_grad = summed(ranges(other, token, level, False), key * part, decay_grad, PRODUCT, PRECISION)
        store(dwritten + own, span, heads * N, keys, in_t, in_n, key_grad)
        store(ddecay + own, span, heads * N, keys, in_t, in_n, decay_grad)
    if GATE and not FREE:
        at = dgate + (first + span) * heads + head
        tl.store(at, tl.load(at, mask=in_t, other=0.0) + dbeta, mask=in_t)
