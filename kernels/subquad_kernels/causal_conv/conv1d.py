"""The causal convolution by torch's grouped convolution, channels first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from subquad_kernels.causal_conv.history import History

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> Outputs:
    """y and final_state."""
    exact = torch.promote_types(x.dtype, torch.float32)
    history = History.of(x.shape[1], weight.shape[1], cu_seqlens)
    extended = history.extend(x.to(exact), initial_state)
    y = history.at_tokens(_convolve(extended, weight, bias))
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), history.final_state(extended).to(x.dtype)


def backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument; the sum before the activation is computed again."""
    values: Any = arguments
    x, weight, bias = values["x"], values["weight"], values["bias"]
    dy, dfinal = gradients
    exact = torch.promote_types(x.dtype, torch.float32)
    history = History.of(x.shape[1], weight.shape[1], values["cu_seqlens"])
    extended = history.extend(x.to(exact), values["initial_state"])
    if dy is None:
        dpre = torch.zeros(x.shape, dtype=exact, device=x.device)
    elif values["activation"] == "silu":
        dpre = torch.ops.aten.silu_backward(dy.to(exact), history.at_tokens(_convolve(extended, weight, bias)))
    else:
        dpre = dy.to(exact)
    c = x.shape[2]
    dextended, dweight, dbias = torch.ops.aten.convolution_backward(
        history.from_tokens(dpre).transpose(1, 2), extended.transpose(1, 2), weight.to(exact).unsqueeze(1), [c],
        [1], [0], [1], False, [0], c, [True, True, bias is not None],
    )  # fmt: skip
    dx, dstate = history.split(dextended.transpose(1, 2), dfinal)
    return {"x": dx, "weight": dweight.squeeze(1), "bias": dbias, "initial_state": dstate}


def _convolve(extended: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes:  extended: b rows c    weight: c w    bias: c  ->  b rows-w+1 c"""
    exact = extended.dtype
    filters = weight.to(exact).unsqueeze(1)
    offset = None if bias is None else bias.to(exact)
    return F.conv1d(extended.transpose(1, 2), filters, offset, groups=filters.shape[0]).transpose(1, 2)
