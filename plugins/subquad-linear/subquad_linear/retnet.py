"""Multi-scale retention (RetNet): linear attention whose heads forget at constant rates of their own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from subquad import MixerContext
from subquad_kernels.operators import linear_attention, rotary
from subquad_linear.both_sides import AttendsToBothSides
from subquad_linear.config import RetNetConfig, width_of_a_head
from subquad_linear.gated_output import GatedOutput

GAIN, OUTPUT_GAIN = 2**-2.5, 2**-1
"""Gains of Xavier's uniform draw, from the authors' torchscale."""


class RetNetCarry(NamedTuple):
    """What retention remembers: its state, and where the next token stands.  Shapes:  state: b h n p (fp32)"""

    state: Tensor
    position: int


class RetNet(nn.Module):
    """Retention:  S_t = gamma_h S_{t-1} + k_t v_t^T,   o_t = n^-1/2 S_t^T q_t,   gamma_h = 1 - 2^(-5-h).

    q, k = R W_q x, R W_k x with rotary R, v = W_v x;  y = W_o( RMSNorm_head(o) * silu(W_g x) ); no biases.
    The paper's two other normalisations divide a whole output vector, which the norm of the heads undoes.

    Shapes:  x: b t d  ->  b t d      h heads of n = d / h keys and p = expand_v d / h values
    Source: Sun et al. 2023 (RetNet), section 2; R turns half-split pairs instead of neighbours, a permutation of n.
    """

    log_decay: Tensor

    def __init__(self, config: RetNetConfig, context: MixerContext) -> None:
        super().__init__()
        d = context.d_model
        self.num_heads, self.rope_theta = config.num_heads, config.rope_theta
        self.key_dim = width_of_a_head(d, config.num_heads, "keys")
        self.value_dim = self.key_dim * config.expand_v
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, config.expand_v * d, bias=False)
        self.output = GatedOutput(d, config.num_heads, self.value_dim, affine=False)
        self.register_buffer("log_decay", torch.empty(config.num_heads))
        self._init_decay()

    def init_parameters(self, std: float) -> None:
        """Xavier's uniform draw with the authors' gains, whatever the model's `std`."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.output.g_proj):
            nn.init.xavier_uniform_(linear.weight, gain=GAIN)
        nn.init.xavier_uniform_(self.output.o_proj.weight, gain=OUTPUT_GAIN)
        self._init_decay()

    def _init_decay(self) -> None:
        """log gamma_h, computed in fp64: in fp32, 1 - 2^(-5-h) is 1 for every head from the twentieth on."""
        heads = torch.arange(self.num_heads, dtype=torch.float64, device=self.log_decay.device)
        self.log_decay.copy_(torch.log1p(-torch.exp2(-5 - heads)))

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        y, _ = self._mix(x, None, 0, cu_seqlens)
        return y

    def empty_carry(self, batch_size: int) -> RetNetCarry:
        """Zeros: no token has been seen."""
        exact = torch.promote_types(self.q_proj.weight.dtype, torch.float32)
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim)
        return RetNetCarry(self.q_proj.weight.new_zeros(shape, dtype=exact), 0)

    def prefill(self, x: Tensor, carry: RetNetCarry) -> tuple[Tensor, RetNetCarry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, state = self._mix(x, carry.state, carry.position, None)
        return y, RetNetCarry(state, carry.position + x.shape[1])

    def decode(self, x_t: Tensor, carry: RetNetCarry) -> tuple[Tensor, RetNetCarry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry

    def _mix(self, x: Tensor, state: Tensor | None, position: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.key_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_heads, self.key_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_heads, self.value_dim))
        q, k = rotary(q, k, cu_seqlens, start=position, theta=self.rope_theta)
        o, state = self._attend(q, k, v, state, cu_seqlens)
        return self.output.leave(o, x), state

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return linear_attention(q, k, v, self.log_decay, initial_state=state, cu_seqlens=cu_seqlens)


class BidirectionalRetNet(AttendsToBothSides, RetNet):
    """Retention to both sides:  o_i = n^-1/2 sum_j gamma_h^|i - j| (q_i . k_j) v_j.  Shapes:  x: b t d  ->  b t d

    Source: Afzal et al. 2025 (LION-D), with RetNet's positions and norms.
    """


def build_retnet(config: RetNetConfig, context: MixerContext) -> RetNet:
    """Retention to earlier tokens, or to both sides."""
    return (BidirectionalRetNet if config.bidirectional else RetNet)(config, context)
