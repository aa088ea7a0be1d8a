"""A mixer that shares tensors with other layers, closed off: it can then be asked whatever any mixer is asked."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from subquad.contracts import Carry, Sharing


class ClosedCarry(NamedTuple):
    """The mixer's own carry, and what it has read so far where it reads a history."""

    own: Carry
    read: dict[str, Tensor]


class ClosedMixer(nn.Module):
    """y = Mixer(x; F x) + G p, with p what the mixer publishes and F x what it reads; F and G are fixed maps of tokens.

    What is read depends on its own token alone, and what is published is part of the output: causality, packing, splits
    and gradients of the whole are those of the mixer in all that it shares. Parameters, buffers and submodules are the
    mixer's own, under its names.

    Shapes:  x: b t d  ->  b t d
    """

    mixer: Any  # a Mixer is a Protocol over nn.Module

    def __init__(self, mixer: nn.Module, sharing: Sharing) -> None:
        super().__init__()
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[kind] = mixer.__dict__[kind]
        self.__dict__["mixer"] = mixer
        self.sharing = sharing

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences."""
        y: Tensor
        y, published = self.mixer(x, cu_seqlens, self.drawn(x))
        return y + self._as_output(published, x)

    def empty_carry(self, batch_size: int) -> Any:
        """The mixer's own; with it no history, where it reads one."""
        own: Carry = self.mixer.empty_carry(batch_size)
        like = next(self.mixer.parameters())
        read = {
            name: like.new_zeros(batch_size, 0, *tensor.shape)
            for name, tensor in self.sharing.reads.items()
            if tensor.history
        }
        return ClosedCarry(own, read) if read else own

    def init_parameters(self, std: float) -> None:
        """Draw the mixer's parameters."""
        self.mixer.init_parameters(std)

    def prefill(self, x: Tensor, carry: Any) -> tuple[Tensor, Any]:
        """Mix the next t tokens."""
        shared, own, read = self._with_history(x, carry)
        y, own, published = self.mixer.prefill(x, own, shared)
        return y + self._as_output(published, x), ClosedCarry(own, read) if read else own

    def decode(self, x_t: Tensor, carry: Any) -> tuple[Tensor, Any]:
        """Mix the next token."""
        x = x_t.unsqueeze(1)
        shared, own, read = self._with_history(x, carry)
        y_t, own, published = self.mixer.decode(x_t, own, shared)
        return y_t + self._as_output(published, x).squeeze(1), ClosedCarry(own, read) if read else own

    def drawn(self, x: Tensor) -> dict[str, Tensor]:
        """F x, what stands for other layers' tensors.  Shapes:  x: b t d  ->  b t *shape each"""
        found = {}
        for name, tensor in self.sharing.reads.items():
            width = math.prod(tensor.shape)
            found[name] = (x @ _fixed(x, x.shape[-1], width)).unflatten(-1, tensor.shape)
        return found

    def _with_history(self, x: Tensor, carry: Any) -> tuple[dict[str, Tensor], Carry, dict[str, Tensor]]:
        new = self.drawn(x)
        own, before = (carry.own, carry.read) if isinstance(carry, ClosedCarry) else (carry, {})
        read = {name: torch.cat([before[name], new[name]], dim=1) for name in before}
        given = {name: self.thinned(name, history, x.shape[1]) for name, history in read.items()}
        return new | given, own, read

    def thinned(self, name: str, history: Tensor, t: int) -> Tensor:
        """Of all tokens so far, those that are read: the t of the call, and as many of the others as are declared."""
        before, every = history.shape[1] - t, self.sharing.reads[name].every
        return torch.cat([history[:, :before][:, every - 1 :: every], history[:, before:]], dim=1)

    def _as_output(self, published: dict[str, Tensor], x: Tensor) -> Tensor:
        """G p; of a history, the tokens of this call."""
        total = torch.zeros_like(x)
        for tensor in published.values():
            last = tensor[:, tensor.shape[1] - x.shape[1] :].flatten(2)
            total = total + last @ _fixed(last, last.shape[-1], x.shape[-1])
        return total


def _fixed(like: Tensor, rows: int, columns: int) -> Tensor:
    """Numbers without a pattern that are the same on every device, of variance 1 / 2 rows."""
    numbers = torch.arange(rows * columns, dtype=like.dtype, device=like.device)
    return numbers.cos().view(rows, columns) / math.sqrt(rows)
