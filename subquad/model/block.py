"""One residual unit: norm, mixer, and, unless the recipe leaves it out, norm, channel mixer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from subquad.contracts import Carry
from subquad.model.channel_mixer import ChannelMixer


class Block(nn.Module):
    """h = x + Mixer(RMSNorm(x));   y = h + ChannelMixer(RMSNorm(h)).  Shapes:  x: b t d  ->  b t d"""

    def __init__(
        self,
        mixer: nn.Module,
        channel_mixer: ChannelMixer | None,
        *,
        mixer_name: str,
        layer_index: int,
        d_model: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.mixer_name, self.layer_index = mixer_name, layer_index
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        # A Mixer is a Protocol over nn.Module; its own methods are called by name below.
        self.mixer: Any = mixer
        self.channel_norm = None if channel_mixer is None else nn.RMSNorm(d_model, eps=norm_eps)
        self.channel_mixer = channel_mixer

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences."""
        return self._mix_channels(x + self.mixer(self.norm(x), cu_seqlens))

    def prefill(self, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """Mix the next t tokens of each sequence."""
        mixed, carry = self.mixer.prefill(self.norm(x), carry)
        return self._mix_channels(x + mixed), carry

    def decode(self, x_t: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """Mix the next token of each sequence.  Shapes:  x_t: b d  ->  b d"""
        mixed, carry = self.mixer.decode(self.norm(x_t), carry)
        return self._mix_channels(x_t + mixed), carry

    def _mix_channels(self, x: Tensor) -> Tensor:
        if self.channel_mixer is None or self.channel_norm is None:
            return x
        return x + self.channel_mixer(self.channel_norm(x))  # type: ignore[no-any-return]
