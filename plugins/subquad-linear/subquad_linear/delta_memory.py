"""What DeltaNet and Gated DeltaNet share: the inputs of a short convolution and a state of the delta rule as carry."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class DeltaCarry(NamedTuple):
    """What a mixer on the delta rule remembers, of a size that does not depend on t.

    Shapes:  conv_inputs: b (w-1) c, the last inputs of the convolution, c = 2 h_k n + h p    state: b h n p (fp32)
    """

    conv_inputs: Tensor
    state: Tensor


class DeltaMemory(nn.Module):
    """A mixer whose `_mix` goes on from a convolution's last inputs and a state of h heads, n keys by p values."""

    conv: nn.Conv1d
    num_heads: int
    key_dim: int
    value_dim: int

    @abstractmethod
    def _mix(
        self, x: Tensor, conv_inputs: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, last inputs of the convolution, and state.  Shapes:  x: b t d  ->  b t d"""

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        y, _, _ = self._mix(x, None, None, cu_seqlens)
        return y

    def empty_carry(self, batch_size: int) -> DeltaCarry:
        """Zeros: no token has been seen."""
        channels, _, width = self.conv.weight.shape
        exact = torch.promote_types(self.conv.weight.dtype, torch.float32)
        state = (batch_size, self.num_heads, self.key_dim, self.value_dim)
        return DeltaCarry(
            self.conv.weight.new_zeros(batch_size, width - 1, channels),
            self.conv.weight.new_zeros(state, dtype=exact),
        )

    def prefill(self, x: Tensor, carry: DeltaCarry) -> tuple[Tensor, DeltaCarry]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, conv_inputs, state = self._mix(x, carry.conv_inputs, carry.state, None)
        return y, DeltaCarry(conv_inputs, state)

    def decode(self, x_t: Tensor, carry: DeltaCarry) -> tuple[Tensor, DeltaCarry]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry
