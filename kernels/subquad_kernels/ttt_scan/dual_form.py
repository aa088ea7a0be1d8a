"""Test-time training by mini-batches, in torch: matrix products within one, a loop over them.

All gradients G of a mini-batch are taken at the W that enters it, so that no W - s_i A_i need be formed. With the sums
A that were handed in (zero but for a call that begins within a mini-batch), K~ = [K, 1], eta_ij = s_i r_j for j <= i:

    Q~ (W - s A_i) = Q~ W - s (Q~ A) - (eta o Q~ K~^T) G          A' = A + (r K~)^T G

for each map; the second map's Q~ is what the first one gave for the queries. Gradients are torch's own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from subquad_kernels.boundaries import layout_of
from subquad_kernels.documents import document_groups, groups_of
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.ttt_scan.definition import Maps, maps_of, rows_of
from subquad_kernels.ttt_scan.inner_model import gelu, gelu_slope, layer_norm, loss_gradient, with_one

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Outputs


def dual_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    token_scales: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    position: int,
    inner: str,
) -> Outputs:
    """y, final_state. Packed documents of similar length are laid side by side."""
    exact = torch.promote_types(v.dtype, torch.float32)
    rows = tuple(tensor.to(exact) for tensor in (q, k, v, rates))
    scales, state = token_scales.to(exact), initial_state.to(exact)
    norm = (norm_weight.to(exact)[:, None], norm_bias.to(exact)[:, None])
    start = position % len(scales)
    if cu_seqlens is None:
        y, final = _scan(rows, scales, norm, state, start, inner, None)
        return y.to(v.dtype), final
    y, finals = torch.zeros_like(rows[0]), []
    lengths, (empty, place) = cu_seqlens.diff(), layout_of(_in_groups, cu_seqlens)
    for group in document_groups(cu_seqlens):
        laid = tuple(group.pad(part) for part in rows)
        out, final = _scan(laid, scales, norm, state[group.documents], start, inner, lengths[group.documents])
        group.write(y, out)
        finals.append(final)
    return y.to(v.dtype), torch.cat([*finals, state[empty]])[place]


DUAL_FORM = AutogradKernel(dual_form)


def _in_groups(bounds: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Empty documents, and where each document stands among those of all groups and the empty ones after these."""
    empty = [number for number, (start, stop) in enumerate(pairwise(bounds)) if start == stop]
    grouped = [number for group in groups_of(bounds, torch.device("cpu")) for number in group.numbers]
    return torch.tensor(empty, dtype=torch.long).to(device), torch.tensor([*grouped, *empty]).argsort().to(device)


def _scan(
    rows: tuple[Tensor, ...],
    scales: Tensor,
    norm: tuple[Tensor, Tensor],
    state: Tensor,
    start: int,
    inner: str,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mini-batch after mini-batch, the first from place `start`; sequences end at their `lengths`.

    Shapes:  rows: b t h k, the last of them b t h    state: b 2 h s  ->  b t h k, b 2 h s
    """
    c, t, width = len(scales), rows[0].shape[1], rows[0].shape[-1]
    q, k, v, rates = (part.transpose(1, 2) for part in rows)
    weights, sums = (maps_of(part, width, inner) for part in state.unbind(1))
    outputs, first = [], 0
    while first < t:
        place = start if first == 0 else 0
        last = min(first + c - place, t)
        part = slice(first, last)
        s = scales[place : place + last - first, None]
        out, sums = _mini_batch(q[:, :, part], k[:, :, part], v[:, :, part], rates[:, :, part], s, norm, weights, sums)
        outputs.append(out)
        if place + last - first == c:  # full: but not for a sequence that ended within it
            full = None if lengths is None else (lengths >= last)[:, None, None, None]
            trained = [w - scales[-1] * a for w, a in zip(weights, sums)]
            weights = [new if full is None else torch.where(full, new, w) for new, w in zip(trained, weights)]
            sums = [torch.zeros_like(a) if full is None else torch.where(full, 0, a) for a in sums]
        first = last
    y = torch.cat(outputs, dim=2).transpose(1, 2).contiguous()
    return y, torch.stack([rows_of(weights), rows_of(sums)], dim=1)


def _mini_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    scales: Tensor,
    norm: tuple[Tensor, Tensor],
    weights: Maps,
    sums: Maps,
) -> tuple[Tensor, Maps]:
    """y, and the sums with this mini-batch's gradients.  Shapes:  q, k, v: b h c k    rates: b h c    scales: c 1"""
    inputs: list[Tensor] = []
    results: list[Tensor] = []
    for w in weights:
        inputs.append(with_one(gelu(results[-1]) if results else k))
        results.append(inputs[-1] @ w)
    pulls = [loss_gradient(results[-1], v - k, *norm)]
    if len(weights) == 2:
        pulls.insert(0, pulls[0] @ weights[1][..., :-1, :].transpose(-1, -2) * gelu_slope(results[0]))

    eta = (scales * rates[:, :, None, :]).tril()
    hidden = q
    for number, (w, a, x, g) in enumerate(zip(weights, sums, inputs, pulls)):
        asked = with_one(gelu(hidden) if number else q)
        hidden = asked @ w - scales * (asked @ a) - (eta * (asked @ x.transpose(-1, -2))) @ g
    after = [a + (x * rates[..., None]).transpose(-1, -2) @ g for a, x, g in zip(sums, inputs, pulls)]
    return q + layer_norm(hidden, *norm), after
