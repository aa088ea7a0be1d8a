"""A third-party mixer, complete in one module: each token mixes with the few before it, through a gate.

    u, g = x W_in          y_t = ( sum_j  f_j * u_{t-j} ) * silu(g_t) W_out          j = 0 .. conv_width - 1

The convolution is the operator `causal_conv`: packed sequences, carries, gradients and kernels come with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from subquad import ConfigError, Growth, MixerContext, MixerSpec, hookimpl
from subquad_kernels.operators import causal_conv


@dataclass(kw_only=True)
class GatedConvConfig:
    """How many tokens, itself included, a token mixes with."""

    conv_width: int = 4

    def __post_init__(self) -> None:
        if self.conv_width < 2:
            raise ConfigError(what=f"conv_width is {self.conv_width}", where="conv_width", mend="use 2 or more")


class GatedConvCarry(NamedTuple):
    """The last conv_width - 1 inputs of the convolution.  Shape: b (w-1) d"""

    inputs: Tensor


class GatedConv(nn.Module):
    """Mixes each token with the conv_width - 1 before it.  Shapes:  x: b t d  ->  b t d"""

    def __init__(self, config: GatedConvConfig, context: MixerContext) -> None:
        super().__init__()
        d = context.d_model
        self.in_proj = nn.Linear(d, 2 * d, bias=False)
        self.filters = nn.Parameter(torch.empty(d, config.conv_width))
        self.out_proj = nn.Linear(d, d, bias=False)

    def init_parameters(self, std: float) -> None:
        nn.init.normal_(self.in_proj.weight, std=std)
        nn.init.normal_(self.out_proj.weight, std=std)
        nn.init.normal_(self.filters, std=self.filters.shape[1] ** -0.5)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        mixed, _ = causal_conv(u, self.filters, cu_seqlens=cu_seqlens, activation="none")
        return self.out_proj(mixed * nn.functional.silu(gate))

    def empty_carry(self, batch_size: int) -> GatedConvCarry:
        d, width = self.filters.shape
        return GatedConvCarry(self.filters.new_zeros(batch_size, width - 1, d))

    def prefill(self, x: Tensor, carry: GatedConvCarry) -> tuple[Tensor, GatedConvCarry]:
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        mixed, inputs = causal_conv(u, self.filters, initial_state=carry.inputs, activation="none")
        return self.out_proj(mixed * nn.functional.silu(gate)), GatedConvCarry(inputs)

    def decode(self, x_t: Tensor, carry: GatedConvCarry) -> tuple[Tensor, GatedConvCarry]:
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry


@hookimpl
def subquad_provide_mixers() -> Iterable[MixerSpec]:
    return [
        MixerSpec(
            name="gated_conv",
            summary="a gated short convolution",
            paper="an example, not a paper",
            config=GatedConvConfig,
            build="gated_conv:GatedConv",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            operators=("causal_conv",),
        )
    ]
