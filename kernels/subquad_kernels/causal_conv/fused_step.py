"""The kernel of one token: the last inputs of a sequence are read once, and written with the new one behind them."""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def,assignment,misc"

from __future__ import annotations

import triton
import triton.language as tl

from subquad_kernels.triton_launch import QuickLaunch

_LOG2_E = tl.constexpr(1.4426950408889634)


@QuickLaunch
@triton.jit(do_not_specialize=["b"])
def step_one(
    x, taps, bias, initial, y, final, b, c, tap_c, tap_w, x_stride,
    WIDTH: tl.constexpr, TILE_B: tl.constexpr, TILE_C: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
    INITIAL: tl.constexpr,
):  # fmt: skip
    """y of one token, and the state after it; a program takes a tile of channels of a few sequences, one a warp.

    Those sequences share the taps, which a warp then finds in the multiprocessor's own cache.
    """
    tiles = tl.cdiv(c, TILE_C)
    sequence = (tl.program_id(0) // tiles).to(tl.int64) * TILE_B + tl.arange(0, TILE_B)[:, None]
    channels = (tl.program_id(0) % tiles) * TILE_C + tl.arange(0, TILE_C)[None, :]
    within = channels < c
    inside = within & (sequence < b)
    states = sequence * (WIDTH - 1) * c + channels

    own = tl.load(x + sequence * x_stride + channels, mask=inside, other=0.0)
    total = tl.zeros([TILE_B, TILE_C], tl.float32)
    if BIAS:
        total += tl.load(bias + channels, mask=within, other=0.0).to(tl.float32)
    for j in tl.static_range(WIDTH - 1):
        earlier = tl.zeros([TILE_B, TILE_C], tl.float32)
        if INITIAL:
            earlier = tl.load(initial + states + j * c, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(taps + channels * tap_c + j * tap_w, mask=within, other=0.0).to(tl.float32) * earlier
        if j > 0:
            tl.store(final + states + (j - 1) * c, earlier.to(final.dtype.element_ty), mask=inside)
    last = tl.load(taps + channels * tap_c + (WIDTH - 1) * tap_w, mask=within, other=0.0).to(tl.float32)
    total += last * own.to(tl.float32)
    if WIDTH > 1:
        tl.store(final + states + (WIDTH - 2) * c, own, mask=inside)
    if SILU:
        total = total / (1.0 + tl.exp2(-total * _LOG2_E))
    tl.store(y + sequence * c + channels, total.to(y.dtype.element_ty), mask=inside)
