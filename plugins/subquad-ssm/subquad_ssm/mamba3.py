"""The Mamba-3 mixer: a trapezoidal rule, a complex state as rotations, and several inputs and outputs a token."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad import MixerContext
from subquad_kernels.operators import gated_norm, rotary
from subquad_ssm.config import Mamba3Config, grouped_channels
from subquad_ssm.data_rotation import CumulatedAngles
from subquad_ssm.exact_norm import EPS, ExactNorm
from subquad_ssm.step_sizes import draw_step_biases
from subquad_ssm.trapezoid import Before, attend, attend_in_lanes

SLOWEST_RATE = 1e-4
"""No rate -A is below it: every state is forgotten in the end (the authors' code)."""


class Mamba3Carry(NamedTuple):
    """What a Mamba-3 mixer remembers, of a size that does not depend on t.

    Shapes:  angle: b h s (fp32), key: b r h n, value: b h p, of the last token
             state: b h n p (fp32), without what the next token writes of the last one
    """

    angle: Tensor
    state: Tensor
    key: Tensor
    value: Tensor


class Mamba3(nn.Module):
    """Mamba-3:  S_t = a_t S_{t-1} + b_t K_{t-1} U_{t-1}^T + c_t K_t U_t^T,   Y_t = S_t^T Q_t + D U_t, a head each.

        [z, u, B, C, dt, rate, trap, angle] = x W_in
        dt = softplus(dt + dt_bias),   A = -max(softplus(rate), 1e-4),   lambda = sigmoid(trap)
        a_t = exp(dt_t A_t),   b_t = (1 - lambda_t) dt_t a_t,   c_t = lambda_t dt_t
        K_t = Rot(theta_t) (RMSNorm(B_t) + B_bias),   Q_t = Rot(theta_t) (RMSNorm(C_t) + C_bias)
        theta_t = theta_{t-1} + pi tanh(angle_t) dt_t
        out = W_out sum_r mimo_o^r * Y^r * silu(mimo_z^r * z),   U^r = mimo_x^r * u

    lambda = 1 is Mamba-2's Euler rule, 1/2 the trapezoid; the rotation is a complex A. With the write of a token
    gathered at its own place, w_t = c_t + (1 - lambda_{t+1}) dt_{t+1}, the recurrence is linear attention that weighs
    a token's own write by c_t. One lane (r = 1, SISO) has no mimo maps.

    Shapes:  x: b t d  ->  b t d      c = expand d channels in h = c / p heads of p = head_dim, n = state_dim states;
             B, C: b t r g n, of r = mimo_rank lanes, each shared by h / g heads; dt, rate, trap: b t h; angle: b t s
             with 2 s = rotated_share n;  D: h;  B_bias, C_bias: h r n;  mimo_x, mimo_z, mimo_o: h r p
    Source: Lahoti et al. 2026 (Mamba-3), section 3; order of W_in's outputs, floor and layouts as in the authors' code.
    """

    def __init__(self, config: Mamba3Config, context: MixerContext) -> None:
        super().__init__()
        channels = grouped_channels(config, context.d_model)
        self.channels, self.head_dim = channels, config.head_dim
        self.num_heads = channels // config.head_dim
        self.num_groups, self.state_dim, self.lanes = config.num_groups, config.state_dim, config.mimo_rank
        self.num_angles = config.num_angles
        self.heavy_tail = config.rate_map == "heavy_tail"
        states, h = self.lanes * self.num_groups * self.state_dim, self.num_heads
        self.parts = [channels, channels, states, states, h, h, h, self.num_angles]
        self.in_proj = nn.Linear(context.d_model, sum(self.parts), bias=False)
        self.dt_bias = nn.Parameter(torch.empty(h))
        self.D = nn.Parameter(torch.empty(h))
        self.B_norm, self.C_norm = ExactNorm(self.state_dim), ExactNorm(self.state_dim)
        self.B_bias = nn.Parameter(torch.empty(h, self.lanes, self.state_dim))
        self.C_bias = nn.Parameter(torch.empty(h, self.lanes, self.state_dim))
        if self.lanes > 1:
            self.mimo_x = nn.Parameter(torch.empty(h, self.lanes, self.head_dim))
            self.mimo_z = nn.Parameter(torch.empty(h, self.lanes, self.head_dim))
            self.mimo_o = nn.Parameter(torch.empty(h, self.lanes, self.head_dim))
        self.cumulated_angles = CumulatedAngles()
        self.out_norm = ExactNorm(h, self.head_dim) if config.out_norm else None
        self.out_proj = nn.Linear(channels, context.d_model, bias=False)
        self._init_dynamics()

    def init_parameters(self, std: float) -> None:
        """Projections normal(0, std), the dynamics as the authors start them."""
        for linear in (self.in_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=std)
        for norm in (self.B_norm, self.C_norm, self.out_norm):
            if norm is not None:
                nn.init.ones_(norm.weight)
        self._init_dynamics()

    @torch.no_grad()
    def _init_dynamics(self) -> None:
        """Step sizes log-uniform from 1e-3 to 1e-1 whatever the input, D and biases 1, lanes that share one signal."""
        draw_step_biases(self.dt_bias)
        for ones in (self.D, self.B_bias, self.C_bias):
            ones.fill_(1)
        if self.lanes > 1:
            self.mimo_x.fill_(1 / self.lanes)
            self.mimo_z.fill_(1)
            self.mimo_o.fill_(1 / self.lanes)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        y, _ = self._mix(x, None, cu_seqlens)
        return y

    def empty_carry(self, batch_size: int) -> Mamba3Carry:
        """Zeros: no input has been seen."""
        new_zeros, h = self.in_proj.weight.new_zeros, self.num_heads
        exact = torch.promote_types(self.in_proj.weight.dtype, torch.float32)
        return Mamba3Carry(
            new_zeros(batch_size, h, self.num_angles, dtype=exact),
            new_zeros(batch_size, h, self.state_dim, self.head_dim, dtype=exact),
            new_zeros(batch_size, self.lanes, h, self.state_dim),
            new_zeros(batch_size, h, self.head_dim),
        )

    def prefill(self, x: Tensor, carry: Mamba3Carry) -> tuple[Tensor, Mamba3Carry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        return self._mix(x, carry, None)

    def decode(self, x_t: Tensor, carry: Mamba3Carry) -> tuple[Tensor, Mamba3Carry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry

    def _mix(self, x: Tensor, carry: Mamba3Carry | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Mamba3Carry]:
        z, u, B, C, dt, rate, trap, angle = self.in_proj(x).split(self.parts, dim=-1)
        z, u = (part.unflatten(-1, (self.num_heads, self.head_dim)) for part in (z, u))
        # Steps, decays and angles are fp32 or wider, where products are rounded to 8 bits: they add up over time.
        exact = torch.promote_types(z.dtype, torch.float32)
        dt = F.softplus(dt.to(exact) + self.dt_bias)
        log_decay = -dt * self._rate(rate.to(exact)).clamp(min=SLOWEST_RATE)
        own = dt * torch.sigmoid(trap.to(exact))  # c_t
        again = dt - own  # what a token writes of the one before it, at that token's place and so before a_t

        steps = (math.pi * torch.tanh(angle.to(exact))).unsqueeze(2) * dt.unsqueeze(-1)
        angles = self.cumulated_angles(steps, None if carry is None else carry.angle, cu_seqlens)
        # All lanes of a head turn by the same angles.
        turns = angles.unsqueeze(2).expand(-1, -1, self.lanes, -1, -1).flatten(2, 3)
        q, k = self._heads(self.C_norm, C, self.C_bias), self._heads(self.B_norm, B, self.B_bias)
        q, k = rotary(q, k, angles=turns)
        q, k = (rows.unflatten(2, (self.lanes, self.num_heads)) for rows in (q, k))
        v = self._values(u)
        before = None if carry is None else Before(carry.state, carry.key, self._values(carry.value))
        if self.lanes == 1:
            y, state = attend(q, k, v, log_decay, own, again, before, cu_seqlens)
        else:
            y, state = attend_in_lanes(q, k, v, log_decay, own, again, before, cu_seqlens)
        return self._left(y, v, z), Mamba3Carry(angles[:, -1].clone(), state, k[:, -1].clone(), u[:, -1].clone())

    def _rate(self, raw: Tensor) -> Tensor:
        """-A before its floor; `heavy_tail` is 1 + x above 0 and 1 / (1 - x) below, the authors' later choice."""
        if self.heavy_tail:
            return raw.clamp(min=0) + 1 / (1 - raw.clamp(max=0))
        return F.softplus(raw)

    def _heads(self, norm: ExactNorm, part: Tensor, bias: Tensor) -> Tensor:
        """B or C as the heads' keys or queries, before they turn.  Shapes:  part: b t (r g n)  ->  b t (r h) n"""
        groups = part.unflatten(-1, (self.lanes, self.num_groups, 1, self.state_dim))
        rows = groups.expand(-1, -1, -1, -1, self.num_heads // self.num_groups, -1).flatten(2)
        heads = self.lanes * self.num_heads
        y = gated_norm(rows, weight=norm.weight, bias=bias.transpose(0, 1).flatten(), groups=heads, eps=EPS)
        return y.unflatten(2, (heads, self.state_dim))  # type: ignore[no-any-return]

    def _values(self, u: Tensor) -> Tensor:
        """The lanes' values.  Shapes:  ... h p  ->  ... r h p"""
        if self.lanes == 1:
            return u.unsqueeze(-3)
        return u.unsqueeze(-3) * self.mimo_x.transpose(0, 1).to(u.dtype)

    def _left(self, y: Tensor, v: Tensor, z: Tensor) -> Tensor:
        """Add what skips, gate the lanes, add them up, project.  Shapes:  y, v: b t r h p    z: b t h p  ->  b t d"""
        if self.lanes == 1:
            weight = None if self.out_norm is None else self.out_norm.weight.flatten()
            y = gated_norm(
                y.flatten(2), z.flatten(2), weight,
                groups=self.num_heads, norm=self.out_norm is not None, eps=EPS, skip=v.flatten(2), skip_weight=self.D,
            )  # fmt: skip
            return self.out_proj(y)  # type: ignore[no-any-return]
        y = y + self.D.unsqueeze(-1) * v
        y = (y if self.out_norm is None else self.out_norm(y)) * F.silu(z.unsqueeze(2) * self.mimo_z.transpose(0, 1))
        y = y * self.mimo_o.transpose(0, 1)
        return self.out_proj(y.sum(2).flatten(2).to(z.dtype))  # type: ignore[no-any-return]
