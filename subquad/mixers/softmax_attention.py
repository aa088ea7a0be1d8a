"""Multi-head softmax attention with rotary positions and grouped queries; the window mixer builds on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from subquad.contracts import MixerContext
from subquad.errors import ConfigError
from subquad.mixers.configs import SoftmaxAttentionConfig
from subquad_kernels.operators import rotary, softmax_attention


class AttentionCarry(NamedTuple):
    """Rotated keys and values of all tokens so far.  Shape: b s h_kv k each"""

    keys: Tensor
    values: Tensor


class SoftmaxAttention(nn.Module):
    """Causal attention:  y = W_o concat_heads( softmax_attention(R q, R k, v) ),  q, k, v = W_q x, W_k x, W_v x.

    Shapes:  x: b t d  ->  b t d      R rotates by position (`rotary`); no biases.
    Source: Vaswani et al. 2017, 3.2; Su et al. 2021 (positions); Ainslie et al. 2023 (shared key heads).
    """

    window = 0

    def __init__(self, config: SoftmaxAttentionConfig, context: MixerContext) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = config.head_dim or context.d_model // config.num_heads
        if not config.head_dim and context.d_model % config.num_heads:
            raise ConfigError(
                what=f"{config.num_heads} heads do not divide the width {context.d_model}",
                where="num_heads",
                mend="use a divisor of model.d_model, or set head_dim",
            )
        self.q_proj = nn.Linear(context.d_model, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(context.d_model, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(context.d_model, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, context.d_model, bias=False)
        self.rope_theta = config.rope_theta

    def init_parameters(self, std: float) -> None:
        """Every projection normal(0, std)."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=std)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        q, k, v = self._project(x)
        q, k = rotary(q, k, cu_seqlens, theta=self.rope_theta)
        out = softmax_attention(q, k, v, cu_seqlens, window=self.window)
        return self.o_proj(out.flatten(2))  # type: ignore[no-any-return]

    def empty_carry(self, batch_size: int) -> AttentionCarry:
        """No keys yet."""
        return AttentionCarry(*self._empty_cache(batch_size))

    def prefill(self, x: Tensor, carry: AttentionCarry) -> tuple[Tensor, AttentionCarry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        out, keys, values = self._attend(x, carry.keys, carry.values, carry.keys.shape[1])
        return out, AttentionCarry(keys, values)

    def decode(self, x_t: Tensor, carry: AttentionCarry) -> tuple[Tensor, AttentionCarry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        out, carry = self.prefill(x_t.unsqueeze(1), carry)
        return out.squeeze(1), carry

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)),
            self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)),
            self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)),
        )

    def _attend(self, x: Tensor, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._project(x)
        q, k = rotary(q, k, start=start, theta=self.rope_theta)
        keys, values = torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)
        out = softmax_attention(q, keys, values, window=self.window)
        return self.o_proj(out.flatten(2)), keys, values

    def _empty_cache(self, batch_size: int) -> tuple[Tensor, Tensor]:
        shape = (batch_size, 0, self.num_kv_heads, self.head_dim)
        return self.k_proj.weight.new_zeros(shape), self.v_proj.weight.new_zeros(shape)
