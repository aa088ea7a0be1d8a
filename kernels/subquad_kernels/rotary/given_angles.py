"""The rotation by given angles as one Triton kernel a direction: queries, keys and angles are read once.

A program takes a tile of tokens and the heads of queries and keys that one angle turns, so that the backward adds up
its gradient in registers.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.tile_sizes import ceil_div, power_of_two
from subquad_kernels.triton_launch import QuickLaunch

TILE = 1024
"""Features of one head in a tile of tokens."""


def turned(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Both, rotated.  Shapes:  q: b t h k    k: b t h_kv k    angles: b t a s"""
    outputs = _empty(q), _empty(k)
    _launch(q, k, angles, None, None, None, *outputs)
    return outputs


def turned_back(q: Tensor, k: Tensor, angles: Tensor, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and the angles, from those of what was rotated."""
    outputs = _empty(q), _empty(k)
    dangles = torch.empty_like(angles, dtype=torch.float32, memory_format=torch.contiguous_format)
    _launch(q, k, angles, dq, dk, dangles, *outputs)
    return *outputs, dangles


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _launch(
    q: Tensor, k: Tensor, angles: Tensor, dq: Tensor | None, dk: Tensor | None, dangles: Tensor | None,
    out_q: Tensor, out_k: Tensor,
) -> None:  # fmt: skip
    b, t, a, pairs = angles.shape
    width = q.shape[3]
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    dq, dk = (None if x is None else x.contiguous() for x in (dq, dk))
    pad = power_of_two(pairs)
    tile_t = max(1, min(TILE // (2 * pad), power_of_two(t)))
    if not q.numel() + k.numel():
        return
    constants: dict[str, Any] = {
        "WIDTH": width,
        "PAIRS": pairs,
        "PAD": pad,
        "REST": power_of_two(width - 2 * pairs) if width > 2 * pairs else 0,
        "TILE_T": tile_t,
        "BACK": dq is not None,
    }
    _turn[(b * ceil_div(t, tile_t), a)](
        q, k, angles.contiguous(), dq, dk, dangles, out_q, out_k,
        t, a, q.shape[2] // a, k.shape[2] // a, *q.stride()[:3], *k.stride()[:3],
        **constants, num_warps=4 if tile_t * pad >= 256 else 1,
    )  # fmt: skip


@QuickLaunch
@triton.jit(do_not_specialize=["t", "a", "heads_q", "heads_k"])
def _turn(
    q, k, angles, dq, dk, dangles, out_q, out_k,
    t, a, heads_q, heads_k, q_batch, q_token, q_head, k_batch, k_token, k_head,
    WIDTH: tl.constexpr, PAIRS: tl.constexpr, PAD: tl.constexpr, REST: tl.constexpr, TILE_T: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """Turn the heads of one angle in a tile of tokens of one sequence; back, and add up what the angles get of it."""
    tiles = tl.cdiv(t, TILE_T)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tokens = (tl.program_id(0) % tiles) * TILE_T + tl.arange(0, TILE_T)
    turn = tl.program_id(1)
    rows = batch * t + tokens.to(tl.int64)  # of what is contiguous
    pairs = tl.arange(0, PAD)
    real = tokens < t
    inside = real[:, None] & (pairs < PAIRS)[None, :]
    at = (rows[:, None] * a + turn) * PAIRS + pairs[None, :]
    given = tl.load(angles + at, mask=inside, other=0.0).to(tl.float32)
    cos, sin = tl.cos(given), tl.sin(given)
    total = tl.zeros([TILE_T, PAD], tl.float32)
    for i in range(heads_q):
        head = turn * heads_q + i
        target = (rows * heads_q * a + head) * WIDTH
        source = batch * q_batch + tokens.to(tl.int64) * q_token + head * q_head
        total = _turn_head(q, source, dq, out_q, target, real, cos, sin, total, WIDTH, PAIRS, PAD, REST, BACK)
    for i in range(heads_k):
        head = turn * heads_k + i
        target = (rows * heads_k * a + head) * WIDTH
        source = batch * k_batch + tokens.to(tl.int64) * k_token + head * k_head
        total = _turn_head(k, source, dk, out_k, target, real, cos, sin, total, WIDTH, PAIRS, PAD, REST, BACK)
    if BACK:
        tl.store(dangles + at, total, mask=inside)


@triton.jit
def _turn_head(
    x, source, dy, out, target, real, cos, sin, total,
    WIDTH: tl.constexpr, PAIRS: tl.constexpr, PAD: tl.constexpr, REST: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """One head of the tile, of x or back of its gradient; the sum with what the angles get."""
    columns = tl.arange(0, 2 * PAD)
    inside = real[:, None] & (columns < 2 * PAIRS)[None, :]
    from_x, to = x + source[:, None] + columns[None, :], out + target[:, None] + columns[None, :]
    even, odd = _halves(tl.load(from_x, mask=inside, other=0.0).to(tl.float32), PAD)
    if BACK:
        pull_even, pull_odd = _halves(
            tl.load(dy + target[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32), PAD
        )
        first, second = pull_even * cos + pull_odd * sin, pull_odd * cos - pull_even * sin
        total += second * even - first * odd
    else:
        first, second = even * cos - odd * sin, odd * cos + even * sin
    result = tl.reshape(tl.join(first, second), [first.shape[0], 2 * PAD])
    tl.store(to, result.to(out.dtype.element_ty), mask=inside)
    if REST:
        left = 2 * PAIRS + tl.arange(0, REST)
        beyond = real[:, None] & (left < WIDTH)[None, :]
        if BACK:
            still = tl.load(dy + target[:, None] + left[None, :], mask=beyond)
        else:
            still = tl.load(x + source[:, None] + left[None, :], mask=beyond)
        tl.store(out + target[:, None] + left[None, :], still, mask=beyond)
    return total


@triton.jit
def _halves(rows, PAD: tl.constexpr):
    """The even and the odd columns.  Shapes:  t 2 PAD  ->  t PAD, t PAD"""
    return tl.split(tl.reshape(rows, [rows.shape[0], PAD, 2]))
