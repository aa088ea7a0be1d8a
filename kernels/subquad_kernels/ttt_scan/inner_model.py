"""The pieces of the inner model: its norm, that norm's gradient under the loss, its activation and that one's slope."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-6
"""The authors' value."""
_SLOPE, _CUBE = math.sqrt(2 / math.pi), 0.044715
"""The tanh form of gelu (Hendrycks and Gimpel 2016)."""


def with_one(x: Tensor) -> Tensor:
    """[x, 1]: what the rows of a map with its bias last are multiplied with.  Shapes:  ... k  ->  ... k+1"""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def normal(z: Tensor) -> tuple[Tensor, Tensor]:
    """z less its mean over its deviation, and that deviation.  Shapes:  ... k  ->  ... k, ... 1"""
    centred = z - z.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return centred / deviation, deviation


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """weight * (z - mean) / deviation + bias."""
    return normal(z)[0] * weight + bias


def loss_gradient(z: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """d/dz of 1/2 | LN(z) - target |^2.  Shapes:  z, target: ... k  ->  ... k

    With x = (z - mean) / deviation and g = weight * (LN(z) - target): (g - mean g - x mean(g x)) / deviation.
    """
    x, deviation = normal(z)
    g = weight * (weight * x + bias - target)
    return (g - g.mean(-1, keepdim=True) - x * (g * x).mean(-1, keepdim=True)) / deviation


def gelu(z: Tensor) -> Tensor:
    """z/2 (1 + tanh u), u = sqrt(2 / pi) (z + 0.044715 z^3)."""
    return torch.nn.functional.gelu(z, approximate="tanh")


def gelu_slope(z: Tensor) -> Tensor:
    """d gelu / dz = (1 + tanh u)/2 + z/2 (1 - tanh^2 u) du/dz."""
    tanh = torch.tanh(_SLOPE * (z + _CUBE * z**3))
    return (1 + tanh) / 2 + z / 2 * (1 - tanh.square()) * _SLOPE * (1 + 3 * _CUBE * z.square())
