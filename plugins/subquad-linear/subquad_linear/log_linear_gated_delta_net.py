"""Log-linear Gated DeltaNet: the state of Gated DeltaNet becomes log t states, each read with its own weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad import MixerContext
from subquad_kernels.operators import causal_conv, log_linear_delta_rule
from subquad_linear.config import LogLinearGatedDeltaNetConfig, width_of_a_head
from subquad_linear.gated_delta_net import draw_decays
from subquad_linear.gated_output import GatedOutput
from subquad_linear.unit_length import unit_length


class LogLinearGatedDeltaNetCarry(NamedTuple):
    """What a log-linear Gated DeltaNet remembers: a state for each bit of the number of tokens so far.

    Shapes:  conv_inputs: b (w-1) c, the last inputs of the convolution, c = 2 h_k n + h p    state: b m h n p (fp32)
    """

    conv_inputs: Tensor
    state: Tensor
    position: int


class LogLinearGatedDeltaNet(nn.Module):
    """Log-linear Gated DeltaNet:  o_t = sum over levels l of  lambda_t[l] S_t[l]^T q_t.

    Every S[l] becomes e^(g_t) (I - beta_t k_t k_t^T) S[l] with a token, as Gated DeltaNet's one state does; S_t[l]
    holds what the tokens of the l-th bucket before t wrote, 2^(l-1) of them, and the token's own beta_t k_t v_t^T for
    l = 0. [q, k, v] = silu(conv(W x)), q and k then scaled to length one;  beta = sigmoid(W_b x), doubled with
    `negative_eigenvalues`;  g = -exp(A_log) softplus(W_a x + dt_bias);  lambda = softplus(L * W_l x);
    y = W_o( RMSNorm_head(o) * silu(W_g x) ).

    Shapes:  x: b t d  ->  b t d      h heads of n = key_dim keys and p = expand_v n values; beta, g: b t h;
             `num_key_heads` h_k < h: head i reads the queries and keys of key head i // (h / h_k);
             W_l: d -> h l    L: h l      l = num_levels
    Source: Guo et al. 2025 (Log-linear attention), section 3.4; lambda, and reads that are not scaled by n^-1/2, as in
            the authors' code. The rest is Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024).
    """

    def __init__(self, config: LogLinearGatedDeltaNetConfig, context: MixerContext) -> None:
        super().__init__()
        d, h = context.d_model, config.num_heads
        self.num_heads, self.num_key_heads = h, config.num_key_heads or h
        self.num_levels = config.resolved_levels(context.context_len)
        self.key_dim = config.key_dim or width_of_a_head(0.75 * d, h, "keys")
        self.value_dim = config.expand_v * self.key_dim
        self.largest_write = 2.0 if config.negative_eigenvalues else 1.0
        channels = 2 * self.num_key_heads * self.key_dim + h * self.value_dim
        self.qkv_proj = nn.Linear(d, channels, bias=False)
        # Holds the taps (c 1 w) and draws them; the operator computes.
        self.conv = nn.Conv1d(channels, channels, config.conv_width, groups=channels, bias=False)
        self.write_proj = nn.Linear(d, h, bias=False)
        self.decay_proj = nn.Linear(d, h, bias=False)
        self.level_proj = nn.Linear(d, h * self.num_levels, bias=False)
        self.A_log = nn.Parameter(torch.empty(h))
        self.dt_bias = nn.Parameter(torch.empty(h))
        self.L = nn.Parameter(torch.ones(h, self.num_levels))
        self.output = GatedOutput(d, h, self.value_dim)
        draw_decays(self.A_log, self.dt_bias)

    def init_parameters(self, std: float) -> None:
        """As Gated DeltaNet; L 1, so that all levels weigh about log 2 whatever the input."""
        maps = (self.qkv_proj, self.write_proj, self.decay_proj, self.level_proj)
        for linear in (*maps, self.output.g_proj, self.output.o_proj):
            nn.init.normal_(linear.weight, std=std)
        self.conv.reset_parameters()
        self.output.norm.reset_parameters()
        nn.init.ones_(self.L)
        draw_decays(self.A_log, self.dt_bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        y, _, _ = self._mix(x, None, None, 0, cu_seqlens)
        return y

    def empty_carry(self, batch_size: int) -> LogLinearGatedDeltaNetCarry:
        """No token has been seen, and there is no state yet."""
        channels, _, width = self.conv.weight.shape
        exact = torch.promote_types(self.conv.weight.dtype, torch.float32)
        state = (batch_size, 0, self.num_heads, self.key_dim, self.value_dim)
        return LogLinearGatedDeltaNetCarry(
            self.conv.weight.new_zeros(batch_size, width - 1, channels),
            self.conv.weight.new_zeros(state, dtype=exact),
            0,
        )

    def prefill(self, x: Tensor, carry: LogLinearGatedDeltaNetCarry) -> tuple[Tensor, LogLinearGatedDeltaNetCarry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, conv_inputs, state = self._mix(x, carry.conv_inputs, carry.state, carry.position, None)
        return y, LogLinearGatedDeltaNetCarry(conv_inputs, state, carry.position + x.shape[1])

    def decode(self, x_t: Tensor, carry: LogLinearGatedDeltaNetCarry) -> tuple[Tensor, LogLinearGatedDeltaNetCarry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry

    def _mix(
        self, x: Tensor, conv_inputs: Tensor | None, state: Tensor | None, position: int, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv, conv_inputs = causal_conv(
            self.qkv_proj(x), self.conv.weight.squeeze(1), initial_state=conv_inputs, cu_seqlens=cu_seqlens
        )
        keys, values = self.num_key_heads * self.key_dim, self.num_heads * self.value_dim
        q, k, v = qkv.split([keys, keys, values], dim=-1)
        q, k = (unit_length(rows, self.num_key_heads, self.key_dim) for rows in (q, k))
        v = v.unflatten(-1, (self.num_heads, self.value_dim))
        write_gate = self.largest_write * torch.sigmoid(self.write_proj(x))
        # Rates, biases and L are fp32, which makes decays and weights fp32 where products are rounded to 8 bits.
        log_decay = -torch.exp(self.A_log) * F.softplus(self.decay_proj(x) + self.dt_bias)
        scales = F.softplus(self.L * self.level_proj(x).unflatten(-1, (self.num_heads, self.num_levels)))
        o, state = log_linear_delta_rule(
            q, k, v, scales, log_decay, write_gate,
            initial_state=state, cu_seqlens=cu_seqlens, position=position, scale=1.0,
        )  # fmt: skip
        return self.output.leave(o, x), conv_inputs, state
