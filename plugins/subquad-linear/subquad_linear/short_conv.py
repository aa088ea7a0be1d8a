"""A short convolution as a block of its own: what TTT's Mamba backbone puts in front of every TTT layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from subquad import MixerContext
from subquad_kernels.operators import causal_conv
from subquad_linear.config import ShortConvConfig


class ShortConvCarry(NamedTuple):
    """What a short convolution remembers.  Shape:  conv_inputs: b (w-1) d, its last inputs"""

    conv_inputs: Tensor


class ShortConv(nn.Module):
    """y_t = bias + sum over j of  weight[:, j] * x_{t-w+1+j},   each channel by itself, without activation.

    It takes a block without channel mixer: `schedule: [short_conv, ttt_linear]`, `short_conv: {channel_mixer: null}`,
    so that x becomes x + conv(RMSNorm(x)) before the next block. It sees w tokens: alone it is no sequence mixer.

    Shapes:  x: b t d  ->  b t d      weight: d w, w = conv_width    bias: d
    Source: Sun et al. 2024 (Learning to (learn at test time)), the Mamba backbone, and `pre_conv` of the authors' code.
    """

    def __init__(self, config: ShortConvConfig, context: MixerContext) -> None:
        super().__init__()
        # Holds weight (d 1 w) and bias and draws them; the operator computes.
        self.conv = nn.Conv1d(context.d_model, context.d_model, config.conv_width, groups=context.d_model)

    def init_parameters(self, std: float) -> None:
        """As torch draws a convolution, whatever the model's `std`."""
        self.conv.reset_parameters()

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        y, _ = self._mix(x, None, cu_seqlens)
        return y

    def empty_carry(self, batch_size: int) -> ShortConvCarry:
        """Zeros: no token has been seen."""
        channels, _, width = self.conv.weight.shape
        return ShortConvCarry(self.conv.weight.new_zeros(batch_size, width - 1, channels))

    def prefill(self, x: Tensor, carry: ShortConvCarry) -> tuple[Tensor, ShortConvCarry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, conv_inputs = self._mix(x, carry.conv_inputs, None)
        return y, ShortConvCarry(conv_inputs)

    def decode(self, x_t: Tensor, carry: ShortConvCarry) -> tuple[Tensor, ShortConvCarry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry

    def _mix(self, x: Tensor, conv_inputs: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        return causal_conv(
            x, self.conv.weight.squeeze(1), self.conv.bias,
            initial_state=conv_inputs, cu_seqlens=cu_seqlens, activation="none",
        )  # fmt: skip
