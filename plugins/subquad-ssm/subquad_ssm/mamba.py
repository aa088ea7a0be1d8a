"""The Mamba mixer: a gated selective scan behind a short causal convolution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad import MixerContext
from subquad_kernels.operators import causal_conv, selective_scan
from subquad_ssm.config import MambaConfig
from subquad_ssm.step_sizes import draw_step_biases


class MambaCarry(NamedTuple):
    """What a Mamba mixer remembers, of a size that does not depend on t.

    Shapes:  conv_inputs: b (w-1) c, the last inputs of the convolution    state: b c n (fp32)
    """

    conv_inputs: Tensor
    state: Tensor


class Mamba(nn.Module):
    """Mamba:  [u, z] = x W_in;  u = silu(conv u);  [r, B, C] = u W_x;  y = scan(u, r W_dt, A, B, C) W_out.

    The scan is h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,  (C_t . h_t + D u_t) silu(z_t),  with
    dt_t = softplus(r_t W_dt + b_dt) and A = -exp(A_log).

    Shapes:  x: b t d  ->  b t d      c = expand d channels, n = state_dim states each, w = conv_width taps
    Source: Gu and Dao 2023 (Mamba), section 3.4, figure 3 and algorithm 2.
    """

    def __init__(self, config: MambaConfig, context: MixerContext) -> None:
        super().__init__()
        d_inner = config.expand * context.d_model
        self.state_dim = config.state_dim
        self.dt_rank = config.resolved_dt_rank(context.d_model)
        self.in_proj = nn.Linear(context.d_model, 2 * d_inner, bias=False)
        # Holds weight (c 1 w) and bias and draws them; the operator computes.
        self.conv = nn.Conv1d(d_inner, d_inner, config.conv_width, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * config.state_dim, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.empty(d_inner, config.state_dim))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.out_proj = nn.Linear(d_inner, context.d_model, bias=False)
        self._init_dynamics()

    def init_parameters(self, std: float) -> None:
        """Projections normal(0, std), the convolution as torch draws it, the dynamics as the paper starts them."""
        for linear in (self.in_proj, self.x_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=std)
        self.conv.reset_parameters()
        self._init_dynamics()

    @torch.no_grad()
    def _init_dynamics(self) -> None:
        """A = -1 .. -n (S4D-real), D = 1, and step sizes log-uniform from 1e-3 to 1e-1 whatever the input."""
        self.A_log.copy_(torch.arange(1, self.state_dim + 1, device=self.A_log.device).log())
        self.D.fill_(1)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        draw_step_biases(self.dt_proj.bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        y, _, _ = self._mix(x, None, None, cu_seqlens)
        return y

    def empty_carry(self, batch_size: int) -> MambaCarry:
        """Zeros: no input has been seen."""
        channels, _, width = self.conv.weight.shape
        exact = torch.promote_types(self.A_log.dtype, torch.float32)
        return MambaCarry(
            self.conv.weight.new_zeros(batch_size, width - 1, channels),
            self.A_log.new_zeros(batch_size, channels, self.state_dim, dtype=exact),
        )

    def prefill(self, x: Tensor, carry: MambaCarry) -> tuple[Tensor, MambaCarry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, conv_inputs, state = self._mix(x, carry.conv_inputs, carry.state, None)
        return y, MambaCarry(conv_inputs, state)

    def decode(self, x_t: Tensor, carry: MambaCarry) -> tuple[Tensor, MambaCarry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry

    def _mix(
        self, x: Tensor, conv_inputs: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv_inputs = causal_conv(
            u, self.conv.weight.squeeze(1), self.conv.bias, initial_state=conv_inputs, cu_seqlens=cu_seqlens
        )
        low_rank, B, C = self.x_proj(u).split([self.dt_rank, self.state_dim, self.state_dim], dim=-1)
        # The bias joins in the operator, where step sizes are fp32.
        dt = F.linear(low_rank, self.dt_proj.weight)
        y, state = selective_scan(
            u, dt, -torch.exp(self.A_log), B, C, self.D, z, self.dt_proj.bias,
            initial_state=state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return self.out_proj(y), conv_inputs, state
