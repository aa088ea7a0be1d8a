"""DeltaNet: a linear memory that replaces what it holds under a key instead of adding to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subquad import MixerContext
from subquad_kernels.operators import causal_conv, delta_rule, gated_norm
from subquad_linear.config import DeltaNetConfig, width_of_a_head
from subquad_linear.delta_memory import DeltaMemory
from subquad_linear.exact_norm import EPS, ExactNorm
from subquad_linear.unit_length import unit_length


class DeltaNet(DeltaMemory):
    """DeltaNet:  S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = n^-1/2 S_t^T q_t.

    [q, k, v] = silu(conv(W x)), q and k then scaled to length one;  beta = sigmoid(W_b x), doubled with
    `negative_eigenvalues`;  y = W_o RMSNorm_head(o).

    Shapes:  x: b t d  ->  b t d      h heads of n = d / h keys and values; beta: b t h
    Source: Yang et al. 2024 (Parallelizing linear transformers with the delta rule), section 3; Grazzi et
            al. 2024 (negative eigenvalues). W_q, W_k and W_v are one map here, as are their convolutions.
    """

    def __init__(self, config: DeltaNetConfig, context: MixerContext) -> None:
        super().__init__()
        d = context.d_model
        self.num_heads = config.num_heads
        self.key_dim = self.value_dim = width_of_a_head(d, config.num_heads, "keys")
        self.largest_write = 2.0 if config.negative_eigenvalues else 1.0
        self.qkv_proj = nn.Linear(d, 3 * d, bias=False)
        # Holds the taps (c 1 w) and draws them; the operator computes.
        self.conv = nn.Conv1d(3 * d, 3 * d, config.conv_width, groups=3 * d, bias=False)
        self.write_proj = nn.Linear(d, config.num_heads, bias=False)
        self.norm = ExactNorm(self.key_dim)
        self.o_proj = nn.Linear(d, d, bias=False)

    def init_parameters(self, std: float) -> None:
        """Maps normal(0, std), as in the authors' released models; the convolution as torch draws it, the norm 1."""
        for linear in (self.qkv_proj, self.write_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=std)
        self.conv.reset_parameters()
        self.norm.reset_parameters()

    def _mix(
        self, x: Tensor, conv_inputs: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv, conv_inputs = causal_conv(
            self.qkv_proj(x), self.conv.weight.squeeze(1), initial_state=conv_inputs, cu_seqlens=cu_seqlens
        )
        q, k, v = qkv.split(self.num_heads * self.key_dim, dim=-1)
        q, k = (unit_length(rows, self.num_heads, self.key_dim) for rows in (q, k))
        write_gate = self.largest_write * torch.sigmoid(self.write_proj(x))
        o, state = delta_rule(
            q, k, v.unflatten(-1, (self.num_heads, self.value_dim)), write_gate=write_gate,
            initial_state=state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y = gated_norm(o.flatten(2), weight=self.norm.weight, groups=self.num_heads, eps=EPS)
        return self.o_proj(y), conv_inputs, state
