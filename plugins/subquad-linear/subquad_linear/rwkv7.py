"""RWKV-7 (Goose): a state that decays by channel, and takes out under one key what it writes under another."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad import MixerContext
from subquad_kernels.operators import delta_rule
from subquad_linear.config import FIRST_VALUE, RWKV7Config, share_values, width_of_a_head
from subquad_linear.head_group_norm import HeadGroupNorm
from subquad_linear.low_rank import LowRank
from subquad_linear.rwkv_depth import Depth
from subquad_linear.shifted_memory import Shared, ShiftedMemory
from subquad_linear.token_shift import TokenShift

LARGEST_RATE = math.exp(-0.5)
"""A channel forgets at most 1 - exp(-exp(-1/2)) = 45 % of what it holds a token."""
POWERS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
"""How early channels of each stream look back at first, in the order of `mix` (the authors' code)."""
UP_GAIN = 0.1
"""Gain of the second factors of low-rank maps at first (the authors' code)."""


class UnitDirection(nn.Module):
    """y = x / max(|x|, 1e-12) over the last axis, in fp32 or wider; y has x's type.  Shapes:  x: ... n  ->  ... n"""

    def forward(self, x: Tensor) -> Tensor:
        """Scale each vector."""
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-12).to(x.dtype)


class RWKV7(ShiftedMemory):
    """RWKV-7's time mix:  S_t = Diag(exp w_t) S_{t-1} - (a_t * c_t) (c_t^T S_{t-1}) + k~_t v_t^T,   o_t = S_t^T r_t.

    With D = x_{t-1} - x_t each stream s in {r, w, k, v, a, g} reads  x_s = x + D * mu_s.
    r, k, v = W_r x_r, W_k x_k, W_v x_v;  c = k * xi, each head scaled to length one, is what is taken out, and
    k~ = k * (1 + (a - 1) * alpha) what is written;  a = sigmoid(a_0 + B_a A_a x_a) is the rate in context;
    w = -exp(-1/2) sigmoid(w_0 + B_w tanh(A_w x_w));  gate = B_g sigmoid(A_g x_g);
    y = W_o( (GroupNorm(o) + (r . (rho * k~)) v) * gate ).
    In every layer but the first, v is  v + (v' - v) * sigmoid(v_0 + B_v A_v x_v)  with v' the first layer's W_v x_v.

    Shapes:  x: b t d  ->  b t d      h heads of n = d / h keys and values; rho: h n    w, a, c, xi, alpha: h n
    Source: Peng et al. 2025 (RWKV-7), section 4; initial values from the authors' code.
    """

    def __init__(self, config: RWKV7Config, context: MixerContext) -> None:
        super().__init__()
        d, h = context.d_model, config.num_heads
        self.num_heads, self.head_dim = h, width_of_a_head(d, h, "keys")
        self.depth = Depth.of(context, config.blocks_per_layer)
        self.shift = TokenShift()
        self.mix = nn.Parameter(torch.empty(len(POWERS), d))
        self.decay_base = nn.Parameter(torch.empty(d))
        self.decay = LowRank(d, config.resolved_decay_rank(d), nn.Tanh())
        self.rate_base = nn.Parameter(torch.empty(d))
        self.rate = LowRank(d, config.resolved_rate_rank(d), nn.Identity())
        self.gate = LowRank(d, config.resolved_gate_rank(d), nn.Sigmoid())
        self.removal = nn.Parameter(torch.empty(d))
        self.replacement = nn.Parameter(torch.empty(d))
        self.bonus = nn.Parameter(torch.empty(h, self.head_dim))
        self.r_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        sharing = share_values(config, context)
        self.publishes, self.reads = bool(sharing.publishes), bool(sharing.reads)
        if self.reads:
            self.value_base = nn.Parameter(torch.empty(d))
            self.value = LowRank(d, config.resolved_value_rank(d), nn.Identity())
        self.unit_direction = UnitDirection()
        self.norm = HeadGroupNorm(h, self.head_dim)
        self.o_proj = nn.Linear(d, d, bias=False)
        self._init_dynamics()

    def init_parameters(self, std: float) -> None:
        """The authors' values by channel and depth, whatever the model's `std`; the output starts at zero."""
        for linear, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0)):
            nn.init.orthogonal_(linear.weight, gain=gain)
        nn.init.zeros_(self.o_proj.weight)
        for low_rank in (self.decay, self.rate, self.gate, *((self.value,) if self.reads else ())):
            low_rank.init_orthogonal(UP_GAIN)
        self.norm.init_parameters(self.depth.norm_weight)
        self._init_dynamics()

    @torch.no_grad()
    def _init_dynamics(self) -> None:
        """Early channels look further back and forget later; the token changes neither at first."""
        d, depth = len(self.decay_base), self.depth
        self.mix.copy_(torch.stack([depth.mix(d, power * depth.left) for power in POWERS.values()]))
        place = torch.linspace(0, 1, d, dtype=torch.float64)
        centred = torch.linspace(-1, 1, self.head_dim, dtype=torch.float64).repeat(self.num_heads)
        zigzag = centred * centred.abs()
        self.decay_base.copy_(-5.5 + 6 * place ** (1 + depth.risen**0.3) + 2.5 * zigzag)
        self.rate_base.copy_(-0.19 + 0.3 * zigzag + 0.4 * (place - 0.5))
        if self.reads:
            self.value_base.copy_(0.73 - 0.4 * (place - 0.5))
        self.removal.copy_(0.71 - 0.1 * (place - 0.5))
        nn.init.constant_(self.replacement, 1.02)
        nn.init.constant_(self.bonus, -0.04)

    def _mix(
        self, x: Tensor, last: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, shared: Shared
    ) -> tuple[Tensor, Tensor, Shared]:
        change = self.shift(x, last, cu_seqlens)
        x_r, x_w, x_k, x_v, x_a, x_g = (x + change * self.mix[:, None, None]).unbind(0)
        r, k, v = self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        published = {FIRST_VALUE: v} if self.publishes else {}
        if self.reads:
            share = torch.sigmoid(self.value_base + self.value(x_v)).to(v.dtype)
            v = v + (shared[FIRST_VALUE].to(v.dtype) - v) * share
        rate = torch.sigmoid(self.rate_base + self.rate(x_a))
        # The base is fp32, which makes the decays fp32 where products are rounded to 8 bits.
        log_decay = -LARGEST_RATE * torch.sigmoid(self.decay_base + self.decay(x_w))
        heads = (self.num_heads, self.head_dim)
        removed = self.unit_direction((k * self.removal).unflatten(-1, heads))
        inserted = removed * rate.unflatten(-1, heads)
        written = (k * (1 + (rate - 1) * self.replacement)).to(v.dtype).unflatten(-1, heads)
        r, v = r.unflatten(-1, heads), v.unflatten(-1, heads)
        o, state = delta_rule(
            r, written, v, log_decay.unflatten(-1, heads),
            remove=-removed.to(v.dtype), insert=inserted.to(v.dtype),
            initial_state=state, cu_seqlens=cu_seqlens, scale=1.0,
        )  # fmt: skip
        current = (r * written * self.bonus).sum(-1, keepdim=True) * v
        return self.o_proj((self.norm(o) + current.flatten(-2)) * self.gate(x_g)), state, published
