"""The causal convolution with a program for every tile of tokens and channels: w loads, all but one from the cache.

    y_t = act( bias + sum_j weight[:, j] x_{t-w+1+j} )

The backward is that of the operator's kernel `taps`: a kernel need not do everything anew.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from subquad_kernels import CATALOGUE

TILE_T, TILE_C = 16, 128


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """y: b t c, and final_state: b (w-1) c, the last inputs."""
    if initial_state is not None or cu_seqlens is not None or x.dtype == torch.float64:
        raise ValueError("causal_conv/hopper_tiles takes whole sequences without a state, not in float64")
    b, t, c = x.shape
    width = weight.shape[1]
    x, weight, y = x.contiguous(), weight.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    _convolve[(triton.cdiv(t, TILE_T), triton.cdiv(c, TILE_C), b)](
        x, weight, bias, y, t, c,
        WIDTH=width, BIAS=bias is not None, SILU=activation == "silu", TILE_T=TILE_T, TILE_C=TILE_C,
    )  # fmt: skip
    kept = width - 1
    return y, F.pad(x, (0, 0, max(0, kept - t), 0))[:, max(0, t - kept) :].clone()


def backward(
    arguments: dict[str, Any], outputs: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...]
) -> dict[str, Tensor | None]:
    """Gradients of x, weight and bias."""
    return CATALOGUE.kernel("causal_conv", "taps").torch_half.backward(arguments, outputs, gradients)


@triton.jit
def _convolve(
    x, weight, bias, y, t, c,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, TILE_T: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    channels = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    sequence = tl.program_id(2).to(tl.int64) * t * c
    within = channels < c
    total = tl.zeros([TILE_T, TILE_C], tl.float32)
    if BIAS:
        total += tl.load(bias + channels, mask=within, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(WIDTH):
        rows = tokens - (WIDTH - 1 - tap)
        seen = (rows >= 0) & (rows < t)
        at = x + sequence + rows[:, None] * c + channels[None, :]
        filters = tl.load(weight + channels * WIDTH + tap, mask=within, other=0.0).to(tl.float32)
        total += filters[None, :] * tl.load(at, mask=seen[:, None] & within[None, :], other=0.0).to(tl.float32)
    if SILU:
        total = total * tl.sigmoid(total)
    inside = (tokens < t)[:, None] & within[None, :]
    tl.store(y + sequence + tokens[:, None] * c + channels[None, :], total.to(y.dtype.element_ty), mask=inside)
