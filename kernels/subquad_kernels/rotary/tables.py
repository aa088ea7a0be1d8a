"""The rotary embedding in torch: a table of cosines and sines, and four products a pair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad_kernels.rotary.definition import angles, positions_of

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs


def forward(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, position: Tensor | None, start: int, theta: float
) -> Outputs:
    """Both, rotated."""
    return _rotated((q, k), cu_seqlens, position, start, theta, 1)  # type: ignore[return-value]


def backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """The gradients, rotated back."""
    values: dict[str, Any] = dict(arguments)
    dq, dk = _rotated(
        gradients, values["cu_seqlens"], values["position"], values["start"], values["theta"], -1
    )  # fmt: skip
    return {"q": dq, "k": dk}


def _rotated(
    tensors: tuple[Tensor | None, ...], cu_seqlens: Tensor | None, position: Tensor | None, start: int, theta: float,
    sign: int,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    like = next(tensor for tensor in tensors if tensor is not None)
    _, t, _, head_dim = like.shape
    turn = angles(positions_of(t, start, cu_seqlens, position, like.device), head_dim, theta)
    exact = torch.promote_types(like.dtype, torch.float32)
    cos, sin = turn.cos().to(exact)[:, None], (sign * turn.sin()).to(exact)[:, None]

    def rotate(x: Tensor) -> Tensor:
        first, second = x.to(exact).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    return tuple(None if tensor is None else rotate(tensor) for tensor in tensors)
