"""RWKV-6 (Finch): a state whose channels forget at rates of the token, read before the token is written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subquad import MixerContext
from subquad_kernels.operators import gated_linear_attention
from subquad_linear.config import RWKV6Config, width_of_a_head
from subquad_linear.head_norm import HeadNorm
from subquad_linear.low_rank import LowRank
from subquad_linear.rwkv_depth import NORM_EPS, Depth
from subquad_linear.shifted_memory import Shared, ShiftedMemory
from subquad_linear.token_shift import TokenShift, mapped_lerp

POWERS = {"w": 1.0, "k": 1.0, "v": 1.0, "r": 0.5, "g": 0.5}
"""How early channels of each stream look back at first, in the order of `mix` (the authors' code)."""
STREAMS = len(POWERS)
LARGEST_EXPONENT = 7.0
"""exp(-exp(7)) is 0 in float64 already; from 89 on the inner exponential overflows in float32."""
UP_BOUND = 0.01
"""Second factors of low-rank maps start uniform within it (the authors' code)."""


class RWKV6(ShiftedMemory):
    """RWKV-6's time mix:  S_t = Diag(exp w_t) S_{t-1} + k_t v_t^T,   o_t = S_{t-1}^T r_t + (r_t . (u * k_t)) v_t.

    With D = x_{t-1} - x_t each stream s in {w, k, v, r, g} reads  x_s = x + D * (mu_s + B_s tanh(A_s(x + D * mu_x))).
    r, k, v = W_r x_r, W_k x_k, W_v x_v;  w = -exp( w_0 + B tanh(A x_w) );  y = W_o( GroupNorm(o) * silu(W_g x_g) ).

    Shapes:  x: b t d  ->  b t d      h heads of n = d / h keys and values; u: h n    w, w_0: h n, one per channel
    Source: Peng et al. 2024 (Eagle and Finch), section 4; initial values from the authors' code.
    """

    def __init__(self, config: RWKV6Config, context: MixerContext) -> None:
        super().__init__()
        d, h = context.d_model, config.num_heads
        self.num_heads, self.head_dim = h, width_of_a_head(d, h, "keys")
        self.depth = Depth.of(context, config.blocks_per_layer)
        self.shift = TokenShift()
        self.first_mix = nn.Parameter(torch.empty(d))
        self.mix = nn.Parameter(torch.empty(STREAMS, d))
        self.mix_down = nn.Linear(d, STREAMS * config.mix_rank, bias=False)
        self.mix_up = nn.Parameter(torch.empty(STREAMS, config.mix_rank, d))
        self.decay_base = nn.Parameter(torch.empty(d))
        self.decay = LowRank(d, config.decay_rank, nn.Tanh())
        self.bonus = nn.Parameter(torch.empty(h, self.head_dim))
        self.r_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.g_proj = nn.Linear(d, d, bias=False)
        self.norm = HeadNorm(h, self.head_dim, NORM_EPS, bias=True)
        self.o_proj = nn.Linear(d, d, bias=False)
        self._init_dynamics()

    def init_parameters(self, std: float) -> None:
        """The authors' values by channel and depth, whatever the model's `std`; the output starts at zero."""
        for linear, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0), (self.g_proj, 0.1)):
            nn.init.orthogonal_(linear.weight, gain=gain)
        nn.init.zeros_(self.o_proj.weight)
        nn.init.zeros_(self.mix_down.weight)
        self.decay.init_uniform(UP_BOUND)
        self.norm.init_parameters(self.depth.norm_weight)
        self._init_dynamics()

    @torch.no_grad()
    def _init_dynamics(self) -> None:
        """Early channels look further back and forget later; the token changes neither at first."""
        d, depth = len(self.decay_base), self.depth
        self.first_mix.copy_(depth.mix(d, depth.left))
        self.mix.copy_(torch.stack([depth.mix(d, power * depth.left) for power in POWERS.values()]))
        self.mix[2].sub_(0.3 * depth.risen)
        nn.init.uniform_(self.mix_up, -UP_BOUND, UP_BOUND)
        place = torch.linspace(0, 1, d, dtype=torch.float64)
        self.decay_base.copy_(-6 + 5 * place ** (0.7 + 1.3 * depth.risen))
        zigzag = 0.1 * ((torch.arange(d) + 1) % 3 - 1)
        self.bonus.copy_((depth.risen * (1 - place) + zigzag).view_as(self.bonus))

    def _mix(
        self, x: Tensor, last: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, shared: Shared
    ) -> tuple[Tensor, Tensor, Shared]:
        change = self.shift(x, last, cu_seqlens)
        low = torch.tanh(mapped_lerp(x, change, self.mix_down.weight, self.first_mix))
        low = low.flatten(0, 1).unflatten(-1, (STREAMS, -1)).transpose(0, 1)
        mix = torch.baddbmm(self.mix.unsqueeze(1), low, self.mix_up).unflatten(1, tuple(x.shape[:2]))
        x_w, x_k, x_v, x_r, x_g = torch.addcmul(x, change, mix).unbind(0)
        heads = (self.num_heads, self.head_dim)
        # The base is fp32, which makes the decays fp32 where products are rounded to 8 bits.
        exponent = (self.decay_base + self.decay(x_w)).clamp(max=LARGEST_EXPONENT)
        log_decay = -torch.exp(exponent).unflatten(-1, heads)
        o, state = gated_linear_attention(
            self.r_proj(x_r).unflatten(-1, heads), self.k_proj(x_k).unflatten(-1, heads),
            self.v_proj(x_v).unflatten(-1, heads), log_decay, self.bonus,
            initial_state=state, cu_seqlens=cu_seqlens, scale=1.0, read="before",
        )  # fmt: skip
        return self.o_proj(self.norm.leave(o, self.g_proj(x_g))), state, {}
