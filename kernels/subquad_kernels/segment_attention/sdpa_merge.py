"""Segment attention as torch's fused attention over the summaries, merged with the token's own term.

    lse = log( exp(lse_summaries) + exp(own) )      out = exp(lse_summaries - lse) out_summaries + exp(own - lse) v

The fused backward rebuilds the probabilities from a log-sum-exp and an output; handed those of the whole, it returns
the gradients of the summaries' share of the whole (Dao 2023, section 2.3), and the own term is elementwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from subquad_kernels.documents import document_groups
from subquad_kernels.segment_attention.definition import scale_of
from subquad_kernels.segment_attention.summaries import Summaries
from subquad_kernels.softmax_attention.definition import close
from subquad_kernels.softmax_attention.sdpa_efficient import aligned_rows

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

_aten = torch.ops.aten


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
    q, k, v = close(q, k, v)
    factor = scale_of(q, scale)
    if cu_seqlens is None:
        return _forward(q, k, v, summary_k, summary_v, segment_len, start, factor)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(*q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for group in document_groups(cu_seqlens):
        part, part_lse = _forward(group.pad(q), group.pad(k), group.pad(v), None, None, segment_len, 0, factor)
        group.write(out, part)
        group.write(lse, part_lse.transpose(1, 2))
    return out, lse.transpose(1, 2)


def backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """Gradients of q, k, v and of the known summaries; of half precision in float32, from outputs computed again.

    The fused backward takes gradient . out for the softmax's own term. Where one key has nearly all the weight, the
    gradient of its score is a small difference of it, and rounded outputs would leave their rounding in its place.
    """
    values: Any = arguments
    gradient, exact = gradients[0], outputs[1].dtype
    assert gradient is not None
    if gradient.dtype != exact:
        values = {name: _widened(value, exact) for name, value in arguments.items()}
        gradient, outputs = gradient.to(exact), forward(**values)
    q, k, v = close(values["q"], values["k"], values["v"])
    cu_seqlens = values["cu_seqlens"]
    segment_len, factor = values["segment_len"], scale_of(q, values["scale"])
    out, lse = outputs
    if cu_seqlens is None:
        known = (values["summary_k"], values["summary_v"])
        return _backward(gradient, q, k, v, *known, out, lse, segment_len, values["start"], factor)
    found: dict[str, Tensor | None] = {"q": torch.empty_like(q), "k": torch.empty_like(k), "v": torch.empty_like(v)}
    by_token = lse.transpose(1, 2)
    for group in document_groups(cu_seqlens):
        part = _backward(
            group.pad(gradient), group.pad(q), group.pad(k), group.pad(v), None, None,
            group.pad(out), group.pad(by_token).transpose(1, 2), segment_len, 0, factor,
        )  # fmt: skip
        for name in ("q", "k", "v"):
            whole, piece = found[name], part[name]
            assert whole is not None and piece is not None
            group.write(whole, piece)
    return found


def _widened(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _first_with_summary(summaries: Summaries) -> int:
    """Index in the call of the first token that sees a summary."""
    return 0 if summaries.known else summaries.first + 1


def _mask(q: Tensor, summaries: Summaries, begin: int, count: int) -> Tensor:
    """0 where a summary is visible, -inf elsewhere.  Shape: 1 1 (t - begin) count"""
    index = torch.arange(begin, q.shape[1], device=q.device)
    hidden = summaries.positions(count, q.device)[None, :] >= index[:, None]
    # The CUDA operator wants rows that start at multiples of 16 bytes.
    room = torch.zeros(len(index), count + -count % 8, dtype=q.dtype, device=q.device)
    return room[:, :count].masked_fill_(hidden, float("-inf"))[None, None]


def _heads_first(x: Tensor, groups: int) -> Tensor:
    x = x.transpose(1, 2)
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _own_term(q: Tensor, k: Tensor, factor: float, groups: int) -> Tensor:
    """scale q_g . k_g.  Shape: b h t"""
    exact = torch.promote_types(q.dtype, torch.float32)
    keys = k.repeat_interleave(groups, dim=2)
    return (q.to(exact) * keys.to(exact)).sum(dim=-1).transpose(1, 2) * factor


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
    t, groups = q.shape[1], q.shape[2] // k.shape[2]
    summaries = Summaries.of_call(start, segment_len)
    lse = _own_term(q, k, factor, groups)
    out = v.repeat_interleave(groups, dim=2).contiguous()
    if out is v:
        out = v.clone()
    begin, count = _first_with_summary(summaries), summaries.visible(t - 1)
    if begin >= t:
        return out, lse
    mask = _mask(q, summaries, begin, count)
    keys = summaries.compact(summary_k, k).repeat_interleave(groups, dim=1)[:, :, :count]
    values = summaries.compact(summary_v, v).repeat_interleave(groups, dim=1)[:, :, :count]
    part, part_lse = _attend(q[:, begin:].transpose(1, 2), keys, values, mask, factor)
    own = lse[:, :, begin:]
    total = torch.logaddexp(part_lse, own)
    share = (part_lse - total).exp().transpose(1, 2).unsqueeze(-1)
    own_share = (own - total).exp().transpose(1, 2).unsqueeze(-1)
    out[:, begin:] = (share * part.transpose(1, 2) + own_share * out[:, begin:]).to(out.dtype)
    lse[:, :, begin:] = total
    return out, lse


def _backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_k: Tensor | None,
    summary_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    segment_len: int,
    start: int,
    factor: float,
) -> dict[str, Tensor | None]:
    t, h_kv = q.shape[1], k.shape[2]
    groups = q.shape[2] // h_kv
    exact = lse.dtype
    summaries = Summaries.of_call(start, segment_len)
    weight = (_own_term(q, k, factor, groups) - lse).exp().transpose(1, 2).unsqueeze(-1)  # [b, t, h, 1]
    own_values = v.repeat_interleave(groups, dim=2)
    d_own = (gradient * (own_values.to(exact) - out)).sum(dim=-1, keepdim=True) * weight * factor
    dq = d_own * k.repeat_interleave(groups, dim=2)
    dk = (d_own * q).unflatten(2, (h_kv, groups)).sum(dim=3)
    dv = (weight * gradient).unflatten(2, (h_kv, groups)).sum(dim=3)
    begin, count = _first_with_summary(summaries), summaries.visible(t - 1)
    d_known: tuple[Tensor | None, Tensor | None] = (None, None)
    if begin < t:
        mask = _mask(q, summaries, begin, count)
        all_keys, all_values = summaries.compact(summary_k, k), summaries.compact(summary_v, v)
        part_q, part_k, part_v = _attend_backward(
            gradient[:, begin:].transpose(1, 2),
            q[:, begin:].transpose(1, 2),
            all_keys.repeat_interleave(groups, dim=1)[:, :, :count],
            all_values.repeat_interleave(groups, dim=1)[:, :, :count],
            mask,
            out[:, begin:].transpose(1, 2),
            lse[:, :, begin:],
            factor,
        )
        dq[:, begin:] += part_q.transpose(1, 2)
        missing = all_keys.shape[2] - count
        d_keys, d_values = (
            pad(x.unflatten(1, (h_kv, groups)).sum(dim=2), (0, 0, 0, missing)) for x in (part_k, part_v)
        )
        d_known = summaries.scatter(d_keys, dk), summaries.scatter(d_values, dv)
    return {"q": dq, "k": dk, "v": dv, "summary_k": d_known[0], "summary_v": d_known[1]}


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Shapes:  q: b h t k    k, v: b h n k    mask: 1 1 t n  ->  b h t k,  b h t"""
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=factor)
        return out, lse
    wide = mask.expand(q.shape[0], q.shape[1], -1, -1)
    out, lse, _, _ = _aten._scaled_dot_product_efficient_attention(q, k, v, wide, True, 0.0, False, scale=factor)
    return out, lse[:, :, : q.shape[2]]


def _attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: Tensor, lse: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=factor
        )
        return found  # type: ignore[no-any-return]
    wide = mask.expand(q.shape[0], q.shape[1], -1, -1)
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        gradient, q, k, v, wide, out, aligned_rows(lse), seed, seed, 0.0, [True, True, True, False], False, scale=factor
    )
    return dq, dk, dv
