"""The segment attention mixer: SCOUT's second half, to follow a mixer that fills the segments' last tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from subquad import MixerContext, ProjectionSplit
from subquad_kernels.growing_cache import appended
from subquad_kernels.operators import rotary, segment_attention
from subquad_kernels.ring import Rings, attend, cache_of, places_for, rings_of
from subquad_scout.config import SegmentAttentionConfig, share_summaries


class SegmentCarry(NamedTuple):
    """Rotated keys and values of the segment summaries so far, and how many tokens came before.

    Shapes:  keys, values: b floor(position / segment_len) h_kv k
    """

    keys: Tensor
    values: Tensor
    position: int


class SegmentAttention(nn.Module):
    """y = W_o concat_heads( segment_attention(R q, R k, v) ),  q, k, v = W_q x, W_k x, W_v x.

    Token g attends to itself and to the last token of each segment that ended before it: 1 + floor(g / segment_len)
    keys. The summaries are not pooled and add no parameters; the mixer before this one writes a segment's content into
    its last token. With `kv` "publish" it hands R k and v to later layers (`ReadingSegmentAttention`), in a prefill or
    decode with those of the summaries so far in front.

    Shapes:  x: b t d  ->  b t d      R rotates by absolute position, summaries keep the phase of their own token.
    Source: SCOUT 2025 (arXiv 2509.00935).
    """

    def __init__(self, config: SegmentAttentionConfig, context: MixerContext) -> None:
        super().__init__()
        self.segment_len = config.resolved_segment_len(context.context_len)
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = config.resolved_head_dim(context.d_model)
        self.q_proj = nn.Linear(context.d_model, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(context.d_model, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(context.d_model, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, context.d_model, bias=False)
        self.rope_theta = config.rope_theta
        self.published = tuple(share_summaries(config, context).publishes)

    def init_parameters(self, std: float) -> None:
        """Every projection normal(0, std)."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=std)

    def tensor_parallel_plan(self) -> ProjectionSplit:
        """Heads are dealt out, queries with their keys."""
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}
        return ProjectionSplit(columns=("q_proj", "k_proj", "v_proj"), rows=("o_proj",), units=heads)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, shared: Mapping[str, Tensor] | None = None) -> Any:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        q, k, v = self._project(x)
        q, k = rotary(q, k, cu_seqlens, theta=self.rope_theta)
        out = segment_attention(q, k, v, cu_seqlens=cu_seqlens, segment_len=self.segment_len)
        y = self.o_proj(out.flatten(2))
        return y if shared is None else (y, dict(zip(self.published, (k, v))))

    def empty_carry(self, batch_size: int) -> SegmentCarry:
        """No summaries yet."""
        shape = (batch_size, 0, self.num_kv_heads, self.head_dim)
        return SegmentCarry(self.k_proj.weight.new_zeros(shape), self.v_proj.weight.new_zeros(shape), 0)

    def prefill(self, x: Tensor, carry: SegmentCarry, shared: Mapping[str, Tensor] | None = None) -> tuple[Any, ...]:
        """Mix the next t tokens, and keep the summaries of the segments they complete.  Shapes:  x: b t d  ->  b t d"""
        q, k, v = self._project(x)
        q, k = rotary(q, k, start=carry.position, theta=self.rope_theta)
        out = segment_attention(q, k, v, carry.keys, carry.values, segment_len=self.segment_len, start=carry.position)
        first = self.segment_len - 1 - carry.position % self.segment_len
        after = SegmentCarry(
            appended(carry.keys, k[:, first :: self.segment_len]),
            appended(carry.values, v[:, first :: self.segment_len]),
            carry.position + x.shape[1],
        )
        y = self.o_proj(out.flatten(2))
        if shared is None:
            return y, after
        published = (torch.cat([carry.keys, k], dim=1), torch.cat([carry.values, v], dim=1))
        return y, after, dict(zip(self.published, published))

    def decode(self, x_t: Tensor, carry: SegmentCarry, shared: Mapping[str, Tensor] | None = None) -> tuple[Any, ...]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, *rest = self.prefill(x_t.unsqueeze(1), carry, shared)
        return y.squeeze(1), *rest

    def with_room(self, carry: SegmentCarry, tokens: int) -> Rings:
        """Summaries in memory for those of so many tokens more."""
        places = places_for(carry.position, tokens, self.segment_len)
        return rings_of(carry.keys, carry.values, carry.position, places, self.segment_len)

    def decode_in_place(self, x_t: Tensor, carry: Rings) -> tuple[Tensor, Rings]:
        """Mix the next token, where its position is known to the device alone.  Shapes:  x_t: b d  ->  b d"""
        q, k, v = self._project(x_t.unsqueeze(1))
        q, k = rotary(q, k, position=carry.position, theta=self.rope_theta)
        out, carry = attend(q, k, v, carry, segment_len=self.segment_len)
        return self.o_proj(out.flatten(2)).squeeze(1), carry

    def without_room(self, carry: Rings) -> SegmentCarry:
        """The summaries so far."""
        position = int(carry.position)
        keys, values = (cache_of(ring, position, self.segment_len) for ring in (carry.keys, carry.values))
        return SegmentCarry(keys, values, position)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (  # as many heads as the projections have here: ranks may share them
            self.q_proj(x).unflatten(-1, (-1, self.head_dim)),
            self.k_proj(x).unflatten(-1, (-1, self.head_dim)),
            self.v_proj(x).unflatten(-1, (-1, self.head_dim)),
        )
