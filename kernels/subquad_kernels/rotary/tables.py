"""The rotary embedding in torch: a table of cosines and sines, and four products a pair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad_kernels.rotary.definition import position_angles, positions_of

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs


def forward(
    q: Tensor,
    k: Tensor,
    angles: Tensor | None,
    cu_seqlens: Tensor | None,
    position: Tensor | None,
    start: int,
    theta: float,
) -> Outputs:
    """Both, rotated."""
    if angles is not None:
        return _turned((q, k), angles)  # type: ignore[return-value]
    return _rotated((q, k), cu_seqlens, position, start, theta, 1)  # type: ignore[return-value]


def backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """The gradients, rotated back."""
    values: dict[str, Any] = dict(arguments)
    if (angles := values["angles"]) is None:
        dq, dk = _rotated(
            gradients, values["cu_seqlens"], values["position"], values["start"], values["theta"], -1
        )  # fmt: skip
        return {"q": dq, "k": dk}
    dq, dk = _turned(gradients, -angles)
    found = torch.zeros_like(angles)
    for x, dx in ((values["q"], dq), (values["k"], dk)):
        if dx is not None:
            found += _angles_pull(x, dx, angles)
    return {"q": dq, "k": dk, "angles": found}


def _rotated(
    tensors: tuple[Tensor | None, ...], cu_seqlens: Tensor | None, position: Tensor | None, start: int, theta: float,
    sign: int,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    like = next(tensor for tensor in tensors if tensor is not None)
    _, t, _, head_dim = like.shape
    turn = position_angles(positions_of(t, start, cu_seqlens, position, like.device), head_dim, theta)
    exact = torch.promote_types(like.dtype, torch.float32)
    cos, sin = turn.cos().to(exact)[:, None], (sign * turn.sin()).to(exact)[:, None]

    def rotate(x: Tensor) -> Tensor:
        first, second = x.to(exact).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    return tuple(None if tensor is None else rotate(tensor) for tensor in tensors)


def _turned(tensors: tuple[Tensor | None, ...], angles: Tensor) -> tuple[Tensor | None, ...]:
    """Neighbours by the angles given.  Shapes:  b t h k    angles: b t a s  ->  b t h k"""
    cos, sin = angles.cos(), angles.sin()

    def turn(x: Tensor) -> Tensor:
        even, odd = _pairs(x, angles)
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
        return torch.cat([turned.to(x.dtype), x[..., 2 * angles.shape[-1] :]], dim=-1)

    return tuple(None if tensor is None else turn(tensor) for tensor in tensors)


def _angles_pull(x: Tensor, dx: Tensor, angles: Tensor) -> Tensor:
    """dx_2i+1 x_2i - dx_2i x_2i+1, of all heads that an angle turns.  Shapes:  x, dx: b t h k  ->  b t a s"""
    even, odd = _pairs(x, angles)
    d_even, d_odd = _pairs(dx, angles)
    pull = d_odd * even - d_even * odd
    return pull if angles.shape[2] == x.shape[2] else pull.sum(2, keepdim=True)


def _pairs(x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    pairs = x[..., : 2 * angles.shape[-1]].to(angles.dtype).unflatten(-1, (-1, 2))
    return pairs[..., 0], pairs[..., 1]
