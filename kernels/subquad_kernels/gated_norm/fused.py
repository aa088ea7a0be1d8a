"""The gated norm as one Triton kernel a direction: every tensor is read or written once, the rest stays in registers.

A program has one group of channels and a stretch of tokens, which it takes a tile at a time with the weights in
registers. The backward computes the norm again from what the forward read. Gradients of the weights are summed over a
program's tokens and written once, and torch adds the programs: no atomics, equal bits in every run.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.gated_norm.definition import ACTIVATIONS
from subquad_kernels.tile_sizes import ceil_div, power_of_two
from subquad_kernels.triton_launch import QuickLaunch

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

_LOG2_E = tl.constexpr(1.4426950408889634)
# The place of each in ACTIVATIONS, and one more: 0 is no gate, the gate as it is comes last.
_SILU, _SIGMOID = tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Elements a program holds of each tensor at a time, elements a warp has of them, and programs in all."""

    tile: int
    warp: int
    programs: int

    def rows(self, pad: int, tokens: int) -> int:
        """Tokens of a tile."""
        return max(1, min(self.tile // pad, power_of_two(tokens)))

    def num_warps(self, elements: int) -> int:
        """Warps for a tile of so many elements."""
        return max(1, min(16, elements // self.warp))


FORWARD = Launch(tile=2048, warp=256, programs=4224)
BACKWARD = Launch(tile=1024, warp=512, programs=1056)
"""4224 and 1056 programs: 32 and 8 on each of an H100's 132 multiprocessors."""


def forward(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    groups: int,
    gate_first: bool,
    norm: bool,
    centre: bool,
    activation: str,
    eps: float,
    launch: Launch = FORWARD,
) -> Outputs:
    """y: b t c"""
    call = _Call(x, z, weight, bias, skip, skip_weight, groups, gate_first, norm, centre, activation, eps)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if programs := call.programs(launch):
        _normalise[programs](
            call.x, call.z, call.skip, *call.weights, y, call.tokens, x.shape[1], call.stretch(launch),
            *call.strides, **call.constants(launch),
        )  # fmt: skip
    return (y,)


def backward(
    arguments: Arguments,
    outputs: Outputs,
    gradients: tuple[Tensor | None, ...],
    launch: Launch = BACKWARD,
) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument."""
    values: dict[str, Any] = dict(arguments)
    call = _Call(**values)
    (dy,) = gradients
    assert dy is not None
    x, (weight, bias, skip_weight) = call.x, call.weights
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dz, dskip = (None if of is None else torch.empty_like(dx) for of in (call.z, call.skip))
    programs = call.programs(launch)
    parts = programs[0] if programs else 0
    dweight, dbias, dskip_weight = (
        None if of is None else x.new_empty(parts, x.shape[2], dtype=torch.float32)
        for of in (weight, bias, skip_weight)
    )
    if programs:
        _differentiate[programs](
            x, call.z, call.skip, *call.weights, dy.contiguous(), dx, dz, dskip, dweight, dbias,
            dskip_weight, call.tokens, x.shape[1], call.stretch(launch), *call.strides, **call.constants(launch),
        )  # fmt: skip
    found: dict[str, Tensor | None] = {"x": dx, "z": dz, "skip": dskip}
    for name, of, parts_of in (("weight", weight, dweight), ("bias", bias, dbias)):
        if of is not None and parts_of is not None:
            shared = len(of) != x.shape[2]
            found[name] = parts_of.unflatten(1, (call.groups, -1)).sum((0, 1)) if shared else parts_of.sum(0)
    if skip_weight is not None and dskip_weight is not None:
        found["skip_weight"] = dskip_weight.unflatten(1, (len(skip_weight), -1)).sum((0, 2))
    return found


class _Call:
    """The arguments of one call as the kernels take them."""

    def __init__(
        self,
        x: Tensor,
        z: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        skip: Tensor | None,
        skip_weight: Tensor | None,
        groups: int,
        gate_first: bool,
        norm: bool,
        centre: bool,
        activation: str,
        eps: float,
    ) -> None:
        if x.dtype == torch.float64:
            raise TypeError("gated_norm/fused computes in float32; for float64 use kernel='composed'")
        self.x = x if x.stride(2) == 1 else x.contiguous()
        self.z, self.skip = (part if part is None or part.stride(2) == 1 else part.contiguous() for part in (z, skip))
        self.weights = [None if part is None else part.contiguous() for part in (weight, bias, skip_weight)]
        b, t, c = x.shape
        self.tokens, self.groups, self.width = b * t, groups, c // groups
        self.pad = power_of_two(self.width)
        self.strides = [
            stride for part in (self.x, self.z, self.skip) for stride in ((0, 0) if part is None else part.stride()[:2])
        ]
        self._constants: dict[str, Any] = {
            "EPS": eps,
            "WIDTH": self.width,
            "PAD": self.pad,
            "GROUPS": groups,
            "HEAD": 1 if skip_weight is None else c // skip_weight.shape[0],
            "GATE_FIRST": gate_first,
            "NORM": norm,
            "CENTRE": centre,
            "GATE": 0 if z is None else 1 + ACTIVATIONS.index(activation),
            "WEIGHT": weight is not None,
            "SHARED": weight is not None and weight.shape[0] != c,
            "BIAS": bias is not None,
            "SHARED_BIAS": bias is not None and bias.shape[0] != c,
            "SKIP": skip is not None,
        }

    def programs(self, launch: Launch) -> tuple[int, int] | None:
        """Stretches of tokens times groups; None where there is nothing to compute."""
        stretch = self.stretch(launch)
        return (ceil_div(self.tokens, stretch), self.groups) if self.tokens and self.width else None

    def stretch(self, launch: Launch) -> int:
        """Tokens of a program: whole tiles, as many as leave the wanted number of programs."""
        rows = launch.rows(self.pad, max(1, self.tokens))
        tiles = ceil_div(max(1, self.tokens), rows)
        return rows * ceil_div(tiles, max(1, launch.programs // self.groups))

    def constants(self, launch: Launch) -> dict[str, Any]:
        """What the kernels are compiled for."""
        rows = launch.rows(self.pad, max(1, self.tokens))
        return {**self._constants, "ROWS": rows, "num_warps": launch.num_warps(rows * self.pad)}


@triton.jit
def _half_open(gate):
    """The logistic function; its exponential stops at 2^126, before it overflows."""
    return 1 / (1 + tl.exp2(tl.minimum(-gate * _LOG2_E, 126.0)))


@triton.jit
def _opened(gate, GATE: tl.constexpr):
    """act(z), and its derivative."""
    opened, slope = gate, tl.full(gate.shape, 1.0, tl.float32)
    if GATE <= _SIGMOID:
        half = _half_open(gate)
        opened = gate * half if GATE == _SILU else half
        slope = half * (1 + gate * (1 - half)) if GATE == _SILU else half * (1 - half)
    return opened, slope


@triton.jit
def _loaded(source, by_batch, by_token, batch, token, channels, inside):
    """A tile in fp32, from rows that may be parts of wider ones."""
    at = source + (batch * by_batch + token * by_token)[:, None] + channels
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _centred(size, wide, WIDTH: tl.constexpr):
    """Less the mean of each row; zeros stay beyond the group's channels."""
    return tl.where(wide[None, :], size - (tl.sum(size, axis=1) / WIDTH)[:, None], 0.0)


@QuickLaunch
@triton.jit(do_not_specialize=["tokens", "t", "stretch"])
def _normalise(
    x, z, skip, weight, bias, skip_weight, y,
    tokens, t, stretch, x_batch, x_token, z_batch, z_token, skip_batch, skip_token,
    EPS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, GROUPS: tl.constexpr, HEAD: tl.constexpr,
    GATE_FIRST: tl.constexpr, NORM: tl.constexpr, CENTRE: tl.constexpr, GATE: tl.constexpr, WEIGHT: tl.constexpr,
    SHARED: tl.constexpr, BIAS: tl.constexpr, SHARED_BIAS: tl.constexpr, SKIP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y of a stretch of tokens and one group."""
    group = tl.program_id(1)
    columns = tl.arange(0, PAD)
    wide = columns < WIDTH
    channels = group * WIDTH + columns
    if WEIGHT:
        scale = tl.load(weight + (columns if SHARED else channels), mask=wide, other=0.0).to(tl.float32)
    if BIAS:
        shift = tl.load(bias + (columns if SHARED_BIAS else channels), mask=wide, other=0.0).to(tl.float32)
    if SKIP:
        carried = tl.load(skip_weight + channels // HEAD, mask=wide, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * stretch
    for tile in range(0, stretch, ROWS):
        rows = first + tile + tl.arange(0, ROWS)
        inside = (rows < tokens)[:, None] & wide[None, :]
        batch, token = rows // t, rows % t
        value = _loaded(x, x_batch, x_token, batch, token, channels, inside)
        if SKIP:
            value += carried * _loaded(skip, skip_batch, skip_token, batch, token, channels, inside)
        if GATE:
            opened, _ = _opened(_loaded(z, z_batch, z_token, batch, token, channels, inside), GATE)
        size = value * opened if GATE_FIRST else value
        if CENTRE:
            size = _centred(size, wide, WIDTH)
        normal = size
        if NORM:
            normal *= tl.rsqrt(tl.sum(size * size, axis=1) / WIDTH + EPS)[:, None]
        if WEIGHT:
            normal *= scale
        if BIAS:
            normal += shift
        if GATE and not GATE_FIRST:
            normal *= opened
        tl.store(y + rows[:, None] * (GROUPS * WIDTH) + channels, normal.to(y.dtype.element_ty), mask=inside)


@QuickLaunch
@triton.jit(do_not_specialize=["tokens", "t", "stretch"])
def _differentiate(
    x, z, skip, weight, bias, skip_weight, dy, dx, dz, dskip, dweight, dbias, dskip_weight,
    tokens, t, stretch, x_batch, x_token, z_batch, z_token, skip_batch, skip_token,
    EPS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, GROUPS: tl.constexpr, HEAD: tl.constexpr,
    GATE_FIRST: tl.constexpr, NORM: tl.constexpr, CENTRE: tl.constexpr, GATE: tl.constexpr, WEIGHT: tl.constexpr,
    SHARED: tl.constexpr, BIAS: tl.constexpr, SHARED_BIAS: tl.constexpr, SKIP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of a stretch of tokens and one group, and its part of those of the weights."""
    group = tl.program_id(1)
    columns = tl.arange(0, PAD)
    wide = columns < WIDTH
    channels = group * WIDTH + columns
    if WEIGHT:
        scale = tl.load(weight + (columns if SHARED else channels), mask=wide, other=0.0).to(tl.float32)
        d_scale = tl.zeros([PAD], tl.float32)
    if BIAS:
        shift = tl.load(bias + (columns if SHARED_BIAS else channels), mask=wide, other=0.0).to(tl.float32)
        d_shift = tl.zeros([PAD], tl.float32)
    if SKIP:
        carried = tl.load(skip_weight + channels // HEAD, mask=wide, other=0.0).to(tl.float32)
        d_carried = tl.zeros([PAD], tl.float32)
    first = tl.program_id(0).to(tl.int64) * stretch
    for tile in range(0, stretch, ROWS):
        rows = first + tile + tl.arange(0, ROWS)
        inside = (rows < tokens)[:, None] & wide[None, :]
        batch, token = rows // t, rows % t
        at = rows[:, None] * (GROUPS * WIDTH) + channels
        value = _loaded(x, x_batch, x_token, batch, token, channels, inside)
        pull = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if SKIP:
            own = _loaded(skip, skip_batch, skip_token, batch, token, channels, inside)
            value += carried * own
        if GATE:
            opened, slope = _opened(_loaded(z, z_batch, z_token, batch, token, channels, inside), GATE)
        size = value * opened if GATE_FIRST else value
        if CENTRE:
            size = _centred(size, wide, WIDTH)
        normal = size
        if NORM:
            reciprocal = tl.rsqrt(tl.sum(size * size, axis=1) / WIDTH + EPS)[:, None]
            normal *= reciprocal
        scaled = pull if GATE_FIRST or not GATE else pull * opened
        left = normal
        if BIAS:
            d_shift += tl.sum(scaled, axis=0)
        if WEIGHT:
            d_scale += tl.sum(scaled * normal, axis=0)
            scaled *= scale
            left *= scale
        if BIAS:
            left += shift
        d_size = scaled
        if NORM:
            d_size -= normal * (tl.sum(scaled * normal, axis=1) / WIDTH)[:, None]
            if CENTRE:
                d_size -= (tl.sum(scaled, axis=1) / WIDTH)[:, None]
            d_size *= reciprocal
        d_value = d_size * opened if GATE_FIRST else d_size
        tl.store(dx + at, d_value.to(dx.dtype.element_ty), mask=inside)
        if GATE:
            d_opened = d_size * value if GATE_FIRST else pull * left
            tl.store(dz + at, (d_opened * slope).to(dz.dtype.element_ty), mask=inside)
        if SKIP:
            d_carried += tl.sum(d_value * own, axis=0)
            tl.store(dskip + at, (d_value * carried).to(dskip.dtype.element_ty), mask=inside)
    part = tl.program_id(0).to(tl.int64) * (GROUPS * WIDTH) + channels
    if WEIGHT:
        tl.store(dweight + part, d_scale, mask=wide)
    if BIAS:
        tl.store(dbias + part, d_shift, mask=wide)
    if SKIP:
        tl.store(dskip_weight + part, d_carried, mask=wide)
