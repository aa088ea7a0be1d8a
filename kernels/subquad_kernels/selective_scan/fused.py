"""The selective scan in one Triton kernel a direction: states stay in registers, everything around them is fused.

A program is one warp. It holds the states [TILE_C, N] of a tile of channels and walks over the tokens of one segment
of one sequence; four lanes share a channel (at n = 16), so that sums over n are short, and loads of x, dt and z are
contiguous in channels. What is a vector over channels is made for 16 tokens at once, in a layout of its own, and
passed through scratch memory that only the program touches. Where sequences times tiles are too few for the device,
time is cut into segments: a first kernel finds what each segment does to a state (a decay and a write), every program
of the second kernel starts by composing the segments before its own. The backward walks chunks of 16 tokens from last
to first, computes the states inside a chunk again from the saved one, and cuts time in the same way. Sums over
channels and over sequences are written as one partial sum a program, and added afterwards: no atomics, the same bits
every time.
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
    segments of at least `shortest` tokens. The states of a tile are tuples of [`sub`, N], small enough that a row of
    vectors is loaded in their layout; vectors of a chunk are made `rows` tokens at a time. `evict` is what the caches
    are told of tensors that pass through ("" or "evict_first").
    """

    tile_c: int
    group: int
    num_warps: int = 1
    enough: int = 528
    programs: int = 1056
    shortest: int = 64
    segment_len: int | None = None
    sub: int = 8
    rows: int = 4
    evict: str = ""


@lru_cache(maxsize=256)
def launch_of(n: int, *, backward: bool) -> Launch:
    """Sizes for a state size: 16 states a lane, so that the states and decays of a backward's group fit in registers.

    1056 programs are 8 warps on each of an H100's 132 multiprocessors, what 255 registers a lane leave room for. The
    forward holds less, and four times as many were fastest (README).
    """
    padded = _power_of_two(n)
    if backward:
        return Launch(tile_c=min(64, max(8, 512 // padded)), group=2)
    tile_c = min(64, max(16, 256 // padded))
    return Launch(tile_c=tile_c, group=4, rows=128 // tile_c, programs=2640)


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
        self.softplus, self.reversed = bool(values["softplus"]), bool(values["reversed"])
        cu_seqlens = values["cu_seqlens"]
        self.documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.marks = None if cu_seqlens is None else _marks(cu_seqlens, self.t, reversed=self.reversed)

    def _cut(self, launch: Launch) -> tuple[int, int, int]:
        """Tiles of channels, segments of time, and tokens a segment (whole chunks)."""
        tiles = -(-self.c // launch.tile_c)
        if launch.segment_len is not None:
            wanted = launch.segment_len
        else:
            segments = max(1, launch.programs // (tiles * self.b)) if tiles * self.b < launch.enough else 1
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
            "AHEAD": -1 if self.reversed else 1,
            "EVICT": launch.evict,
            "SUB": min(launch.sub, launch.tile_c),
            "ROWS": launch.rows,
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
        pad = constants["PAD_N"]
        held = CHUNK * (3 * launch.tile_c + 2 * pad) + launch.tile_c * pad
        scratch = self._new(tiles * self.b * segments, held)
        if segments > 1:
            _summarise[(tiles * self.b * (segments - 1),)](
                self.x, self.dt, self.A, self.B, self.dt_bias, self.initial, self.marks, decays, writes, scratch,
                self.t, self.c, self.b, segment_len, self.x.stride(0), self.dt.stride(0), self.B.stride(0),
                **constants,
            )  # fmt: skip
        _scan[(tiles * self.b * segments,)](
            self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias, self.initial, self.marks,
            decays, writes, y, final, boundaries, ungated, scratch,
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
        constants = self._constants(launch) | {"FINAL": dfinal is not None, "GATE": self.z is not None}
        pad = constants["PAD_N"]
        held = (CHUNK // launch.group) * launch.tile_c * pad + CHUNK * (6 * launch.tile_c + 2 * pad)
        scratch = self._new(tiles * b * segments, held)
        if segments > 1:
            _summarise_gradients[(tiles * b * (segments - 1),)](
                self.dt, self.A, self.C, self.z, self.dt_bias, self.marks, dy, dfinal, decays, writes, scratch,
                t, c, b, segments, segment_len,
                self.dt.stride(0), self.C.stride(0), _stride(self.z), dy.stride(0),
                **constants,
            )  # fmt: skip
        _differentiate[(tiles * b * segments,)](
            self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias, self.initial, self.marks,
            boundaries, ungated, dy, dfinal, decays, writes,
            dx, ddt, dz, dmaps, drates, dchannels, dinitial, scratch,
            t, c, b, segments, segment_len,
            self.x.stride(0), self.dt.stride(0), self.B.stride(0), self.C.stride(0), _stride(self.z), dy.stride(0),
            SKIP=self.D is not None, INITIAL=self.initial is not None, SCRATCH=held, **constants,
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


def _marks(cu_seqlens: Tensor, t: int, *, reversed: bool) -> Tensor:
    """4 document + 2 (last token of it) + (first token of it), for every token, both in the order of the scan.

    Found on the device.  Shapes:  cu_seqlens: documents + 1  ->  t
    """
    cu_seqlens = cu_seqlens.contiguous()
    marks = cu_seqlens.new_empty(t)
    documents = cu_seqlens.shape[0] - 1
    _mark[(-(-t // _MARKS),)](
        cu_seqlens, marks, t, documents, halvings(documents), TILE_T=_MARKS, AHEAD=-1 if reversed else 1, num_warps=1
    )
    return marks


@QuickLaunch
@triton.jit(do_not_specialize=["t", "documents", "steps"])
def _mark(cu_seqlens, marks, t, documents, steps, TILE_T: tl.constexpr, AHEAD: tl.constexpr):
    places = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    tokens = _row(0, places, t, AHEAD)
    document = find_documents(cu_seqlens, documents, steps, tokens)
    lowest = (tl.load(cu_seqlens + document) == tokens).to(tl.int32)
    highest = (tl.load(cu_seqlens + document + 1) == tokens + 1).to(tl.int32)
    edges = 2 * highest + lowest if AHEAD > 0 else 2 * lowest + highest
    tl.store(marks + places, 4 * document + edges, mask=places < t)


@triton.jit
def _row(sequence, token, t, AHEAD: tl.constexpr):
    """The row of a token that is counted from where the scan of its sequence begins; the next is AHEAD rows on."""
    return sequence * t + (token if AHEAD > 0 else t - 1 - token)


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
def _load_chunk(
    table, stride, sequence, start, end, t, columns, within,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr, EVICT: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """The rows of a chunk of tokens as tiles of ROWS, in their own type; zeros from token `end` on; () if not given."""
    tiles = ()
    if GIVEN:
        near = table + _row(sequence, start, t, AHEAD) * stride  # offsets from here fit 32 bits
        for i in tl.static_range(CHUNK // ROWS):
            at = tl.arange(0, ROWS)[:, None] + i * ROWS
            mask = (start + at < end) & within[None, :]
            offsets = at * AHEAD * stride + columns[None, :]
            tiles += (tl.load(near + offsets, mask=mask, other=0.0, eviction_policy=EVICT),)
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
def _reciprocal(number):
    """1 / number from 1 on, to 5e-7: a division spends four more instructions to be safe near the largest number."""
    root = tl.rsqrt(number)
    return root * root


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
        s = e * _reciprocal(2.0 + e)
        q = s * s
        series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
        slope = tl.where(step >= 0, 1.0, e) * _reciprocal(1.0 + e)
        step = tl.maximum(step, 0.0) + 2.0 * s * series
    return tl.where(valid, step, 0.0), tl.where(valid, slope, 0.0)


@triton.jit
def _sigmoid(z):
    return _reciprocal(1.0 + tl.exp2(-z * _LOG2_E))


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


@triton.jit
def _parts(table, place, SUB: tl.constexpr, PARTS: tl.constexpr):
    """A row of the scratch as vectors of SUB channels: fewer elements than lanes load in the layout of their use.

    Part i holds the channels i, PARTS + i, ...: what a lane has of the parts lies together, and is stored together.
    """
    found = ()
    for i in tl.static_range(PARTS):
        found += (tl.load(table + place + i + tl.arange(0, SUB) * PARTS),)
    return found


@triton.jit
def _store_sums(table, sums, stride, COUNT: tl.constexpr, SUB: tl.constexpr, PARTS: tl.constexpr, PAD_N: tl.constexpr):
    """Sums over n of COUNT tokens, `sums` holding the parts of a token one after the other, into rows `stride` apart.

    Up to four are laid side by side, and stored at once. Where they are neighbours in memory, they are laid in a tile
    of states, of which the first columns are stored: a lane has all four, and none moves to another lane before.
    """
    WIDTH: tl.constexpr = min(4, PAD_N, COUNT * PARTS)
    COLUMNS: tl.constexpr = PAD_N if PARTS >= WIDTH else WIDTH
    column = tl.arange(0, COLUMNS)[None, :]
    for k in tl.static_range(0, COUNT * PARTS, WIDTH):
        tile = tl.broadcast_to(sums[k][:, None], [SUB, COLUMNS])
        for j in tl.static_range(1, WIDTH):
            tile = tl.where(column % WIDTH == j, sums[k + j][:, None], tile)
        token, part = (k + column) // PARTS, (k + column) % PARTS
        place = token * stride + part + tl.arange(0, SUB)[:, None] * PARTS
        tl.store(table + place, tile, mask=tl.broadcast_to(column < WIDTH, [SUB, COLUMNS]))


@triton.jit
def _store_over_channels(place, tile, within):
    """The sum of a tile over its channels, stored from the tile's layout.  Shapes:  tile: SUB N    within: N"""
    total = tl.sum(tile, axis=0, keep_dims=True)
    first = tl.arange(0, tile.shape[0])[:, None]
    columns = tl.arange(0, tile.shape[1])[None, :]
    tl.store(place + (first * 0 + columns), tl.broadcast_to(total, tile.shape), mask=(first == 0) & within[None, :])


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "segment_len"])
def _summarise(
    x, dt, A, B, dt_bias, initial, marks, decays, writes, scratch,
    t, c, b, segment_len, x_stride, dt_stride, B_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, AHEAD: tl.constexpr, EVICT: tl.constexpr,
    INITIAL: tl.constexpr, SUB: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What a segment does to the state that enters it:  h -> decay h + write.  The first segment's h is in its write.

    Shapes:  decays, writes: segments-1 b c n
    """
    PARTS: tl.constexpr = TILE_C // SUB
    tile, sequence, segment = _place(c, b, TILE_C)
    channels = tile * TILE_C + tl.arange(0, TILE_C)
    columns = tl.arange(0, PAD_N)
    in_c, in_n = channels < c, columns < N
    state_size = c * N
    bias = _load_vector(dt_bias, channels, in_c, BIAS)
    rows = tl.arange(0, ROWS)[:, None]
    local = tl.arange(0, TILE_C)[None, :]
    steps_at = scratch + tl.program_id(0).to(tl.int64) * (CHUNK * (2 * TILE_C + PAD_N))
    drives_at = steps_at + CHUNK * TILE_C
    B_table = drives_at + CHUNK * TILE_C
    begin = segment * segment_len
    end = tl.minimum(begin + segment_len, t)

    rates, states, offsets, within = (), (), (), ()
    for h in tl.static_range(PARTS):
        mine = tile * TILE_C + h + tl.arange(0, SUB) * PARTS
        offsets += (mine[:, None] * N + columns[None, :],)
        within += ((mine < c)[:, None] & in_n[None, :],)
        rates += (tl.load(A + offsets[h], mask=within[h], other=0.0).to(tl.float32) * _LOG2_E,)
        state = tl.zeros([SUB, PAD_N], tl.float32)
        if INITIAL and not PACKED and segment == 0:
            state = tl.load(initial + sequence * state_size + offsets[h], mask=within[h], other=0.0).to(tl.float32)
        states += (state,)
    age = tl.zeros([ROWS, TILE_C], tl.float32)  # the sum of steps
    kept = begin >= 0  # no document starts in this segment
    next_raws = _load_chunk(dt, dt_stride, sequence, begin, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, True)
    next_values = _load_chunk(x, x_stride, sequence, begin, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, True)
    next_map_rows = _load_chunk(B, B_stride, sequence, begin, end, t, columns, in_n, CHUNK, ROWS, AHEAD, "", True)
    for chunk_start in range(begin, end, CHUNK):
        limit = end - chunk_start
        # The loads of the next chunk are under way while this one is computed.
        raws, values, map_rows = next_raws, next_values, next_map_rows
        next_raws = _load_chunk(
            dt, dt_stride, sequence, chunk_start + CHUNK, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, True
        )
        next_values = _load_chunk(
            x, x_stride, sequence, chunk_start + CHUNK, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, True
        )
        next_map_rows = _load_chunk(
            B, B_stride, sequence, chunk_start + CHUNK, end, t, columns, in_n, CHUNK, ROWS, AHEAD, "", True
        )
        for i in tl.static_range(CHUNK // ROWS):
            at = rows + i * ROWS
            step, _ = _step(raws[i], bias[None, :], (at < limit) & in_c[None, :], SOFTPLUS)
            age += step
            tl.store(steps_at + (at * TILE_C + local), step)
            tl.store(drives_at + (at * TILE_C + local), step * values[i].to(tl.float32))
            tl.store(B_table + (at * PAD_N + columns[None, :]), map_rows[i].to(tl.float32))
        tl.debug_barrier()
        for group in range(CHUNK // GROUP):
            base = group * GROUP
            tags = _load_marks(marks, chunk_start, base, limit, GROUP, PACKED)
            steps, drives, maps = (), (), ()
            for i in tl.static_range(GROUP):
                steps += (_parts(steps_at, (base + i) * TILE_C, SUB, PARTS),)
                drives += (_parts(drives_at, (base + i) * TILE_C, SUB, PARTS),)
                maps += (tl.load(B_table + (base + i) * PAD_N + columns),)
            for i in tl.static_range(GROUP):
                new = ()
                for h in tl.static_range(PARTS):
                    state = states[h]
                    if PACKED:
                        state = _restart(state, tags[i], initial, state_size, offsets[h], within[h], INITIAL)
                    factor = tl.exp2(steps[i][h][:, None] * rates[h])
                    new += (factor * state + drives[i][h][:, None] * maps[i][None, :],)
                states = new
                if PACKED:
                    kept = kept & ((tags[i] & 1) == 0)
        tl.debug_barrier()
    # The sum of the steps changes its layout through the scratch.
    tl.store(steps_at + tl.arange(0, TILE_C), tl.sum(age, axis=0))
    tl.debug_barrier()
    ages = _parts(steps_at, 0, SUB, PARTS)
    summary = (segment * b + sequence) * state_size
    for h in tl.static_range(PARTS):
        decay = tl.exp2(ages[h][:, None] * rates[h])
        if PACKED:
            decay = tl.where(kept, decay, 0.0)
        tl.store(decays + summary + offsets[h], decay, mask=within[h])
        tl.store(writes + summary + offsets[h], states[h], mask=within[h])


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "segments", "segment_len"])
def _scan(
    x, dt, A, B, C, D, z, dt_bias, initial, marks, decays, writes, y, final, boundaries, ungated, scratch,
    t, c, b, segments, segment_len, x_stride, dt_stride, B_stride, C_stride, z_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, AHEAD: tl.constexpr, EVICT: tl.constexpr,
    INITIAL: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, SUB: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The scan of one segment, from the state that the segments before it leave."""
    PARTS: tl.constexpr = TILE_C // SUB
    tile, sequence, segment = _place(c, b, TILE_C)
    channels = tile * TILE_C + tl.arange(0, TILE_C)
    columns = tl.arange(0, PAD_N)
    in_c, in_n = channels < c, columns < N
    state_size = c * N
    bias = _load_vector(dt_bias, channels, in_c, BIAS)
    skip = _load_vector(D, channels, in_c, SKIP)
    rows = tl.arange(0, ROWS)[:, None]
    local = tl.arange(0, TILE_C)[None, :]
    slot = scratch + tl.program_id(0).to(tl.int64) * (CHUNK * (3 * TILE_C + 2 * PAD_N) + TILE_C * PAD_N)
    steps_at = slot + TILE_C * PAD_N
    drives_at = steps_at + CHUNK * TILE_C
    totals_at = drives_at + CHUNK * TILE_C
    B_table = totals_at + CHUNK * TILE_C
    C_table = B_table + CHUNK * PAD_N
    by_state = tl.arange(0, SUB)[:, None] * (PARTS * PAD_N) + columns[None, :]

    rates, states, offsets, within = (), (), (), ()
    for h in tl.static_range(PARTS):
        mine = tile * TILE_C + h + tl.arange(0, SUB) * PARTS
        offsets += (mine[:, None] * N + columns[None, :],)
        within += ((mine < c)[:, None] & in_n[None, :],)
        rates += (tl.load(A + offsets[h], mask=within[h], other=0.0).to(tl.float32) * _LOG2_E,)
        state = tl.zeros([SUB, PAD_N], tl.float32)
        if INITIAL and not PACKED and segment == 0:
            state = tl.load(initial + sequence * state_size + offsets[h], mask=within[h], other=0.0).to(tl.float32)
        states += (state,)
    for earlier in range(segment):
        summary = (earlier * b + sequence) * state_size
        new = ()
        for h in tl.static_range(PARTS):
            decay = tl.load(decays + summary + offsets[h], mask=within[h], other=0.0)
            new += (decay * states[h] + tl.load(writes + summary + offsets[h], mask=within[h], other=0.0),)
        states = new

    begin = segment * segment_len
    end = tl.minimum(begin + segment_len, t)
    next_raws = _load_chunk(dt, dt_stride, sequence, begin, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, True)
    next_values = _load_chunk(x, x_stride, sequence, begin, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, True)
    next_map_rows = _load_chunk(B, B_stride, sequence, begin, end, t, columns, in_n, CHUNK, ROWS, AHEAD, "", True)
    next_read_rows = _load_chunk(C, C_stride, sequence, begin, end, t, columns, in_n, CHUNK, ROWS, AHEAD, "", True)
    for chunk_start in range(begin, end, CHUNK):
        limit = end - chunk_start
        raws, values, map_rows, read_rows = next_raws, next_values, next_map_rows, next_read_rows
        next_raws = _load_chunk(
            dt, dt_stride, sequence, chunk_start + CHUNK, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, True
        )
        next_values = _load_chunk(
            x, x_stride, sequence, chunk_start + CHUNK, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, True
        )
        next_map_rows = _load_chunk(
            B, B_stride, sequence, chunk_start + CHUNK, end, t, columns, in_n, CHUNK, ROWS, AHEAD, "", True
        )
        next_read_rows = _load_chunk(
            C, C_stride, sequence, chunk_start + CHUNK, end, t, columns, in_n, CHUNK, ROWS, AHEAD, "", True
        )
        gates = _load_chunk(z, z_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, GATE)
        row = _row(sequence, chunk_start, t, AHEAD)
        y_at, ungated_at = y + row * c, ungated
        if GATE:
            ungated_at = ungated + row * c
        for i in tl.static_range(CHUNK // ROWS):
            at = rows + i * ROWS
            step, _ = _step(raws[i], bias[None, :], (at < limit) & in_c[None, :], SOFTPLUS)
            tl.store(steps_at + (at * TILE_C + local), step)
            tl.store(drives_at + (at * TILE_C + local), step * values[i].to(tl.float32))
            tl.store(B_table + (at * PAD_N + columns[None, :]), map_rows[i].to(tl.float32))
            tl.store(C_table + (at * PAD_N + columns[None, :]), read_rows[i].to(tl.float32))
        for h in tl.static_range(PARTS):
            tl.store(slot + h * PAD_N + by_state, states[h])
        tl.debug_barrier()

        for group in range(CHUNK // GROUP):
            base = group * GROUP
            tags = _load_marks(marks, chunk_start, base, limit, GROUP, PACKED)
            steps, drives, maps, reads = (), (), (), ()
            for i in tl.static_range(GROUP):
                steps += (_parts(steps_at, (base + i) * TILE_C, SUB, PARTS),)
                drives += (_parts(drives_at, (base + i) * TILE_C, SUB, PARTS),)
                maps += (tl.load(B_table + (base + i) * PAD_N + columns),)
                reads += (tl.load(C_table + (base + i) * PAD_N + columns),)
            sums = ()
            for i in tl.static_range(GROUP):
                new = ()
                for h in tl.static_range(PARTS):
                    state = states[h]
                    if PACKED:
                        state = _restart(state, tags[i], initial, state_size, offsets[h], within[h], INITIAL)
                    state = tl.exp2(steps[i][h][:, None] * rates[h]) * state + drives[i][h][:, None] * maps[i][None, :]
                    new += (state,)
                    sums += (tl.sum(state * reads[i][None, :], axis=1),)
                    if PACKED and (tags[i] & 2) != 0:
                        tl.store(final + (tags[i] >> 2).to(tl.int64) * state_size + offsets[h], state, mask=within[h])
                states = new
            _store_sums(totals_at + base * TILE_C, sums, TILE_C, GROUP, SUB, PARTS, PAD_N)
        tl.debug_barrier()

        for i in tl.static_range(CHUNK // ROWS):
            at = rows + i * ROWS
            away = at * AHEAD
            mask = (at < limit) & in_c[None, :]
            total = tl.load(totals_at + (at * TILE_C + local)) + skip[None, :] * values[i].to(tl.float32)
            if GATE:
                tl.store(ungated_at + (away * c + channels[None, :]), total, mask=mask)
                gate = gates[i].to(tl.float32)
                total = total * gate * _sigmoid(gate)
            tl.store(y_at + (away * c + channels[None, :]), total.to(y.dtype.element_ty), mask=mask)
        if chunk_start > 0:  # the state that entered, as boundaries lie: n c
            boundary = tl.load(slot + (columns[:, None] + local * PAD_N))
            if PACKED:
                boundary = tl.where((tl.load(marks + chunk_start) & 1) != 0, 0.0, boundary)
            place = ((chunk_start // CHUNK - 1) * b + sequence) * state_size
            tl.store(
                boundaries + place + (columns[:, None] * c + channels[None, :]),
                boundary,
                mask=in_n[:, None] & in_c[None, :],
            )
        tl.debug_barrier()
    if not PACKED and segment == segments - 1:
        for h in tl.static_range(PARTS):
            tl.store(final + sequence * state_size + offsets[h], states[h], mask=within[h])


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "segments", "segment_len"])
def _summarise_gradients(
    dt, A, C, z, dt_bias, marks, dy, dfinal, decays, writes, scratch,
    t, c, b, segments, segment_len, dt_stride, C_stride, z_stride, dy_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, AHEAD: tl.constexpr, EVICT: tl.constexpr,
    FINAL: tl.constexpr, GATE: tl.constexpr, SUB: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What a segment does to the gradient of the state it leaves:  g -> decay g + write, for the state that enters it.

    Row k of the results is segment k + 1's; final_state's gradient is in the write of the last.
    Shapes:  decays, writes: segments-1 b c n
    """
    PARTS: tl.constexpr = TILE_C // SUB
    tile, sequence, index = _place(c, b, TILE_C)
    segment = index + 1
    channels = tile * TILE_C + tl.arange(0, TILE_C)
    columns = tl.arange(0, PAD_N)
    in_c, in_n = channels < c, columns < N
    state_size = c * N
    bias = _load_vector(dt_bias, channels, in_c, BIAS)
    rows = tl.arange(0, ROWS)[:, None]
    local = tl.arange(0, TILE_C)[None, :]
    steps_at = scratch + tl.program_id(0).to(tl.int64) * (CHUNK * (2 * TILE_C + PAD_N))
    pulls_at = steps_at + CHUNK * TILE_C
    C_table = pulls_at + CHUNK * TILE_C

    rates, carried, offsets, within = (), (), (), ()
    for h in tl.static_range(PARTS):
        mine = tile * TILE_C + h + tl.arange(0, SUB) * PARTS
        offsets += (mine[:, None] * N + columns[None, :],)
        within += ((mine < c)[:, None] & in_n[None, :],)
        rates += (tl.load(A + offsets[h], mask=within[h], other=0.0).to(tl.float32) * _LOG2_E,)
        back = tl.zeros([SUB, PAD_N], tl.float32)
        if FINAL and not PACKED and segment == segments - 1:
            back = tl.load(dfinal + sequence * state_size + offsets[h], mask=within[h], other=0.0).to(tl.float32)
        carried += (back,)
    begin = segment * segment_len
    end = tl.minimum(begin + segment_len, t)
    age = tl.zeros([ROWS, TILE_C], tl.float32)
    kept = begin >= 0
    chunks = tl.cdiv(end - begin, CHUNK)
    for reverse_chunk in range(chunks):
        chunk_start = begin + (chunks - 1 - reverse_chunk) * CHUNK
        limit = end - chunk_start
        raws = _load_chunk(
            dt, dt_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, True
        )
        results = _load_chunk(
            dy, dy_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, True
        )
        gates = _load_chunk(z, z_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, GATE)
        read_rows = _load_chunk(C, C_stride, sequence, chunk_start, end, t, columns, in_n, CHUNK, ROWS, AHEAD, "", True)
        for i in tl.static_range(CHUNK // ROWS):
            at = rows + i * ROWS
            step, _ = _step(raws[i], bias[None, :], (at < limit) & in_c[None, :], SOFTPLUS)
            age += step
            pull = results[i].to(tl.float32)
            if GATE:
                gate = gates[i].to(tl.float32)
                pull = pull * gate * _sigmoid(gate)
            tl.store(steps_at + (at * TILE_C + local), step)
            tl.store(pulls_at + (at * TILE_C + local), pull)
            tl.store(C_table + (at * PAD_N + columns[None, :]), read_rows[i].to(tl.float32))
        tl.debug_barrier()
        for reverse_group in range(CHUNK // GROUP):
            base = CHUNK - GROUP - reverse_group * GROUP
            tags = _load_marks(marks, chunk_start, base, limit, GROUP, PACKED)
            steps, pulls, reads = (), (), ()
            for i in tl.static_range(GROUP):
                steps += (_parts(steps_at, (base + i) * TILE_C, SUB, PARTS),)
                pulls += (_parts(pulls_at, (base + i) * TILE_C, SUB, PARTS),)
                reads += (tl.load(C_table + (base + i) * PAD_N + columns),)
            for i in tl.static_range(GROUP - 1, -1, -1):
                new = ()
                for h in tl.static_range(PARTS):
                    back = carried[h]
                    if PACKED and FINAL and (tags[i] & 2) != 0:
                        document_at = (tags[i] >> 2).to(tl.int64) * state_size
                        back += tl.load(dfinal + document_at + offsets[h], mask=within[h], other=0.0).to(tl.float32)
                    back = tl.exp2(steps[i][h][:, None] * rates[h]) * (back + pulls[i][h][:, None] * reads[i][None, :])
                    if PACKED:
                        back = tl.where((tags[i] & 1) != 0, 0.0, back)
                    new += (back,)
                carried = new
                if PACKED:
                    kept = kept & ((tags[i] & 1) == 0)
        tl.debug_barrier()
    tl.store(steps_at + tl.arange(0, TILE_C), tl.sum(age, axis=0))
    tl.debug_barrier()
    ages = _parts(steps_at, 0, SUB, PARTS)
    summary = (index * b + sequence) * state_size
    for h in tl.static_range(PARTS):
        decay = tl.exp2(ages[h][:, None] * rates[h])
        if PACKED:
            decay = tl.where(kept, decay, 0.0)
        tl.store(decays + summary + offsets[h], decay, mask=within[h])
        tl.store(writes + summary + offsets[h], carried[h], mask=within[h])


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "segments", "segment_len"])
def _differentiate(
    x, dt, A, B, C, D, z, dt_bias, initial, marks, boundaries, ungated, dy, dfinal, decays, writes,
    dx, ddt, dz, dmaps, drates, dchannels, dinitial, scratch,
    t, c, b, segments, segment_len, x_stride, dt_stride, B_stride, C_stride, z_stride, dy_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, TILE_C: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, AHEAD: tl.constexpr, EVICT: tl.constexpr,
    FINAL: tl.constexpr, GATE: tl.constexpr, SKIP: tl.constexpr, INITIAL: tl.constexpr, SUB: tl.constexpr,
    ROWS: tl.constexpr,
    SCRATCH: tl.constexpr,
):  # fmt: skip
    """All gradients of one segment: chunks from last to first, in a chunk groups from last to first.

    `carried` is what the token after the current one sends back, decay_{t+1} g_{t+1}. Vectors of a whole chunk are made
    first and left in `scratch`, which only this program touches and the caches hold.
    """
    PARTS: tl.constexpr = TILE_C // SUB
    tile, sequence, segment = _place(c, b, TILE_C)
    channels = tile * TILE_C + tl.arange(0, TILE_C)
    columns = tl.arange(0, PAD_N)
    in_c, in_n = channels < c, columns < N
    state_size = c * N
    bias = _load_vector(dt_bias, channels, in_c, BIAS)
    skip = _load_vector(D, channels, in_c, SKIP)

    # scratch: the states that enter the groups of a chunk, then tables of its vectors, one row a token
    VECTOR: tl.constexpr = CHUNK * TILE_C
    MAP: tl.constexpr = CHUNK * PAD_N
    slots = scratch + tl.program_id(0).to(tl.int64) * SCRATCH
    steps_at = slots + (CHUNK // GROUP) * TILE_C * PAD_N
    drives_at = steps_at + VECTOR
    pulls_at = drives_at + VECTOR
    slopes_at = pulls_at + VECTOR
    B_table = slopes_at + VECTOR
    C_table = B_table + MAP
    drive_grads_at = C_table + MAP
    step_grads_at = drive_grads_at + VECTOR
    by_state = tl.arange(0, SUB)[:, None] * (PARTS * PAD_N) + columns[None, :]

    rates, carried, rate_grads, offsets, within = (), (), (), (), ()
    for h in tl.static_range(PARTS):
        mine = tile * TILE_C + h + tl.arange(0, SUB) * PARTS
        offsets += (mine[:, None] * N + columns[None, :],)
        within += ((mine < c)[:, None] & in_n[None, :],)
        rates += (tl.load(A + offsets[h], mask=within[h], other=0.0).to(tl.float32) * _LOG2_E,)
        back = tl.zeros([SUB, PAD_N], tl.float32)
        if FINAL and not PACKED and segment == segments - 1:
            back = tl.load(dfinal + sequence * state_size + offsets[h], mask=within[h], other=0.0).to(tl.float32)
        carried += (back,)
        rate_grads += (tl.zeros([SUB, PAD_N], tl.float32),)
    for later in range(segments - 1 - segment):
        summary = ((segments - 2 - later) * b + sequence) * state_size
        new = ()
        for h in tl.static_range(PARTS):
            decay = tl.load(decays + summary + offsets[h], mask=within[h], other=0.0)
            new += (decay * carried[h] + tl.load(writes + summary + offsets[h], mask=within[h], other=0.0),)
        carried = new

    begin = segment * segment_len
    end = tl.minimum(begin + segment_len, t)
    skip_grads = tl.zeros([ROWS, TILE_C], tl.float32)
    bias_grads = tl.zeros([ROWS, TILE_C], tl.float32)
    dB = dmaps + tile.to(tl.int64) * 2 * b * t * N
    dC = dB + b.to(tl.int64) * t * N
    chunks = tl.cdiv(end - begin, CHUNK)
    rows = tl.arange(0, ROWS)[:, None]
    local = tl.arange(0, TILE_C)[None, :]
    for reverse_chunk in range(chunks):
        chunk_start = begin + (chunks - 1 - reverse_chunk) * CHUNK
        limit = end - chunk_start
        row = _row(sequence, chunk_start, t, AHEAD)
        x_at, dx_at, ddt_at, dz_at = x + row * x_stride, dx + row * c, ddt + row * c, dz
        if GATE:
            dz_at = dz + row * c

        # The vectors of the chunk, and the state that enters it.
        raws = _load_chunk(
            dt, dt_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, True
        )
        values = _load_chunk(
            x, x_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, True
        )
        results = _load_chunk(
            dy, dy_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, True
        )
        gates = _load_chunk(z, z_stride, sequence, chunk_start, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, GATE)
        totals = _load_chunk(ungated, c, sequence, chunk_start, end, t, channels, in_c, CHUNK, ROWS, AHEAD, EVICT, GATE)
        map_rows = _load_chunk(B, B_stride, sequence, chunk_start, end, t, columns, in_n, CHUNK, ROWS, AHEAD, "", True)
        read_rows = _load_chunk(C, C_stride, sequence, chunk_start, end, t, columns, in_n, CHUNK, ROWS, AHEAD, "", True)
        swapped = columns[:, None] * c + channels[None, :]
        place = ((chunk_start // CHUNK - 1) * b + sequence) * state_size
        inside = in_n[:, None] & in_c[None, :] & (chunk_start > 0)
        entering = tl.load(boundaries + place + swapped, mask=inside, other=0.0)
        if INITIAL and not PACKED and chunk_start == 0:
            ordered = channels[None, :] * N + columns[:, None]
            entering = tl.load(initial + sequence * state_size + ordered, mask=in_n[:, None] & in_c[None, :], other=0.0)
            entering = entering.to(tl.float32)
        tl.store(slots + (columns[:, None] + local * PAD_N), entering)
        for i in tl.static_range(CHUNK // ROWS):
            at = rows + i * ROWS
            away = at * AHEAD
            mask = (at < limit) & in_c[None, :]
            value, pull = values[i].to(tl.float32), results[i].to(tl.float32)
            if GATE:
                gate = gates[i].to(tl.float32)
                sigmoid = _sigmoid(gate)
                gate_grad = pull * totals[i] * sigmoid * (1.0 + gate * (1.0 - sigmoid))
                tl.store(dz_at + (away * c + channels[None, :]), gate_grad.to(dz.dtype.element_ty), mask=mask)
                pull = pull * gate * sigmoid
            step, slope = _step(raws[i], bias[None, :], mask, SOFTPLUS)
            skip_grads += pull * value
            tl.store(steps_at + (at * TILE_C + local), step)
            tl.store(drives_at + (at * TILE_C + local), step * value)
            tl.store(pulls_at + (at * TILE_C + local), pull)
            tl.store(slopes_at + (at * TILE_C + local), slope)
            tl.store(B_table + (at * PAD_N + columns[None, :]), map_rows[i].to(tl.float32))
            tl.store(C_table + (at * PAD_N + columns[None, :]), read_rows[i].to(tl.float32))
        tl.debug_barrier()

        # The states that enter the groups.
        states = ()
        for h in tl.static_range(PARTS):
            states += (tl.load(slots + h * PAD_N + by_state),)
        for group in range(CHUNK // GROUP - 1):
            base = group * GROUP
            tags = _load_marks(marks, chunk_start, base, limit, GROUP, PACKED)
            steps, drives, maps = (), (), ()
            for i in tl.static_range(GROUP):
                steps += (_parts(steps_at, (base + i) * TILE_C, SUB, PARTS),)
                drives += (_parts(drives_at, (base + i) * TILE_C, SUB, PARTS),)
                maps += (tl.load(B_table + (base + i) * PAD_N + columns),)
            for i in tl.static_range(GROUP):
                new = ()
                for h in tl.static_range(PARTS):
                    state = states[h]
                    if PACKED:
                        state = _restart(state, tags[i], initial, state_size, offsets[h], within[h], INITIAL)
                    state = tl.exp2(steps[i][h][:, None] * rates[h]) * state + drives[i][h][:, None] * maps[i][None, :]
                    new += (state,)
                states = new
            for h in tl.static_range(PARTS):
                tl.store(slots + ((group + 1) * TILE_C + h) * PAD_N + by_state, states[h])

        for reverse_group in range(CHUNK // GROUP):
            base = CHUNK - GROUP - reverse_group * GROUP
            tags = _load_marks(marks, chunk_start, base, limit, GROUP, PACKED)
            steps, drives, pulls, maps, reads = (), (), (), (), ()
            for i in tl.static_range(GROUP):
                steps += (_parts(steps_at, (base + i) * TILE_C, SUB, PARTS),)
                drives += (_parts(drives_at, (base + i) * TILE_C, SUB, PARTS),)
                pulls += (_parts(pulls_at, (base + i) * TILE_C, SUB, PARTS),)
                maps += (tl.load(B_table + (base + i) * PAD_N + columns),)
                reads += (tl.load(C_table + (base + i) * PAD_N + columns),)
            states = ()
            for h in tl.static_range(PARTS):
                slot = (CHUNK // GROUP - 1 - reverse_group) * TILE_C + h
                states += (tl.load(slots + slot * PAD_N + by_state),)

            # The states before every token of the group and its decays; dC needs the states after.
            before, factors = (), ()
            for i in tl.static_range(GROUP):
                new, old, decay = (), (), ()
                read_grad = tl.zeros([SUB, PAD_N], tl.float32)
                for h in tl.static_range(PARTS):
                    state = states[h]
                    if PACKED:
                        state = _restart(state, tags[i], initial, state_size, offsets[h], within[h], INITIAL)
                    old += (state,)
                    factor = tl.exp2(steps[i][h][:, None] * rates[h])
                    decay += (factor,)
                    state = factor * state + drives[i][h][:, None] * maps[i][None, :]
                    new += (state,)
                    if h == 0:
                        read_grad = pulls[i][h][:, None] * state
                    else:
                        read_grad += pulls[i][h][:, None] * state
                states = new
                before += (old,)
                factors += (decay,)
                _store_over_channels(dC + (row + (base + i) * AHEAD) * N, read_grad, in_n & (base + i < limit))

            for i in tl.static_range(GROUP - 1, -1, -1):
                new, more, drive_sums, step_sums = (), (), (), ()
                map_grad = tl.zeros([SUB, PAD_N], tl.float32)
                for h in tl.static_range(PARTS):
                    back = carried[h]
                    if PACKED and FINAL and (tags[i] & 2) != 0:
                        document_at = (tags[i] >> 2).to(tl.int64) * state_size
                        back += tl.load(dfinal + document_at + offsets[h], mask=within[h], other=0.0).to(tl.float32)
                    grad = back + pulls[i][h][:, None] * reads[i][None, :]
                    if h == 0:
                        map_grad = drives[i][h][:, None] * grad
                    else:
                        map_grad += drives[i][h][:, None] * grad
                    drive_grad = grad * maps[i][None, :]
                    back = grad * factors[i][h]
                    exponent_grad = back * before[i][h]
                    more += (rate_grads[h] + steps[i][h][:, None] * exponent_grad,)
                    step_grad = exponent_grad * rates[h]
                    drive_sums += (tl.sum(drive_grad, axis=1),)
                    step_sums += (tl.sum(step_grad, axis=1),)
                    if PACKED:
                        if INITIAL and (tags[i] & 1) != 0:
                            document_at = (tags[i] >> 2).to(tl.int64) * state_size
                            tl.store(dinitial + document_at + offsets[h], back, mask=within[h])
                        back = tl.where((tags[i] & 1) != 0, 0.0, back)
                    new += (back,)
                _store_sums(drive_grads_at + (base + i) * TILE_C, drive_sums, TILE_C, 1, SUB, PARTS, PAD_N)
                _store_sums(step_grads_at + (base + i) * TILE_C, step_sums, TILE_C, 1, SUB, PARTS, PAD_N)
                carried = new
                rate_grads = more
                _store_over_channels(dB + (row + (base + i) * AHEAD) * N, map_grad, in_n & (base + i < limit))
        tl.debug_barrier()

        # The gradients of the chunk's vectors.
        for i in tl.static_range(CHUNK // ROWS):
            at = rows + i * ROWS
            away = at * AHEAD
            mask = (at < limit) & in_c[None, :]
            spots = at * TILE_C + local
            drive_grad = tl.load(drive_grads_at + spots)
            step_grad = tl.load(step_grads_at + spots)
            value = tl.load(x_at + (away * x_stride + channels[None, :]), mask=mask, other=0.0).to(tl.float32)
            raw_grad = (step_grad * _LN_2 + drive_grad * value) * tl.load(slopes_at + spots)  # `rates` are A log2 e
            bias_grads += raw_grad
            tl.store(ddt_at + (away * c + channels[None, :]), raw_grad.to(ddt.dtype.element_ty), mask=mask)
            input_grad = drive_grad * tl.load(steps_at + spots) + skip[None, :] * tl.load(pulls_at + spots)
            tl.store(dx_at + (away * c + channels[None, :]), input_grad.to(dx.dtype.element_ty), mask=mask)

    part = sequence * segments + segment
    for h in tl.static_range(PARTS):
        if INITIAL and not PACKED and segment == 0:
            tl.store(dinitial + sequence * state_size + offsets[h], carried[h], mask=within[h])
        tl.store(drates + part * state_size + offsets[h], rate_grads[h], mask=within[h])
    sums = dchannels + part * c + channels
    tl.store(sums, tl.sum(skip_grads, axis=0), mask=in_c)
    tl.store(sums + b.to(tl.int64) * segments * c, tl.sum(bias_grads, axis=0), mask=in_c)
