"""The scalar LSTM (sLSTM): a recurrent network with exponential gates, whose heads mix their hidden states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, einsum, nn

from subquad import MixerContext
from subquad_kernels.operators import causal_conv, slstm_scan
from subquad_linear.config import ScalarLSTMConfig, width_of_a_head
from subquad_linear.head_norm import HeadNorm

NORM_EPS = 1e-5
SLOWEST_FORGET_BIAS, FASTEST_FORGET_BIAS = 5.0, -7.0
"""Forget gates start at sigmoid of these and between, over the channels of a head (the authors' `powerlaw`)."""
FIRST_POWER, ADDED_POWER = 0.3, 1.3
"""The power of that curve in the first block, and what it has grown by in the last."""


class ScalarLSTMCarry(NamedTuple):
    """What a scalar LSTM remembers, of a size that does not depend on t.

    Shapes:  conv_inputs: b (w-1) d, the last inputs of the convolution    state: b 3 h p (fp32)
    """

    conv_inputs: Tensor
    state: Tensor


class ScalarLSTM(nn.Module):
    """sLSTM:  c_t = f_t c_{t-1} + i_t z_t,   n_t = f_t n_{t-1} + i_t,   h_t = o_t c_t / n_t;   y = LayerNorm_head(h).

        i = exp(W_i u + R_i h_{t-1} + b_i),      f = sigmoid(W_f u + R_f h_{t-1} + b_f),    u = silu(conv x)
        z = tanh(W_z x + R_z h_{t-1} + b_z),     o = sigmoid(W_o x + R_o h_{t-1} + b_o)

    All W and R are blocks on the diagonal, one a head. A token waits for the hidden state before it: the work is linear
    in t and so is the time, however many processors there are.

    Shapes:  x: b t d  ->  b t d      h heads of p = d / h;  conv_gates, input_gates: h p 2 p (i and f, z and o);
             recurrent: h p 4 p;  bias: h 4 p
    Source: Beck et al. 2024 (xLSTM), section 2.2 and figure 10; initial values as in the authors' code.
    """

    def __init__(self, config: ScalarLSTMConfig, context: MixerContext) -> None:
        super().__init__()
        d, h = context.d_model, config.num_heads
        self.num_heads = h
        self.head_dim = width_of_a_head(d, h, "the model")
        self.depth = context.layer_index / max(context.num_layers - 1, 1)
        # Holds weight (d 1 w) and bias and draws them; the operator computes.
        self.conv = nn.Conv1d(d, d, config.conv_width, groups=d)
        self.conv_gates = nn.Parameter(torch.empty(h, self.head_dim, 2, self.head_dim))
        self.input_gates = nn.Parameter(torch.empty(h, self.head_dim, 2, self.head_dim))
        self.recurrent = nn.Parameter(torch.empty(h, self.head_dim, 4, self.head_dim))
        self.bias = nn.Parameter(torch.empty(h, 4, self.head_dim))
        self.norm = HeadNorm(h, self.head_dim, NORM_EPS, bias=False)
        self._init_gates()

    def init_parameters(self, std: float) -> None:
        """All as the authors draw them, whatever `std`: heads see the input first and each other only with training."""
        self.conv.reset_parameters()
        nn.init.ones_(self.norm.weight)
        self._init_gates()

    @torch.no_grad()
    def _init_gates(self) -> None:
        """Maps normal(0, sqrt(2 / 5d)), nothing recurrent, forget gates from slow to fast by a power of the depth."""
        h, p = self.num_heads, self.head_dim
        for gates in (self.conv_gates, self.input_gates):
            nn.init.normal_(gates, std=(2 / (5 * h * p)) ** 0.5)
        nn.init.zeros_(self.recurrent)
        nn.init.zeros_(self.bias)
        place = torch.linspace(0, 1, p, device=self.bias.device) ** (FIRST_POWER + ADDED_POWER * self.depth)
        self.bias[:, 1] = SLOWEST_FORGET_BIAS + (FASTEST_FORGET_BIAS - SLOWEST_FORGET_BIAS) * place

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        y, _, _ = self._mix(x, None, None, cu_seqlens)
        return y

    def empty_carry(self, batch_size: int) -> ScalarLSTMCarry:
        """No token has been seen: hidden state and mean 0, the log of all weights -inf."""
        d, _, width = self.conv.weight.shape
        exact = torch.promote_types(self.conv.weight.dtype, torch.float32)
        state = self.conv.weight.new_zeros(batch_size, 3, self.num_heads, self.head_dim, dtype=exact)
        state[:, 2] = -torch.inf
        return ScalarLSTMCarry(self.conv.weight.new_zeros(batch_size, width - 1, d), state)

    def prefill(self, x: Tensor, carry: ScalarLSTMCarry) -> tuple[Tensor, ScalarLSTMCarry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, conv_inputs, state = self._mix(x, carry.conv_inputs, carry.state, None)
        return y, ScalarLSTMCarry(conv_inputs, state)

    def decode(self, x_t: Tensor, carry: ScalarLSTMCarry) -> tuple[Tensor, ScalarLSTMCarry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry

    def _mix(
        self, x: Tensor, conv_inputs: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        u, conv_inputs = causal_conv(
            x, self.conv.weight.squeeze(1), self.conv.bias, initial_state=conv_inputs, cu_seqlens=cu_seqlens
        )
        i_and_f, z_and_o = (
            einsum("bthj,hjgp->bthgp", rows.unflatten(-1, (self.num_heads, self.head_dim)), weight)
            for rows, weight in ((u, self.conv_gates), (x, self.input_gates))
        )
        # The bias joins in the operator, where gates are fp32.
        h, state = slstm_scan(
            torch.cat([i_and_f, z_and_o], 3), self.recurrent, self.bias, initial_state=state, cu_seqlens=cu_seqlens
        )
        return self.norm.leave(h), conv_inputs, state
