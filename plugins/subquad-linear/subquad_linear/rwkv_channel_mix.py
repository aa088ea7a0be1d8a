"""RWKV's channel mix: a block of its own, as it sees the token before and so has a carry."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from subquad import MixerContext
from subquad_linear.config import RWKVChannelMixConfig
from subquad_linear.rwkv_depth import Depth
from subquad_linear.token_shift import TokenShift


class RWKVChannelMixCarry(NamedTuple):
    """What a channel mix remembers.  Shape:  last: b d, the input of the last token"""

    last: Tensor


class RWKVChannelMix(nn.Module):
    """y = W_v relu(W_k x_k)^2,  and with `receptance` (RWKV-6) that times sigmoid(W_r x_r).

    x_s = x + (x_{t-1} - x_t) * mu_s for s in {k, r}; no biases. It takes a block without channel mixer:
    `schedule: [rwkv7, rwkv_channel_mix]`, `channel_mixer: null`. It sees two tokens: alone it is no sequence mixer.

    Shapes:  x: b t d  ->  b t d      W_k: d -> d_hidden    W_v: d_hidden -> d
    Source: Peng et al. 2024 (Eagle and Finch), section 3; Peng et al. 2025 (RWKV-7), section 4.
    """

    def __init__(self, config: RWKVChannelMixConfig, context: MixerContext) -> None:
        super().__init__()
        d = context.d_model
        d_hidden = config.resolved_d_hidden(d)
        self.depth = Depth.of(context, config.blocks_per_layer)
        self.shift = TokenShift()
        self.k_mix = nn.Parameter(torch.empty(d))
        self.k_proj = nn.Linear(d, d_hidden, bias=False)
        self.v_proj = nn.Linear(d_hidden, d, bias=False)
        self.r_mix = nn.Parameter(torch.empty(d)) if config.receptance else None
        self.r_proj = nn.Linear(d, d, bias=False) if config.receptance else None
        self._init_mix()

    def init_parameters(self, std: float) -> None:
        """The authors' values by channel and depth, whatever the model's `std`; values and receptance start at zero."""
        nn.init.orthogonal_(self.k_proj.weight)
        nn.init.zeros_(self.v_proj.weight)
        if self.r_proj is not None:
            nn.init.zeros_(self.r_proj.weight)
        self._init_mix()

    @torch.no_grad()
    def _init_mix(self) -> None:
        """Early channels look back, late ones do not."""
        power = self.depth.left ** (4 if self.r_mix is None else 3)
        self.k_mix.copy_(self.depth.mix(len(self.k_mix), power))
        if self.r_mix is not None:
            self.r_mix.copy_(self.k_mix)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        return self._mix(x, None, cu_seqlens)

    def empty_carry(self, batch_size: int) -> RWKVChannelMixCarry:
        """Zeros: no token has been seen."""
        return RWKVChannelMixCarry(self.k_mix.new_zeros(batch_size, len(self.k_mix)))

    def prefill(self, x: Tensor, carry: RWKVChannelMixCarry) -> tuple[Tensor, RWKVChannelMixCarry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        return self._mix(x, carry.last, None), RWKVChannelMixCarry(x[:, -1].clone())

    def decode(self, x_t: Tensor, carry: RWKVChannelMixCarry) -> tuple[Tensor, RWKVChannelMixCarry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry

    def _mix(self, x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        change = self.shift(x, last, cu_seqlens)
        y: Tensor = self.v_proj(torch.relu(self.k_proj(x + change * self.k_mix)).square())
        if self.r_mix is None or self.r_proj is None:
            return y
        return torch.sigmoid(self.r_proj(x + change * self.r_mix)) * y
