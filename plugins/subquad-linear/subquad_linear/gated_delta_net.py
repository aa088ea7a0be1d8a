"""Gated DeltaNet: a memory that decays, and replaces what it holds under a key instead of adding to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad import MixerContext
from subquad_kernels.operators import causal_conv, delta_rule
from subquad_linear.config import GatedDeltaNetConfig, width_of_a_head
from subquad_linear.delta_memory import DeltaMemory
from subquad_linear.gated_output import GatedOutput
from subquad_linear.unit_length import unit_length

SMALLEST_STEP, LARGEST_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4
"""Step sizes are drawn log-uniform between the first two and not below the third, as in Mamba-2."""
LARGEST_RATE, RATE_FLOOR = 16.0, 1e-4
"""Rates A are drawn uniform below the first; the second keeps a draw of 0 from becoming a logarithm of -inf."""


@torch.no_grad()
def draw_decays(A_log: Tensor, dt_bias: Tensor) -> None:
    """A uniform from 0 to 16; step sizes log-uniform from 1e-3 to 1e-1 whatever the input.  Shapes:  both: h"""
    rate = torch.empty_like(A_log, dtype=torch.float32).uniform_(0, LARGEST_RATE).clamp_(min=RATE_FLOOR)
    A_log.copy_(rate.log())
    step = torch.empty_like(dt_bias, dtype=torch.float32)
    step.uniform_(math.log(SMALLEST_STEP), math.log(LARGEST_STEP)).exp_().clamp_(min=STEP_FLOOR)
    dt_bias.copy_(step + (-torch.expm1(-step)).log())  # the inverse of softplus


class GatedDeltaNet(DeltaMemory):
    """Gated DeltaNet:  S_t = e^(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = n^-1/2 S_t^T q_t.

    [q, k, v] = silu(conv(W x)), q and k then scaled to length one;  beta = sigmoid(W_b x), doubled with
    `negative_eigenvalues`;  g = -exp(A_log) softplus(W_a x + dt_bias);  y = W_o( RMSNorm_head(o) * silu(W_g x) ).

    Shapes:  x: b t d  ->  b t d      h heads of n = key_dim keys and p = expand_v n values; beta, g: b t h;
             `num_key_heads` h_k < h: head i reads the queries and keys of key head i // (h / h_k)
    Source: Yang, Kautz and Hatamizadeh 2024 (Gated delta networks), sections 3.1 and 3.4; Grazzi et al. 2024
            (negative eigenvalues); Qwen Team 2025 (Qwen3-Next: shared key heads). W_q, W_k and W_v are one map here,
            as are their convolutions.
    """

    def __init__(self, config: GatedDeltaNetConfig, context: MixerContext) -> None:
        super().__init__()
        d, h = context.d_model, config.num_heads
        self.num_heads, self.num_key_heads = h, config.num_key_heads or h
        self.key_dim = config.key_dim or width_of_a_head(0.75 * d, h, "keys")
        self.value_dim = config.expand_v * self.key_dim
        self.largest_write = 2.0 if config.negative_eigenvalues else 1.0
        channels = 2 * self.num_key_heads * self.key_dim + h * self.value_dim
        self.qkv_proj = nn.Linear(d, channels, bias=False)
        # Holds the taps (c 1 w) and draws them; the operator computes.
        self.conv = nn.Conv1d(channels, channels, config.conv_width, groups=channels, bias=False)
        self.write_proj = nn.Linear(d, h, bias=False)
        self.decay_proj = nn.Linear(d, h, bias=False)
        self.A_log = nn.Parameter(torch.empty(h))
        self.dt_bias = nn.Parameter(torch.empty(h))
        self.output = GatedOutput(d, h, self.value_dim)
        draw_decays(self.A_log, self.dt_bias)

    def init_parameters(self, std: float) -> None:
        """Maps normal(0, std), the convolution as torch draws it, the decays as Mamba-2 starts its own."""
        for linear in (self.qkv_proj, self.write_proj, self.decay_proj, self.output.g_proj, self.output.o_proj):
            nn.init.normal_(linear.weight, std=std)
        self.conv.reset_parameters()
        self.output.norm.reset_parameters()
        draw_decays(self.A_log, self.dt_bias)

    def _mix(
        self, x: Tensor, conv_inputs: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv, conv_inputs = causal_conv(
            self.qkv_proj(x), self.conv.weight.squeeze(1), initial_state=conv_inputs, cu_seqlens=cu_seqlens
        )
        keys, values = self.num_key_heads * self.key_dim, self.num_heads * self.value_dim
        q, k, v = qkv.split([keys, keys, values], dim=-1)
        q, k = (unit_length(rows, self.num_key_heads, self.key_dim) for rows in (q, k))
        v = v.unflatten(-1, (self.num_heads, self.value_dim))
        write_gate = self.largest_write * torch.sigmoid(self.write_proj(x))
        # Rates and biases are fp32, which makes the decays fp32 where products are rounded to 8 bits.
        log_decay = -torch.exp(self.A_log) * F.softplus(self.decay_proj(x) + self.dt_bias)
        o, state = delta_rule(q, k, v, log_decay, write_gate, initial_state=state, cu_seqlens=cu_seqlens)
        return self.output.leave(o, x), conv_inputs, state
