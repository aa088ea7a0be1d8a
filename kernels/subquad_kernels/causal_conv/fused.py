"""The causal convolution in one Triton kernel a direction: every input is read once, and the taps stay in registers.

A program is one warp with a tile of channels, a few neighbours a lane. It walks over the tokens of a stretch of time
and keeps the last w-1 inputs, backward also the w-1 gradients of x that later tokens still add to; it begins w-1
tokens early and (backward) ends w-1 late. Sums over tokens are written as one partial sum a stretch and added
afterwards: no atomics, the same bits every time. Gradients of initial states have a small kernel of their own, and so
has one token (`fused_step`).
"""

# What Triton compiles has no Python types, and tuples that grow.
# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.causal_conv.declaration import MOST_TAPS
from subquad_kernels.causal_conv.fused_step import step_one
from subquad_kernels.tile_sizes import ceil_div, power_of_two
from subquad_kernels.triton_documents import find_documents, halvings
from subquad_kernels.triton_launch import QuickLaunch

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

_LOG2_E = tl.constexpr(1.4426950408889634)

_MARKS = 128
"""Tokens that one program of `_mark` marks."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How one direction is laid out: channels and tokens a program, and how many tokens are loaded together."""

    tile_c: int
    stretch: int
    group: int = 4
    num_warps: int = 1


@lru_cache(maxsize=4096)
def launch_of(tokens: int, c: int, width: int, *, backward: bool) -> Launch:
    """Sizes for a call: wide loads where registers allow, stretches short enough to fill a large GPU.

    4224 programs are 32 warps on each of an H100's 132 multiprocessors; stretches under 16 tokens reread too much.
    """
    widest = 128 if backward or width > 4 else 256
    tile_c = min(widest, max(32, power_of_two(c)))
    tiles = -(-c // tile_c)
    stretch = power_of_two(max(1, tokens * tiles // 4224))
    return Launch(tile_c=tile_c, stretch=min(256, max(16, stretch)))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    launch: Launch | None = None,
) -> Outputs:
    """y and final_state."""
    call = _Call(x, weight, bias, initial_state, cu_seqlens, activation)
    if call.t == 1 and call.cu_seqlens is None:
        return call.step()
    return call.forward(launch or launch_of(call.b * call.t, call.c, call.width, backward=False))


def backward(
    arguments: Arguments,
    outputs: Outputs,
    gradients: tuple[Tensor | None, ...],
    launch: Launch | None = None,
) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument; the sum before the activation is computed again."""
    values: Mapping[str, Any] = arguments
    names = ("x", "weight", "bias", "initial_state", "cu_seqlens", "activation")
    call = _Call(*(values[name] for name in names))
    return call.backward(launch or launch_of(call.b * call.t, call.c, call.width, backward=True), *gradients)


class _Call:
    """The arguments of one call as the kernels take them: x a table of rows, one row a token."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        activation: str,
    ) -> None:
        if x.dtype == torch.float64:
            raise TypeError("causal_conv/fused computes in float32; for float64 use kernel='conv1d'")
        self.b, self.t, self.c = x.shape
        self.width = weight.shape[1]
        if self.width > MOST_TAPS:
            raise ValueError(f"causal_conv/fused has at most {MOST_TAPS} taps, not {self.width}: use kernel='conv1d'")
        self.x = _rows(x)
        self.taps = weight
        self.bias = None if bias is None else bias.contiguous()
        self.initial = None if initial_state is None else initial_state.contiguous()
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.marks = None if self.cu_seqlens is None else _marks(self.cu_seqlens, self.t)
        self.silu = activation == "silu"

    def _constants(self, launch: Launch) -> dict[str, Any]:
        return {
            "WIDTH": self.width,
            "TILE_C": launch.tile_c,
            "GROUP": launch.group,
            "SILU": self.silu,
            "BIAS": self.bias is not None,
            "PACKED": self.marks is not None,
            "INITIAL": self.initial is not None,
            "num_warps": launch.num_warps,
        }

    def _cut(self, launch: Launch) -> tuple[int, int]:
        return ceil_div(self.c, launch.tile_c), ceil_div(self.t, launch.stretch)

    def forward(self, launch: Launch) -> Outputs:
        """y: b t c    final_state: q (w-1) c"""
        tiles, stretches = self._cut(launch)
        y = torch.empty(self.b, self.t, self.c, dtype=self.x.dtype, device=self.x.device)
        _convolve[(tiles * self.b * stretches,)](
            self.x, self.taps, self.bias, self.initial, self.marks, y,
            self.t, self.c, self.b, launch.stretch, *self.taps.stride(), self.x.stride(0), **self._constants(launch),
        )  # fmt: skip
        return y, self._final_state()

    def _final_state(self) -> Tensor:
        """The last w-1 inputs of every sequence or document, its initial state among them where it is shorter."""
        kept = self.width - 1
        states = self.b if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        final = self.x.new_empty(states, kept, self.c)
        if kept:
            tile = min(256, power_of_two(self.c))
            _keep_last[(-(-self.c // tile) * states,)](
                self.x, self.initial, self.cu_seqlens, final, self.t, self.c, self.x.stride(0), KEPT=kept, TILE_C=tile,
                PACKED=self.cu_seqlens is not None, INITIAL=self.initial is not None, num_warps=1,
            )  # fmt: skip
        return final

    def step(self) -> Outputs:
        """One token of every sequence, by programs small enough to keep a large GPU busy."""
        b, c, kept = self.b, self.c, self.width - 1
        tile_b = 4 if b >= 64 else 1
        tile_c = min(256, max(32, power_of_two(c)))
        while tile_c > 64 and b * ceil_div(c, tile_c) < 528:
            tile_c //= 2
        y, final = self.x.new_empty(b, 1, c), self.x.new_empty(b, kept, c)
        step_one[(ceil_div(b, tile_b) * ceil_div(c, tile_c),)](
            self.x, self.taps, self.bias, self.initial, y, final, b, c, *self.taps.stride(), self.x.stride(0),
            WIDTH=self.width, TILE_B=tile_b, TILE_C=tile_c, SILU=self.silu, BIAS=self.bias is not None,
            INITIAL=self.initial is not None, num_warps=tile_b,
        )  # fmt: skip
        return y, final

    def backward(self, launch: Launch, dy: Tensor | None, dfinal: Tensor | None) -> dict[str, Tensor | None]:
        """Gradients; those of x and initial_state in their types, the others in fp32."""
        tiles, stretches = self._cut(launch)
        b, t, c, width = self.b, self.t, self.c, self.width
        dy = self.x.new_zeros(1, c).expand(b * t, c) if dy is None else _rows(dy)
        dfinal = None if dfinal is None else dfinal.contiguous()
        dx = torch.empty(b, t, c, dtype=self.x.dtype, device=self.x.device)
        # Row j < w: the gradient of tap j; row w: of the bias.
        sums = torch.empty(b * stretches, width + 1, c, dtype=torch.float32, device=self.x.device)
        constants = self._constants(launch)
        _differentiate[(tiles * b * stretches,)](
            self.x, self.taps, self.bias, self.initial, self.marks, dy, dfinal, dx, sums,
            t, c, b, launch.stretch, *self.taps.stride(), self.x.stride(0), dy.stride(0),
            FINAL=dfinal is not None, **constants,
        )  # fmt: skip
        dinitial = None
        if self.initial is not None:
            dinitial = torch.empty_like(self.initial)
            if width > 1:
                _differentiate_initial[(tiles * self.initial.shape[0],)](
                    self.x, self.taps, self.bias, self.initial, self.cu_seqlens, dy, dfinal, dinitial,
                    t, c, *self.taps.stride(), self.x.stride(0), dy.stride(0), FINAL=dfinal is not None,
                    **{name: value for name, value in constants.items() if name not in ("GROUP", "INITIAL")},
                )  # fmt: skip
        totals = sums.sum(0)
        return {
            "x": dx,
            "weight": totals[:width].T,
            "bias": None if self.bias is None else totals[width],
            "initial_state": dinitial,
        }


def _rows(tensor: Tensor) -> Tensor:
    """The tokens of all sequences as rows; a view where a slice of a wider tensor allows it.

    Shapes:  b t c  ->  b*t c
    """
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        tensor = tensor.contiguous()
    return tensor.reshape(-1, tensor.shape[-1])


def _marks(cu_seqlens: Tensor, t: int) -> Tensor:
    """256 document + 16 left + position, for every token: how many tokens of its document stand from it on and before
    it, both at most 15, which is all that eight taps can see.

    Shapes:  cu_seqlens: documents + 1  ->  t
    """
    marks = cu_seqlens.new_empty(t)
    documents = cu_seqlens.shape[0] - 1
    _mark[(-(-t // _MARKS),)](cu_seqlens, marks, t, documents, halvings(documents), TILE_T=_MARKS, num_warps=1)
    return marks


@QuickLaunch
@triton.jit(do_not_specialize=["t", "documents", "steps"])
def _mark(cu_seqlens, marks, t, documents, steps, TILE_T: tl.constexpr):
    tokens = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    document = find_documents(cu_seqlens, documents, steps, tokens)
    position = tl.minimum(tokens - tl.load(cu_seqlens + document), 15)
    left = tl.minimum(tl.maximum(tl.load(cu_seqlens + document + 1) - tokens, 0), 15)
    tl.store(marks + tokens, 256 * document + 16 * left + position, mask=tokens < t)


@triton.jit
def _place(c, b, TILE_C: tl.constexpr):
    """Tile, sequence (64 bits) and stretch of this program; neighbours differ in the tile."""
    program = tl.program_id(0)
    tiles = tl.cdiv(c, TILE_C)
    sequence = ((program // tiles) % b).to(tl.int64)
    return program % tiles, sequence, program // (tiles * b)


@triton.jit
def _load_taps(taps, bias, tap_c, tap_w, channels, within, WIDTH: tl.constexpr, BIAS: tl.constexpr):
    filters = ()
    for j in tl.static_range(WIDTH):
        filters += (tl.load(taps + channels * tap_c + j * tap_w, mask=within, other=0.0).to(tl.float32),)
    offset = tl.zeros(channels.shape, tl.float32)
    if BIAS:
        offset = tl.load(bias + channels, mask=within, other=0.0).to(tl.float32)
    return filters, offset


@triton.jit
def _load_rows(rows, stride, first, limit, columns, within, GROUP: tl.constexpr):
    """A tile of each of GROUP rows from `first` on in fp32; zeros from row `limit` on."""
    tiles = ()
    for i in tl.static_range(GROUP):
        tile = tl.load(rows + (first + i) * stride + columns, mask=within & (first + i < limit), other=0.0)
        tiles += (tile.to(tl.float32),)
    return tiles


@triton.jit
def _load_marks(marks, start, first, limit, GROUP: tl.constexpr, PACKED: tl.constexpr):
    """The marks of GROUP tokens, counted from token `start` as rows are; empty when not packed."""
    tags = ()
    if PACKED:
        for i in tl.static_range(GROUP):
            tags += (tl.load(marks + start + first + i, mask=first + i < limit, other=0),)
    return tags


@triton.jit
def _load_history(
    x_at, initial, x_stride, sequence, begin, c, channels, within,
    WIDTH: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """The w-1 inputs before token `begin`, oldest first; before the sequence its initial state or zeros."""
    history = ()
    for j in tl.static_range(WIDTH - 1):
        back = WIDTH - 1 - j
        value = tl.load(x_at - back * x_stride + channels, mask=within & (begin >= back), other=0.0).to(tl.float32)
        if INITIAL and not PACKED and begin < back:
            row = sequence * (WIDTH - 1) + j + begin
            value = tl.load(initial + row * c + channels, mask=within, other=0.0).to(tl.float32)
        history += (value,)
    return history


@triton.jit
def _reachable(
    seen, i: tl.constexpr, tag, initial, c, channels, within,
    WIDTH: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """The w inputs under the taps of a token, oldest first; those before its document from its initial state."""
    inputs = ()
    for j in tl.static_range(WIDTH):
        value = seen[i + j]
        if PACKED and j < WIDTH - 1:
            back = WIDTH - 1 - j
            outside = (tag & 15) < back
            if INITIAL:
                if outside:
                    row = (tag >> 8).to(tl.int64) * (WIDTH - 1) + (tag & 15) + j
                    value = tl.load(initial + row * c + channels, mask=within, other=0.0).to(tl.float32)
            else:
                value = tl.where(outside, 0.0, value)
        inputs += (value,)
    return inputs


@triton.jit
def _total(inputs, filters, offset, WIDTH: tl.constexpr):
    total = offset
    for j in tl.static_range(WIDTH):
        total += filters[j] * inputs[j]
    return total


@triton.jit
def _pull(dy, total, SILU: tl.constexpr):
    """The gradient of the sum before the activation."""
    pull = dy
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp2(-total * _LOG2_E))
        pull = dy * sigmoid * (1.0 + total * (1.0 - sigmoid))
    return pull


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "stretch"])
def _convolve(
    x, taps, bias, initial, marks, y, t, c, b, stretch, tap_c, tap_w, x_stride,
    WIDTH: tl.constexpr, TILE_C: tl.constexpr, GROUP: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
    PACKED: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    tile, sequence, index = _place(c, b, TILE_C)
    channels = tile * TILE_C + tl.arange(0, TILE_C)
    within = channels < c
    filters, offset = _load_taps(taps, bias, tap_c, tap_w, channels, within, WIDTH, BIAS)
    begin = index * stretch
    limit = tl.minimum(stretch, t - begin)
    x_at = x + (sequence * t + begin) * x_stride
    y_at = y + (sequence * t + begin) * c
    history = _load_history(
        x_at, initial, x_stride, sequence, begin, c, channels, within, WIDTH, PACKED, INITIAL
    )  # fmt: skip
    for base in range(0, limit, GROUP):
        seen = history + _load_rows(x_at, x_stride, base, limit, channels, within, GROUP)
        tags = _load_marks(marks, begin, base, limit, GROUP, PACKED)
        for i in tl.static_range(GROUP):
            tag = tags[i] if PACKED else 0
            inputs = _reachable(seen, i, tag, initial, c, channels, within, WIDTH, PACKED, INITIAL)
            total = _total(inputs, filters, offset, WIDTH)
            if SILU:
                total = total / (1.0 + tl.exp2(-total * _LOG2_E))
            mask = within & (base + i < limit)
            tl.store(y_at + (base + i) * c + channels, total.to(y.dtype.element_ty), mask=mask)
        history = seen[GROUP:]


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "stretch"])
def _differentiate(
    x, taps, bias, initial, marks, dy, dfinal, dx, sums, t, c, b, stretch, tap_c, tap_w, x_stride, dy_stride,
    WIDTH: tl.constexpr, TILE_C: tl.constexpr, GROUP: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
    PACKED: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """dx of a stretch, and its parts of the gradients of taps and bias.

    `pending` are the gradients of the last w-1 inputs, oldest first, which the next tokens still add to; an input's is
    complete w-1 tokens after it, so the walk goes on that far past the end (and counts those tokens in no sum).
    """
    tile, sequence, index = _place(c, b, TILE_C)
    channels = tile * TILE_C + tl.arange(0, TILE_C)
    within = channels < c
    filters, offset = _load_taps(taps, bias, tap_c, tap_w, channels, within, WIDTH, BIAS)
    begin = index * stretch
    limit = tl.minimum(stretch, t - begin)
    x_at = x + (sequence * t + begin) * x_stride
    dy_at = dy + (sequence * t + begin) * dy_stride
    dx_at = dx + (sequence * t + begin) * c
    history = _load_history(
        x_at, initial, x_stride, sequence, begin, c, channels, within, WIDTH, PACKED, INITIAL
    )  # fmt: skip
    zero = tl.zeros([TILE_C], tl.float32)
    pending, tap_grads, bias_grads = (), (), zero
    for _ in tl.static_range(WIDTH - 1):
        pending += (zero,)
    for _ in tl.static_range(WIDTH):
        tap_grads += (zero,)
    for base in range(0, limit + WIDTH - 1, GROUP):
        seen = history + _load_rows(x_at, x_stride, base, t - begin, channels, within, GROUP)
        results = _load_rows(dy_at, dy_stride, base, t - begin, channels, within, GROUP)
        tags = _load_marks(marks, begin, base, t - begin, GROUP, PACKED)
        for i in tl.static_range(GROUP):
            tag = tags[i] if PACKED else 0
            inputs = _reachable(seen, i, tag, initial, c, channels, within, WIDTH, PACKED, INITIAL)
            pull = _pull(results[i], _total(inputs, filters, offset, WIDTH), SILU)
            counted = tl.where(base + i < limit, pull, 0.0)
            bias_grads += counted
            grown, sums_so_far = (), ()
            for j in tl.static_range(WIDTH):
                sums_so_far += (tap_grads[j] + counted * inputs[j],)
                back = WIDTH - 1 - j
                share = filters[j] * pull
                if j < WIDTH - 1:
                    if PACKED:
                        share = tl.where((tag & 15) < back, 0.0, share)
                    share += pending[j]
                grown += (share,)
            tap_grads = sums_so_far
            # The input w-1 tokens ago is complete.
            token = base + i - (WIDTH - 1)
            grad = grown[0]
            if FINAL:
                if PACKED:
                    own = tl.load(marks + begin + token, mask=(token >= 0) & (token < limit), other=15 * 16)
                    left = (own >> 4) & 15
                    document = (own >> 8).to(tl.int64)
                else:
                    left = t - begin - token
                    document = sequence
                if (left < WIDTH) & (token >= 0) & (token < limit):
                    row = document * (WIDTH - 1) + WIDTH - 1 - left
                    grad += tl.load(dfinal + row * c + channels, mask=within, other=0.0).to(tl.float32)
            mask = within & (token >= 0) & (token < limit)
            tl.store(dx_at + token * c + channels, grad.to(dx.dtype.element_ty), mask=mask)
            pending = grown[1:]
        history = seen[GROUP:]
    stretches = tl.cdiv(t, stretch)
    part = sums + (sequence * stretches + index) * (WIDTH + 1) * c + channels
    for j in tl.static_range(WIDTH):
        tl.store(part + j * c, tap_grads[j], mask=within)
    tl.store(part + WIDTH * c, bias_grads, mask=within)


@QuickLaunch
@triton.jit(do_not_specialize=["t"])
def _differentiate_initial(
    x, taps, bias, initial, cu_seqlens, dy, dfinal, dinitial, t, c, tap_c, tap_w, x_stride, dy_stride,
    WIDTH: tl.constexpr, TILE_C: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr,
    FINAL: tl.constexpr,
):  # fmt: skip
    """Gradients of one document's initial state, from its first w-1 tokens and from what final_state took of it."""
    program = tl.program_id(0)
    tiles = tl.cdiv(c, TILE_C)
    document = (program // tiles).to(tl.int64)
    channels = (program % tiles) * TILE_C + tl.arange(0, TILE_C)
    within = channels < c
    filters, offset = _load_taps(taps, bias, tap_c, tap_w, channels, within, WIDTH, BIAS)
    begin, length = document * t, t
    if PACKED:
        begin = tl.load(cu_seqlens + document).to(tl.int64)
        length = tl.load(cu_seqlens + document + 1) - tl.load(cu_seqlens + document)
    states = document * (WIDTH - 1) * c + channels
    seen, grads = (), ()
    for j in tl.static_range(WIDTH - 1):
        seen += (tl.load(initial + states + j * c, mask=within, other=0.0).to(tl.float32),)
        grad = tl.zeros([TILE_C], tl.float32)
        if FINAL:  # row j is row j - length of the final state where the document has j tokens or fewer
            mask = within & (j >= length)
            grad = tl.load(dfinal + states + (j - length) * c, mask=mask, other=0.0).to(tl.float32)
        grads += (grad,)
    seen += _load_rows(x + begin * x_stride, x_stride, 0, length, channels, within, WIDTH - 1)
    results = _load_rows(dy + begin * dy_stride, dy_stride, 0, length, channels, within, WIDTH - 1)
    for i in tl.static_range(WIDTH - 1):
        inputs = seen[i : i + WIDTH]
        pull = _pull(results[i], _total(inputs, filters, offset, WIDTH), SILU)
        grown = ()
        for row in tl.static_range(WIDTH - 1):
            grad = grads[row]
            if row >= i:
                grad += filters[row - i] * pull
            grown += (grad,)
        grads = grown
    for j in tl.static_range(WIDTH - 1):
        tl.store(dinitial + states + j * c, grads[j].to(dinitial.dtype.element_ty), mask=within)


@QuickLaunch
@triton.jit(do_not_specialize=["t"])
def _keep_last(
    x, initial, cu_seqlens, final, t, c, x_stride,
    KEPT: tl.constexpr, TILE_C: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """The last w-1 inputs of one document, after the end of its initial state where it is shorter."""
    program = tl.program_id(0)
    tiles = tl.cdiv(c, TILE_C)
    document = (program // tiles).to(tl.int64)
    channels = (program % tiles) * TILE_C + tl.arange(0, TILE_C)
    within = channels < c
    begin, length = document * t, t
    if PACKED:
        begin = tl.load(cu_seqlens + document).to(tl.int64)
        length = tl.load(cu_seqlens + document + 1) - tl.load(cu_seqlens + document)
    states = document * KEPT * c + channels
    for j in tl.static_range(KEPT):
        token = length - KEPT + j
        value = tl.load(x + (begin + token) * x_stride + channels, mask=within & (token >= 0), other=0.0)
        if INITIAL and token < 0:
            value = tl.load(initial + states + (token + KEPT) * c, mask=within, other=0.0).to(value.dtype)
        tl.store(final + states + j * c, value, mask=within)
