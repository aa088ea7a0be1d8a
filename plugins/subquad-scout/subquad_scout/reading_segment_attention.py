"""Segment attention whose keys and values are those of an earlier layer: no maps for them, and no cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from subquad import MixerContext
from subquad_kernels.operators import rotary, segment_attention
from subquad_scout.config import SegmentAttentionConfig, share_summaries
from subquad_scout.segment_attention import SegmentAttention


class PositionCarry(NamedTuple):
    """How many tokens came before; summaries lie in the carry of the layer that publishes them."""

    position: int


class ReadingSegmentAttention(nn.Module):
    """y = W_o concat_heads( segment_attention(R q, k, v) ),  q = W_q x;  k rotated already, of an earlier layer.

    Shapes:  x: b t d    k, v: b (m + t) h_kv k, the m summaries before the call and the tokens of x  ->  b t d
    Source: SCOUT 2025 (arXiv 2509.00935), with the cross-layer attention of Brandon et al. 2024, section 3.
    """

    def __init__(self, config: SegmentAttentionConfig, context: MixerContext) -> None:
        super().__init__()
        self.segment_len = config.resolved_segment_len(context.context_len)
        self.num_heads, self.head_dim = config.num_heads, config.resolved_head_dim(context.d_model)
        self.q_proj = nn.Linear(context.d_model, self.num_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, context.d_model, bias=False)
        self.rope_theta = config.rope_theta
        self.keys, self.values = share_summaries(config, context).reads

    def init_parameters(self, std: float) -> None:
        """Both projections normal(0, std)."""
        for linear in (self.q_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=std)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None, shared: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        q = self._turned(x, cu_seqlens, 0)
        keys, values = shared[self.keys], shared[self.values]
        out = segment_attention(q, keys, values, cu_seqlens=cu_seqlens, segment_len=self.segment_len)
        return self.o_proj(out.flatten(2)), {}

    def empty_carry(self, batch_size: int) -> PositionCarry:
        """No token came before."""
        return PositionCarry(0)

    def prefill(
        self, x: Tensor, carry: PositionCarry, shared: Mapping[str, Tensor]
    ) -> tuple[Tensor, PositionCarry, Any]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        q = self._turned(x, None, carry.position)
        keys, values, summaries = shared[self.keys], shared[self.values], carry.position // self.segment_len
        out = segment_attention(
            q, keys[:, summaries:], values[:, summaries:], keys[:, :summaries], values[:, :summaries],
            segment_len=self.segment_len, start=carry.position,
        )  # fmt: skip
        return self.o_proj(out.flatten(2)), PositionCarry(carry.position + x.shape[1]), {}

    def decode(
        self, x_t: Tensor, carry: PositionCarry, shared: Mapping[str, Tensor]
    ) -> tuple[Tensor, PositionCarry, Any]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry, published = self.prefill(x_t.unsqueeze(1), carry, shared)
        return y.squeeze(1), carry, published

    def _turned(self, x: Tensor, cu_seqlens: Tensor | None, start: int) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        # The operator turns queries and keys together; one head stands where keys would.
        return rotary(q, q[:, :, :1], cu_seqlens, start=start, theta=self.rope_theta)[0]


def build_segment_attention(config: SegmentAttentionConfig, context: MixerContext) -> nn.Module:
    """Segment attention over keys and values of its own, or of an earlier layer."""
    return (ReadingSegmentAttention if config.kv == "read" else SegmentAttention)(config, context)
