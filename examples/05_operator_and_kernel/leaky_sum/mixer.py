"""A gated moving average:  u, g = x W_in    y = ( leaky_sum((1 - decay) u) * silu(g) ) W_out"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leaky_sum.operator import leaky_sum
from leaky_sum.plugin import LeakySumConfig
from subquad import MixerContext


class LeakySumCarry(NamedTuple):
    """The sum over all tokens so far.  Shape: b d"""

    state: Tensor


class LeakySum(nn.Module):
    """Mixes each token with all before it, less the longer ago.  Shapes:  x: b t d  ->  b t d"""

    def __init__(self, config: LeakySumConfig, context: MixerContext) -> None:
        super().__init__()
        d = context.d_model
        self.config = config
        self.in_proj = nn.Linear(d, 2 * d, bias=False)
        self.rate = nn.Parameter(torch.empty(d))  # decay = exp(-softplus(rate))
        self.out_proj = nn.Linear(d, d, bias=False)

    def init_parameters(self, std: float) -> None:
        nn.init.normal_(self.in_proj.weight, std=std)
        nn.init.normal_(self.out_proj.weight, std=std)
        longest = math.log(self.config.longest_half_life)
        half_lives = torch.linspace(0, longest, len(self.rate), device=self.rate.device).exp()
        with torch.no_grad():
            self.rate.copy_((math.log(2) / half_lives).expm1().log())

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        y, _ = self._mix(x, None, cu_seqlens)
        return y

    def empty_carry(self, batch_size: int) -> LeakySumCarry:
        return LeakySumCarry(self.rate.new_zeros(batch_size, len(self.rate)))

    def prefill(self, x: Tensor, carry: LeakySumCarry) -> tuple[Tensor, LeakySumCarry]:
        y, state = self._mix(x, carry.state, None)
        return y, LeakySumCarry(state)

    def decode(self, x_t: Tensor, carry: LeakySumCarry) -> tuple[Tensor, LeakySumCarry]:
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry

    def _mix(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        log_decay = -F.softplus(self.rate)
        averaged = -log_decay.expm1() * u  # a weight of 1 in all, for any decay
        y, state = leaky_sum(averaged, log_decay, state, cu_seqlens)
        return self.out_proj(y.to(u.dtype) * F.silu(gate)), state
