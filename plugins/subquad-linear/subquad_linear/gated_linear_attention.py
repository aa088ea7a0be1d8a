"""Gated linear attention (GLA): every key channel of the state forgets at a rate that the token decides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad import MixerContext
from subquad_kernels.operators import gated_linear_attention
from subquad_linear.config import GatedLinearAttentionConfig, width_of_a_head
from subquad_linear.gated_output import GatedOutput


class GatedLinearAttentionCarry(NamedTuple):
    """What gated linear attention remembers.  Shape:  state: b h n p (fp32)"""

    state: Tensor


class GatedLinearAttention(nn.Module):
    """GLA:  S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T,   o_t = n^-1/2 S_t^T q_t.

    g = logsigmoid(W_2 W_1 x + b) / tau;  q, k, v = W_q x, W_k x, W_v x;  y = W_o( RMSNorm_head(o) * silu(W_g x) ).
    No other biases, no positions.

    Shapes:  x: b t d  ->  b t d      h heads of n = expand_k d / h keys and p = expand_v d / h values
             W_1: d -> r    W_2: r -> h n      r = gate_rank, tau = gate_temperature
    Source: Yang et al. 2023 (GLA), sections 4.1 and 4.4.
    """

    def __init__(self, config: GatedLinearAttentionConfig, context: MixerContext) -> None:
        super().__init__()
        d, h = context.d_model, config.num_heads
        self.num_heads, self.gate_temperature = h, config.gate_temperature
        self.key_dim = width_of_a_head(config.expand_k * d, h, "keys")
        self.value_dim = width_of_a_head(config.expand_v * d, h, "values")
        self.q_proj = nn.Linear(d, h * self.key_dim, bias=False)
        self.k_proj = nn.Linear(d, h * self.key_dim, bias=False)
        self.v_proj = nn.Linear(d, h * self.value_dim, bias=False)
        self.decay_down = nn.Linear(d, config.gate_rank, bias=False)
        self.decay_up = nn.Linear(config.gate_rank, h * self.key_dim)
        self.output = GatedOutput(d, h, self.value_dim)

    def init_parameters(self, std: float) -> None:
        """Every map normal(0, std), as in the authors' released models; the decays' bias 0, the norm's weight 1."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.decay_down, self.decay_up):
            nn.init.normal_(linear.weight, std=std)
        for linear in (self.output.g_proj, self.output.o_proj):
            nn.init.normal_(linear.weight, std=std)
        nn.init.zeros_(self.decay_up.bias)
        self.output.norm.reset_parameters()

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        y, _ = self._mix(x, None, cu_seqlens)
        return y

    def empty_carry(self, batch_size: int) -> GatedLinearAttentionCarry:
        """Zeros: no token has been seen."""
        exact = torch.promote_types(self.q_proj.weight.dtype, torch.float32)
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim)
        return GatedLinearAttentionCarry(self.q_proj.weight.new_zeros(shape, dtype=exact))

    def prefill(self, x: Tensor, carry: GatedLinearAttentionCarry) -> tuple[Tensor, GatedLinearAttentionCarry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, state = self._mix(x, carry.state, None)
        return y, GatedLinearAttentionCarry(state)

    def decode(self, x_t: Tensor, carry: GatedLinearAttentionCarry) -> tuple[Tensor, GatedLinearAttentionCarry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry

    def _mix(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.key_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_heads, self.key_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_heads, self.value_dim))
        # The bias joins after the product: it is fp32, and makes the decays fp32 where products are rounded to 8 bits.
        logits = F.linear(self.decay_down(x), self.decay_up.weight) + self.decay_up.bias
        log_decay = F.logsigmoid(logits).unflatten(-1, (self.num_heads, self.key_dim)) / self.gate_temperature
        o, state = gated_linear_attention(q, k, v, log_decay, initial_state=state, cu_seqlens=cu_seqlens)
        return self.output.leave(o, x), state
