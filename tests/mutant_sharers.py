"""A small mixer that reads a tensor of an earlier layer and publishes one, and copies of it with one fault each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mutant_mixers import NoConfig, Sound, State
from torch import Tensor

from subquad.contracts import MixerContext, SharedTensor, Sharing

Shared = Mapping[str, Tensor]


def share(config: NoConfig, context: MixerContext) -> Sharing:
    tensor = SharedTensor(shape=(context.d_model,))
    return Sharing(publishes={"sum": tensor}, reads={"given": tensor})


class SoundSharer(Sound):
    """y = Mix(x + given),  sum = x + given"""

    def read(self, x: Tensor, shared: Shared) -> Tensor:
        return x + shared["given"]

    def published(self, x: Tensor, read: Tensor) -> Tensor:
        return read

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, shared: Shared | None = None) -> Any:
        read = self.read(x, shared or {})
        return self.mix(read, None, cu_seqlens)[0], {"sum": self.published(x, read)}

    def prefill(self, x: Tensor, carry: State, shared: Shared | None = None) -> tuple[Any, ...]:
        read = self.read(x, shared or {})
        y, state = self.mix(read, carry.state, None)
        return y, State(state), {"sum": self.published(x, read)}

    def decode(self, x_t: Tensor, carry: State, shared: Shared | None = None) -> tuple[Any, ...]:
        y, *rest = self.prefill(x_t.unsqueeze(1), carry, shared)
        return y.squeeze(1), *rest


class IgnoresWhatItReads(SoundSharer):
    def read(self, x: Tensor, shared: Shared) -> Tensor:
        return x


class DropsTheGradientOfWhatItReads(SoundSharer):
    def read(self, x: Tensor, shared: Shared) -> Tensor:
        return x + (shared["given"] + shared["given"].detach()) / 2


class ReadsALaterToken(SoundSharer):
    def read(self, x: Tensor, shared: Shared) -> Tensor:
        return x + shared["given"].roll(-1, dims=1)


class PublishesAcrossDocuments(SoundSharer):
    def published(self, x: Tensor, read: Tensor) -> Tensor:
        return read.cumsum(dim=1)


class PublishesAnotherWidth(SoundSharer):
    def published(self, x: Tensor, read: Tensor) -> Tensor:
        return torch.cat([read, read], dim=-1)


class PublishesAnotherType(SoundSharer):
    def published(self, x: Tensor, read: Tensor) -> Tensor:
        return read.half()


class PublishesNothingWhenDecoding(SoundSharer):
    def decode(self, x_t: Tensor, carry: State, shared: Shared | None = None) -> tuple[Any, ...]:
        y_t, carry, _ = super().decode(x_t, carry, shared)
        return y_t, carry, {"sum": 0 * x_t.unsqueeze(1)}


class HasACarryAllTheSame(Sound):
    """Declared bidirectional: it sees both sides of a token, and decodes as if later ones were there."""

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return super().forward(x, cu_seqlens) + super().forward(x.flip(1), cu_seqlens).flip(1)
