"""Test-time training: a mixer whose state is a small model, which learns to turn keys into values as tokens come."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad import ConfigError, MixerContext
from subquad_kernels.operators import causal_conv, rotary, ttt_scan
from subquad_linear.batch_angles import BatchAngles
from subquad_linear.config import (
    TTTLinearConfig,
    TTTLinearMambaConfig,
    TTTMLPConfig,
    TTTMLPMambaConfig,
    width_of_a_head,
)

EXPANSION = 4
"""Width inside the two-layer model / width of a head."""
NORM_EPS = 1e-6
"""As in the authors' code."""


class TTTCarry(NamedTuple):
    """The inner model's weights, the sums of the current mini-batch's gradients, and how many tokens came before.

    Shapes:  conv_inputs: b (w-1) d, the last inputs of the convolutions; b 0 d where there are none
             state: b 2 h s (fp32), s numbers for a head's model
    """

    conv_inputs: Tensor
    state: Tensor
    position: int


class TTT(nn.Module):
    """Test-time training:  y_t = q_t + f(q_t; W - s_i A),  A the sum of r_j d/dW 1/2 |f(k_j; W) - (v_j - k_j)|^2.

    The sum runs over the tokens of the mini-batch up to the i-th, the token itself; all gradients are taken at the W
    that entered it, and W - s A of its last token enters the next. f(x) = LN(x W_1 + b_1), or LN(gelu(x W_1 + b_1) W_2
    + b_2); q, k, v = R W_q x, R W_k x, W_v x with R the rotation by i; r = base_rate / k sigmoid(W_r x + b_r);
    s_i = max(1/i + token_scale_i, 0). Out: W_o LayerNorm(y), the norm over all heads; with `gate` times gelu(W_g x).
    With `conv_width` w > 0, q = R conv_q(W_q x) and k = R conv_k(W_q x), convolutions of w tokens, each channel by
    itself, with biases. No other biases. W_1 .. b_2 are what every sequence starts from.

    Shapes:  x: b t d  ->  b t d      h heads of k = d / h    W_1: h k k | h k 4k    W_2: h 4k k    b_1, b_2: h columns
             W_r: d -> h    norm_weight, norm_bias (LN of a head): h k    token_scale: one for a place of a mini-batch
    Source: Sun et al. 2024 (Learning to (learn at test time)), sections 2.3 to 2.7, and the authors' code, whose
            defaults are the Transformer backbone's. Its Mamba backbone is a gate and convolutions (`use_gate`,
            `share_qk` there), and a block of `short_conv` (`pre_conv`) before each.
    """

    def __init__(
        self, config: TTTLinearConfig, context: MixerContext, inner: Literal["linear", "mlp"], conv_width: int = 0
    ) -> None:
        super().__init__()
        d, h = context.d_model, config.num_heads
        self.num_heads, self.inner, self.mini_batch = h, inner, config.mini_batch
        self.head_dim = width_of_a_head(d, h, "keys")
        if self.head_dim % 2:
            raise ConfigError(
                what=f"{h} heads of {self.head_dim} channels have no pairs to rotate",
                where="num_heads",
                mend="use heads of an even width",
            )
        self.largest_rate = config.base_rate / self.head_dim
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = None if conv_width else nn.Linear(d, d, bias=False)
        # They hold weights (d 1 w) and biases and draw them; the operator computes.
        self.conv_q, self.conv_k = (nn.Conv1d(d, d, conv_width, groups=d) if conv_width else None for _ in "qk")
        self.v_proj = nn.Linear(d, d, bias=False)
        self.angles = BatchAngles(self.head_dim, config.mini_batch, config.rope_theta)
        self.rate_proj = nn.Linear(d, h)
        self.token_scale = nn.Parameter(torch.zeros(config.mini_batch))
        self.norm_weight = nn.Parameter(torch.ones(h, self.head_dim))
        self.norm_bias = nn.Parameter(torch.zeros(h, self.head_dim))
        inside = self.head_dim if inner == "linear" else EXPANSION * self.head_dim
        self.W1 = nn.Parameter(torch.zeros(h, self.head_dim, inside))
        self.b1 = nn.Parameter(torch.zeros(h, inside))
        if inner == "mlp":
            self.W2 = nn.Parameter(torch.zeros(h, inside, self.head_dim))
            self.b2 = nn.Parameter(torch.zeros(h, self.head_dim))
        self.post_norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.g_proj = nn.Linear(d, d, bias=False) if config.gate else None
        self.o_proj = nn.Linear(d, d, bias=False)

    def init_parameters(self, std: float) -> None:
        """Every map, the inner ones too, normal(0, std); biases, scales 0, norms' weights 1; convolutions torch's."""
        linears = (self.q_proj, self.k_proj, self.v_proj, self.rate_proj, self.g_proj, self.o_proj)
        for weight in [linear.weight for linear in linears if linear is not None] + self._maps()[::2]:
            nn.init.normal_(weight, std=std)
        for bias in (self.rate_proj.bias, self.token_scale, self.norm_bias, *self._maps()[1::2]):
            nn.init.zeros_(bias)
        nn.init.ones_(self.norm_weight)
        self.post_norm.reset_parameters()
        for conv in (self.conv_q, self.conv_k):
            if conv is not None:
                conv.reset_parameters()

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        states = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        y, _, _ = self._mix(x, None, self._first_state(states), 0, cu_seqlens)
        return y

    def empty_carry(self, batch_size: int) -> TTTCarry:
        """The inner model as it is before the first token, and no gradients."""
        before = 0 if self.conv_q is None else self.conv_q.weight.shape[2] - 1
        conv_inputs = self.q_proj.weight.new_zeros(batch_size, before, self.q_proj.out_features)
        return TTTCarry(conv_inputs, self._first_state(batch_size).contiguous(), 0)

    def prefill(self, x: Tensor, carry: TTTCarry) -> tuple[Tensor, TTTCarry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, conv_inputs, state = self._mix(x, carry.conv_inputs, carry.state, carry.position, None)
        return y, TTTCarry(conv_inputs, state, carry.position + x.shape[1])

    def decode(self, x_t: Tensor, carry: TTTCarry) -> tuple[Tensor, TTTCarry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry

    def _maps(self) -> list[Tensor]:
        return [self.W1, self.b1] if self.inner == "linear" else [self.W1, self.b1, self.W2, self.b2]

    def _first_state(self, states: int) -> Tensor:
        """The parameters W and gradients of zero, a copy for each sequence.  Shape:  states 2 h s"""
        weights = torch.cat([part.flatten(1) for part in self._maps()], dim=-1)
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        return torch.stack([weights, torch.zeros_like(weights)]).expand(states, -1, -1, -1)

    def _queries_and_keys(
        self, x: Tensor, conv_inputs: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k before they turn, and the last inputs of their convolutions.  Shapes:  x: b t d  ->  b t d, b t d, .."""
        q = self.q_proj(x)
        if self.conv_q is None or self.conv_k is None:
            assert self.k_proj is not None
            return q, self.k_proj(x), q.new_zeros(x.shape[0], 0, x.shape[2])
        (q, last), (k, _) = (
            causal_conv(
                q, conv.weight.squeeze(1), conv.bias,
                initial_state=conv_inputs, cu_seqlens=cu_seqlens, activation="none",
            )
            for conv in (self.conv_q, self.conv_k)
        )  # fmt: skip
        return q, k, last

    def _mix(
        self, x: Tensor, conv_inputs: Tensor | None, state: Tensor, position: int, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, conv_inputs = self._queries_and_keys(x, conv_inputs, cu_seqlens)
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)) for part in (q, k, self.v_proj(x)))
        q, k = rotary(q, k, angles=self.angles(q, position, cu_seqlens))
        # The bias joins after the product: it is fp32, and makes the rates fp32 where products are rounded to 8 bits.
        rates = torch.sigmoid(F.linear(x, self.rate_proj.weight) + self.rate_proj.bias) * self.largest_rate
        places = torch.ones_like(self.token_scale).cumsum(0)
        scales = (1 / places + self.token_scale).clamp(min=0)
        y, state = ttt_scan(
            q, k, v, rates, scales, self.norm_weight, self.norm_bias, state, cu_seqlens,
            position=position, inner=self.inner,
        )  # fmt: skip
        y = self.post_norm(y.flatten(2)).to(x.dtype)
        if self.g_proj is not None:
            y = y * F.gelu(self.g_proj(x), approximate="tanh")
        return self.o_proj(y), conv_inputs, state


def linear(config: TTTLinearConfig, context: MixerContext) -> TTT:
    """TTT-Linear."""
    return TTT(config, context, "linear")


def mlp(config: TTTMLPConfig, context: MixerContext) -> TTT:
    """TTT-MLP."""
    return TTT(config, context, "mlp")


def linear_mamba(config: TTTLinearMambaConfig, context: MixerContext) -> TTT:
    """TTT-Linear of the Mamba backbone."""
    return TTT(config, context, "linear", config.conv_width)


def mlp_mamba(config: TTTMLPMambaConfig, context: MixerContext) -> TTT:
    """TTT-MLP of the Mamba backbone."""
    return TTT(config, context, "mlp", config.conv_width)
