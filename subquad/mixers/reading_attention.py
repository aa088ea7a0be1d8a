"""Softmax attention whose keys and values are those of an earlier layer: no maps for them, and no cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from subquad.contracts import MixerContext
from subquad.mixers.configs import SoftmaxAttentionConfig, WindowConfig, share_keys
from subquad_kernels.operators import rotary, softmax_attention


class PositionCarry(NamedTuple):
    """How many tokens came before; keys and values lie in the carry of the layer that publishes them."""

    position: int


class ReadingAttention(nn.Module):
    """Causal attention:  y = W_o concat_heads( softmax_attention(R q, k, v) ),  q = W_q x;  k rotated already.

    Shapes:  x: b t d    k, v: b s h_kv k, the last t of them of the tokens of x  ->  b t d      no biases.
    Source: Brandon et al. 2024, 3 (cross-layer attention).
    """

    def __init__(self, config: SoftmaxAttentionConfig, context: MixerContext) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.resolved_head_dim(context.d_model)
        self.window = config.window if isinstance(config, WindowConfig) else 0
        self.q_proj = nn.Linear(context.d_model, self.num_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, context.d_model, bias=False)
        self.rope_theta = config.rope_theta
        self.keys, self.values = share_keys(config, context).reads

    def init_parameters(self, std: float) -> None:
        """Both projections normal(0, std)."""
        for linear in (self.q_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=std)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None, shared: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        return self._attend(x, shared, cu_seqlens, 0), {}

    def empty_carry(self, batch_size: int) -> PositionCarry:
        """No token came before."""
        return PositionCarry(0)

    def prefill(
        self, x: Tensor, carry: PositionCarry, shared: Mapping[str, Tensor]
    ) -> tuple[Tensor, PositionCarry, Any]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        return self._attend(x, shared, None, carry.position), PositionCarry(carry.position + x.shape[1]), {}

    def decode(
        self, x_t: Tensor, carry: PositionCarry, shared: Mapping[str, Tensor]
    ) -> tuple[Tensor, PositionCarry, Any]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry, published = self.prefill(x_t.unsqueeze(1), carry, shared)
        return y.squeeze(1), carry, published

    def _attend(self, x: Tensor, shared: Mapping[str, Tensor], cu_seqlens: Tensor | None, start: int) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        # The operator turns queries and keys together; one head stands where keys would.
        q, _ = rotary(q, q[:, :, :1], cu_seqlens, start=start, theta=self.rope_theta)
        out = softmax_attention(q, shared[self.keys], shared[self.values], cu_seqlens, window=self.window)
        return self.o_proj(out.flatten(2))  # type: ignore[no-any-return]
