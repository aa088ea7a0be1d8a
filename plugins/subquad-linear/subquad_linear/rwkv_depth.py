"""Where a layer of RWKV stands in its model: its first values depend on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad import MixerContext

NORM_EPS = 64e-5
"""Of the norm of the heads: the authors' value, 1e-5 times the square of 8."""


@dataclass(frozen=True)
class Depth:
    """Layer i of L as the authors count: time mix and channel mix together, here `blocks_per_layer` blocks."""

    layer: int
    layers: int

    @classmethod
    def of(cls, context: MixerContext, blocks_per_layer: int) -> Depth:
        """The depth of a block."""
        return cls(context.layer_index // blocks_per_layer, -(-context.num_layers // blocks_per_layer))

    @property
    def risen(self) -> float:
        """i / (L - 1): 0 in the first layer, 1 in the last."""
        return self.layer / max(self.layers - 1, 1)

    @property
    def left(self) -> float:
        """1 - i / L: 1 in the first layer, 1 / L in the last."""
        return 1 - self.layer / self.layers

    @property
    def norm_weight(self) -> float:
        """((i + 1) / L)^0.7, where the norm of the heads starts."""
        return float(((self.layer + 1) / self.layers) ** 0.7)

    def mix(self, d_model: int, power: float) -> Tensor:
        """1 - (c / d)^power for channel c of d: early channels look back, late ones do not.  Shape:  d (fp64)"""
        return 1 - (torch.arange(d_model, dtype=torch.float64) / d_model) ** power
