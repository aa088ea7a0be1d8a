"""The gated norm of torch's own operations, forward and backward, in fp32 or wider."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import silu

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "sigmoid": torch.sigmoid,
    "identity": lambda gate: gate,
}


def forward(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    groups: int,
    gate_first: bool,
    norm: bool,
    centre: bool,
    activation: str,
    eps: float,
) -> Outputs:
    """y: b t c"""
    exact = torch.promote_types(x.dtype, torch.float32)
    value = _with_skip(x.to(exact), skip, skip_weight)
    opened = None if z is None else _ACTIVATIONS[activation](z.to(exact))
    size = _sized(value if opened is None or not gate_first else value * opened, groups, centre)
    normal = _weighed((size * _reciprocal(size, eps) if norm else size).flatten(-2), weight, bias)
    return ((normal if opened is None or gate_first else normal * opened).to(x.dtype),)


def backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """The gradients of every tensor; the norm is computed again."""
    values: dict[str, Any] = dict(arguments)
    x, z, weight, bias, skip, skip_weight = (
        values[name] for name in ("x", "z", "weight", "bias", "skip", "skip_weight")
    )
    (dy,) = gradients
    assert dy is not None
    exact = torch.promote_types(x.dtype, torch.float32)
    groups, gate_first, c = values["groups"], values["gate_first"], x.shape[2]
    dy, value = dy.to(exact), _with_skip(x.to(exact), skip, skip_weight)
    opened, slope = (None, None) if z is None else _opened_and_slope(z.to(exact), values["activation"])
    size = _sized(value if opened is None or not gate_first else value * opened, groups, values["centre"])
    reciprocal = _reciprocal(size, values["eps"]) if values["norm"] else None
    normal = size if reciprocal is None else size * reciprocal
    scaled = dy if opened is None or gate_first else dy * opened
    by_group = (scaled if weight is None else scaled * _by_channel(weight, c, exact)).unflatten(-1, (groups, -1))
    d_size = by_group
    if reciprocal is not None:
        d_size = d_size - normal * (by_group * normal).mean(-1, keepdim=True)
        if values["centre"]:
            d_size = d_size - by_group.mean(-1, keepdim=True)
        d_size = reciprocal * d_size
    d_size, normal = d_size.flatten(-2), normal.flatten(-2)
    d_value = d_size if opened is None or not gate_first else d_size * opened
    found: dict[str, Tensor | None] = {"x": d_value}
    if slope is not None:
        found["z"] = slope * (d_size * value if gate_first else dy * _weighed(normal, weight, bias))
    for name, by_token in (("weight", scaled * normal), ("bias", scaled)):
        if (given := values[name]) is not None:
            by_channel = by_token.sum((0, 1))
            found[name] = by_channel if len(given) == c else by_channel.unflatten(0, (groups, -1)).sum(0)
    if skip is not None:
        found["skip"] = d_value * _by_head(skip_weight, c, exact)
        found["skip_weight"] = (d_value * skip.to(exact)).sum((0, 1)).unflatten(0, (len(skip_weight), -1)).sum(1)
    return found


def _opened_and_slope(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(z), and its derivative."""
    if activation == "identity":
        return gate, torch.ones_like(gate)
    half_open = torch.sigmoid(gate)
    if activation == "silu":
        return gate * half_open, half_open * (1 + gate * (1 - half_open))
    return half_open, half_open * (1 - half_open)


def _sized(value: Tensor, groups: int, centre: bool) -> Tensor:
    """What is normalised.  Shapes:  b t c  ->  b t g c/g"""
    size: Tensor = value.unflatten(-1, (groups, -1))
    return size - size.mean(-1, keepdim=True) if centre else size


def _weighed(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        normal = normal * _by_channel(weight, normal.shape[2], normal.dtype)
    return normal if bias is None else normal + _by_channel(bias, normal.shape[2], normal.dtype)


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
