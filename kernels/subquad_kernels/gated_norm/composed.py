"""The gated norm of torch's own operations, forward and backward, in fp32 or wider."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import silu

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs


def forward(
    x: Tensor,
    z: Tensor,
    weight: Tensor | None,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    groups: int,
    gate_first: bool,
    activation: str,
    eps: float,
) -> Outputs:
    """y: b t c"""
    exact = torch.promote_types(x.dtype, torch.float32)
    value = _with_skip(x.to(exact), skip, skip_weight)
    opened = silu(z.to(exact)) if activation == "silu" else torch.sigmoid(z.to(exact))
    size = (value * opened if gate_first else value).unflatten(-1, (groups, -1))
    normal = (size * _reciprocal(size, eps)).flatten(-2)
    if weight is not None:
        normal = normal * _by_channel(weight, x.shape[2], exact)
    return ((normal if gate_first else normal * opened).to(x.dtype),)


def backward(
    arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]
) -> dict[str, Tensor | None]:
    """The gradients of every tensor; the norm is computed again."""
    values: dict[str, Any] = dict(arguments)
    x, z, weight, skip, skip_weight = (values[name] for name in ("x", "z", "weight", "skip", "skip_weight"))
    (dy,) = gradients
    assert dy is not None
    exact = torch.promote_types(x.dtype, torch.float32)
    groups, gate_first, c = values["groups"], values["gate_first"], x.shape[2]
    dy, gate, value = dy.to(exact), z.to(exact), _with_skip(x.to(exact), skip, skip_weight)
    half_open = torch.sigmoid(gate)
    if values["activation"] == "silu":
        opened, slope = gate * half_open, half_open * (1 + gate * (1 - half_open))
    else:
        opened, slope = half_open, half_open * (1 - half_open)
    size = (value * opened if gate_first else value).unflatten(-1, (groups, -1))
    reciprocal = _reciprocal(size, values["eps"])
    normal = size * reciprocal
    scaled = dy if gate_first else dy * opened
    weighed = scaled if weight is None else scaled * _by_channel(weight, c, exact)
    by_group = weighed.unflatten(-1, (groups, -1))
    d_size = (reciprocal * (by_group - normal * (by_group * normal).mean(-1, keepdim=True))).flatten(-2)
    normal = normal.flatten(-2)
    if gate_first:
        d_value, d_opened = d_size * opened, d_size * value
    else:
        unscaled = dy if weight is None else dy * _by_channel(weight, c, exact)
        d_value, d_opened = d_size, unscaled * normal
    found: dict[str, Tensor | None] = {"x": d_value, "z": d_opened * slope}
    if weight is not None:
        by_token = (scaled * normal).sum((0, 1))
        found["weight"] = by_token if len(weight) == c else by_token.unflatten(0, (groups, -1)).sum(0)
    if skip is not None:
        found["skip"] = d_value * _by_head(skip_weight, c, exact)
        found["skip_weight"] = (d_value * skip.to(exact)).sum((0, 1)).unflatten(0, (len(skip_weight), -1)).sum(1)
    return found


def _with_skip(value: Tensor, skip: Tensor | None, skip_weight: Tensor | None) -> Tensor:
    if skip is None or skip_weight is None:
        return value
    return value + skip.to(value.dtype) * _by_head(skip_weight, value.shape[2], value.dtype)


def _reciprocal(size: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(size.square().mean(-1, keepdim=True) + eps)


def _by_channel(weight: Tensor, channels: int, exact: torch.dtype) -> Tensor:
    """A weight that groups share, once for each of them."""
    return weight.to(exact) if len(weight) == channels else weight.to(exact).repeat(channels // len(weight))


def _by_head(skip_weight: Tensor, channels: int, exact: torch.dtype) -> Tensor:
    return skip_weight.to(exact).repeat_interleave(channels // len(skip_weight))
