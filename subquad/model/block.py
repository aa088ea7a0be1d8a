"""One residual unit: norm, mixer, and, unless the recipe leaves it out, norm, channel mixer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

from torch import Tensor, nn

from subquad.contracts import NOTHING_SHARED, Carry, Sharing
from subquad.model.channel_mixer import ChannelMixer

Shared = Mapping[str, Tensor]
"""Tensors of other layers by name, as `subquad.contracts.SharedTensor` describes them."""


class Block(nn.Module):
    """h = x + Mixer(RMSNorm(x));   y = h + ChannelMixer(RMSNorm(h)).  Shapes:  x: b t d  ->  b t d

    Given what its mixer reads of earlier layers (`shared`), each method returns one thing more: what it publishes.
    """

    def __init__(
        self,
        mixer: nn.Module,
        channel_mixer: ChannelMixer | None,
        *,
        mixer_name: str,
        layer_index: int,
        d_model: int,
        norm_eps: float,
        sharing: Sharing = NOTHING_SHARED,
    ) -> None:
        super().__init__()
        self.sharing = sharing
        self.mixer_name, self.layer_index = mixer_name, layer_index
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        # A Mixer is a Protocol over nn.Module; its own methods are called by name below.
        self.mixer: Any = mixer
        # Why a mixer that `DecodesInPlace` must not, once compiled: as written it would run kernels that nobody chose.
        self.not_in_place: str | None = None
        self.channel_norm = None if channel_mixer is None else nn.RMSNorm(d_model, eps=norm_eps)
        self.channel_mixer = channel_mixer

    @overload
    def forward(self, x: Tensor, cu_seqlens: Tensor | None = ..., shared: None = ...) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, cu_seqlens: Tensor | None, shared: Shared) -> tuple[Tensor, Shared]: ...

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, shared: Shared | None = None
    ) -> Tensor | tuple[Tensor, Shared]:
        """Mix whole sequences."""
        if shared is None:
            return self.mix_channels(x + self.mixer(self.norm(x), cu_seqlens))
        mixed, published = self.mixer(self.norm(x), cu_seqlens, shared)
        return self.mix_channels(x + mixed), published

    def prefill(self, x: Tensor, carry: Carry, *shared: Shared) -> tuple[Any, ...]:
        """Mix the next t tokens of each sequence."""
        mixed, *rest = self.mixer.prefill(self.norm(x), carry, *shared)
        return self.mix_channels(x + mixed), *rest

    def decode(self, x_t: Tensor, carry: Carry, *shared: Shared) -> tuple[Any, ...]:
        """Mix the next token of each sequence.  Shapes:  x_t: b d  ->  b d"""
        h, *rest = self.decode_mixer(x_t, carry, *shared)
        return self.mix_channels(h), *rest

    def decode_mixer(self, x_t: Tensor, carry: Carry, *shared: Shared) -> tuple[Any, ...]:
        """The half of `decode` that knows of other tokens: h.  Shapes:  x_t: b d  ->  b d"""
        mixed, *rest = self.mixer.decode(self.norm(x_t), carry, *shared)
        return x_t + mixed, *rest

    def decode_mixer_in_place(self, x_t: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """`decode_mixer` on a carry with room, of a mixer that `DecodesInPlace`.  Shapes:  x_t: b d  ->  b d"""
        mixed, after = self.mixer.decode_in_place(self.norm(x_t), carry)
        return x_t + mixed, after

    def mix_channels(self, x: Tensor) -> Tensor:
        """The other half: y of h, token by token; x itself where the block has no channel mixer."""
        if self.channel_mixer is None or self.channel_norm is None:
            return x
        return x + self.channel_mixer(self.channel_norm(x))  # type: ignore[no-any-return]
