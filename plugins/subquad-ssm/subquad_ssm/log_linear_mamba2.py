"""Log-linear Mamba-2: the state of Mamba-2 becomes log t states, each read with its own weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad import MixerContext
from subquad_kernels.operators import causal_conv, log_linear_attention
from subquad_ssm.config import LogLinearMamba2Config, grouped_channels
from subquad_ssm.mamba2 import GatedNorm, draw_rates
from subquad_ssm.step_sizes import draw_step_biases


class LogLinearMamba2Carry(NamedTuple):
    """What a log-linear Mamba-2 mixer remembers: a state for each bit of the number of tokens so far.

    Shapes:  conv_inputs: b (w-1) (c + 2 g n), the last inputs of the convolution    state: b m h n p (fp32)
    """

    conv_inputs: Tensor
    state: Tensor
    position: int


class LogLinearMamba2(nn.Module):
    """Log-linear Mamba-2:  y_t = sum over levels l of  lambda_t[l] S_t[l]^T C_t + D u_t,   all S decaying by exp(dt A).

    S_t[l] holds the tokens of the l-th bucket before t, of 2^(l-1) tokens (the token itself for l = 0), as dt_j B_j
    u_j^T. [z, u, B, C, dt, dl] = x W_in;  [u, B, C] = silu(conv [u, B, C]);  dt = softplus(dt + dt_bias),
    A = -exp(A_log);  lambda = softplus(L * dl);  out = W_out RMSNorm( y * silu(z) ).

    Shapes:  x: b t d  ->  b t d      c = expand d channels in h = c / p heads of p = head_dim, n = state_dim states;
             B, C: b t g n, each of the g = num_groups shared by h / g heads; dt: b t h; dl: b t h l; A, D: h; L: h l
    Source: Guo et al. 2025 (Log-linear attention), section 3.4; order of W_in's outputs and lambda as in the authors'
            code. The rest is Mamba-2 (Dao and Gu 2024).
    """

    def __init__(self, config: LogLinearMamba2Config, context: MixerContext) -> None:
        super().__init__()
        channels = grouped_channels(config, context.d_model)
        self.channels, self.head_dim = channels, config.head_dim
        self.num_heads = channels // config.head_dim
        self.num_groups, self.state_dim = config.num_groups, config.state_dim
        self.num_levels = config.resolved_levels(context.context_len)
        self.mixed = channels + 2 * config.num_groups * config.state_dim
        weights = self.num_heads * (1 + self.num_levels)
        self.in_proj = nn.Linear(context.d_model, channels + self.mixed + weights, bias=False)
        # Holds weight (c 1 w) and bias and draws them; the operator computes.
        self.conv = nn.Conv1d(self.mixed, self.mixed, config.conv_width, groups=self.mixed)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.L = nn.Parameter(torch.empty(self.num_heads, self.num_levels))
        self.norm = GatedNorm(channels, config.num_groups)
        self.out_proj = nn.Linear(channels, context.d_model, bias=False)
        self._init_dynamics()

    def init_parameters(self, std: float) -> None:
        """Projections normal(0, std), the convolution as torch draws it, the dynamics as Mamba-2's; L 1."""
        for linear in (self.in_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=std)
        self.conv.reset_parameters()
        nn.init.ones_(self.norm.weight)
        self._init_dynamics()

    @torch.no_grad()
    def _init_dynamics(self) -> None:
        draw_rates(self.A_log)
        self.D.fill_(1)
        self.L.fill_(1)
        draw_step_biases(self.dt_bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        y, _, _ = self._mix(x, None, None, 0, cu_seqlens)
        return y

    def empty_carry(self, batch_size: int) -> LogLinearMamba2Carry:
        """No input has been seen, and there is no state yet."""
        width = self.conv.weight.shape[2]
        exact = torch.promote_types(self.A_log.dtype, torch.float32)
        return LogLinearMamba2Carry(
            self.conv.weight.new_zeros(batch_size, width - 1, self.mixed),
            self.A_log.new_zeros(batch_size, 0, self.num_heads, self.state_dim, self.head_dim, dtype=exact),
            0,
        )

    def prefill(self, x: Tensor, carry: LogLinearMamba2Carry) -> tuple[Tensor, LogLinearMamba2Carry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, conv_inputs, state = self._mix(x, carry.conv_inputs, carry.state, carry.position, None)
        return y, LogLinearMamba2Carry(conv_inputs, state, carry.position + x.shape[1])

    def decode(self, x_t: Tensor, carry: LogLinearMamba2Carry) -> tuple[Tensor, LogLinearMamba2Carry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry

    def _mix(
        self, x: Tensor, conv_inputs: Tensor | None, state: Tensor | None, position: int, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, mixed, dt, dl = self.in_proj(x).split(
            [self.channels, self.mixed, self.num_heads, self.num_heads * self.num_levels], dim=-1
        )
        mixed, conv_inputs = causal_conv(
            mixed, self.conv.weight.squeeze(1), self.conv.bias, initial_state=conv_inputs, cu_seqlens=cu_seqlens
        )
        states = self.num_groups * self.state_dim
        u, B, C = mixed.split([self.channels, states, states], dim=-1)
        B, C = (part.unflatten(-1, (self.num_groups, self.state_dim)) for part in (B, C))
        # Bias, rates and L are fp32, which makes steps, decays and weights fp32 where products are rounded to 8 bits.
        step = F.softplus(dt + self.dt_bias)
        scales = F.softplus(self.L * dl.unflatten(-1, (self.num_heads, self.num_levels)))
        y, state = log_linear_attention(
            C, B, u.unflatten(-1, (self.num_heads, self.head_dim)), scales, -torch.exp(self.A_log) * step, step,
            initial_state=state, cu_seqlens=cu_seqlens, position=position, scale=1.0,
        )  # fmt: skip
        return self.out_proj(self.norm.gated(y.flatten(2), z, u, self.D)), conv_inputs, state
