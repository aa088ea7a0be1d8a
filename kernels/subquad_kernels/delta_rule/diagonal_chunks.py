"""What decays per key channel do inside a chunk: to tokens that meet, to states that enter and leave, to gradients.

Everything else the diagonal kernel does (`fused_diagonal.py`) is free of decays: it multiplies what `relate` writes.
Chunks lie one after the other, each with 64 rows; those past a sequence's end are zeros.
"""

# What Triton compiles has no Python types, and tuples that grow.
# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from subquad_kernels.delta_rule.diagonal_levels import bound, factor, lowest_level, middle, read_by, reads
from subquad_kernels.delta_rule.inverse import BLOCK, invert_chunk, pairs_of, store_inverse
from subquad_kernels.delta_rule.tiles import chunk_of, load, store
from subquad_kernels.triton_launch import QuickLaunch

_LOG2_E = tl.constexpr(1.4426950408889634)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "chunks", "heads"])
def accumulate(
    log_decay, table, sums, lowest, t, chunks, heads,
    N: tl.constexpr, TILE_N: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, MILD: tl.constexpr,
    PACKED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Sums of log2 decays up to each token of its chunk, and the lowest level of every tile of channels.

    One decay per head is repeated for every channel.  Shapes:  sums: chunks h 64 n    lowest: chunks h tiles
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
    tl.store(lowest + program, lowest_level(found, MILD, CHUNK, TILE_N, LEVELS))


@triton.jit
def _sums(sums, rows, keys, N: tl.constexpr):
    """The sums up to these rows of a chunk, 0 before the first.  [rows, keys]"""
    inside = (rows >= 0)[:, None] & (keys < N)[None, :]
    return tl.load(sums + rows[:, None] * N + keys[None, :], mask=inside, other=0.0)


@triton.jit
def _lowest(lowest, program, start, N: tl.constexpr, TILE_N: tl.constexpr, FOUND_N: tl.constexpr):
    """The lowest level of a tile of channels; it was found for FOUND_N together."""
    tiles: tl.constexpr = (N + FOUND_N - 1) // FOUND_N
    found = start // FOUND_N + tl.arange(0, TILE_N // FOUND_N if TILE_N > FOUND_N else 1)
    at = lowest + program.to(tl.int64) * tiles + found
    return tl.min(tl.load(at, mask=found < tiles, other=31), axis=0)


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
    q, reader, written, sums, lowest, gate, table, scores, pairs, entering, reading, leaving, kept, gates,
    t, chunks, heads, group, reader_group, written_group, q_stride, reader_stride, written_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_N: tl.constexpr, FOUND_N: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, MILD: tl.constexpr, PACKED: tl.constexpr, GATE: tl.constexpr, FREE: tl.constexpr,
    SYSTEM: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
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
        first_level = _lowest(lowest, program, start, N, TILE_N, FOUND_N)
        for level in tl.range(first_level, LEVELS, num_stages=1, disable_licm=True):
            ends, most = _sums(sums, middle(span, level), keys, N), bound(level, first_level, MILD)
            after = factor(upto - ends, most)
            before = factor(short - ends, most) if FREE else after
            keyed = (key * factor(ends - upto, most)).to(PRODUCT)
            later = reads(span, span, level, first_level)
            met = tl.dot((query * after).to(PRODUCT), tl.trans(keyed), input_precision=PRECISION)
            score += tl.where(later, met, 0.0)
            met = tl.dot((read * before).to(PRODUCT), tl.trans(keyed), input_precision=PRECISION)
            pair += tl.where(later, met, 0.0)
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


@triton.jit
def _blocks(systems, later, earlier, CHUNK: tl.constexpr):
    return tl.load(systems + later * CHUNK + earlier)


@QuickLaunch
@triton.jit(do_not_specialize=["count"])
def invert(systems, inverses, count, CHUNK: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """T = (I + A)^-1 of every chunk and head, by one warp.

    Shapes:  systems: count 64 64    inverses: terms count 64 64
    """
    program = tl.program_id(0).to(tl.int64)
    systems += program * (CHUNK * CHUNK)
    tokens = tl.arange(0, CHUNK // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    transposed = _blocks(systems, tokens[:, None, :], tokens[:, :, None], CHUNK)
    earlier, later = pairs_of(BLOCK, CHUNK)
    near = _blocks(systems, later[:, :, None], earlier[:, None, :], CHUNK)
    earlier, later = pairs_of(2 * BLOCK, CHUNK)
    far = _blocks(systems, later[:, :, None], earlier[:, None, :], CHUNK)
    inverse = invert_chunk(transposed, near, far, PRECISION)
    store_inverse(inverses + program * (CHUNK * CHUNK), count.to(tl.int64) * (CHUNK * CHUNK), inverse, CHUNK, TERMS)


@triton.jit
def _pull_reads(
    query_grad, read_grad, key, upto, short, sums, dscores, dpairs, keys, lowest,
    N: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, MILD: tl.constexpr, FREE: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of queries and readers, and what one kind of written keys adds to them."""
    span = tl.arange(0, CHUNK)
    token, other = span[:, None], span[None, :]
    square = token * CHUNK + other
    query_grad += tl.load(dscores + span * (CHUNK + 1)).to(tl.float32)[:, None] * key
    for level in tl.range(lowest, LEVELS, num_stages=1, disable_licm=True):
        ends, most = _sums(sums, middle(span, level), keys, N), bound(level, lowest, MILD)
        keyed = (key * factor(ends - upto, most)).to(PRODUCT)
        later = reads(span, span, level, lowest)
        after = factor(upto - ends, most)
        pull = tl.where(later, tl.load(dscores + square), 0.0).to(PRODUCT)
        query_grad += tl.dot(pull, keyed, input_precision=PRECISION) * after
        before = factor(short - ends, most) if FREE else after
        pull = tl.where(later, tl.load(dpairs + square), 0.0).to(PRODUCT)
        read_grad += tl.dot(pull, keyed, input_precision=PRECISION) * before
    return query_grad, read_grad


@triton.jit
def _pull_writes(
    query, read, key, upto, short, sums, dscores, dpairs, dleaving, keys, lowest,
    N: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, MILD: tl.constexpr, FREE: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one kind of written keys; and that of what all of them decay by until they leave.  [keys]"""
    span, in_n = tl.arange(0, CHUNK), keys < N
    token, other = span[:, None], span[None, :]
    turned = other * CHUNK + token
    rest = _power(tl.load(sums + (CHUNK - 1) * N + keys, mask=in_n, other=0.0)[None, :] - upto)
    key_grad = load(dleaving, span, N, keys, span < CHUNK, in_n).to(tl.float32) * rest
    left = tl.sum(key * key_grad, axis=0)
    key_grad += tl.load(dscores + span * (CHUNK + 1)).to(tl.float32)[:, None] * query
    for level in tl.range(lowest, LEVELS, num_stages=1, disable_licm=True):
        ends, most = _sums(sums, middle(span, level), keys, N), bound(level, lowest, MILD)
        earlier = read_by(span, span, level, lowest)
        after = factor(upto - ends, most)
        pull = tl.where(earlier, tl.load(dscores + turned), 0.0).to(PRODUCT)
        part = tl.dot(pull, (query * after).to(PRODUCT), input_precision=PRECISION)
        before = factor(short - ends, most) if FREE else after
        pull = tl.where(earlier, tl.load(dpairs + turned), 0.0).to(PRODUCT)
        part = tl.dot(pull, (read * before).to(PRODUCT), part, input_precision=PRECISION)
        key_grad += part * factor(ends - upto, most)
    return key_grad, left


@triton.jit
def _written(
    key, kind, keys, in_t, solved, given, solved_stride, given_stride, dscores, dscores_k, dpairs, dpairs_k,
    N: tl.constexpr, FREE: tl.constexpr,
):  # fmt: skip
    """Of the written keys that are solved for (kind 0) or given: themselves, and the gradients of scores and pairs."""
    if FREE:
        span, in_n = tl.arange(0, in_t.shape[0]), keys < N
        if kind == 0:  # their types may differ
            key = load(solved, span, solved_stride, keys, in_t, in_n).to(tl.float32)
        else:
            key = load(given, span, given_stride, keys, in_t, in_n).to(tl.float32)
        dscores, dpairs = tl.where(kind == 0, dscores, dscores_k), tl.where(kind == 0, dpairs, dpairs_k)
    return key, dscores, dpairs


@triton.jit
def _summed_after(terms, total, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """Each token's total, and the terms of all later tokens: of half types two, as sums cancel.  [CHUNK, keys]"""
    rows = tl.arange(0, terms.shape[0])
    later = (rows[:, None] < rows[None, :]).to(PRODUCT)
    leading = terms.to(PRODUCT)
    total = tl.dot(later, leading, total, input_precision=PRECISION)
    if tl.float32 != PRODUCT:
        total = tl.dot(later, (terms - leading.to(tl.float32)).to(PRODUCT), total, input_precision=PRECISION)
    return total


@QuickLaunch
@triton.jit(do_not_specialize=["t", "chunks", "heads"])
def differentiate(
    q, reader, solved, given, sums, lowest, gate, table, dscores, dpairs, dscores_k, dpairs_k,
    dentering, dreading, dleaving, dleaving_k, dkept, dq, dreader, dsolved, dgiven, ddecay, dgate,
    t, chunks, heads, group, solved_group, q_stride, reader_stride, solved_stride, given_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_N: tl.constexpr, FOUND_N: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, MILD: tl.constexpr, PACKED: tl.constexpr, GATE: tl.constexpr, FREE: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's queries, readers, what is written and log decays, from those of all `relate` wrote.

    `dpairs` is that of readers with what the system solves for, the `solved` keys; `.._k` are those of the keys
    `given` beside them (FREE). Where the reader is -beta k, its gradient joins that of the key, and `dgate` is added
    to. Shapes:  dq, dreader, dsolved, dgiven, ddecay: b t h n
    """
    program = tl.program_id(0)
    head, chunk = program % heads, program // heads
    first, size = chunk_of(table, chunk, t, chunks, CHUNK, PACKED)
    span = tl.arange(0, CHUNK)
    in_t, every = span < size, span < CHUNK
    place = program.to(tl.int64) * CHUNK
    own = (first * heads + head) * N
    q += first * q_stride + head // group * N
    solved += first * solved_stride + head // solved_group * N
    if FREE:
        reader += first * reader_stride + head * N
        given += first * given_stride + head // group * N
    sums += place * N
    dscores += place * CHUNK
    dpairs += place * CHUNK
    if FREE:
        dscores_k += place * CHUNK
        dpairs_k += place * CHUNK
    beta = _gates(gate, first, head, heads, in_t, CHUNK, GATE)
    dbeta = tl.zeros([CHUNK], tl.float32)
    KINDS: tl.constexpr = 2 if FREE else 1  # of written keys
    for start in tl.range(0, PAD_N, TILE_N, num_stages=1):
        keys = start + tl.arange(0, TILE_N)
        in_n = keys < N
        level = _lowest(lowest, program, start, N, TILE_N, FOUND_N)
        upto = _sums(sums, span, keys, N)
        short = _sums(sums, span - 1, keys, N) if FREE else upto

        # What reads: the state that enters, and earlier tokens.
        query_grad = load(dentering + place * N, span, N, keys, every, in_n).to(tl.float32) * _power(upto)
        read_grad = load(dreading + place * N, span, N, keys, every, in_n).to(tl.float32) * _power(short)
        key = load(solved, span, solved_stride, keys, in_t, in_n).to(tl.float32)
        # In a loop, not one after the other: two thirds of the machine code, and half of what Triton walks.
        for kind in range(KINDS):
            key, scores_at, pairs_at = _written(
                key, kind, keys, in_t, solved, given, solved_stride, given_stride, dscores, dscores_k, dpairs, dpairs_k,
                N, FREE,
            )  # fmt: skip
            query_grad, read_grad = _pull_reads(
                query_grad, read_grad, key, upto, short, sums, scores_at, pairs_at, keys, level,
                N, CHUNK, LEVELS, MILD, FREE, PRODUCT, PRECISION,
            )  # fmt: skip
        if FREE:
            read = load(reader, span, reader_stride, keys, in_t, in_n).to(tl.float32)
            store(dreader + own, span, heads * N, keys, in_t, in_n, read_grad)
        else:
            read = key * -beta[:, None]
            dbeta -= tl.sum(key * read_grad, axis=1)
        query = load(q, span, q_stride, keys, in_t, in_n).to(tl.float32)
        store(dq + own, span, heads * N, keys, in_t, in_n, query_grad)
        # What a token's decay acts on: in all but the read before it, if there is one (FREE), its own is counted.
        flow = query * query_grad
        if FREE:
            removed = read * read_grad
        else:
            flow += read * read_grad

        # What was written: for the state that leaves, and for later tokens.
        left = tl.zeros([TILE_N], tl.float32)
        for kind in range(KINDS):
            key, scores_at, pairs_at = _written(
                key, kind, keys, in_t, solved, given, solved_stride, given_stride, dscores, dscores_k, dpairs, dpairs_k,
                N, FREE,
            )  # fmt: skip
            leaving_at = dleaving + place * N
            if FREE:
                leaving_at = tl.where(kind == 0, leaving_at, dleaving_k + place * N)
            key_grad, left_here = _pull_writes(
                query, read, key, upto, short, sums, scores_at, pairs_at, leaving_at, keys, level,
                N, CHUNK, LEVELS, MILD, FREE, PRODUCT, PRECISION,
            )  # fmt: skip
            left += left_here
            flow -= key * key_grad
            if not FREE:
                key_grad -= beta[:, None] * read_grad
            if FREE and kind > 0:
                store(dgiven + own, span, heads * N, keys, in_t, in_n, key_grad)
            else:
                store(dsolved + own, span, heads * N, keys, in_t, in_n, key_grad)

        # A decay is in all that its token and later ones read, less what they wrote, and in what is kept or leaves.
        within = _power(tl.load(sums + (CHUNK - 1) * N + keys, mask=in_n, other=0.0))
        left += within * tl.load(dkept + program.to(tl.int64) * N + keys, mask=in_n, other=0.0)
        decay_grad = left[None, :] + flow
        if FREE:
            flow += removed
        decay_grad = _summed_after(flow, decay_grad, PRODUCT, PRECISION)
        store(ddecay + own, span, heads * N, keys, in_t, in_n, decay_grad)
    if GATE and not FREE:
        at = dgate + (first + span) * heads + head
        tl.store(at, tl.load(at, mask=in_t, other=0.0) + dbeta, mask=in_t)
