"""The causal convolution as w shifted multiply-adds over the whole sequence, channels last as they come.

A library convolution wants channels first: two transposed copies cost more than w multiply-adds (README.md).
"""

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
    y = history.at_tokens(_convolve(extended, weight.to(exact).T.contiguous(), bias))
    if activation == "silu":
        y = F.silu(y, inplace=True)
    return y.to(x.dtype), history.final_state(extended).to(x.dtype)


def backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument; the sum before the activation is computed again."""
    values: Any = arguments
    x, weight, bias = values["x"], values["weight"], values["bias"]
    dy, dfinal = gradients
    exact = torch.promote_types(x.dtype, torch.float32)
    history = History.of(x.shape[1], weight.shape[1], values["cu_seqlens"])
    extended = history.extend(x.to(exact), values["initial_state"])
    taps = weight.to(exact).T.contiguous()
    if dy is None:
        dpre = torch.zeros(x.shape, dtype=exact, device=x.device)
    elif values["activation"] == "silu":
        dpre = torch.ops.aten.silu_backward(dy.to(exact), history.at_tokens(_convolve(extended, taps, bias)))
    else:
        dpre = dy.to(exact)
    dbias = None if bias is None else dpre.sum((0, 1))

    dpre = history.from_tokens(dpre)
    rows = dpre.shape[1]
    dextended = torch.zeros_like(extended)
    dtaps = torch.empty_like(taps)
    product = torch.empty_like(dpre)
    for tap, filter_ in enumerate(taps):
        dextended[:, tap : tap + rows].addcmul_(dpre, filter_)
        torch.mul(extended[:, tap : tap + rows], dpre, out=product)
        torch.sum(product.flatten(0, 1), 0, out=dtaps[tap])
    dx, dstate = history.split(dextended, dfinal)
    return {"x": dx, "weight": dtaps.T, "bias": dbias, "initial_state": dstate}


def _convolve(extended: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes:  extended: b rows c    taps: w c    bias: c  ->  b rows-w+1 c"""
    rows = extended.shape[1] - len(taps) + 1
    total = extended[:, :rows] * taps[0]
    for tap in range(1, len(taps)):
        total.addcmul_(extended[:, tap : tap + rows], taps[tap])
    return total if bias is None else total.add_(bias.to(total.dtype))
