"""The leaky sum in Triton: a program walks over one document with a tile of channels, its state in registers.

Backwards it walks from the end:  g_t = dy_t + decay g_{t+1}  is the gradient of x_t, and  g_t y_{t-1} decay  its part
of the gradient of log_decay. Parts are written per document and added afterwards: no atomics, the same bits each time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_C = 64


def forward(
    x: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and final_state."""
    if x.dtype == torch.float64:
        raise TypeError("leaky_sum/fused computes in float32; for float64 use kernel='reference'")
    x, log_decay, bounds = x.contiguous(), log_decay.contiguous(), _bounds(x, cu_seqlens)
    initial_state = None if initial_state is None else initial_state.contiguous()
    documents, c = bounds.shape[0] - 1, x.shape[2]
    y, final_state = torch.empty_like(x), x.new_empty(documents, c, dtype=torch.float32)
    _sum[(documents, triton.cdiv(c, TILE_C))](
        x, log_decay, initial_state, bounds, y, final_state, c,
        INITIAL=initial_state is not None, TILE_C=TILE_C, num_warps=2,
    )  # fmt: skip
    return y, final_state


def backward(
    arguments: dict[str, Any], outputs: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...]
) -> dict[str, Tensor | None]:
    """Gradients of x, log_decay and initial_state."""
    x, log_decay, initial = arguments["x"], arguments["log_decay"].contiguous(), arguments["initial_state"]
    initial = None if initial is None else initial.contiguous()
    y, bounds = outputs[0].contiguous(), _bounds(x, arguments["cu_seqlens"])
    dy, dfinal = (None if gradient is None else gradient.contiguous() for gradient in gradients)
    documents, c = bounds.shape[0] - 1, x.shape[2]
    dx, dinitial = torch.empty_like(y), y.new_empty(documents, c, dtype=torch.float32)
    parts = torch.empty_like(dinitial)
    _sum_back[(documents, triton.cdiv(c, TILE_C))](
        y, log_decay, initial, bounds, dy, dfinal, dx, parts, dinitial, c,
        INITIAL=initial is not None, OUTPUT=dy is not None, FINAL=dfinal is not None, TILE_C=TILE_C, num_warps=2,
    )  # fmt: skip
    return {"x": dx, "log_decay": parts.sum(0), "initial_state": None if initial is None else dinitial}


def _bounds(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where documents begin and end among the b t rows; without boundaries each sequence is one."""
    b, t, _ = x.shape
    return torch.arange(b + 1, device=x.device) * t if cu_seqlens is None else cu_seqlens


@triton.jit
def _sum(x, log_decay, initial, bounds, y, final_state, c, INITIAL: tl.constexpr, TILE_C: tl.constexpr):
    document = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    inside = channels < c
    decay = tl.exp(tl.load(log_decay + channels, mask=inside, other=0.0).to(tl.float32))
    state = tl.zeros([TILE_C], tl.float32)
    if INITIAL:
        state = tl.load(initial + document * c + channels, mask=inside, other=0.0).to(tl.float32)
    begin = tl.load(bounds + document).to(tl.int64)
    end = tl.load(bounds + document + 1).to(tl.int64)
    for token in range(begin, end):
        state = decay * state + tl.load(x + token * c + channels, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + token * c + channels, state.to(y.dtype.element_ty), mask=inside)
    tl.store(final_state + document * c + channels, state, mask=inside)


@triton.jit
def _sum_back(
    y, log_decay, initial, bounds, dy, dfinal, dx, parts, dinitial, c,
    INITIAL: tl.constexpr, OUTPUT: tl.constexpr, FINAL: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    document = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    inside = channels < c
    decay = tl.exp(tl.load(log_decay + channels, mask=inside, other=0.0).to(tl.float32))
    before = tl.zeros([TILE_C], tl.float32)
    if INITIAL:
        before = tl.load(initial + document * c + channels, mask=inside, other=0.0).to(tl.float32)
    pull = tl.zeros([TILE_C], tl.float32)  # the gradient of the state, as far as later tokens gave it
    if FINAL:
        pull = tl.load(dfinal + document * c + channels, mask=inside, other=0.0).to(tl.float32)
    part = tl.zeros([TILE_C], tl.float32)
    begin = tl.load(bounds + document).to(tl.int64)
    end = tl.load(bounds + document + 1).to(tl.int64)
    for back in range(0, end - begin):
        token = end - 1 - back
        if OUTPUT:
            pull += tl.load(dy + token * c + channels, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + token * c + channels, pull.to(dx.dtype.element_ty), mask=inside)
        last = tl.load(y + (token - 1) * c + channels, mask=inside & (token > begin), other=0.0).to(tl.float32)
        pull *= decay
        part += pull * tl.where(token > begin, last, before)
    tl.store(parts + document * c + channels, part, mask=inside)
    tl.store(dinitial + document * c + channels, pull, mask=inside)
