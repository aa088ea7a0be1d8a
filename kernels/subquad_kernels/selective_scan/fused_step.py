"""The kernel of one token: the state is read and written once."""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def,assignment,misc"

from __future__ import annotations

import triton
import triton.language as tl

from subquad_kernels.selective_scan.tiles import LOG2_E, load_vector, sigmoid, step_and_slope
from subquad_kernels.triton_launch import QuickLaunch


@QuickLaunch
@triton.jit
def step_one(
    x, dt, A, B, C, D, z, dt_bias, initial, y, final, ungated,
    c, x_stride, dt_stride, B_stride, C_stride, z_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, INITIAL: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """h' = exp(dt A) h + dt x B,  y = (C . h' + D x) silu(z);  a program takes TILE_C channels of one sequence."""
    tiles = tl.cdiv(c, TILE_C)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    channels = (tl.program_id(0) % tiles) * TILE_C + tl.arange(0, TILE_C)
    columns = tl.arange(0, PAD_N)
    in_c, in_n = channels < c, columns < N
    offsets = channels[:, None] * N + columns[None, :]
    within = in_c[:, None] & in_n[None, :]
    states_at = sequence * c * N + offsets

    value = tl.load(x + sequence * x_stride + channels, mask=in_c, other=0.0).to(tl.float32)
    raw = tl.load(dt + sequence * dt_stride + channels, mask=in_c, other=0.0)
    step, _ = step_and_slope(raw, load_vector(dt_bias, channels, in_c, BIAS), in_c, SOFTPLUS)
    written = tl.load(B + sequence * B_stride + columns, mask=in_n, other=0.0).to(tl.float32)
    read = tl.load(C + sequence * C_stride + columns, mask=in_n, other=0.0).to(tl.float32)
    state = (step * value)[:, None] * written[None, :]
    if INITIAL:
        rates = tl.load(A + offsets, mask=within, other=0.0).to(tl.float32) * LOG2_E
        before = tl.load(initial + states_at, mask=within, other=0.0).to(tl.float32)
        state += tl.exp2(step[:, None] * rates) * before
    tl.store(final + states_at, state, mask=within)

    result = tl.sum(state * read[None, :], axis=1)
    if SKIP:
        result += load_vector(D, channels, in_c, SKIP) * value
    if GATE:
        tl.store(ungated + sequence * c + channels, result, mask=in_c)
        gate = tl.load(z + sequence * z_stride + channels, mask=in_c, other=0.0).to(tl.float32)
        result = result * gate * sigmoid(gate)
    tl.store(y + sequence * c + channels, result.to(y.dtype.element_ty), mask=in_c)
