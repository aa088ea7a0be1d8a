"""The adapter for timm's attention: its fused call is answered by a kernel, everything around it stays timm's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from subquad.compiler.foreign import sdpa_calls
from subquad.contracts import AttentionFunction


def adapt(module: nn.Module, attention: Mapping[str, AttentionFunction]) -> Mapping[str, str]:
    """As `sdpa_calls`; a model that timm built without fused attention is told how to get it."""
    if not getattr(module, "fused_attn", False):
        return dict.fromkeys(
            attention, "was built without fused attention: call timm.layers.set_fused_attn(True) before building"
        )
    return sdpa_calls.adapt(module, attention)
