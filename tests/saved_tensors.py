"""What autograd keeps of a forward, by its own hooks: to hold against what is counted storage by storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(block: nn.Module, forward: Callable[[], Tensor], held: Iterable[Tensor] = ()) -> int:
    """The bytes that autograd keeps of a forward, each storage once; parameters, and what others hold, left out."""
    own = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), *held)}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage that is freed gives its address to the next one

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor), torch.enable_grad():
        alive.append(forward())
    return sum(kept.values())
