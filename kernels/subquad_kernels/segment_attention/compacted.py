"""Segment attention over a compact copy of the summaries, in tiles of queries; forward and backward by hand.

A tile of queries multiplies only the summaries that its last query sees, so about half of all t x t / segment_len
products are skipped, and no matrix over two token axes is ever formed. The token's own term joins the softmax through
the log-sum-exp: every row has at least that term, so nothing is ever divided by zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad_kernels.documents import document_groups
from subquad_kernels.segment_attention.definition import scale_of
from subquad_kernels.segment_attention.summaries import Summaries

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

TILE_T = 256
"""Queries of one tile: long enough for efficient products, short enough to skip most of what nobody sees."""


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
    factor = scale_of(q, scale)
    if cu_seqlens is None:
        return _forward(q, k, v, summary_k, summary_v, segment_len, start, factor)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(*q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for group in document_groups(cu_seqlens):
        # Padding stands after a document's end: causality keeps it out of every real row.
        part, part_lse = _forward(group.pad(q), group.pad(k), group.pad(v), None, None, segment_len, 0, factor)
        group.write(out, part)
        group.write(lse, part_lse.transpose(1, 2))
    return out, lse.transpose(1, 2)


def backward(
    arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]
) -> dict[str, Tensor | None]:
    """Gradients of q, k, v and of the known summaries, from the saved log-sum-exp."""
    values: Any = arguments
    q, k, v, cu_seqlens = values["q"], values["k"], values["v"], values["cu_seqlens"]
    segment_len, factor = values["segment_len"], scale_of(q, values["scale"])
    (_, lse), gradient = outputs, gradients[0]
    assert gradient is not None
    if cu_seqlens is None:
        known = (values["summary_k"], values["summary_v"])
        return _backward(gradient, q, k, v, *known, lse, segment_len, values["start"], factor)
    found: dict[str, Tensor | None] = {"q": torch.empty_like(q), "k": torch.empty_like(k), "v": torch.empty_like(v)}
    by_token = lse.transpose(1, 2)
    for group in document_groups(cu_seqlens):
        part = _backward(
            group.pad(gradient), group.pad(q), group.pad(k), group.pad(v), None, None,
            group.pad(by_token).transpose(1, 2), segment_len, 0, factor,
        )  # fmt: skip
        for name in ("q", "k", "v"):
            whole, piece = found[name], part[name]
            assert whole is not None and piece is not None
            group.write(whole, piece)
    return found


def _grouped(x: Tensor, h_kv: int) -> Tensor:
    """Put the heads that share a key head beside time.  Shapes:  b t h k  ->  b h_kv (r t) k"""
    b, t, h, width = x.shape
    return x.reshape(b, t, h_kv, h // h_kv, width).permute(0, 2, 3, 1, 4).reshape(b, h_kv, -1, width)


def _by_token(x: Tensor, t: int) -> Tensor:
    """The way back.  Shapes:  b h_kv (r t) k  ->  b t h k"""
    b, h_kv, rows, width = x.shape
    return x.reshape(b, h_kv, rows // t, t, width).permute(0, 3, 1, 2, 4).reshape(b, t, -1, width)


def _scores(queries: Tensor, keys: Tensor, summaries: Summaries, begin: int, end: int, factor: float) -> Tensor:
    """Masked scores of queries begin..end against the first n summaries.  Shape: b h_kv (r T) n"""
    count, tile = keys.shape[2], end - begin
    exact = torch.promote_types(queries.dtype, torch.float32)
    # A product in half precision would round its results: a score of 40 by 0.1, and its weight by a tenth.
    scores = torch.matmul(queries.to(exact), keys.to(exact).transpose(2, 3))
    scores *= factor
    visible_to_all = summaries.visible(begin)
    if visible_to_all < count:
        index = torch.arange(begin, end, device=queries.device)
        position = summaries.positions(count, queries.device)[visible_to_all:]
        hidden = position[None, :] >= index[:, None]
        scores.unflatten(2, (-1, tile))[..., visible_to_all:].masked_fill_(hidden, float("-inf"))
    return scores


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_k: Tensor | None,
    summary_v: Tensor | None,
    segment_len: int,
    start: int,
    factor: float,
) -> Outputs:
    b, t, h, _ = q.shape
    h_kv = k.shape[2]
    exact = torch.promote_types(q.dtype, torch.float32)
    summaries = Summaries.of_call(start, segment_len)
    all_keys, all_values = summaries.compact(summary_k, k), summaries.compact(summary_v, v)
    out, lse = q.new_empty(b, t, h, v.shape[3]), q.new_empty(b, h, t, dtype=exact)
    own = _own_scores(q, k, factor)
    for begin in range(0, t, TILE_T):
        end = min(begin + TILE_T, t)
        count = summaries.visible(end - 1)
        self_score = own[:, begin:end]
        self_value = v[:, begin:end].repeat_interleave(h // h_kv, dim=2)
        if count == 0:
            out[:, begin:end] = self_value
            lse[:, :, begin:end] = self_score.transpose(1, 2)
            continue
        queries = _grouped(q[:, begin:end], h_kv)
        scores = _scores(queries, all_keys[:, :, :count], summaries, begin, end, factor)
        own_rows = _grouped(self_score[..., None], h_kv)
        total = torch.logaddexp(scores.logsumexp(dim=-1, keepdim=True), own_rows)
        weights = scores.sub_(total).exp_()
        mixed = torch.matmul(weights.to(v.dtype), all_values[:, :, :count])
        self_weight = _by_token((own_rows - total).exp_(), end - begin)
        out[:, begin:end] = _by_token(mixed, end - begin) + self_weight.to(v.dtype) * self_value
        lse[:, :, begin:end] = _by_token(total, end - begin)[..., 0].transpose(1, 2)
    return out, lse


def _own_scores(q: Tensor, k: Tensor, factor: float) -> Tensor:
    """scale q_g . k_g of every token.  Shapes:  q: b t h k    k: b t h_kv k  ->  b t h"""
    exact = torch.promote_types(q.dtype, torch.float32)
    queries: Tensor = q.unflatten(2, (k.shape[2], -1)).to(exact)
    return ((queries * k.unsqueeze(3).to(exact)).sum(dim=-1) * factor).flatten(2)


def _backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_k: Tensor | None,
    summary_v: Tensor | None,
    lse: Tensor,
    segment_len: int,
    start: int,
    factor: float,
) -> dict[str, Tensor | None]:
    t, h_kv = q.shape[1], k.shape[2]
    exact = lse.dtype
    summaries = Summaries.of_call(start, segment_len)
    all_keys, all_values = summaries.compact(summary_k, k), summaries.compact(summary_v, v)
    d_keys, d_values = (torch.zeros_like(x, dtype=exact) for x in (all_keys, all_values))

    # The token's own term: elementwise in time.
    self_weight = (_own_scores(q, k, factor) - lse.transpose(1, 2)).exp_()
    grouped_gradient = gradient.unflatten(2, (h_kv, -1)).to(exact)
    d_self_weight = (grouped_gradient * v.unsqueeze(3).to(exact)).sum(dim=-1).flatten(2)
    dq = torch.zeros_like(q, dtype=exact)
    # sum_s p_s dp_s over all keys of a query. Where one has nearly all the weight, its own dp is nearly this: the
    # saved outputs are rounded, and gradient . out would leave that rounding in place of the difference.
    delta = self_weight * d_self_weight

    for begin in range(0, t, TILE_T):
        end = min(begin + TILE_T, t)
        count = summaries.visible(end - 1)
        if count == 0:
            continue
        queries, d_out = _grouped(q[:, begin:end], h_kv), _grouped(gradient[:, begin:end], h_kv)
        keys, values = all_keys[:, :, :count], all_values[:, :, :count]
        total = _grouped(lse[:, :, begin:end].transpose(1, 2).unsqueeze(-1), h_kv)
        weights = _scores(queries, keys, summaries, begin, end, factor).sub_(total).exp_()
        d_weights = torch.matmul(d_out.to(exact), values.to(exact).transpose(2, 3))
        rest = (weights * d_weights).sum(dim=-1, keepdim=True)
        delta[:, begin:end] += _by_token(rest, end - begin)[..., 0]
        d_scores = d_weights.sub_(_grouped(delta[:, begin:end, :, None], h_kv)).mul_(weights).mul_(factor)
        d_values[:, :, :count] += torch.matmul(weights.to(d_out.dtype).transpose(2, 3), d_out)
        d_scores = d_scores.to(queries.dtype)
        d_keys[:, :, :count] += torch.matmul(d_scores.transpose(2, 3), queries)
        dq[:, begin:end] += _by_token(torch.matmul(d_scores, keys), end - begin)

    d_own = (self_weight * (d_self_weight - delta) * factor).unflatten(2, (h_kv, -1)).unsqueeze(-1)
    dq += (d_own * k.unsqueeze(3).to(exact)).flatten(2, 3)
    dk = (d_own * q.unflatten(2, (h_kv, -1)).to(exact)).sum(dim=3)
    dv = (self_weight.unflatten(2, (h_kv, -1)).unsqueeze(-1) * grouped_gradient).sum(dim=3)
    return {
        "q": dq,
        "k": dk,
        "v": dv,
        "summary_k": summaries.scatter(d_keys, dk),
        "summary_v": summaries.scatter(d_values, dv),
    }
