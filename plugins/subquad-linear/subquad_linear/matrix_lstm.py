"""The matrix LSTM (mLSTM): linear attention with an exponential input gate, a forget gate and a normaliser."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad import MixerContext
from subquad_kernels.operators import linear_attention
from subquad_linear.config import MatrixLSTMConfig, width_of_a_head
from subquad_linear.head_norm import HeadNorm

NORM_EPS = 1e-6
INPUT_BIAS, FIRST_FORGET_BIAS, LAST_FORGET_BIAS = -10.0, 3.0, 6.0
"""Where the gates start, the forget gate's biases evenly spaced over the heads (the authors' xLSTM 7B)."""


class MatrixLSTMCarry(NamedTuple):
    """What a matrix LSTM remembers.  Shapes:  state: b h n p    normalizer: b h n 1 (both fp32)"""

    state: Tensor
    normalizer: Tensor


class MatrixLSTM(nn.Module):
    """mLSTM:  C_t = f_t C_{t-1} + i_t k_t v_t^T,   z_t = f_t z_{t-1} + i_t k_t,   h_t = C_t^T q_t / max(|z_t.q_t|, 1).

    q, k, v = n^-1/2 W_q x, W_k x, W_v x;  i = exp cap(W_i x + b_i), f = sigmoid cap(W_f x + b_f) with
    cap(a) = gate_cap tanh(a / gate_cap);  y = W_out( sigmoid(W_o x) * LayerNorm_head(h) ); no other biases.
    The authors carry exp(-m) C_t and exp(-m) z_t, and floor by exp(-m): the same quotient. Capped gates need no m in
    float32 or bfloat16; float16 ends at 65504 and may overflow.

    Shapes:  x: b t d  ->  b t d      h heads of n = expand_k d / h keys and p = d / h values; i, f: b t h
    Source: Beck et al. 2024 (xLSTM), section 2.3; Beck et al. 2025 (xLSTM 7B), section 3 and the released code.
    """

    def __init__(self, config: MatrixLSTMConfig, context: MixerContext) -> None:
        super().__init__()
        d, h = context.d_model, config.num_heads
        self.num_heads, self.gate_cap = h, config.gate_cap
        self.key_dim = width_of_a_head(config.expand_k * d, h, "keys")
        self.value_dim = width_of_a_head(d, h, "values")
        self.q_proj = nn.Linear(d, h * self.key_dim, bias=False)
        self.k_proj = nn.Linear(d, h * self.key_dim, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.input_gate = nn.Linear(d, h)
        self.forget_gate = nn.Linear(d, h)
        self.norm = HeadNorm(h, self.value_dim, NORM_EPS, bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)

    @torch.no_grad()
    def init_parameters(self, std: float) -> None:
        """Maps normal(0, std); gates that ignore the token: little is written, each head forgets at its own rate."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=std)
        nn.init.zeros_(self.input_gate.weight)
        nn.init.constant_(self.input_gate.bias, INPUT_BIAS)
        nn.init.zeros_(self.forget_gate.weight)
        self.forget_gate.bias.copy_(torch.linspace(FIRST_FORGET_BIAS, LAST_FORGET_BIAS, self.num_heads))
        nn.init.ones_(self.norm.weight)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        y, _, _ = self._mix(x, None, None, cu_seqlens)
        return y

    def empty_carry(self, batch_size: int) -> MatrixLSTMCarry:
        """Zeros: no token has been seen."""
        exact = torch.promote_types(self.q_proj.weight.dtype, torch.float32)
        shape = (batch_size, self.num_heads, self.key_dim)
        new_zeros = self.q_proj.weight.new_zeros
        return MatrixLSTMCarry(new_zeros((*shape, self.value_dim), dtype=exact), new_zeros((*shape, 1), dtype=exact))

    def prefill(self, x: Tensor, carry: MatrixLSTMCarry) -> tuple[Tensor, MatrixLSTMCarry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, state, normalizer = self._mix(x, carry.state, carry.normalizer, None)
        return y, MatrixLSTMCarry(state, normalizer)

    def decode(self, x_t: Tensor, carry: MatrixLSTMCarry) -> tuple[Tensor, MatrixLSTMCarry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry

    def _mix(
        self, x: Tensor, state: Tensor | None, normalizer: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.key_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_heads, self.key_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_heads, self.value_dim))
        write = torch.exp(self._capped(x, self.input_gate.weight, self.input_gate.bias))
        log_decay = F.logsigmoid(self._capped(x, self.forget_gate.weight, self.forget_gate.bias))
        numerator, state = linear_attention(q, k, v, log_decay, write, initial_state=state, cu_seqlens=cu_seqlens)
        # The normaliser is the same recurrence on v = 1.
        denominator, normalizer = linear_attention(
            q, k, torch.ones_like(v[..., :1]), log_decay, write, initial_state=normalizer, cu_seqlens=cu_seqlens
        )
        h = numerator / denominator.abs().clamp(min=1)
        return self.out_proj(self.norm.leave(h, self.o_proj(x), "sigmoid")), state, normalizer

    def _capped(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A gate before its activation. The bias joins after the product: it is fp32, and makes the gate fp32."""
        return self.gate_cap * torch.tanh((F.linear(x, weight) + bias) / self.gate_cap)
