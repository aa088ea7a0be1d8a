"""Log-linear attention over gated linear attention: log t states instead of one, each read with its own weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad import MixerContext
from subquad_kernels.operators import log_linear_attention
from subquad_linear.config import LogLinearConfig, width_of_a_head
from subquad_linear.gated_output import GatedOutput


class LogLinearCarry(NamedTuple):
    """The states of the past's buckets, one for each bit of the number of tokens so far, and that number.

    Shapes:  state: b m h n p (fp32), m the bits of `position`
    """

    state: Tensor
    position: int


class LogLinear(nn.Module):
    """Log-linear attention:  o_t = n^-1/2 sum over levels l of  lambda_t[l] S_t[l]^T q_t,   all S decaying by exp g_t.

    S_t[l] holds the tokens of the l-th bucket before t, of 2^(l-1) tokens (the token itself for l = 0), as
    k_j v_j^T. g = logsigmoid(W_a x + b) / tau, lambda = softplus(L * W_l x), q, k, v = W_q x, W_k x, W_v x;
    y = W_o( RMSNorm_head(o) * silu(W_g x) ). No other biases, no positions.

    Shapes:  x: b t d  ->  b t d      h heads of n = expand_k d / h keys and p = expand_v d / h values
             W_a: d -> h    W_l: d -> h l    L: h l      l = num_levels, tau = gate_temperature
    Source: Guo et al. 2025, section 3, and lambda of the authors' code; the block is GLA's (Yang et al. 2023, section
            4.4) with one decay per head, as the paper's masks have it.
    """

    def __init__(self, config: LogLinearConfig, context: MixerContext) -> None:
        super().__init__()
        d, h = context.d_model, config.num_heads
        self.num_heads, self.gate_temperature = h, config.gate_temperature
        self.num_levels = config.resolved_levels(context.context_len)
        self.key_dim = width_of_a_head(config.expand_k * d, h, "keys")
        self.value_dim = width_of_a_head(config.expand_v * d, h, "values")
        self.q_proj = nn.Linear(d, h * self.key_dim, bias=False)
        self.k_proj = nn.Linear(d, h * self.key_dim, bias=False)
        self.v_proj = nn.Linear(d, h * self.value_dim, bias=False)
        self.decay_proj = nn.Linear(d, h)
        self.level_proj = nn.Linear(d, h * self.num_levels, bias=False)
        self.L = nn.Parameter(torch.ones(h, self.num_levels))
        self.output = GatedOutput(d, h, self.value_dim)

    def init_parameters(self, std: float) -> None:
        """Every map normal(0, std); the decays' bias 0; L 1, so that all levels weigh log 2 whatever the input."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.decay_proj, self.level_proj):
            nn.init.normal_(linear.weight, std=std)
        for linear in (self.output.g_proj, self.output.o_proj):
            nn.init.normal_(linear.weight, std=std)
        nn.init.zeros_(self.decay_proj.bias)
        nn.init.ones_(self.L)
        self.output.norm.reset_parameters()

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        y, _ = self._mix(x, None, 0, cu_seqlens)
        return y

    def empty_carry(self, batch_size: int) -> LogLinearCarry:
        """No token has been seen, and there is no state yet."""
        exact = torch.promote_types(self.q_proj.weight.dtype, torch.float32)
        shape = (batch_size, 0, self.num_heads, self.key_dim, self.value_dim)
        return LogLinearCarry(self.q_proj.weight.new_zeros(shape, dtype=exact), 0)

    def prefill(self, x: Tensor, carry: LogLinearCarry) -> tuple[Tensor, LogLinearCarry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, state = self._mix(x, carry.state, carry.position, None)
        return y, LogLinearCarry(state, carry.position + x.shape[1])

    def decode(self, x_t: Tensor, carry: LogLinearCarry) -> tuple[Tensor, LogLinearCarry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry

    def _mix(self, x: Tensor, state: Tensor | None, position: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.key_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_heads, self.key_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_heads, self.value_dim))
        # Bias and L join after the products: they are fp32, and make decays and weights fp32 under bfloat16.
        log_decay = F.logsigmoid(F.linear(x, self.decay_proj.weight) + self.decay_proj.bias) / self.gate_temperature
        scales = F.softplus(self.L * self.level_proj(x).unflatten(-1, (self.num_heads, self.num_levels)))
        o, state = log_linear_attention(
            q, k, v, scales, log_decay, initial_state=state, cu_seqlens=cu_seqlens, position=position
        )
        return self.output.leave(o, x), state
