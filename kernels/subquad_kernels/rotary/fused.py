"""The rotary embedding as one Triton kernel: queries and keys are read and written once, angles stay in registers.

A program takes a tile of tokens, computes their cosines and sines once, and turns the features of its share of the
heads. Angles are counted in turns: the whole turns are taken off in fp64, what remains is exact enough for fp32.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.rotary import given_angles
from subquad_kernels.tile_sizes import ceil_div, power_of_two
from subquad_kernels.triton_documents import find_documents, halvings
from subquad_kernels.triton_launch import QuickLaunch

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

_TWO_PI = tl.constexpr(2 * math.pi)
PROGRAMS = 1056
"""Heads are shared out until this many programs run: 8 on each of an H100's 132 multiprocessors."""


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
    if q.dtype == torch.float64:
        raise TypeError("rotary/fused computes in float32; for float64 use kernel='tables'")
    if angles is not None:
        return given_angles.turned(q, k, angles)
    return _rotated(q, k, cu_seqlens, position, start, theta, 1.0)


def backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """The gradients, rotated back."""
    values: dict[str, Any] = dict(arguments)
    dq, dk = (
        torch.zeros_like(values[name]) if gradient is None else gradient for name, gradient in zip("qk", gradients)
    )
    if values["angles"] is not None:
        dq, dk, dangles = given_angles.turned_back(values["q"], values["k"], values["angles"], dq, dk)
        return {"q": dq, "k": dk, "angles": dangles}
    cu_seqlens, position = values["cu_seqlens"], values["position"]
    dq, dk = _rotated(dq, dk, cu_seqlens, position, values["start"], values["theta"], -1.0)
    return {"q": dq, "k": dk}


def _rotated(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, position: Tensor | None, start: int, theta: float, sign: float
) -> tuple[Tensor, Tensor]:
    b, t, h, head_dim = q.shape
    h_kv = k.shape[2]
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    turned_q, turned_k = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    half = head_dim // 2
    pad = power_of_two(half)
    tile_t = max(1, min(1024 // pad, power_of_two(t)))
    tiles = b * ceil_div(t, tile_t)
    heads_each = ceil_div(h + h_kv, min(h + h_kv, ceil_div(PROGRAMS, max(tiles, 1))))
    if tiles:
        _rotate[(tiles, ceil_div(h + h_kv, heads_each))](
            q, k, turned_q, turned_k, cu_seqlens, position,
            t, start, h, h_kv, heads_each, documents, halvings(documents), *q.stride()[:3], *k.stride()[:3],
            LOG2_RATIO=-2.0 * math.log2(theta) / head_dim, SIGN=sign, HALF=half, PAD=pad, TILE_T=tile_t,
            PACKED=cu_seqlens is not None, PLACED=position is not None, num_warps=4 if tile_t * pad >= 256 else 1,
        )  # fmt: skip
    return turned_q, turned_k


@QuickLaunch
@triton.jit(do_not_specialize=["t", "start", "h", "h_kv", "heads_each", "documents", "steps"])
def _rotate(
    q, k, turned_q, turned_k, cu_seqlens, position,
    t, start, h, h_kv, heads_each, documents, steps,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    LOG2_RATIO: tl.constexpr, SIGN: tl.constexpr, HALF: tl.constexpr, PAD: tl.constexpr, TILE_T: tl.constexpr,
    PACKED: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """Turn the heads [first, last) of a tile of tokens of one sequence; heads from h on are those of k."""
    tiles = tl.cdiv(t, TILE_T)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tokens = (tl.program_id(0) % tiles) * TILE_T + tl.arange(0, TILE_T)
    pairs = tl.arange(0, PAD)
    inside = (tokens < t)[:, None] & (pairs < HALF)[None, :]
    rows = tokens.to(tl.int64)
    if PACKED:
        places = (tokens - tl.load(cu_seqlens + find_documents(cu_seqlens, documents, steps, tokens))).to(tl.float64)
    else:
        places = (start + rows).to(tl.float64)
        if PLACED:
            places += tl.load(position).to(tl.float64)
    # theta^(-2 i / k) in turns a token. A constant, since a float that is an argument arrives in fp32.
    rates = tl.exp2(pairs.to(tl.float64) * LOG2_RATIO) / _TWO_PI
    turns = places[:, None] * rates[None, :]
    angles = ((turns - tl.floor(turns)) * _TWO_PI).to(tl.float32)
    cos, sin = tl.cos(angles), tl.sin(angles) * SIGN

    first = tl.program_id(1) * heads_each
    for head in range(first, min(first + heads_each, h)):
        _turn(
            q + batch * q_batch + head * q_head, q_token,
            turned_q + (batch * t * h + head) * (2 * HALF), h * (2 * HALF), rows, pairs, inside, cos, sin, HALF,
        )  # fmt: skip
    for head in range(max(first - h, 0), min(first + heads_each - h, h_kv)):
        _turn(
            k + batch * k_batch + head * k_head, k_token,
            turned_k + (batch * t * h_kv + head) * (2 * HALF), h_kv * (2 * HALF), rows, pairs, inside, cos, sin, HALF,
        )  # fmt: skip


@triton.jit
def _turn(source, source_row, target, target_row, rows, pairs, inside, cos, sin, HALF: tl.constexpr):
    """Turn the pairs of one head's tile of tokens."""
    at = source + rows[:, None] * source_row + pairs[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    to = target + rows[:, None] * target_row + pairs[None, :]
    tl.store(to, (low * cos - high * sin).to(target.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (high * cos + low * sin).to(target.dtype.element_ty), mask=inside)
