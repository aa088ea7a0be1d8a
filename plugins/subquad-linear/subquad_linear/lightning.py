"""Lightning attention: linear attention whose heads forget at constant rates, slower in deeper layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from subquad import MixerContext
from subquad_kernels.operators import gated_norm, linear_attention
from subquad_linear.both_sides import AttendsToBothSides
from subquad_linear.config import LightningConfig, width_of_a_head
from subquad_linear.exact_norm import EPS, ExactNorm

FACTOR_EPS = 1e-5
"""Keeps the last layer's decay below 1 and a model of one layer finite, as the authors' code does."""


def log_decays(kind: str, num_heads: int, layer_index: int, num_layers: int) -> Tensor:
    """log gamma_h of one layer in fp64: a rate per head, times what the depth leaves of it.  Shape: h

    alibi:        -2^(-8 (h+1) / H) (1 - l / (L - 1))        Source: MiniMax 2025 (MiniMax-01), released code
    transnormer:  -(8 h / H) (1 - l / L)                     Source: Qin et al. 2023 (TransNormerLLM)
    """
    heads = torch.arange(num_heads, dtype=torch.float64)
    if kind == "transnormer":
        return -(8 * heads / num_heads) * (1 - layer_index / num_layers)
    factor = 1 - layer_index / (num_layers - 1 + FACTOR_EPS) + FACTOR_EPS
    return -torch.exp2(-8 * (heads + 1) / num_heads) * factor


class LightningCarry(NamedTuple):
    """What lightning attention remembers.  Shape:  state: b h n n (fp32)"""

    state: Tensor


class Lightning(nn.Module):
    """Lightning attention:  S_t = gamma_h S_{t-1} + k_t v_t^T,   o_t = n^-1/2 S_t^T q_t.

    q, k, v = silu(W x);  y = W_o( sigmoid(W_g x) * RMSNorm(o) ), the norm over all heads together; no biases, no
    positions. The authors do not scale q by n^-1/2, which the norm undoes.

    Shapes:  x: b t d  ->  b t d      h heads of n = d / h keys and values; gamma as in `log_decays`
    Source: Qin et al. 2024 (Lightning Attention-2); MiniMax 2025 (MiniMax-01), report and released code.
    """

    log_decay: Tensor

    def __init__(self, config: LightningConfig, context: MixerContext) -> None:
        super().__init__()
        d = context.d_model
        self.num_heads = config.num_heads
        self.head_dim = width_of_a_head(d, config.num_heads, "keys")
        self.qkv_proj = nn.Linear(d, 3 * d, bias=False)
        self.g_proj = nn.Linear(d, d, bias=False)
        self.norm = ExactNorm(d)
        self.o_proj = nn.Linear(d, d, bias=False)
        self._place = (config.decays, config.num_heads, context.layer_index, context.num_layers)
        self.register_buffer("log_decay", torch.empty(config.num_heads))
        self._init_decay()

    def init_parameters(self, std: float) -> None:
        """Every map normal(0, std), the norm's weight 1."""
        for linear in (self.qkv_proj, self.g_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=std)
        self.norm.reset_parameters()
        self._init_decay()

    def _init_decay(self) -> None:
        with torch.device("cpu"):
            log_decay = log_decays(*self._place)
        self.log_decay.copy_(log_decay)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        y, _ = self._mix(x, None, cu_seqlens)
        return y

    def empty_carry(self, batch_size: int) -> LightningCarry:
        """Zeros: no token has been seen."""
        exact = torch.promote_types(self.qkv_proj.weight.dtype, torch.float32)
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        return LightningCarry(self.qkv_proj.weight.new_zeros(shape, dtype=exact))

    def prefill(self, x: Tensor, carry: LightningCarry) -> tuple[Tensor, LightningCarry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, state = self._mix(x, carry.state, None)
        return y, LightningCarry(state)

    def decode(self, x_t: Tensor, carry: LightningCarry) -> tuple[Tensor, LightningCarry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry

    def _mix(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = silu(self.qkv_proj(x)).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        o, state = self._attend(q, k, v, state, cu_seqlens)
        y = gated_norm(o.flatten(2), self.g_proj(x), self.norm.weight, activation="sigmoid", eps=EPS)
        return self.o_proj(y), state

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return linear_attention(q, k, v, self.log_decay, initial_state=state, cu_seqlens=cu_seqlens)


class BidirectionalLightning(AttendsToBothSides, Lightning):
    """Lightning attention to both sides:  o_i = n^-1/2 sum_j gamma_h^|i - j| (q_i . k_j) v_j.

    Shapes:  x: b t d  ->  b t d
    Source: Afzal et al. 2025 (LION-D), with lightning attention's activations, gate and norm.
    """


def build_lightning(config: LightningConfig, context: MixerContext) -> Lightning:
    """Lightning attention to earlier tokens, or to both sides."""
    return (BidirectionalLightning if config.bidirectional else Lightning)(config, context)
