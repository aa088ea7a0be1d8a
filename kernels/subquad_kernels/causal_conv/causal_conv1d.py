"""The kernels of the package causal-conv1d, in its layout with the channels side by side, which is ours.

Packed, it numbers the document of every token, and hands out no final state: the last w - 1 inputs are gathered here.

Source: package causal-conv1d 1.5 and 1.6, `causal_conv1d_fn` and the backward that its autograd calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad_kernels.determinism import deterministic
from subquad_kernels.documents import document_ids

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
    from causal_conv1d import causal_conv1d_fn

    call = {"weight": weight, "bias": _close(bias), "activation": None if activation == "none" else activation}
    if cu_seqlens is None:
        y, final_state = causal_conv1d_fn(
            _channels(x), initial_states=_channels(initial_state), return_final_states=True, **call
        )
        return y.transpose(1, 2), final_state.transpose(1, 2)
    y = causal_conv1d_fn(_channels(x), seq_idx=_documents(cu_seqlens, x), **call)
    last, real = _last_inputs(cu_seqlens, weight.shape[1] - 1)
    return y.transpose(1, 2), x[0][last] * real.to(x.dtype)


@deterministic()
def backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument; the sum before the activation is computed again."""
    from causal_conv1d.cpp_functions import causal_conv1d_bwd_function

    values: Any = arguments
    x, weight, initial_state, cu_seqlens = (values[name] for name in ("x", "weight", "initial_state", "cu_seqlens"))
    dy, dfinal = gradients
    seq_idx = None if cu_seqlens is None else _documents(cu_seqlens, x)
    dx, dweight, dbias, dstate = causal_conv1d_bwd_function(
        _channels(x), weight, _close(values["bias"]), _channels(torch.zeros_like(x) if dy is None else dy), seq_idx,
        _channels(initial_state), None if cu_seqlens is not None else _channels(dfinal), None,
        initial_state is not None, values["activation"] == "silu",
    )  # fmt: skip
    dx = dx.transpose(1, 2)
    if cu_seqlens is not None and dfinal is not None:
        last, real = _last_inputs(cu_seqlens, weight.shape[1] - 1)
        exact = torch.promote_types(x.dtype, torch.float32)
        dx = dx[0].to(exact).index_add(0, last.flatten(), (dfinal.to(exact) * real).flatten(0, 1)).unsqueeze(0)
    return {"x": dx, "weight": dweight, "bias": dbias, "initial_state": None if dstate is None else dstate.mT}


def _channels(tensor: Tensor | None) -> Tensor | None:
    """Channels as the second axis, side by side in memory, and rows apart by multiples of eight: a view where it is so.

    Shapes:  b t c  ->  b c t
    """
    if tensor is None:
        return None
    apart, row, channel = tensor.stride()
    return (tensor if channel == 1 and apart % 8 == row % 8 == 0 else tensor.contiguous()).transpose(1, 2)


def _close(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _documents(cu_seqlens: Tensor, x: Tensor) -> Tensor:
    """The number of each token's document.  Shape:  1 t (int32)"""
    return document_ids(cu_seqlens, x.shape[1]).int().unsqueeze(0)


def _last_inputs(cu_seqlens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where the last inputs of every document stand, and which there are.  Shapes:  documents count    .. count 1"""
    starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    last = stops[:, None] + torch.arange(-count, 0, device=cu_seqlens.device)
    return last.clamp(min=0), (last >= starts[:, None]).unsqueeze(-1)
