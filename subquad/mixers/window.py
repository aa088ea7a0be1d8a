"""Sliding-window attention: a token sees at most `window` tokens, itself included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from subquad.contracts import MixerContext
from subquad.mixers.configs import WindowConfig
from subquad.mixers.softmax_attention import SoftmaxAttention
from subquad_kernels.growing_cache import latest
from subquad_kernels.ring import Rings, cache_of, rings_of


class WindowCarry(NamedTuple):
    """Rotated keys and values of the last tokens, at most `window`, and how many tokens came before.

    Shapes:  keys, values: b min(position, window) h_kv k
    """

    keys: Tensor
    values: Tensor
    position: int


class Window(SoftmaxAttention):
    """Causal attention within a window:  V(t) = { t - window + 1, ..., t }.  Shapes:  x: b t d  ->  b t d

    Source: Beltagy et al. 2020, 3.1 (causal half); as the local mixer of SCOUT-SWA, 2025 (arXiv 2509.00935).
    """

    def __init__(self, config: WindowConfig, context: MixerContext) -> None:
        super().__init__(config, context)
        self.window = config.window

    def empty_carry(self, batch_size: int) -> WindowCarry:  # type: ignore[override]
        """No keys yet."""
        return WindowCarry(*self._empty_cache(batch_size), 0)

    def prefill(  # type: ignore[override]
        self, x: Tensor, carry: WindowCarry, shared: Mapping[str, Tensor] | None = None
    ) -> tuple[Any, ...]:
        """Mix the next t tokens.  Shapes:  x: b t d  ->  b t d"""
        y, keys, values = self._attend(x, carry.keys, carry.values, carry.position)
        after = WindowCarry(
            latest(keys, self.window), latest(values, self.window), carry.position + x.shape[1]
        )  # fmt: skip
        return (y, after) if shared is None else (y, after, dict(zip(self.published, (keys, values))))

    def with_room(self, carry: WindowCarry, tokens: int) -> Rings:  # type: ignore[override]
        """Keys and values of the window, each of whose places is taken again."""
        return rings_of(carry.keys, carry.values, carry.position, self.window)

    def without_room(self, carry: Rings) -> WindowCarry:  # type: ignore[override]
        """The window's keys and values, in order."""
        position = int(carry.position)
        return WindowCarry(cache_of(carry.keys, position), cache_of(carry.values, position), position)
