"""What RWKV-6 and RWKV-7 share: a token shift in front of a matrix memory, and the carry of both."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class ShiftedCarry(NamedTuple):
    """What a time mix remembers, of a size that does not depend on t.

    Shapes:  last: b d, the input of the last token    state: b h n n (fp32)
    """

    last: Tensor
    state: Tensor


Shared = Mapping[str, Tensor]
"""Tensors of other layers, by name."""


class ShiftedMemory(nn.Module):
    """A mixer whose `_mix` goes on from the last token and from a state of h heads, n keys by n values.

    Given tensors of earlier layers (`shared`), each method returns one thing more: those for later ones.
    """

    r_proj: nn.Linear
    num_heads: int
    head_dim: int

    @abstractmethod
    def _mix(
        self,
        x: Tensor,
        last: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        shared: Shared,
    ) -> tuple[Tensor, Tensor, Shared]:
        """Output, state, and what is published.  Shapes:  x: b t d  ->  b t d"""

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, shared: Shared | None = None) -> Any:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        y, _, published = self._mix(x, None, None, cu_seqlens, shared or {})
        return y if shared is None else (y, published)

    def empty_carry(self, batch_size: int) -> ShiftedCarry:
        """Zeros: no token has been seen."""
        weight = self.r_proj.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        state = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        return ShiftedCarry(weight.new_zeros(batch_size, weight.shape[1]), weight.new_zeros(state, dtype=exact))

    def prefill(self, x: Tensor, carry: ShiftedCarry, shared: Shared | None = None) -> tuple[Any, ...]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, state, published = self._mix(x, carry.last, carry.state, None, shared or {})
        after = ShiftedCarry(x[:, -1].clone(), state)
        return (y, after) if shared is None else (y, after, published)

    def decode(self, x_t: Tensor, carry: ShiftedCarry, shared: Shared | None = None) -> tuple[Any, ...]:
        """Mix the next token.  Shapes:  x_t: b d  ->  b d"""
        y, *rest = self.prefill(x_t.unsqueeze(1), carry, shared)
        return y.squeeze(1), *rest
