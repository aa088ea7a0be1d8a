"""Carries of a whole model: their size by mixer, and sequences that join or leave a batch.

In every tensor of a carry the first axis is the batch; integers hold for all sequences alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from subquad.model.language_model import LanguageModel, ModelCarry


def carry_bytes(model: LanguageModel, carry: ModelCarry) -> dict[str, int]:
    """Bytes that the carry holds for all its sequences, by mixer, in the order of the layers; integers count as none.

    A view counts for what it shows, and not for the memory behind it.
    """
    sizes: dict[str, int] = {}
    for block, part in zip(model.blocks, carry, strict=True):
        size = sum(leaf.numel() * leaf.element_size() for leaf in tree_flatten(part)[0] if isinstance(leaf, Tensor))
        name = str(block.mixer_name)
        sizes[name] = sizes.get(name, 0) + size
    return sizes


def selected(carry: ModelCarry, sequences: Tensor) -> ModelCarry:
    """The carry of some of the sequences, copied, so that what the others held is free.  Shapes:  sequences: n"""
    chosen: ModelCarry = tree_map(
        lambda leaf: leaf.index_select(0, sequences) if isinstance(leaf, Tensor) else leaf, carry
    )
    return chosen


def joined(carries: Sequence[ModelCarry]) -> ModelCarry:
    """One carry of all sequences, in their order; `joinable` says which can be."""
    leaves, structure = zip(*(tree_flatten(carry) for carry in carries))
    together = [torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*leaves, strict=True)]
    whole: ModelCarry = tree_unflatten(together, structure[0])
    return whole


def joinable(one: ModelCarry, other: ModelCarry) -> bool:
    """Whether two carries differ only in their sequences: equal integers, and shapes that agree but for the first axis.

    States of constant size always are; caches that grow, and mixers that count positions, are at equal lengths.
    """
    (ours, structure), (theirs, other_structure) = tree_flatten(one), tree_flatten(other)
    return structure == other_structure and all(_alike(*pair) for pair in zip(ours, theirs, strict=True))


def _alike(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape[1:] == other.shape[1:] and one.dtype == other.dtype
    return bool(one == other)
