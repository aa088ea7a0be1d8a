"""Windowed attention in tiles: a tile of `window` queries sees its own tile of keys and the one before (and after).

    work  b t h 2 window (k + v)  multiply-adds instead of  b t^2 h (k + v) / 2; no t x t matrix is ever formed. To both
    sides it is three tiles instead of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, einsum
from torch.nn.functional import pad

from subquad_kernels.documents import document_ids
from subquad_kernels.softmax_attention.definition import scale_of

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

SMALLEST_TILE = 16
"""Shorter windows share a tile of this many tokens, so that products stay large enough to be fast."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int, scale: float | None
) -> Outputs:
    """out and lse."""
    with torch.no_grad():
        return _attend(q, k, v, cu_seqlens, causal, window, scale_of(q, scale))


def backward(
    arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]
) -> dict[str, Tensor | None]:
    """dq, dk, dv by differentiating the tiles, computed once more."""
    values: Any = arguments
    with torch.enable_grad():
        q, k, v = (values[name].detach().requires_grad_() for name in ("q", "k", "v"))
        factor = scale_of(values["q"], values["scale"])
        out, _ = _attend(q, k, v, values["cu_seqlens"], values["causal"], values["window"], factor)
        found = torch.autograd.grad(out, (q, k, v), gradients[0])
    return dict(zip(("q", "k", "v"), found))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int, factor: float
) -> tuple[Tensor, Tensor]:
    b, t, h, _ = q.shape
    h_kv = k.shape[2]
    exact = torch.promote_types(q.dtype, torch.float32)
    tile = min(max(window, SMALLEST_TILE), t)
    tiles = -(-t // tile)

    def tiled(x: Tensor) -> Tensor:  # [b, tiles, tile, heads, width]
        laid_out: Tensor = pad(x, (0, 0, 0, 0, 0, tiles * tile - t)).unflatten(1, (tiles, tile))
        return laid_out

    def with_neighbours(x: Tensor) -> Tensor:  # [b, tiles, 2 or 3 tile, heads, width]
        x = tiled(x)
        parts = [pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x]
        return torch.cat(parts if causal else [*parts, pad(x, (0, 0, 0, 0, 0, 0, 0, 1))[:, 1:]], dim=2)

    queries = tiled(q).unflatten(3, (h_kv, h // h_kv))
    scores = einsum("bntgrk,bnsgk->bngrts", queries.to(exact), with_neighbours(k).to(exact)) * factor
    seen = _visible(t, tile, tiles, causal, window, cu_seqlens, q.device)
    scores = scores.masked_fill(~seen[None, :, None, None], float("-inf"))
    out = einsum("bngrts,bnsgv->bntgrv", scores.softmax(dim=-1).to(v.dtype), with_neighbours(v))
    lse = scores.logsumexp(dim=-1).permute(0, 2, 3, 1, 4).reshape(b, h, tiles * tile)
    return out.reshape(b, tiles * tile, h, v.shape[3])[:, :t], lse[:, :, :t]


def _visible(
    t: int, tile: int, tiles: int, causal: bool, window: int, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """Shape: tiles tile (2 or 3 tile)"""
    query = torch.arange(tiles * tile, device=device).view(tiles, tile, 1)
    key = query.view(tiles, 1, tile)
    if causal:
        key = torch.cat([key - tile, key], dim=2)
        seen = (key >= 0) & (key <= query) & (query - key < window)
    else:
        key = torch.cat([key - tile, key, key + tile], dim=2)
        # A query of the filling sees itself, so that no row is empty.
        seen = ((key >= 0) & (key < t) & ((query - key).abs() < window)) | (key == query)
    if cu_seqlens is not None:
        document = pad(document_ids(cu_seqlens, t), (0, tiles * tile - t), value=-1)
        seen = seen & (document[query] == document[key.clamp(0, tiles * tile - 1)])
    return seen
