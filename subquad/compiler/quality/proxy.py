"""What a quality proxy is: how much a trained model loses when one layer's mixer is exchanged for another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from subquad.contracts import NOTHING_SHARED
from subquad.model.block import Block
from subquad.model.language_model import LanguageModel


@dataclass(frozen=True)
class HeldOut:
    """A batch that was not trained on.

    Shapes:  tokens, targets: b t (int64, target -100: nothing is predicted)    cu_seqlens: documents + 1 (int32)
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None


class QualityProxy(Protocol):
    """A number that is 0 for the mixer the model was trained with, and larger the more another one loses."""

    def __call__(self, model: LanguageModel, layer: int, student: nn.Module, batches: Sequence[HeldOut]) -> float:
        """The loss of `student` in that layer; the model is left as it was."""


def block_of(model: LanguageModel, layer: int) -> Block:
    """The block of a layer."""
    return model.blocks[layer]  # type: ignore[return-value]


@contextmanager
def exchanged(model: LanguageModel, layer: int, student: nn.Module) -> Iterator[None]:
    """The model with another mixer, which shares nothing, in one layer that no other layer reads."""
    block = block_of(model, layer)
    teacher, sharing = block.mixer, block.sharing
    block.mixer, block.sharing = student, NOTHING_SHARED
    try:
        yield
    finally:
        block.mixer, block.sharing = teacher, sharing


@contextmanager
def mixer_calls(model: LanguageModel, layer: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects what a layer's mixer is given and what it returns, call by call.

    Shapes:  both b t d, or 1 b*t d where the batch is packed
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        calls.append((inputs[0], output[0] if isinstance(output, tuple) else output))

    handle = block_of(model, layer).mixer.register_forward_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


def inputs_and_outputs(model: LanguageModel, layer: int, batches: Sequence[HeldOut]) -> list[tuple[Tensor, Tensor]]:
    """What a layer's mixer is given and returns, for every batch, without gradients."""
    with mixer_calls(model, layer) as calls, torch.no_grad():
        for batch in batches:
            model(batch.tokens, batch.cu_seqlens)
    return calls
