"""The recurrence of the trapezoidal rule as linear attention: of one key and value a token, and of several lanes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, einsum
from torch.nn.functional import pad

from subquad_kernels.operators import linear_attention


class Before(NamedTuple):
    """What the first token continues: the state without its own part of the write before it, and that write.

    Shapes:  state: b h n p (fp32)    key: b r h n    value: b r h p
    """

    state: Tensor
    key: Tensor
    value: Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    own: Tensor,
    again: Tensor,
    before: Before | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + a_t b_t k_{t-1} v_{t-1}^T + c_t k_t v_t^T,   y_t = S_t^T q_t      with one lane.

    a = exp(log_decay), b = again, c = own. A token's write is gathered at its own place, c_t + b_{t+1}, and its own
    read of it weighs c_t: the operator's diagonal. Nothing is subtracted, which would cancel in bfloat16.

    Shapes:  q, k: b t 1 h n    v: b t 1 h p    log_decay, own, again: b t h    cu_seqlens: documents + 1
             ->  y: b t 1 h p    S of the last token: b h n p (of packed documents, unused)
    Source: Lahoti et al. 2026 (Mamba-3), section 3.1.
    """
    # Where a document ends, the next one's part reaches nothing: it enters the document's final state, which is unused.
    write = own + pad(again[:, 1:], (0, 0, 0, 1))
    state = None if before is None else before.state + again[:, 0, :, None, None] * _written(before.key, before.value)
    q, k, v = (rows.squeeze(2) for rows in (q, k, v))
    y, state = linear_attention(q, k, v, log_decay, write, own, state, cu_seqlens, scale=1.0)
    return y.unsqueeze(2), state


def attend_in_lanes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    own: Tensor,
    again: Tensor,
    before: Before | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + a_t b_t sum_r k_{t-1}^r v_{t-1}^rT + c_t sum_r k_t^r v_t^rT,   y_t^r = S_t^T q_t^r.

    A token becomes r places of `linear_attention`. Place r of token t writes lane r of token t-1, whose weight is then
    known in full, a_t (c_{t-1} + b_t), and reads query r. What it has not seen by then, later lanes of token t-1 and
    all of token t, is added by products of a token's lanes: again nothing is subtracted.

    Shapes:  as `attend`, with r lanes
    Source: Lahoti et al. 2026 (Mamba-3), section 3.3.
    """
    lanes = q.shape[2]
    earlier = again + pad(own[:, :-1], (0, 0, 1, 0))
    if cu_seqlens is not None:
        # A document's first token has none before it; empty documents at the end begin one past it.
        first = pad(torch.zeros_like(earlier), (0, 0, 0, 1)).index_fill(1, cu_seqlens.long(), 1.0)
        earlier = earlier * (1 - first[:, :-1])
    weight = log_decay.exp() * earlier
    if before is None:
        state, key, value = None, torch.zeros_like(k[:, 0]), torch.zeros_like(v[:, 0])
    else:
        state, key, value = before.state, before.key.to(k.dtype), before.value.to(v.dtype)
    k_before, v_before = (torch.cat([one.unsqueeze(1), rest[:, :-1]], 1) for one, rest in ((key, k), (value, v)))
    seen, state = linear_attention(
        q.flatten(1, 2),
        k_before.flatten(1, 2),
        v_before.flatten(1, 2),
        pad(log_decay.unsqueeze(2), (0, 0, 0, lanes - 1)).flatten(1, 2),
        weight.repeat_interleave(lanes, dim=1),
        initial_state=state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens * lanes,
        scale=1.0,
    )
    y = seen.unflatten(1, (-1, lanes))
    missed = weight[..., None, None] * einsum("btrhn,btlhn->bthrl", q, k_before).triu(1)
    current = own[..., None, None] * einsum("btrhn,btlhn->bthrl", q, k)
    for pairs, values in ((missed, v_before), (current, v)):
        y = y + einsum("bthrl,btlhp->btrhp", pairs.to(v.dtype), values)
    return y, state + own[:, -1, :, None, None] * _written(k[:, -1], v[:, -1])


def _written(key: Tensor, value: Tensor) -> Tensor:
    """sum_r k^r v^rT in fp32 or wider, also under autocast.  Shapes:  key: b r h n    value: b r h p  ->  b h n p"""
    exact = torch.promote_types(key.dtype, torch.float32)
    return (key.to(exact).unsqueeze(-1) * value.to(exact).unsqueeze(-2)).sum(1)
