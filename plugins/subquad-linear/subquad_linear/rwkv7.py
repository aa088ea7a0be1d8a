"""RWKV-7 (Goose): a state that decays by channel, and takes out under one key what it writes under another."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad import MixerContext
from subquad_kernels.operators import delta_rule
from subquad_linear.config import FIRST_VALUE, RWKV7Config, share_values, width_of_a_head
from subquad_linear.head_norm import HeadNorm
from subquad_linear.low_rank import LowRank
from subquad_linear.rwkv_depth import NORM_EPS, Depth
from subquad_linear.shifted_memory import Shared, ShiftedMemory
from subquad_linear.token_shift import TokenShift, mapped_lerp
from subquad_linear.unit_length import unit_length

LARGEST_RATE = math.exp(-0.5)
"""A channel forgets at most 1 - exp(-exp(-1/2)) = 45 % of what it holds a token."""
POWERS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
"""How early channels of each stream look back at first, in the order of `mix` (the authors' code)."""
UP_GAIN = 0.1
"""Gain of the second factors of low-rank maps at first (the authors' code)."""
DIRECTION_EPS = 1e-24
"""Keeps a direction of zeros finite: the square of the authors' 1e-12."""


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
        self.norm = HeadNorm(h, self.head_dim, NORM_EPS, bias=True)
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
        mix_r, mix_w, mix_k, mix_v, mix_a, mix_g = self.mix.unbind(0)
        wide = torch.stack([mix_r, mix_k, mix_v])[:, None, None].to(x.dtype)
        x_r, x_k, x_v = torch.addcmul(x, change, wide).unbind(0)
        maps = [(self.decay, mix_w), (self.rate, mix_a), (self.gate, mix_g)]
        if self.reads:
            maps.append((self.value, mix_v))
        down = torch.cat([low_rank.down.weight for low_rank, _ in maps])
        mixes = torch.cat([mix.expand_as(low_rank.down.weight) for low_rank, mix in maps])
        ranks = [low_rank.down.out_features for low_rank, _ in maps]
        low = mapped_lerp(x, change, down, mixes).split(ranks, dim=-1)
        r, k, v = self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        published = {FIRST_VALUE: v} if self.publishes else {}
        if self.reads:
            share = torch.sigmoid(F.linear(low[3], self.value.up.weight, self.value_base))
            v = torch.lerp(v, shared[FIRST_VALUE].to(v.dtype), share)
        rate = torch.sigmoid(F.linear(low[1], self.rate.up.weight, self.rate_base))
        # The base is fp32, which makes the decays fp32 where products are rounded to 8 bits.
        log_decay = -LARGEST_RATE * torch.sigmoid(self.decay_base + self.decay.widened(low[0]))
        heads = (self.num_heads, self.head_dim)
        removed = unit_length(k * self.removal.to(k.dtype), *heads, eps=DIRECTION_EPS)
        # In fp32 and rounded once: alpha is about 1, where 8 bits are wrong by the same 0.4 % at every token.
        written = (k * torch.addcmul(1 - self.replacement, rate, self.replacement)).to(k.dtype).unflatten(-1, heads)
        r, v = r.unflatten(-1, heads), v.unflatten(-1, heads)
        o, state = delta_rule(
            r, written, v, log_decay.unflatten(-1, heads),
            remove=-removed, insert=removed * rate.unflatten(-1, heads),
            initial_state=state, cu_seqlens=cu_seqlens, scale=1.0,
        )  # fmt: skip
        current = (r * self.bonus.to(r.dtype) * written).sum(-1, keepdim=True).to(v.dtype) * v
        gate = self.gate.widened(low[2])
        return self.o_proj(self.norm.leave(o, gate, "identity") + current.flatten(-2) * gate), state, published
