# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (Triton reads annotations of kernel arguments as their types; only constants carry one.)
"""Segment attention in fused Triton kernels: a tile of queries meets tiles of summaries, and no score leaves the chip.

The online softmax starts from the token's own term (maximum s_own, sum 1, accumulator v_g), so no row is ever empty.
Forward is one launch, backward three: gradients of queries and of own terms, gradients of summaries, and their
addition to the tokens they stand at. Nothing is added atomically: equal inputs give equal bits. A packed sequence is
one call too, without a loop over documents and without waiting for the device. The README derives the backward.

Tiles:  queries: TILE_T rows of one head    summaries: TILE_N rows of its key head    widths: padded to BLOCK_K, BLOCK_V
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.segment_attention import tiled_step
from subquad_kernels.segment_attention.definition import scale_of
from subquad_kernels.segment_attention.summaries import Summaries
from subquad_kernels.segment_attention.tiles import LN2, LOG2E, load, put, rows
from subquad_kernels.segment_attention.tilings import Stage, Tiling, parts_of, tiling
from subquad_kernels.tile_sizes import ceil_div, padded
from subquad_kernels.triton_documents import find_documents, halvings
from subquad_kernels.triton_launch import QuickLaunch

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

ROOM: tl.constexpr = tl.constexpr(256)
"""Row terms of the backward are padded to this many rows: any tile of queries reads them whole, 16 bytes at a time."""

MARKED_T = 128
"""Tokens of one program that finds documents."""

ADD_ROWS = 32
"""Summaries of one program that adds gradients to tokens, or copies rows: bound by memory, hardly by this."""


TILINGS: dict[Stage, Tiling] = {}
"""Overrides of `tiling`, for benchmarks and for tests of edges, which call this module: a replayed call has its own."""


def _tiling(stage: Stage, q: Tensor, width: int) -> Tiling:
    return TILINGS.get(stage) or tiling(stage, q.dtype == torch.float32, width, q.shape[1])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_k: Tensor | None,
    summary_v: Tensor | None,
    cu_seqlens: Tensor | None,
    segment_len: int,
    start: int,
    scale: float | None,
) -> Outputs:
    """out and lse."""
    _check(q, v)
    with torch.cuda.device_of(q):
        if q.shape[1] == 1 and cu_seqlens is None:
            return tiled_step.decode(q, k, v, summary_k, summary_v, scale_of(q, scale))
        return by_tiles(q, k, v, summary_k, summary_v, cu_seqlens, segment_len, start, scale)


def by_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_k: Tensor | None,
    summary_v: Tensor | None,
    cu_seqlens: Tensor | None,
    segment_len: int,
    start: int,
    scale: float | None,
) -> Outputs:
    """out and lse of any number of tokens."""
    b, t, h, key_width = q.shape
    value_width = v.shape[3]
    factor = scale_of(q, scale)
    if factor < 0:  # the kernel takes its maxima before it scales
        q, factor = -q, -factor
    q, k, v = rows(q), rows(k), rows(v)
    seen = _Seen.by_call(k, v, summary_k, summary_v, cu_seqlens, segment_len, start)
    out = q.new_empty(b, t, h, value_width)
    lse = q.new_empty(b, h, t, dtype=torch.float32)
    block_k, block_v = padded(key_width), padded(value_width)
    tiles = _tiling("forward", q, max(block_k, block_v))
    _forward_kernel[(ceil_div(t, tiles.tile_t) * b * h,)](
        q, k, v, seen.keys, seen.values, out, lse, seen.low, seen.high,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *seen.keys.stride()[:3], *seen.values.stride()[:3],
        t, h, start, segment_len, factor * LOG2E.value,
        GROUPS=h // k.shape[2], K=key_width, V=value_width, BLOCK_K=block_k, BLOCK_V=block_v,
        TILE_T=tiles.tile_t, TILE_N=tiles.tile_n, PACKED=cu_seqlens is not None,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, lse


def backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """Gradients of q, k, v and of the known summaries, from the saved log-sum-exp."""
    with torch.cuda.device_of(outputs[0]):
        return _backward(arguments, outputs, gradients)


def _backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    values: Any = arguments
    q, k, v, cu_seqlens = rows(values["q"]), rows(values["k"]), rows(values["v"]), values["cu_seqlens"]
    segment_len, start, factor = values["segment_len"], values["start"], scale_of(q, values["scale"])
    out, lse = outputs[0].contiguous(), outputs[1].contiguous()
    assert gradients[0] is not None
    d_out = gradients[0].contiguous()
    b, t, h, key_width = q.shape
    h_kv, value_width = v.shape[2:]
    seen = _Seen.by_call(k, v, values["summary_k"], values["summary_v"], cu_seqlens, segment_len, start)
    dq = q.new_empty(q.shape)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    row_terms = lse.new_empty(b, h, ceil_div(t, ROOM.value) * ROOM.value, 2)
    block_k, block_v = padded(key_width), padded(value_width)
    packed, wide = cu_seqlens is not None, max(block_k, block_v)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    summary_strides = (*seen.keys.stride()[:3], *seen.values.stride()[:3])
    tiles = _tiling("query_gradients", q, wide)
    _query_gradients_kernel[(ceil_div(t, tiles.tile_t) * b * h,)](
        q, k, v, seen.keys, seen.values, out, d_out, lse, row_terms, dq, dk, dv, seen.low, seen.high,
        *strides, *summary_strides, t, h, start, segment_len, factor,
        GROUPS=h // h_kv, K=key_width, V=value_width, BLOCK_K=block_k, BLOCK_V=block_v,
        TILE_T=tiles.tile_t, TILE_N=tiles.tile_n, PACKED=packed,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    found: dict[str, Tensor | None] = {"q": dq, "k": dk, "v": dv}
    if seen.count == 0:
        return found

    tiles = _tiling("summary_gradients", q, wide)
    programs = ceil_div(seen.count, tiles.tile_n) * b * h_kv
    splits = parts_of(programs, t)
    # Splits begin and end between tiles.
    split_t = ceil_div(t, splits * tiles.tile_t) * tiles.tile_t
    part_k = lse.new_empty(splits, b, h_kv, seen.count, key_width)
    part_v = lse.new_empty(splits, b, h_kv, seen.count, value_width)
    _summary_gradients_kernel[(programs * splits,)](
        q, seen.keys, seen.values, d_out, row_terms.view(torch.int64), part_k, part_v, seen.position, seen.end,
        *q.stride()[:3], *summary_strides, t, h_kv, seen.count, seen.first, segment_len, splits, split_t, factor,
        GROUPS=h // h_kv, K=key_width, V=value_width, BLOCK_K=block_k, BLOCK_V=block_v,
        TILE_T=tiles.tile_t, TILE_N=tiles.tile_n, PACKED=packed,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    _add_to_tokens_kernel[(ceil_div(seen.count, ADD_ROWS) * b * h_kv,)](
        part_k, part_v, dk, dv, seen.position, t, b, h_kv, seen.count, seen.first, segment_len, splits,
        K=key_width, V=value_width, BLOCK_K=block_k, BLOCK_V=block_v, TILE_N=ADD_ROWS, PACKED=packed, num_warps=4,
    )  # fmt: skip
    known = start // segment_len
    if known:
        for name, part, like in (("summary_k", part_k, k), ("summary_v", part_v, v)):
            found[name] = part[:, :, :, :known].sum(dim=0).transpose(1, 2).to(like.dtype)
    return found


def _check(q: Tensor, v: Tensor) -> None:
    """Raise ValueError where no kernel below applies; the record of this kernel says the same before a call."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"tiled does not compute in {q.dtype}: name another kernel, such as compacted")
    for width in (q.shape[3], v.shape[3]):
        if not 16 <= width <= 256:
            raise ValueError(f"tiled takes widths from 16 to 256, not {width}: name another kernel, such as compacted")


@dataclass(frozen=True)
class _Seen:
    """The summaries that some token of the call sees, in order of time.

    Shapes:  keys: b n h_kv k    values: b n h_kv v    (often views with a stride of segment_len tokens: a row of one
    head is what memory moves at once, so a compact copy would gain nothing)
    `first` is the index in the call where summary 0 stands, negative when it is a known one. In a packed sequence
    token i sees low[i] <= j < high[i], and summary j is seen by position[j] < i < end[j]; None otherwise.
    """

    keys: Tensor
    values: Tensor
    count: int
    first: int
    low: Tensor | None = None
    high: Tensor | None = None
    position: Tensor | None = None
    end: Tensor | None = None

    @classmethod
    def by_call(
        cls,
        k: Tensor,
        v: Tensor,
        summary_k: Tensor | None,
        summary_v: Tensor | None,
        cu_seqlens: Tensor | None,
        segment_len: int,
        start: int,
    ) -> _Seen:
        t = k.shape[1]
        if cu_seqlens is not None:
            return cls.by_documents(k, v, cu_seqlens, segment_len)
        summaries = Summaries.of_call(start, segment_len)
        count = summaries.visible(t - 1)
        first = summaries.first - summaries.known * segment_len
        inside = slice(summaries.first, None, segment_len)
        if summary_k is None or summary_v is None:
            return cls(k[:, inside], v[:, inside], count, first)
        if count > summaries.known:
            summary_k = torch.cat([summary_k, k[:, inside]], dim=1)
            summary_v = torch.cat([summary_v, v[:, inside]], dim=1)
        return cls(rows(summary_k), rows(summary_v), count, first)

    @classmethod
    def by_documents(cls, k: Tensor, v: Tensor, cu_seqlens: Tensor, segment_len: int) -> _Seen:
        """Room for a summary in each stretch of segment_len tokens, which holds one at most: summaries of one document
        are segment_len apart, and others further. Room that none takes is seen by nobody.
        """
        _, t, h_kv, key_width = k.shape
        value_width, documents = v.shape[3], cu_seqlens.shape[0] - 1
        count = ceil_div(t, segment_len)
        # Rows of multiples of 16 bytes: every length has the alignments, and so the compiled kernels, of every other.
        tokens = cu_seqlens.new_empty(2, ceil_div(t, 4) * 4)
        room = cu_seqlens.new_empty(2, ceil_div(count, 4) * 4)
        keys, values = k.new_empty(1, count, h_kv, key_width), v.new_empty(1, count, h_kv, value_width)
        _find_kernel[(ceil_div(count, ADD_ROWS) * h_kv + ceil_div(t, MARKED_T),)](
            cu_seqlens.contiguous(), k, v, keys, values, tokens, room, *k.stride()[1:3], *v.stride()[1:3],
            t, h_kv, count, tokens.stride(0), room.stride(0), documents, halvings(documents), segment_len,
            K=key_width, V=value_width, BLOCK_K=padded(key_width), BLOCK_V=padded(value_width),
            TILE_N=ADD_ROWS, TILE_T=MARKED_T, num_warps=4,
        )  # fmt: skip
        low, high = tokens.unbind()
        position, end = room[:, :count].unbind()
        return cls(keys, values, count, 0, low, high, position, end)


@triton.jit
def _document_of(cu_seqlens, documents, steps, token, t):
    """Where the document of each token starts and ends; tokens after the last boundary are one of their own."""
    document = find_documents(cu_seqlens, documents, steps, token)
    start, end = tl.load(cu_seqlens + document), tl.load(cu_seqlens + document + 1)
    return tl.where(token < end, start, end), tl.where(token < end, end, t)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "h_kv", "count", "token_row", "room_row", "documents", "steps", "segment_len"])
def _find_kernel(
    cu_seqlens, k, v, keys, values, tokens, room, k_t, k_h, v_t, v_h,
    t, h_kv, count, token_row, room_row, documents, steps, segment_len,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE_N: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    """Where summaries are; the first programs copy their rows, the others say which of them each token sees.

    Summary j of a document that starts at s stands at s + (j + 1) segment_len - 1, in stretch j + 1 + (s - 1) //
    segment_len (rounded down) of the sequence: its document is that of the stretch's first token.
    Shapes:  tokens: 2 token_row (low, high)    room: 2 room_row (position, end)
    """
    tiles = tl.cdiv(count, TILE_N)
    program = tl.program_id(0)
    if program < tiles * h_kv:
        summary, key_head = program % tiles * TILE_N + tl.arange(0, TILE_N), (program // tiles).to(tl.int64)
        inside = summary < count
        first = summary * segment_len
        start, end = _document_of(cu_seqlens, documents, steps, first, t)
        position = first + segment_len - 1 - (first - start) % segment_len
        taken = position < end
        position, end = tl.where(taken, position, t), tl.where(taken, end, t)
        if key_head == 0:
            tl.store(room + summary, position, mask=inside)
            tl.store(room + room_row + summary, end, mask=inside)
        # Room that no summary takes gets the last row, which nobody sees.
        from_ = tl.minimum(position, t - 1).to(tl.int64)[:, None]
        place = summary.to(tl.int64)[:, None] * h_kv + key_head
        column_k, column_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
        k_ok, v_ok = column_k < K, column_v < V
        key = load(k + key_head * k_h + from_ * k_t + column_k[None, :], inside, k_ok, True, K == BLOCK_K)
        value = load(v + key_head * v_h + from_ * v_t + column_v[None, :], inside, v_ok, True, V == BLOCK_V)
        put(keys + place * K + column_k[None, :], key, inside, k_ok, K == BLOCK_K)
        put(values + place * V + column_v[None, :], value, inside, v_ok, V == BLOCK_V)
    else:
        _mark(cu_seqlens, tokens, program - tiles * h_kv, t, token_row, documents, steps, segment_len, TILE_T)


@triton.jit
def _mark(cu_seqlens, tokens, tile, t, token_row, documents, steps, segment_len, TILE_T: tl.constexpr):
    """Which summaries each token of a tile sees."""
    token = tile * TILE_T + tl.arange(0, TILE_T)
    start, _ = _document_of(cu_seqlens, documents, steps, token, t)
    low = (start + segment_len - 1) // segment_len
    tl.store(tokens + token, low, mask=token < t)
    tl.store(tokens + token_row + token, low + (token - start) // segment_len, mask=token < t)


@triton.jit
def _range_of_tile(low, high, row, begin, last, t, start, segment_len, TILE_N: tl.constexpr, PACKED: tl.constexpr):
    """Which summaries each row sees, and the tile's own: first, end, and how many tiles every row sees whole."""
    if PACKED:
        row_low = tl.load(low + row, mask=row < t, other=0)
        row_high = tl.load(high + row, mask=row < t, other=0)
        from_ = tl.load(low + begin)
        to = tl.load(high + last)
        whole = (tl.load(high + begin) - from_) // TILE_N
        # A tile over several documents has no summary that all its rows see.
        whole = tl.where(tl.load(low + last) == from_, whole, 0)
    else:
        row_low = row * 0
        row_high = (start + row) // segment_len
        from_ = begin * 0
        to = (start + last) // segment_len
        whole = (start + begin) // segment_len // TILE_N
    return row_low, row_high, from_, to, whole


@triton.jit
def _attend(
    acc, total, peak, queries, keys, values, keys_n, values_n, column_k, column_v,
    row_low, row_high, from_, to, factor2,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILE_N: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Take summaries from_..to into the online softmax; at an EDGE rows see different ones."""
    offset = tl.arange(0, TILE_N)
    for begin in range(from_, to, TILE_N):
        summary = begin + offset
        place = summary.to(tl.int64)[:, None]
        key = load(keys + place * keys_n + column_k[None, :], summary < to, column_k < K, EDGE, K == BLOCK_K)
        score = tl.dot(queries, tl.trans(key), input_precision="ieee")  # [TILE_T, TILE_N]
        if EDGE:
            visible = (summary[None, :] >= row_low[:, None]) & (summary[None, :] < row_high[:, None])
            score = tl.where(visible, score * factor2, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(score, 1))
            weight = tl.exp2(score - new_peak[:, None])
        else:
            # One fused multiply-add a score; the factor is not negative.
            new_peak = tl.maximum(peak, tl.max(score, 1) * factor2)
            weight = tl.exp2(score * factor2 - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        value = load(values + place * values_n + column_v[None, :], summary < to, column_v < V, EDGE, V == BLOCK_V)
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@QuickLaunch
@triton.jit(do_not_specialize=["t", "h", "start", "segment_len"])
def _forward_kernel(
    q, k, v, keys, values, out, lse, low, high,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, keys_b, keys_n, keys_h, values_b, values_n, values_h,
    t, h, start, segment_len, factor2,
    GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE_T: tl.constexpr, TILE_N: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; `factor2` is the scale in units of log 2."""
    tiles = tl.cdiv(t, TILE_T)
    # Later tiles see more: the longest first, so that none is left alone at the end.
    begin = (tiles - 1 - tl.program_id(0) % tiles) * TILE_T
    batch_head = tl.program_id(0) // tiles
    batch, head = (batch_head // h).to(tl.int64), (batch_head % h).to(tl.int64)
    key_head = head // GROUPS
    row = begin + tl.arange(0, TILE_T)
    row_ok = row < t
    place = row.to(tl.int64)[:, None]
    column_k, column_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    at_k, at_v = column_k[None, :], column_v[None, :]

    queries = load(q + batch * q_b + head * q_h + place * q_t + at_k, row_ok, column_k < K, True, K == BLOCK_K)
    own_key = load(k + batch * k_b + key_head * k_h + place * k_t + at_k, row_ok, column_k < K, True, K == BLOCK_K)
    own_value = load(v + batch * v_b + key_head * v_h + place * v_t + at_v, row_ok, column_v < V, True, V == BLOCK_V)
    peak = tl.sum(queries.to(tl.float32) * own_key.to(tl.float32), 1) * factor2
    total = tl.full([TILE_T], 1.0, tl.float32)
    acc = own_value.to(tl.float32)

    keys += batch * keys_b + key_head * keys_h
    values += batch * values_b + key_head * values_h
    last = tl.minimum(begin + TILE_T, t) - 1
    row_low, row_high, from_, to, whole = _range_of_tile(
        low, high, row, begin, last, t, start, segment_len, TILE_N, PACKED
    )
    edge = from_ + whole * TILE_N
    acc, total, peak = _attend(
        acc, total, peak, queries, keys, values, keys_n, values_n, column_k, column_v, row_low, row_high,
        from_, edge, factor2, K, V, BLOCK_K, BLOCK_V, TILE_N, False,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, queries, keys, values, keys_n, values_n, column_k, column_v, row_low, row_high,
        edge, to, factor2, K, V, BLOCK_K, BLOCK_V, TILE_N, True,
    )  # fmt: skip

    by_token = ((batch * t + place) * h + head) * V
    put(out + by_token + at_v, acc / total[:, None], row_ok, column_v < V, V == BLOCK_V)
    tl.store(lse + batch_head.to(tl.int64) * t + row, (peak + tl.log2(total)) * LN2, mask=row_ok)


@triton.jit
def _pull_back_to_queries(
    acc, queries, d_out, lse2, delta, keys, values, keys_n, values_n, column_k, column_v,
    row_low, row_high, from_, to, factor2,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILE_N: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Add sum_j P_j (dout . v_j - delta) k_j over summaries from_..to."""
    offset = tl.arange(0, TILE_N)
    for begin in range(from_, to, TILE_N):
        summary = begin + offset
        place = summary.to(tl.int64)[:, None]
        key = load(keys + place * keys_n + column_k[None, :], summary < to, column_k < K, EDGE, K == BLOCK_K)
        value = load(values + place * values_n + column_v[None, :], summary < to, column_v < V, EDGE, V == BLOCK_V)
        score = tl.dot(queries, tl.trans(key), input_precision="ieee")  # [TILE_T, TILE_N]
        score = score * factor2 - lse2[:, None]
        if EDGE:
            visible = (summary[None, :] >= row_low[:, None]) & (summary[None, :] < row_high[:, None])
            score = tl.where(visible, score, float("-inf"))
        weight = tl.exp2(score)
        d_weight = tl.dot(d_out, tl.trans(value), input_precision="ieee")
        d_score = weight * (d_weight - delta[:, None])
        acc = tl.dot(d_score.to(key.dtype), key, acc, input_precision="ieee")
    return acc


@QuickLaunch
@triton.jit(do_not_specialize=["t", "h", "start", "segment_len"])
def _query_gradients_kernel(
    q, k, v, keys, values, out, d_out, lse, row_terms, dq, dk, dv, low, high,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, keys_b, keys_n, keys_h, values_b, values_n, values_h,
    t, h, start, segment_len, factor,
    GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE_T: tl.constexpr, TILE_N: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dq of one tile of one head, and for later the rows' log-sum-exp (in units of log 2) and delta = dout . out.

    The first head of a group also writes the own terms of its keys.
    """
    tiles = tl.cdiv(t, TILE_T)
    begin = (tiles - 1 - tl.program_id(0) % tiles) * TILE_T  # the longest first
    batch_head = tl.program_id(0) // tiles
    batch, head = (batch_head // h).to(tl.int64), (batch_head % h).to(tl.int64)
    key_head = head // GROUPS
    row = begin + tl.arange(0, TILE_T)
    row_ok = row < t
    place = row.to(tl.int64)[:, None]
    column_k, column_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    k_ok, v_ok = column_k < K, column_v < V
    at_k, at_v = column_k[None, :], column_v[None, :]
    factor2 = factor * LOG2E

    q += batch * q_b + place * q_t + at_k
    by_token = ((batch * t + place) * h) * V + at_v
    by_head = batch * h * t + row
    own_key = load(k + batch * k_b + key_head * k_h + place * k_t + at_k, row_ok, k_ok, True, K == BLOCK_K)
    own_value = load(v + batch * v_b + key_head * v_h + place * v_t + at_v, row_ok, v_ok, True, V == BLOCK_V)
    own_key, own_value = own_key.to(tl.float32), own_value.to(tl.float32)

    # The token's own term: elementwise in time, summed over the query heads that share a key head.
    if head % GROUPS == 0:
        own_dk = tl.zeros([TILE_T, BLOCK_K], tl.float32)
        own_dv = tl.zeros([TILE_T, BLOCK_V], tl.float32)
        for other in range(head, head + GROUPS):
            query = load(q + other * q_h, row_ok, k_ok, True, K == BLOCK_K).to(tl.float32)
            pull = load(d_out + by_token + other * V, row_ok, v_ok, True, V == BLOCK_V).to(tl.float32)
            result = load(out + by_token + other * V, row_ok, v_ok, True, V == BLOCK_V).to(tl.float32)
            row_lse2 = tl.load(lse + by_head + other * t, mask=row_ok, other=0.0) * LOG2E
            weight = tl.exp2(tl.sum(query * own_key, 1) * factor2 - row_lse2)
            d_score = weight * tl.sum(pull * (own_value - result), 1)
            own_dk += d_score[:, None] * query
            own_dv += weight[:, None] * pull
        h_kv = h // GROUPS
        key_place = (batch * t + place) * h_kv + key_head
        put(dk + key_place * K + at_k, own_dk * factor, row_ok, k_ok, K == BLOCK_K)
        put(dv + key_place * V + at_v, own_dv, row_ok, v_ok, V == BLOCK_V)

    queries = load(q + head * q_h, row_ok, k_ok, True, K == BLOCK_K)
    pulls = load(d_out + by_token + head * V, row_ok, v_ok, True, V == BLOCK_V)
    results = load(out + by_token + head * V, row_ok, v_ok, True, V == BLOCK_V)
    lse2 = tl.load(lse + by_head + head * t, mask=row_ok, other=0.0) * LOG2E
    row_delta = tl.sum(pulls.to(tl.float32) * results.to(tl.float32), 1)
    row_terms += 2 * (batch_head.to(tl.int64) * (tl.cdiv(t, ROOM) * ROOM) + row)
    tl.store(row_terms, lse2, mask=row_ok)
    tl.store(row_terms + 1, row_delta, mask=row_ok)
    own_weight = tl.exp2(tl.sum(queries.to(tl.float32) * own_key, 1) * factor2 - lse2)
    d_own = own_weight * (tl.sum(pulls.to(tl.float32) * own_value, 1) - row_delta)
    acc = d_own[:, None] * own_key

    keys += batch * keys_b + key_head * keys_h
    values += batch * values_b + key_head * values_h
    last = tl.minimum(begin + TILE_T, t) - 1
    row_low, row_high, from_, to, whole = _range_of_tile(
        low, high, row, begin, last, t, start, segment_len, TILE_N, PACKED
    )
    edge = from_ + whole * TILE_N
    acc = _pull_back_to_queries(
        acc, queries, pulls, lse2, row_delta, keys, values, keys_n, values_n, column_k, column_v,
        row_low, row_high, from_, edge, factor2, K, V, BLOCK_K, BLOCK_V, TILE_N, False,
    )  # fmt: skip
    acc = _pull_back_to_queries(
        acc, queries, pulls, lse2, row_delta, keys, values, keys_n, values_n, column_k, column_v,
        row_low, row_high, edge, to, factor2, K, V, BLOCK_K, BLOCK_V, TILE_N, True,
    )  # fmt: skip
    put(dq + ((batch * t + place) * h + head) * K + at_k, acc * factor, row_ok, k_ok, K == BLOCK_K)


@triton.jit
def _pull_back_to_summaries(
    acc_k, acc_v, keys, values, q, d_out, row_terms, q_t, d_out_t, column_k, column_v, position, end,
    tile, number, gap_at, gap, earliest, latest, factor2,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILE_T: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Add the pulls of `number` tiles of queries from `tile` on, where after `gap_at` tiles `gap` are passed over.

    Scores are computed transposed, k q^T: the products P^T dout and dS^T q then take them as they come.
    """
    offset = tl.arange(0, TILE_T)
    for index in range(0, number):
        begin = (tile + index) * TILE_T
        if EDGE:
            begin += tl.where(index >= gap_at, gap * TILE_T, 0)
        row = begin + offset
        row_ok = (row >= earliest) & (row < latest)
        place = row.to(tl.int64)[:, None]
        queries = load(q + place * q_t + column_k[None, :], row_ok, column_k < K, EDGE, K == BLOCK_K)
        pulls = load(d_out + place * d_out_t + column_v[None, :], row_ok, column_v < V, EDGE, V == BLOCK_V)
        # Both terms of a row in one word: every thread needs those of all its columns.
        terms = tl.load(row_terms + row)
        lse2 = terms.to(tl.int32).to(tl.float32, bitcast=True)
        delta = (terms >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        if EDGE:
            # Beyond the last row stands what memory held before.
            lse2 = tl.where(row_ok, lse2, 0.0)
            delta = tl.where(row_ok, delta, 0.0)
        score = tl.dot(keys, tl.trans(queries), input_precision="ieee")  # [TILE_N, TILE_T]
        score = score * factor2 - lse2[None, :]
        if EDGE:
            visible = (row[None, :] > position[:, None]) & (row[None, :] < end[:, None]) & row_ok[None, :]
            score = tl.where(visible, score, float("-inf"))
        weight = tl.exp2(score)
        acc_v = tl.dot(weight.to(pulls.dtype), pulls, acc_v, input_precision="ieee")
        d_weight = tl.dot(values, tl.trans(pulls), input_precision="ieee")
        d_score = weight * (d_weight - delta[None, :])
        acc_k = tl.dot(d_score.to(queries.dtype), queries, acc_k, input_precision="ieee")
    return acc_k, acc_v


@QuickLaunch
@triton.jit(do_not_specialize=["t", "h_kv", "count", "first", "segment_len", "splits", "split_t"])
def _summary_gradients_kernel(
    q, keys, values, d_out, row_terms, part_k, part_v, positions, ends,
    q_b, q_t, q_h, keys_b, keys_n, keys_h, values_b, values_n, values_h,
    t, h_kv, count, first, segment_len, splits, split_t, factor,
    GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE_T: tl.constexpr, TILE_N: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of summaries of one key head, from the queries of one split of time.

    Shapes:  row_terms: b h t (padded; two fp32 in a word)    part_k: splits b h_kv n k    part_v: splits b h_kv n v
    """
    tiles = tl.cdiv(count, TILE_N)
    tile = tl.program_id(0) % tiles  # the earliest are seen by most: the longest first
    split = tl.program_id(0) // tiles % splits
    batch_head = tl.program_id(0) // tiles // splits
    batch, key_head = (batch_head // h_kv).to(tl.int64), (batch_head % h_kv).to(tl.int64)
    summary = tile * TILE_N + tl.arange(0, TILE_N)
    summary_ok = summary < count
    if PACKED:
        position = tl.load(positions + summary, mask=summary_ok, other=t)
        exists = position < t
        end = tl.load(ends + summary, mask=exists, other=0)
        latest = tl.minimum(tl.max(end, 0), (split + 1) * split_t)
        # Summaries of several documents have no query that sees them all.
        one_document = tl.min(tl.where(exists, end, t), 0) == tl.max(end, 0)
        all_seen_from = tl.where(one_document, tl.max(tl.where(exists, position, 0), 0) + 1, latest)
        earliest = tl.min(position, 0) + 1
    else:
        position = first + summary * segment_len
        end = position * 0 + t
        latest = tl.minimum(t, (split + 1) * split_t)
        all_seen_from = first + (tl.minimum((tile + 1) * TILE_N, count) - 1) * segment_len + 1
        earliest = first + tile * TILE_N * segment_len + 1
    earliest = tl.maximum(earliest, split * split_t)
    # Tiles begin at multiples of TILE_T; those that every summary is seen by whole lie between ragged ones.
    from_ = earliest // TILE_T
    to = tl.maximum(tl.cdiv(latest, TILE_T), from_)
    whole_from = tl.minimum(tl.cdiv(tl.maximum(earliest, all_seen_from), TILE_T), to)
    whole = tl.maximum(latest // TILE_T - whole_from, 0)

    column_k, column_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    at_k, at_v = column_k[None, :], column_v[None, :]
    place = summary.to(tl.int64)[:, None]
    keys += batch * keys_b + key_head * keys_h
    values += batch * values_b + key_head * values_h
    key = load(keys + place * keys_n + at_k, summary_ok, column_k < K, True, K == BLOCK_K)
    value = load(values + place * values_n + at_v, summary_ok, column_v < V, True, V == BLOCK_V)
    acc_k = tl.zeros([TILE_N, BLOCK_K], tl.float32)
    acc_v = tl.zeros([TILE_N, BLOCK_V], tl.float32)
    factor2 = factor * LOG2E
    h = h_kv * GROUPS
    for member in range(GROUPS):
        head = key_head * GROUPS + member
        q_head = q + batch * q_b + head * q_h
        d_out_head = d_out + (batch * t * h + head) * V
        terms_head = row_terms + (batch * h + head) * (tl.cdiv(t, ROOM) * ROOM)
        acc_k, acc_v = _pull_back_to_summaries(
            acc_k, acc_v, key, value, q_head, d_out_head, terms_head, q_t, h * V, column_k, column_v, position, end,
            from_, to - from_ - whole, whole_from - from_, whole, earliest, latest, factor2,
            K, V, BLOCK_K, BLOCK_V, TILE_T, True,
        )  # fmt: skip
        acc_k, acc_v = _pull_back_to_summaries(
            acc_k, acc_v, key, value, q_head, d_out_head, terms_head, q_t, h * V, column_k, column_v, position, end,
            whole_from, whole, 0, 0, earliest, latest, factor2,
            K, V, BLOCK_K, BLOCK_V, TILE_T, False,
        )  # fmt: skip
    batch_heads = tl.num_programs(0) // tiles // splits
    part = (split.to(tl.int64) * batch_heads + batch_head) * count + place
    put(part_k + part * K + at_k, acc_k * factor, summary_ok, column_k < K, K == BLOCK_K)
    put(part_v + part * V + at_v, acc_v, summary_ok, column_v < V, V == BLOCK_V)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "h_kv", "count", "first", "segment_len", "splits"])
def _add_to_tokens_kernel(
    part_k, part_v, dk, dv, positions, t, b, h_kv, count, first, segment_len, splits,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILE_N: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Sum the splits, and add them to the rows of dk and dv where the summaries stand."""
    tiles = tl.cdiv(count, TILE_N)
    batch_head = tl.program_id(0) // tiles
    batch, key_head = (batch_head // h_kv).to(tl.int64), (batch_head % h_kv).to(tl.int64)
    summary = tl.program_id(0) % tiles * TILE_N + tl.arange(0, TILE_N)
    if PACKED:
        position = tl.load(positions + summary, mask=summary < count, other=t)
    else:
        position = first + summary * segment_len
    inside = (summary < count) & (position >= 0) & (position < t)
    column_k, column_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    k_ok, v_ok = column_k < K, column_v < V
    at_token = (batch * t + position.to(tl.int64)[:, None]) * h_kv + key_head
    dk += at_token * K + column_k[None, :]
    dv += at_token * V + column_v[None, :]
    acc_k = load(dk, inside, k_ok, True, K == BLOCK_K).to(tl.float32)
    acc_v = load(dv, inside, v_ok, True, V == BLOCK_V).to(tl.float32)
    for split in range(splits):
        part = ((split * b).to(tl.int64) * h_kv + batch_head) * count + summary.to(tl.int64)[:, None]
        acc_k += load(part_k + part * K + column_k[None, :], inside, k_ok, True, K == BLOCK_K)
        acc_v += load(part_v + part * V + column_v[None, :], inside, v_ok, True, V == BLOCK_V)
    put(dk, acc_k, inside, k_ok, K == BLOCK_K)
    put(dv, acc_v, inside, v_ok, V == BLOCK_V)
