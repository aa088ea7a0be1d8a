"""The selective scan in one Triton kernel a direction: states stay in registers, everything around them is fused.

A program is one warp. It holds the states [TILE_C, N] of a tile of channels and walks over the tokens of one segment
of one sequence; four lanes share a channel (at n = 16), so that sums over n are short, and loads of x, dt and z are
contiguous in channels. Where sequences times tiles are too few for the device, time is cut into segments: a first
kernel finds what each segment does to a state (a decay and a write), every program of the second kernel starts by
composing the segments before its own. The backward walks chunks of 16 tokens from last to first, computes the states
inside a chunk again from the saved one, and cuts time in the same way. Sums over channels and over sequences are
written as one partial sum a program, and added afterwards: no atomics, the same bits every time.
README.md has the equations and the reasons for the sizes.
"""

# What Triton compiles has no Python types, and tuples that grow.
# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.selective_scan.declaration import CHUNK
from subquad_kernels.triton_documents import find_documents, halvings
from subquad_kernels.triton_launch import QuickLaunch

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))

_MARKS = 128
"""Tokens that one program of `_mark` marks."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How one direction is laid out on a device; changes speed, never results beyond rounding.

    `tile_c` channels a program; `group` tokens (a divisor of 16) whose inputs are loaded together and, backward, whose
    states are held together. Where fewer than `enough` programs would run, time is cut so that `programs` do, into
    segments of at least `shortest` tokens.
    """

    tile_c: int
    group: int
    num_warps: int = 1
    enough: int = 528
    programs: int = 1056
    shortest: int = 64
    segment_len: int | None = None


@lru_cache(maxsize=256)
def launch_of(n: int, *, backward: bool) -> Launch:
    """Sizes for a state size: 16 states a lane, so that the states and decays of a backward's group fit in registers.

    1056 programs are 8 warps on each of an H100's 132 multiprocessors, what 255 registers a lane leave room for. The
    forward holds less, and four times as many were fastest (README).
    """
    padded = _power_of_two(n)
    tile_c = min(64, max(8 if backward else 16, 512 // padded))
    return Launch(tile_c=tile_c, group=2) if backward else Launch(tile_c=tile_c, group=8, programs=4224)


def forward(launch: Launch | None = None, **arguments: Argument) -> Outputs:
    """y, final_state and the residuals."""
    call = _Call(arguments)
    return call.forward(launch or launch_of(call.n, backward=False))


def backward(
    arguments: Arguments,
    outputs: Outputs,
    gradients: tuple[Tensor | None, ...],
    launch: Launch | None = None,
) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument, from the gradients of y and of final_state."""
    _, _, boundaries, ungated = outputs
    call = _Call(arguments)
    return call.backward(launch or launch_of(call.n, backward=True), boundaries, ungated, *gradients)


class _Call:
    """The arguments of one call as the kernels take them: every tensor a table of rows, one row a token."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        x = values["x"]
        if x.dtype == torch.float64:
            raise TypeError("selective_scan/fused computes in float32; for float64 use kernel='chunked'")
        self.x, self.dt, self.B, self.C = (_rows(values[name]) for name in ("x", "dt", "B", "C"))
        self.z = None if values["z"] is None else _rows(values["z"])
        self.A: Tensor = values["A"].contiguous()
        self.D, self.dt_bias, self.initial = (
            None if values[name] is None else values[name].contiguous() for name in ("D", "dt_bias", "initial_state")
        )
        self.b, self.t, self.c = x.shape
        self.n = self.A.shape[1]
        self.softplus = bool(values["softplus"])
        cu_seqlens = values["cu_seqlens"]
        self.documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.marks = None if cu_seqlens is None else _marks(cu_seqlens, self.t)

    def _cut(self, launch: Launch) -> tuple[int, int, int]:
        """Tiles of channels, segments of time, and tokens a segment (whole chunks)."""
        tiles = -(-self.c // launch.tile_c)
        if launch.segment_len is not None:
            wanted = launch.segment_len
        else:
            segments = -(-launch.programs // (tiles * self.b)) if tiles * self.b < launch.enough else 1
            wanted = max(launch.shortest, -(-self.t // segments))
        segment_len = -(-wanted // CHUNK) * CHUNK
        return tiles, -(-self.t // segment_len), segment_len

    def _constants(self, launch: Launch) -> dict[str, Any]:
        return {
            "N": self.n,
            "PAD_N": _power_of_two(self.n),
            "TILE_C": launch.tile_c,
            "CHUNK": CHUNK,
            "GROUP": launch.group,
            "SOFTPLUS": self.softplus,
            "BIAS": self.dt_bias is not None,
            "PACKED": self.marks is not None,
            "num_warps": launch.num_warps,
        }

    def _new(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)

    def _states(self, initial: Tensor | None) -> Tensor:
        """One state a sequence or document, filled only where a kernel may leave it: an empty document's."""
        if self.documents is None:
            return self._new(self.b, self.c, self.n)
        if initial is None:
            return self._new(self.documents, self.c, self.n).zero_()
        return initial.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def forward(self, launch: Launch) -> Outputs:
        """y: b t c    final_state: q c n    boundaries: (t-1)//16 b n c    ungated: b t c or 0"""
        tiles, segments, segment_len = self._cut(launch)
        y = torch.empty(self.b, self.t, self.c, dtype=self.x.dtype, device=self.x.device)
        ungated = self._new(0) if self.z is None else self._new(self.b, self.t, self.c)
        boundaries = self._new((self.t - 1) // CHUNK, self.b, self.n, self.c)
        final = self._states(self.initial)
        decays, writes = (self._new(segments - 1, self.b, self.c, self.n) for _ in range(2))
        constants = self._constants(launch) | {"INITIAL": self.initial is not None}
        if segments > 1:
            _summarise[(tiles * self.b * (segments - 1),)](
                self.x, self.dt, self.A, self.B, self.dt_bias, self.initial, self.marks, decays, writes,
                self.t, self.c, self.b, segment_len, self.x.stride(0), self.dt.stride(0), self.B.stride(0),
                **constants,
            )  # fmt: skip
        _scan[(tiles * self.b * segments,)](
            self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias, self.initial, self.marks,
            decays, writes, y, final, boundaries, ungated,
            self.t, self.c, self.b, segments, segment_len,
            self.x.stride(0), self.dt.stride(0), self.B.stride(0), self.C.stride(0), _stride(self.z),
            SKIP=self.D is not None, GATE=self.z is not None, **constants,
        )  # fmt: skip
        return y, final, boundaries, ungated

    def backward(
        self, launch: Launch, boundaries: Tensor, ungated: Tensor, dy: Tensor | None, dfinal: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Gradients in the types of their tensors; sums over programs are taken at the end."""
        tiles, segments, segment_len = self._cut(launch)
        b, t, c, n = self.b, self.t, self.c, self.n
        dy = torch.zeros_like(self.x[:, :1]).expand(b * t, c) if dy is None else dy.reshape(b * t, c)
        if dy.stride(1) != 1:
            dy = dy.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        dx, ddt, dz = (
            None if tensor is None else torch.empty(b, t, c, dtype=tensor.dtype, device=tensor.device)
            for tensor in (self.x, self.dt, self.z)
        )
        # Partial sums: of dB and dC one a tile of channels, of dA, dD and d dt_bias one a segment of a sequence.
        dmaps = self._new(tiles, 2, b, t, n)
        drates = self._new(b * segments, c, n)
        dchannels = self._new(2, b * segments, c)
        dinitial = None if self.initial is None else self._states(dfinal)
        decays, writes = (self._new(segments - 1, b, c, n) for _ in range(2))
        held = max(1, CHUNK // launch.group - 1) * launch.tile_c * _power_of_two(n)
        checkpoints = self._new(tiles * b * segments, held)
        constants = self._constants(launch) | {"FINAL": dfinal is not None, "GATE": self.z is not None}
        if segments > 1:
            _summarise_gradients[(tiles * b * (segments - 1),)](
                self.dt, self.A, self.C, self.z, self.dt_bias, self.marks, dy, dfinal, decays, writes,
                t, c, b, segments, segment_len,
                self.dt.stride(0), self.C.stride(0), _stride(self.z), dy.stride(0),
                **constants,
            )  # fmt: skip
        _differentiate[(tiles * b * segments,)](
            self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias, self.initial, self.marks,
            boundaries, ungated, dy, dfinal, decays, writes,
            dx, ddt, dz, dmaps, drates, dchannels, dinitial, checkpoints,
            t, c, b, segments, segment_len,
            self.x.stride(0), self.dt.stride(0), self.B.stride(0), self.C.stride(0), _stride(self.z), dy.stride(0),
            SKIP=self.D is not None, INITIAL=self.initial is not None, **constants,
        )  # fmt: skip
        dB, dC = dmaps[0] if tiles == 1 else dmaps.sum(0)
        dD, dbias = dchannels.sum(1)
        return {
            "x": dx,
            "dt": ddt,
            "A": drates.sum(0),
            "B": dB,
            "C": dC,
            "D": None if self.D is None else dD,
            "z": dz,
            "dt_bias": None if self.dt_bias is None else dbias,
            "initial_state": dinitial,
        }


def with_segments(launch: Launch, segment_len: int | None) -> Launch:
    """The same launch with time cut into segments of this many tokens (rounded up to whole chunks)."""
    return replace(launch, segment_len=segment_len)


def _power_of_two(number: int) -> int:
    """The least one that is not smaller; triton's own function takes microseconds of every call."""
    return 1 << (number - 1).bit_length()


def _rows(tensor: Tensor) -> Tensor:
    """The tokens of all sequences as rows; a view where a slice of a wider tensor allows it.

    Shapes:  b t c  ->  b*t c
    """
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        tensor = tensor.contiguous()
    return tensor.reshape(-1, tensor.shape[-1])


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _marks(cu_seqlens: Tensor, t: int) -> Tensor:
    """4 document + 2 (last token of it) + (first token of it), for every token, found on the device.

    Shapes:  cu_seqlens: documents + 1  ->  t
    """
    cu_seqlens = cu_seqlens.contiguous()
    marks = cu_seqlens.new_empty(t)
    documents = cu_seqlens.shape[0] - 1
    _mark[(-(-t // _MARKS),)](cu_seqlens, marks, t, documents, halvings(documents), TILE_T=_MARKS, num_warps=1)
    return marks


@QuickLaunch
@triton.jit(do_not_specialize=["t", "documents", "steps"])
def _mark(cu_seqlens, marks, t, documents, steps, TILE_T: tl.constexpr):
    tokens = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    document = find_documents(cu_seqlens, documents, steps, tokens)
    first = tl.load(cu_seqlens + document) == tokens
    last = tl.load(cu_seqlens + document + 1) == tokens + 1
    tl.store(marks + tokens, 4 * document + 2 * last.to(tl.int32) + first.to(tl.int32), mask=tokens < t)


@triton.jit
def _place(c, b, TILE_C: tl.constexpr):
    """Tile, sequence (64 bits) and segment of this program; neighbours differ in the tile and share their B and C."""
    program = tl.program_id(0)
    tiles = tl.cdiv(c, TILE_C)
    tile = program % tiles
    sequence = ((program // tiles) % b).to(tl.int64)
    return tile, sequence, program // (tiles * b)


@triton.jit
def _load_vector(vector, columns, within, GIVEN: tl.constexpr):
    """A tile of D or dt_bias in fp32, zeros where it is not given."""
    tile = tl.zeros(columns.shape, tl.float32)
    if GIVEN:
        tile = tl.load(vector + columns, mask=within, other=0.0).to(tl.float32)
    return tile


@triton.jit
def _load_rows(rows, stride, first, limit, columns, within, GROUP: tl.constexpr):
    """A tile of each of GROUP rows from `first` on, in its own type; zeros from row `limit` on.

    `rows` points at a row near by: the offsets within are small and take no 64-bit arithmetic.
    """
    tiles = ()
    for i in tl.static_range(GROUP):
        tiles += (tl.load(rows + (first + i) * stride + columns, mask=within & (first + i < limit), other=0.0),)
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
def _step(raw, bias, valid, SOFTPLUS: tl.constexpr):
    """Step size and its derivative by `raw`, both with full relative precision however small; 0 past the end.

    softplus(u) = max(u, 0) + log(1 + e),  e = exp(-|u|);  log(1 + e) = 2 artanh(s),  s = e / (2 + e) <= 1/3, of which
    seven terms leave 2e-8. A token with step 0 changes no state.
    """
    step = raw.to(tl.float32) + bias
    slope = tl.full(raw.shape, 1.0, tl.float32)
    if SOFTPLUS:
        e = tl.exp2(-tl.abs(step) * _LOG2_E)
        s = e / (2.0 + e)
        q = s * s
        series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
        slope = tl.where(step >= 0, 1.0, e) / (1.0 + e)
        step = tl.maximum(step, 0.0) + 2.0 * s * series
    return tl.where(valid, step, 0.0), tl.where(valid, slope, 0.0)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(-z * _LOG2_E))


@triton.jit
def _restart(state, tag, initial, state_size, offsets, within, INITIAL: tl.constexpr):
    """The state before a document's first token: its initial state or zero; other tokens keep theirs.  [TILE_C, N]"""
    if INITIAL:
        if (tag & 1) != 0:
            place = (tag >> 2).to(tl.int64) * state_size
            state = tl.load(initial + place + offsets, mask=within, other=0.0).to(tl.float32)
    else:
        state = tl.where((tag & 1) != 0, 0.0, state)
    return state


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "segment_len"])
def _summarise(
    x, dt, A, B, dt_bias, initial, marks, decays, writes,
    t, c, b, segment_len, x_stride, dt_stride, B_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """What a segment does to the state that enters it:  h -> decay h + write.  The first segment's h is in its write.

    Shapes:  decays, writes: segments-1 b c n
    """
    tile, sequence, segment = _place(c, b, TILE_C)
    channels = tile * TILE_C + tl.arange(0, TILE_C)
    columns = tl.arange(0, PAD_N)
    in_c, in_n = channels < c, columns < N
    offsets = channels[:, None] * N + columns[None, :]
    within = in_c[:, None] & in_n[None, :]
    state_size = c * N
    rates = tl.load(A + offsets, mask=within, other=0.0).to(tl.float32) * _LOG2_E
    bias = _load_vector(dt_bias, channels, in_c, BIAS)

    state = tl.zeros([TILE_C, PAD_N], tl.float32)
    if INITIAL and not PACKED and segment == 0:
        state = tl.load(initial + sequence * state_size + offsets, mask=within, other=0.0).to(tl.float32)
    begin = segment * segment_len
    limit = tl.minimum(segment_len, t - begin)
    row = sequence * t + begin
    x_at, dt_at, B_at = x + row * x_stride, dt + row * dt_stride, B + row * B_stride
    age = tl.zeros([TILE_C], tl.float32)  # the sum of steps
    kept = begin >= 0  # no document starts in this segment
    next_raws = _load_rows(dt_at, dt_stride, 0, limit, channels, in_c, GROUP)
    next_inputs = _load_rows(x_at, x_stride, 0, limit, channels, in_c, GROUP)
    next_maps = _load_rows(B_at, B_stride, 0, limit, columns, in_n, GROUP)
    for base in range(0, limit, GROUP):
        raws, inputs, maps = next_raws, next_inputs, next_maps
        ahead = base + GROUP
        next_raws = _load_rows(dt_at, dt_stride, ahead, limit, channels, in_c, GROUP)
        next_inputs = _load_rows(x_at, x_stride, ahead, limit, channels, in_c, GROUP)
        next_maps = _load_rows(B_at, B_stride, ahead, limit, columns, in_n, GROUP)
        tags = _load_marks(marks, begin, base, limit, GROUP, PACKED)
        steps, drives = (), ()
        for i in tl.static_range(GROUP):
            step, _ = _step(raws[i], bias, base + i < limit, SOFTPLUS)
            age += step
            steps += (step[:, None],)
            drives += ((step * inputs[i].to(tl.float32))[:, None],)
        for i in tl.static_range(GROUP):
            if PACKED:
                state = _restart(state, tags[i], initial, state_size, offsets, within, INITIAL)
                kept = kept & ((tags[i] & 1) == 0)
            state = tl.exp2(steps[i] * rates) * state + drives[i] * maps[i].to(tl.float32)[None, :]
    decay = tl.exp2(age[:, None] * rates)
    if PACKED:
        decay = tl.where(kept, decay, 0.0)
    place = (segment * b + sequence) * state_size
    tl.store(decays + place + offsets, decay, mask=within)
    tl.store(writes + place + offsets, state, mask=within)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "segments", "segment_len"])
def _scan(
    x, dt, A, B, C, D, z, dt_bias, initial, marks, decays, writes, y, final, boundaries, ungated,
    t, c, b, segments, segment_len, x_stride, dt_stride, B_stride, C_stride, z_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr,
    SKIP: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """The scan of one segment, from the state that the segments before it leave."""
    tile, sequence, segment = _place(c, b, TILE_C)
    channels = tile * TILE_C + tl.arange(0, TILE_C)
    columns = tl.arange(0, PAD_N)
    in_c, in_n = channels < c, columns < N
    offsets = channels[:, None] * N + columns[None, :]
    within = in_c[:, None] & in_n[None, :]
    state_size = c * N
    rates = tl.load(A + offsets, mask=within, other=0.0).to(tl.float32) * _LOG2_E
    bias = _load_vector(dt_bias, channels, in_c, BIAS)
    skip = _load_vector(D, channels, in_c, SKIP)

    state = tl.zeros([TILE_C, PAD_N], tl.float32)
    if INITIAL and not PACKED and segment == 0:
        state = tl.load(initial + sequence * state_size + offsets, mask=within, other=0.0).to(tl.float32)
    for earlier in range(segment):
        place = (earlier * b + sequence) * state_size
        decay = tl.load(decays + place + offsets, mask=within, other=0.0)
        state = decay * state + tl.load(writes + place + offsets, mask=within, other=0.0)

    begin = segment * segment_len
    limit = tl.minimum(segment_len, t - begin)
    row = sequence * t + begin
    x_at, dt_at, B_at, C_at = x + row * x_stride, dt + row * dt_stride, B + row * B_stride, C + row * C_stride
    y_at, z_at, ungated_at = y + row * c, z, ungated
    if GATE:
        z_at, ungated_at = z + row * z_stride, ungated + row * c
    next_raws = _load_rows(dt_at, dt_stride, 0, limit, channels, in_c, GROUP)
    next_inputs = _load_rows(x_at, x_stride, 0, limit, channels, in_c, GROUP)
    next_maps = _load_rows(B_at, B_stride, 0, limit, columns, in_n, GROUP)
    next_reads = _load_rows(C_at, C_stride, 0, limit, columns, in_n, GROUP)
    for base in range(0, limit, GROUP):
        # The loads of the next group are under way while this one is computed.
        raws, inputs, maps, reads = next_raws, next_inputs, next_maps, next_reads
        ahead = base + GROUP
        next_raws = _load_rows(dt_at, dt_stride, ahead, limit, channels, in_c, GROUP)
        next_inputs = _load_rows(x_at, x_stride, ahead, limit, channels, in_c, GROUP)
        next_maps = _load_rows(B_at, B_stride, ahead, limit, columns, in_n, GROUP)
        next_reads = _load_rows(C_at, C_stride, ahead, limit, columns, in_n, GROUP)
        gates = ()
        if GATE:  # needed last
            gates = _load_rows(z_at, z_stride, base, limit, channels, in_c, GROUP)
        tags = _load_marks(marks, begin, base, limit, GROUP, PACKED)
        if base % CHUNK == 0 and begin + base > 0:
            boundary = state
            if PACKED:
                boundary = tl.where((tags[0] & 1) != 0, 0.0, state)
            place = (((begin + base) // CHUNK - 1) * b + sequence) * state_size
            by_state = columns[None, :] * c + channels[:, None]  # boundaries lie n c
            tl.store(boundaries + place + by_state, boundary, mask=within)
        # The group's vectors change their layout here, so that no two tokens have that between them.
        steps, drives, totals = (), (), ()
        for i in tl.static_range(GROUP):
            step, _ = _step(raws[i], bias, base + i < limit, SOFTPLUS)
            steps += (step[:, None],)
            drives += ((step * inputs[i].to(tl.float32))[:, None],)
        for i in tl.static_range(GROUP):
            if PACKED:
                state = _restart(state, tags[i], initial, state_size, offsets, within, INITIAL)
            state = tl.exp2(steps[i] * rates) * state + drives[i] * maps[i].to(tl.float32)[None, :]
            totals += (tl.sum(state * reads[i].to(tl.float32)[None, :], axis=1),)
            if PACKED and (tags[i] & 2) != 0:
                tl.store(final + (tags[i] >> 2).to(tl.int64) * state_size + offsets, state, mask=within)
        for i in tl.static_range(GROUP):
            mask = in_c & (base + i < limit)
            place = (base + i) * c + channels
            total = totals[i] + skip * inputs[i].to(tl.float32)
            if GATE:
                tl.store(ungated_at + place, total, mask=mask)
                gate = gates[i].to(tl.float32)
                total = total * gate * _sigmoid(gate)
            tl.store(y_at + place, total.to(y.dtype.element_ty), mask=mask)
    if not PACKED and segment == segments - 1:
        tl.store(final + sequence * state_size + offsets, state, mask=within)


@triton.jit
def _pull(dy, z, GATE: tl.constexpr):
    """The gradient of y before its gate."""
    pull = dy.to(tl.float32)
    if GATE:
        gate = z.to(tl.float32)
        pull = pull * gate * _sigmoid(gate)
    return pull


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "segments", "segment_len"])
def _summarise_gradients(
    dt, A, C, z, dt_bias, marks, dy, dfinal, decays, writes,
    t, c, b, segments, segment_len, dt_stride, C_stride, z_stride, dy_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, FINAL: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """What a segment does to the gradient of the state it leaves:  g -> decay g + write, for the state that enters it.

    Row k of the results is segment k + 1's; final_state's gradient is in the write of the last.
    Shapes:  decays, writes: segments-1 b c n
    """
    tile, sequence, index = _place(c, b, TILE_C)
    segment = index + 1
    channels = tile * TILE_C + tl.arange(0, TILE_C)
    columns = tl.arange(0, PAD_N)
    in_c, in_n = channels < c, columns < N
    offsets = channels[:, None] * N + columns[None, :]
    within = in_c[:, None] & in_n[None, :]
    state_size = c * N
    rates = tl.load(A + offsets, mask=within, other=0.0).to(tl.float32) * _LOG2_E
    bias = _load_vector(dt_bias, channels, in_c, BIAS)

    carried = tl.zeros([TILE_C, PAD_N], tl.float32)
    if FINAL and not PACKED and segment == segments - 1:
        carried = tl.load(dfinal + sequence * state_size + offsets, mask=within, other=0.0).to(tl.float32)
    begin = segment * segment_len
    limit = tl.minimum(segment_len, t - begin)
    row = sequence * t + begin
    dt_at, dy_at, C_at, z_at = dt + row * dt_stride, dy + row * dy_stride, C + row * C_stride, z
    if GATE:
        z_at = z + row * z_stride
    age = tl.zeros([TILE_C], tl.float32)
    kept = begin >= 0
    groups = tl.cdiv(limit, GROUP)
    for group in range(groups):
        base = (groups - 1 - group) * GROUP
        raws = _load_rows(dt_at, dt_stride, base, limit, channels, in_c, GROUP)
        results = _load_rows(dy_at, dy_stride, base, limit, channels, in_c, GROUP)
        reads = _load_rows(C_at, C_stride, base, limit, columns, in_n, GROUP)
        gates = results
        if GATE:
            gates = _load_rows(z_at, z_stride, base, limit, channels, in_c, GROUP)
        tags = _load_marks(marks, begin, base, limit, GROUP, PACKED)
        steps, pulls = (), ()
        for i in tl.static_range(GROUP):
            step, _ = _step(raws[i], bias, base + i < limit, SOFTPLUS)
            age += step
            steps += (step[:, None],)
            pulls += (_pull(results[i], gates[i], GATE)[:, None],)
        for i in tl.static_range(GROUP - 1, -1, -1):
            if PACKED and FINAL and (tags[i] & 2) != 0:
                place = (tags[i] >> 2).to(tl.int64) * state_size
                carried += tl.load(dfinal + place + offsets, mask=within, other=0.0).to(tl.float32)
            carried = tl.exp2(steps[i] * rates) * (carried + pulls[i] * reads[i].to(tl.float32)[None, :])
            if PACKED:
                carried = tl.where((tags[i] & 1) != 0, 0.0, carried)
                kept = kept & ((tags[i] & 1) == 0)
    decay = tl.exp2(age[:, None] * rates)
    if PACKED:
        decay = tl.where(kept, decay, 0.0)
    place = (index * b + sequence) * state_size
    tl.store(decays + place + offsets, decay, mask=within)
    tl.store(writes + place + offsets, carried, mask=within)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "segments", "segment_len"])
def _differentiate(
    x, dt, A, B, C, D, z, dt_bias, initial, marks, boundaries, ungated, dy, dfinal, decays, writes,
    dx, ddt, dz, dmaps, drates, dchannels, dinitial, checkpoints,
    t, c, b, segments, segment_len, x_stride, dt_stride, B_stride, C_stride, z_stride, dy_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, FINAL: tl.constexpr, GATE: tl.constexpr,
    SKIP: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """All gradients of one segment: chunks from last to first, in a chunk groups from last to first.

    `carried` is what the token after the current one sends back, decay_{t+1} g_{t+1}. The states that enter the groups
    of a chunk are found first; all but the last wait in `checkpoints`, which only this program touches and L2 holds.
    """
    tile, sequence, segment = _place(c, b, TILE_C)
    channels = tile * TILE_C + tl.arange(0, TILE_C)
    columns = tl.arange(0, PAD_N)
    in_c, in_n = channels < c, columns < N
    offsets = channels[:, None] * N + columns[None, :]
    within = in_c[:, None] & in_n[None, :]
    state_size = c * N
    rates = tl.load(A + offsets, mask=within, other=0.0).to(tl.float32) * _LOG2_E
    bias = _load_vector(dt_bias, channels, in_c, BIAS)
    skip = _load_vector(D, channels, in_c, SKIP)
    slots = checkpoints + tl.program_id(0).to(tl.int64) * ((CHUNK // GROUP - 1) * TILE_C * PAD_N)
    slots += tl.arange(0, TILE_C)[:, None] * PAD_N + columns[None, :]

    carried = tl.zeros([TILE_C, PAD_N], tl.float32)
    if FINAL and not PACKED and segment == segments - 1:
        carried = tl.load(dfinal + sequence * state_size + offsets, mask=within, other=0.0).to(tl.float32)
    for back in range(segments - 1 - segment):
        place = ((segments - 2 - back) * b + sequence) * state_size
        decay = tl.load(decays + place + offsets, mask=within, other=0.0)
        carried = decay * carried + tl.load(writes + place + offsets, mask=within, other=0.0)

    begin = segment * segment_len
    end = tl.minimum(begin + segment_len, t)
    rate_grads = tl.zeros([TILE_C, PAD_N], tl.float32)
    skip_grads = tl.zeros([TILE_C], tl.float32)
    bias_grads = tl.zeros([TILE_C], tl.float32)
    dB = dmaps + tile.to(tl.int64) * 2 * b * t * N
    dC = dB + b.to(tl.int64) * t * N
    chunks = tl.cdiv(end - begin, CHUNK)
    for reverse_chunk in range(chunks):
        chunk_start = begin + (chunks - 1 - reverse_chunk) * CHUNK
        limit = end - chunk_start
        row = sequence * t + chunk_start
        x_at, dt_at, B_at, C_at = x + row * x_stride, dt + row * dt_stride, B + row * B_stride, C + row * C_stride
        dx_at, ddt_at, dy_at = dx + row * c, ddt + row * c, dy + row * dy_stride
        dB_at, dC_at = dB + row * N, dC + row * N
        z_at, dz_at, ungated_at = z, dz, ungated
        if GATE:
            z_at, dz_at, ungated_at = z + row * z_stride, dz + row * c, ungated + row * c

        state = tl.zeros([TILE_C, PAD_N], tl.float32)
        if chunk_start > 0:
            place = ((chunk_start // CHUNK - 1) * b + sequence) * state_size
            by_state = columns[None, :] * c + channels[:, None]
            state = tl.load(boundaries + place + by_state, mask=within, other=0.0)
        elif INITIAL and not PACKED:
            state = tl.load(initial + sequence * state_size + offsets, mask=within, other=0.0).to(tl.float32)
        next_raws = _load_rows(dt_at, dt_stride, 0, limit, channels, in_c, GROUP)
        next_inputs = _load_rows(x_at, x_stride, 0, limit, channels, in_c, GROUP)
        next_maps = _load_rows(B_at, B_stride, 0, limit, columns, in_n, GROUP)
        for group in range(CHUNK // GROUP - 1):
            tl.store(slots + group * (TILE_C * PAD_N), state)
            base = group * GROUP
            raws, inputs, maps = next_raws, next_inputs, next_maps
            next_raws = _load_rows(dt_at, dt_stride, base + GROUP, limit, channels, in_c, GROUP)
            next_inputs = _load_rows(x_at, x_stride, base + GROUP, limit, channels, in_c, GROUP)
            next_maps = _load_rows(B_at, B_stride, base + GROUP, limit, columns, in_n, GROUP)
            tags = _load_marks(marks, chunk_start, base, limit, GROUP, PACKED)
            steps, drives = (), ()
            for i in tl.static_range(GROUP):
                step, _ = _step(raws[i], bias, base + i < limit, SOFTPLUS)
                steps += (step[:, None],)
                drives += ((step * inputs[i].to(tl.float32))[:, None],)
            for i in tl.static_range(GROUP):
                if PACKED:
                    state = _restart(state, tags[i], initial, state_size, offsets, within, INITIAL)
                state = tl.exp2(steps[i] * rates) * state + drives[i] * maps[i].to(tl.float32)[None, :]

        for reverse_group in range(CHUNK // GROUP):
            base = CHUNK - GROUP - reverse_group * GROUP
            raws = _load_rows(dt_at, dt_stride, base, limit, channels, in_c, GROUP)
            inputs = _load_rows(x_at, x_stride, base, limit, channels, in_c, GROUP)
            maps = _load_rows(B_at, B_stride, base, limit, columns, in_n, GROUP)
            results = _load_rows(dy_at, dy_stride, base, limit, channels, in_c, GROUP)
            gates, totals = results, results
            if GATE:
                gates = _load_rows(z_at, z_stride, base, limit, channels, in_c, GROUP)
                totals = _load_rows(ungated_at, c, base, limit, channels, in_c, GROUP)
            reads = _load_rows(C_at, C_stride, base, limit, columns, in_n, GROUP)
            tags = _load_marks(marks, chunk_start, base, limit, GROUP, PACKED)
            if reverse_group > 0:
                state = tl.load(slots + (CHUNK // GROUP - 1 - reverse_group) * (TILE_C * PAD_N))
            entering = state

            # The states after every token of the group and its decays.
            steps, slopes, after, factors = (), (), (), ()
            for i in tl.static_range(GROUP):
                step, slope = _step(raws[i], bias, base + i < limit, SOFTPLUS)
                steps += (step,)
                slopes += (slope,)
                if PACKED:
                    state = _restart(state, tags[i], initial, state_size, offsets, within, INITIAL)
                factor = tl.exp2(step[:, None] * rates)
                drive = step * inputs[i].to(tl.float32)
                state = factor * state + drive[:, None] * maps[i].to(tl.float32)[None, :]
                after += (state,)
                factors += (factor,)

            for i in tl.static_range(GROUP - 1, -1, -1):
                mask = in_c & (base + i < limit)
                mask_maps = in_n & (base + i < limit)
                place = (base + i) * c + channels
                place_maps = (base + i) * N + columns
                value, step = inputs[i].to(tl.float32), steps[i]
                pull = _pull(results[i], gates[i], GATE)
                if GATE:
                    gate = gates[i].to(tl.float32)
                    sigmoid = _sigmoid(gate)
                    gate_grad = results[i].to(tl.float32) * totals[i] * sigmoid * (1.0 + gate * (1.0 - sigmoid))
                    tl.store(dz_at + place, gate_grad.to(dz.dtype.element_ty), mask=mask)
                if PACKED and FINAL and (tags[i] & 2) != 0:
                    at = (tags[i] >> 2).to(tl.int64) * state_size
                    carried += tl.load(dfinal + at + offsets, mask=within, other=0.0).to(tl.float32)
                grad = carried + pull[:, None] * reads[i].to(tl.float32)[None, :]
                tl.store(dC_at + place_maps, tl.sum(pull[:, None] * after[i], axis=0), mask=mask_maps)
                tl.store(dB_at + place_maps, tl.sum((step * value)[:, None] * grad, axis=0), mask=mask_maps)
                drive_grad = tl.sum(grad * maps[i].to(tl.float32)[None, :], axis=1)
                carried = grad * factors[i]
                before = after[i - 1] if i > 0 else entering
                if PACKED:
                    before = _restart(before, tags[i], initial, state_size, offsets, within, INITIAL)
                exponent_grad = carried * before
                rate_grads += step[:, None] * exponent_grad
                # `rates` are A log2 e.
                step_grad = tl.sum(exponent_grad * rates, axis=1) * _LN_2 + drive_grad * value
                raw_grad = step_grad * slopes[i]
                tl.store(ddt_at + place, raw_grad.to(ddt.dtype.element_ty), mask=mask)
                bias_grads += raw_grad
                skip_grads += pull * value
                input_grad = drive_grad * step + skip * pull
                tl.store(dx_at + place, input_grad.to(dx.dtype.element_ty), mask=mask)
                if PACKED:
                    if INITIAL and (tags[i] & 1) != 0:
                        at = (tags[i] >> 2).to(tl.int64) * state_size
                        tl.store(dinitial + at + offsets, carried, mask=within)
                    carried = tl.where((tags[i] & 1) != 0, 0.0, carried)

    if INITIAL and not PACKED and segment == 0:
        tl.store(dinitial + sequence * state_size + offsets, carried, mask=within)
    part = sequence * segments + segment
    tl.store(drates + part * state_size + offsets, rate_grads, mask=within)
    sums = dchannels + part * c + channels
    tl.store(sums, skip_grads, mask=in_c)
    tl.store(sums + b.to(tl.int64) * segments * c, bias_grads, mask=in_c)
