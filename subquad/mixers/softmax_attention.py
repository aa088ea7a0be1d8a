"""Multi-head softmax attention with rotary positions and grouped queries; the window mixer builds on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from subquad.contracts import MixerContext, ProjectionSplit
from subquad.mixers.configs import SoftmaxAttentionConfig, share_keys
from subquad_kernels.growing_cache import appended
from subquad_kernels.operators import rotary, softmax_attention
from subquad_kernels.ring import Rings, attend, cache_of, places_for, rings_of


class AttentionCarry(NamedTuple):
    """Rotated keys and values of all tokens so far.  Shape: b s h_kv k each"""

    keys: Tensor
    values: Tensor


class SoftmaxAttention(nn.Module):
    """Causal attention:  y = W_o concat_heads( softmax_attention(R q, R k, v) ),  q, k, v = W_q x, W_k x, W_v x.

    With `kv` "publish" it hands R k and v to later layers (`ReadingAttention`), in a prefill or decode with those of
    the carry in front.

    Shapes:  x: b t d  ->  b t d      R rotates by position (`rotary`); no biases.
    Source: Vaswani et al. 2017, 3.2; Su et al. 2021 (positions); Ainslie et al. 2023 (shared key heads).
    """

    window = 0
    causal = True

    def __init__(self, config: SoftmaxAttentionConfig, context: MixerContext) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = config.resolved_head_dim(context.d_model)
        self.q_proj = nn.Linear(context.d_model, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(context.d_model, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(context.d_model, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, context.d_model, bias=False)
        self.rope_theta = config.rope_theta
        self.published = tuple(share_keys(config, context).publishes)

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
        out = softmax_attention(q, k, v, cu_seqlens, causal=self.causal, window=self.window)
        y = self.o_proj(out.flatten(2))
        return y if shared is None else (y, dict(zip(self.published, (k, v))))

    def empty_carry(self, batch_size: int) -> AttentionCarry:
        """No keys yet."""
        return AttentionCarry(*self._empty_cache(batch_size))

    def prefill(self, x: Tensor, carry: AttentionCarry, shared: Mapping[str, Tensor] | None = None) -> tuple[Any, ...]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, keys, values = self._attend(x, carry.keys, carry.values, carry.keys.shape[1])
        after = AttentionCarry(keys, values)
        return (y, after) if shared is None else (y, after, dict(zip(self.published, (keys, values))))

    def decode(self, x_t: Tensor, carry: AttentionCarry, shared: Mapping[str, Tensor] | None = None) -> tuple[Any, ...]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, *rest = self.prefill(x_t.unsqueeze(1), carry, shared)
        return y.squeeze(1), *rest

    def with_room(self, carry: AttentionCarry, tokens: int) -> Rings:
        """Keys and values in memory for so many tokens more."""
        position = carry.keys.shape[1]
        return rings_of(carry.keys, carry.values, position, places_for(position, tokens))

    def decode_in_place(self, x_t: Tensor, carry: Rings) -> tuple[Tensor, Rings]:
        """Mix the next token, where its position is known to the device alone.  Shapes:  x_t: b d  ->  b d"""
        q, k, v = self._project(x_t.unsqueeze(1))
        q, k = rotary(q, k, position=carry.position, theta=self.rope_theta)
        out, carry = attend(q, k, v, carry)
        return self.o_proj(out.flatten(2)).squeeze(1), carry

    def without_room(self, carry: Rings) -> AttentionCarry:
        """The keys and values so far."""
        position = int(carry.position)
        return AttentionCarry(cache_of(carry.keys, position), cache_of(carry.values, position))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (  # as many heads as the projections have here: ranks may share them
            self.q_proj(x).unflatten(-1, (-1, self.head_dim)),
            self.k_proj(x).unflatten(-1, (-1, self.head_dim)),
            self.v_proj(x).unflatten(-1, (-1, self.head_dim)),
        )

    def _attend(self, x: Tensor, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._project(x)
        q, k = rotary(q, k, start=start, theta=self.rope_theta)
        keys, values = appended(keys, k), appended(values, v)
        out = softmax_attention(q, keys, values, window=self.window)
        return self.o_proj(out.flatten(2)), keys, values

    def _empty_cache(self, batch_size: int) -> tuple[Tensor, Tensor]:
        shape = (batch_size, 0, self.num_kv_heads, self.head_dim)
        return self.k_proj.weight.new_zeros(shape), self.v_proj.weight.new_zeros(shape)
