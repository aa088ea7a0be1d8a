"""The Mamba-2 mixer: per head a matrix of state that decays by one number, behind a convolution and a gate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad import MixerContext
from subquad_kernels.operators import causal_conv, gated_norm, linear_attention
from subquad_ssm.config import Mamba2Config, grouped_channels
from subquad_ssm.step_sizes import draw_step_biases

SLOWEST_RATE, FASTEST_RATE = 1.0, 16.0
"""Rates -A are drawn uniform between these (the authors' code)."""
NORM_EPS = 1e-5


@torch.no_grad()
def draw_rates(A_log: Tensor) -> None:
    """Fill `A_log` such that exp(A_log) = -A is uniform from 1 to 16, a draw for each entry."""
    A_log.copy_(torch.empty_like(A_log, dtype=torch.float32).uniform_(SLOWEST_RATE, FASTEST_RATE).log())


class Mamba2Carry(NamedTuple):
    """What a Mamba-2 mixer remembers, of a size that does not depend on t.

    Shapes:  conv_inputs: b (w-1) (c + 2 g n), the last inputs of the convolution    state: b h n p (fp32)
    """

    conv_inputs: Tensor
    state: Tensor


class GatedNorm(nn.Module):
    """y = RMSNorm( (x + D u) * silu(z) ) * weight, the norm over each group of channels by itself, in fp32 or wider.

    Shapes:  x, z, u: b t c    D: h, one for each head of c / h channels  ->  b t c
    Source: Dao and Gu 2024 (Mamba-2), section 7.3; one group of channels per group of B and C, as in the authors' code.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))

    def gated(self, x: Tensor, z: Tensor, u: Tensor, D: Tensor) -> Tensor:
        """Add what skips the mixer, gate, then scale; not `forward`, so that the operator is a node of the mixer."""
        return gated_norm(
            x, z, self.weight, groups=self.groups, gate_first=True, eps=NORM_EPS, skip=u, skip_weight=D
        )


class Mamba2(nn.Module):
    """Mamba-2:  S_t = exp(dt_t A) S_{t-1} + dt_t B_t u_t^T,   y_t = S_t^T C_t + D u_t, a head each.

    [z, u, B, C, dt] = x W_in;  [u, B, C] = silu(conv [u, B, C]);  dt = softplus(dt + dt_bias), A = -exp(A_log);
    out = W_out RMSNorm( y * silu(z) ). The recurrence is linear attention: C queries, B keys, u values.

    Shapes:  x: b t d  ->  b t d      c = expand d channels in h = c / p heads of p = head_dim, n = state_dim states;
             B, C: b t g n, each of the g = num_groups shared by h / g heads; dt: b t h; A, D: h
    Source: Dao and Gu 2024 (Mamba-2), sections 3, 6 and 7; order of W_in's outputs as in the authors' code.
    """

    def __init__(self, config: Mamba2Config, context: MixerContext) -> None:
        super().__init__()
        channels = grouped_channels(config, context.d_model)
        self.channels, self.head_dim = channels, config.head_dim
        self.num_heads = channels // config.head_dim
        self.num_groups, self.state_dim = config.num_groups, config.state_dim
        self.mixed = channels + 2 * config.num_groups * config.state_dim
        self.in_proj = nn.Linear(context.d_model, channels + self.mixed + self.num_heads, bias=False)
        # Holds weight (c 1 w) and bias and draws them; the operator computes.
        self.conv = nn.Conv1d(self.mixed, self.mixed, config.conv_width, groups=self.mixed)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GatedNorm(channels, config.num_groups)
        self.out_proj = nn.Linear(channels, context.d_model, bias=False)
        self._init_dynamics()

    def init_parameters(self, std: float) -> None:
        """Projections normal(0, std), the convolution as torch draws it, the dynamics as the authors start them."""
        for linear in (self.in_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=std)
        self.conv.reset_parameters()
        nn.init.ones_(self.norm.weight)
        self._init_dynamics()

    @torch.no_grad()
    def _init_dynamics(self) -> None:
        """-A uniform from 1 to 16, D = 1, and step sizes log-uniform from 1e-3 to 1e-1 whatever the input."""
        draw_rates(self.A_log)
        self.D.fill_(1)
        draw_step_biases(self.dt_bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        y, _, _ = self._mix(x, None, None, cu_seqlens)
        return y

    def empty_carry(self, batch_size: int) -> Mamba2Carry:
        """Zeros: no input has been seen."""
        width = self.conv.weight.shape[2]
        exact = torch.promote_types(self.A_log.dtype, torch.float32)
        return Mamba2Carry(
            self.conv.weight.new_zeros(batch_size, width - 1, self.mixed),
            self.A_log.new_zeros(batch_size, self.num_heads, self.state_dim, self.head_dim, dtype=exact),
        )

    def prefill(self, x: Tensor, carry: Mamba2Carry) -> tuple[Tensor, Mamba2Carry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, conv_inputs, state = self._mix(x, carry.conv_inputs, carry.state, None)
        return y, Mamba2Carry(conv_inputs, state)

    def decode(self, x_t: Tensor, carry: Mamba2Carry) -> tuple[Tensor, Mamba2Carry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry

    def _mix(
        self, x: Tensor, conv_inputs: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, mixed, dt = self.in_proj(x).split([self.channels, self.mixed, self.num_heads], dim=-1)
        mixed, conv_inputs = causal_conv(
            mixed, self.conv.weight.squeeze(1), self.conv.bias, initial_state=conv_inputs, cu_seqlens=cu_seqlens
        )
        states = self.num_groups * self.state_dim
        u, B, C = mixed.split([self.channels, states, states], dim=-1)
        B, C = (part.unflatten(-1, (self.num_groups, self.state_dim)) for part in (B, C))
        # The bias and the rates are fp32, which makes steps and decays fp32 where products are rounded to 8 bits.
        step = F.softplus(dt + self.dt_bias)
        y, state = linear_attention(
            C, B, u.unflatten(-1, (self.num_heads, self.head_dim)), -torch.exp(self.A_log) * step, step,
            initial_state=state, cu_seqlens=cu_seqlens, scale=1.0,
        )  # fmt: skip
        return self.out_proj(self.norm.gated(y.flatten(2), z, u, self.D)), conv_inputs, state
