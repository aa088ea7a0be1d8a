"""Gated linear attention in Triton: chunks of 64 tokens, products on tensor cores, and states passed between chunks.

`_summarise` walks the chunks of a stretch with a state in registers and keeps what has been written before each of
them, and what the whole stretch writes and decays; `_compose` passes states from stretch to stretch, from the initial
to the final one. The state before a chunk is then what its stretch wrote so far, and what entered the stretch,
decayed; `_read`, one program a chunk, adds up what tokens read of it and of each other. Backward, the same three with
time reversed give the gradient of the state after each chunk and that of v, and `_differentiate`, one program a chunk,
those of q, and then, in another launch, of k and the decays, from the states on both sides. No stretch holds tokens of
two documents, so nothing inside knows of packing.

Within a chunk, blocks whose decays are mild are taken whole, by one product; longer ones meet at powers of two, where
no exponent is positive (`triton_decays`). How long mild blocks are is found for every chunk: ordinary decays take one
product, violent ones up to seven, and either is as exact. `_read` and `_differentiate` are compiled for each and
launched for both; a program leaves a chunk of the other kind alone. The gradient of a log decay is the sum of those of
the exponents that it is part of. Sums over programs are taken afterwards: no atomics.

Loops keep what does not change within them (disable_licm): zeros and ones of every power of two, kept in registers
from the first chunk on, would push the state out of them.

A product takes a computed tile transposed only on its right: Triton 3.4 to 3.7.0 may compile the transposed left
operand wrongly on Hopper. Where a transposed product is needed it is computed from its own factors.
"""

# What Triton compiles has no Python types, and tuples that grow.
# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.gated_linear_attention.declaration import stretch_len
from subquad_kernels.tile_sizes import ceil_div, padded
from subquad_kernels.triton_chunks import chunk_at, lay_out, taken
from subquad_kernels.triton_decays import decays, meet, ranges, totals, until, whole_decays, whole_level, within
from subquad_kernels.triton_launch import QuickLaunch
from subquad_kernels.triton_precision import fp32_products

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs

_LOG2_E = tl.constexpr(1.4426950408889634)
_ENTRIES = 256
"""Numbers of a state that a program of `_compose` passes on, and stretches whose writes it loads together."""
_TOGETHER = 8


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """A kernel's tiles of the state, as many key channels as value channels, and how a program takes them.

    One width, because rows in shared memory then have one length: ptxas 12.8, which triton 3.6 to 3.7 bring, may read
    an operand with rows of 64 bytes from nowhere where another with rows of 128 lay at the same place (README).
    """

    width: int = 64
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a call is laid out on a device; changes speed, never results beyond rounding.

    `read` and `differentiate` are for chunks of mild decays, `violent` is both for all others. `chunk` tokens (16 or
    more, a power of two) are taken together. `stretch` tokens are walked by one program of `summarise`: the operator's
    number unless told.
    """

    summarise: Tiles
    read: Tiles
    differentiate: Tiles
    violent: Tiles
    chunk: int = 64
    stretch: int | None = None


@lru_cache
def launch_of(n: int, p: int, dtype: torch.dtype) -> Launch:
    """Sizes for a head. A tensor core's instruction of a warp group has 64 rows: four warps, the tokens of a chunk."""
    if dtype != torch.bfloat16:  # products in three parts need room
        narrow = Tiles(width=32)
        return Launch(summarise=narrow, read=narrow, differentiate=Tiles(width=16), violent=Tiles(width=16))
    differentiate = Tiles(num_warps=4 if padded(max(n, p)) <= 64 else 8)  # four would spill several hundred bytes
    return Launch(summarise=Tiles(), read=Tiles(), differentiate=differentiate, violent=Tiles(width=32))


def forward(launch: Launch | None = None, **arguments: Argument) -> Outputs:
    """y, final_state and the residual."""
    values: Any = arguments
    call = _Call(values, launch)
    if call.t == 1 and call.cu_seqlens is None:
        return call.step()
    return call.forward()


def backward(
    arguments: Arguments,
    outputs: Outputs,
    gradients: tuple[Tensor | None, ...],
    launch: Launch | None = None,
) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument, from the gradients of y and of final_state."""
    return _Call(arguments, launch).backward(outputs[2], *gradients)


@dataclass(frozen=True)
class _Passed:
    """States before every chunk, or their gradients after it: what the stretch wrote to them, and what entered it.

    `decays` are log decays since then, `least` the least log decays of each chunk's tokens.

    Shapes:  kept: chunks h n p    decays, least: chunks h n    crossing: cuts h n p    edge: sequences h n p
    """

    kept: Tensor
    decays: Tensor
    least: Tensor
    crossing: Tensor
    edge: Tensor | None


class _Call:
    """The arguments of one call as the kernels take them: every tensor a table of rows, one row a token."""

    def __init__(self, values: Mapping[str, Any], launch: Launch | None) -> None:
        q, v = values["q"], values["v"]
        if torch.float64 in (q.dtype, values["log_decay"].dtype):
            raise TypeError("gated_linear_attention/fused computes in float32; for float64 use kernel='chunked'")
        self.b, self.t, self.h, self.n = q.shape
        self.p = v.shape[3]
        (self.q, q_stride), (self.k, k_stride), (self.v, v_stride) = _rows(q), _rows(values["k"]), _rows(v)
        self.g, g_stride = _rows(values["log_decay"])
        self.strides = (q_stride, k_stride, v_stride, g_stride)
        self.bonus, self.initial = (
            None if values[name] is None else values[name].contiguous() for name in ("bonus", "initial_state")
        )
        self.scale = values["scale"]
        self.before = values["read"] == "before"
        self.launch = launch or launch_of(self.n, self.p, q.dtype)
        self.stretch = self.launch.stretch or stretch_len(self.n, self.p)
        self.cu_seqlens: Tensor | None = values["cu_seqlens"]

    def _plan(self) -> None:
        """Stretches, those that another follows (cuts), and where documents lie; nothing waits for the device.

        Unpacked, every sequence has `each` stretches and no table is needed. A stretch has room for `per` chunks.
        """
        self.per = ceil_div(min(self.stretch, self.t), self.launch.chunk)
        if self.cu_seqlens is None:
            self.table = self.starts = None
            self.sequences, self.each = self.b, ceil_div(self.t, self.stretch)
            self.stretches, self.cuts = self.b * self.each, self.b * (self.each - 1)
        else:
            self.sequences, self.each = self.cu_seqlens.shape[0] - 1, 0
            self.cuts = self.t // self.stretch
            self.stretches = self.cuts + self.sequences
            # An empty document has a stretch of no tokens: the documents before a stretch tell which cut is its own.
            self.table, self.starts = lay_out(self.cu_seqlens, self.stretches, self.stretch, least=1)
        self.chunks = self.stretches * self.per
        self.sizes = (self.t, self.h, self.stretches, self.each, self.stretch, self.per)

    def _constants(self, tiles: Tiles) -> dict[str, Any]:
        packed = self.cu_seqlens is not None
        return _constants_of(tiles, self.launch.chunk, self.n, self.p, self.q.dtype, self.before, packed)

    @staticmethod
    def _like(rows: Tensor) -> Tensor:
        return torch.empty_like(rows, memory_format=torch.contiguous_format)

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype)

    def _states(self) -> Tensor:
        return self._new(self.sequences, self.h, self.n, self.p)

    def _pass(
        self, rows: Tensor, columns: Tensor, strides: tuple[int, int], edge: Tensor | None, *, reverse: bool,
        last: Tensor | None = None, crossing: Tensor | None = None,
    ) -> _Passed:  # fmt: skip
        """States, from keys and values; or their gradients, from queries and those of y. `last` gets what comes out.

        What crosses cuts is not sought again where it is given.
        Shapes:  rows: b t h n    columns: b t h p (tokens at their strides)    edge, last: sequences h n p
                 crossing: cuts h n p
        """
        n, p, h = self.n, self.p, self.h
        half = self.q.dtype == torch.bfloat16
        kept = self._new(self.chunks, h, n, p, dtype=torch.bfloat16 if half else torch.float32)
        decayed, least = self._new(self.chunks, h, n), self._new(self.chunks, h, n)
        totals = self._new(self.cuts + self.sequences, h, n)
        known = crossing is not None
        crossing = self._new(self.cuts, h, n, p) if crossing is None else crossing
        constants = self._constants(self.launch.summarise)
        _summarise[(self.stretches * h * ceil_div(n, constants["TILE_N"]) * ceil_div(p, constants["TILE_P"]),)](
            rows, columns, self.g, self.table, kept, decayed, least, crossing, last, totals,
            *self.sizes, self.cuts, self.scale if reverse else 1.0, *strides, self.strides[3],
            KNOWN=known, LAST=last is not None, REVERSE=reverse, **constants,
        )  # fmt: skip
        size = n * p
        if not known:
            _compose[(self.sequences * h * ceil_div(size, _ENTRIES),)](
                crossing, last, totals, edge, self.starts, h, self.each, size, self.cuts,
                P=p, TILE=_ENTRIES, TOGETHER=_TOGETHER, GIVEN=edge is not None, LAST=last is not None,
                PACKED=self.starts is not None, REVERSE=reverse, num_warps=2,
            )  # fmt: skip
        return _Passed(kept, decayed, least, crossing, edge)

    def _read(self, passed: _Passed, values: Tensor, value_stride: int, result: Tensor, *, reverse: bool) -> None:
        """y from v and states, or the gradient of v from that of y and those of states."""
        for whole, tiles in ((True, self.launch.read), (False, self.launch.violent)):
            constants = self._constants(tiles)
            _read[(self.chunks * self.h * ceil_div(self.p, constants["TILE_P"]),)](
                self.q, self.k, values, self.g, self.bonus, passed.kept, passed.decays, passed.least, passed.crossing,
                passed.edge, self.table, result, *self.sizes, self.scale, *self.strides[:2], value_stride,
                self.strides[3], PAD_N=padded(self.n), WHOLE=whole, EDGE=passed.edge is not None,
                BONUS=self.bonus is not None, REVERSE=reverse, **constants,
            )  # fmt: skip

    def forward(self) -> Outputs:
        """y: b t h p    final_state: states h n p    boundaries: cuts h n p"""
        self._plan()
        y, final = self._like(self.v), self._states()
        passed = self._pass(self.k, self.v, self.strides[1:3], self.initial, last=final, reverse=False)
        self._read(passed, self.v, self.strides[2], y, reverse=False)
        return y, final, passed.crossing

    def step(self) -> Outputs:
        """One token: the state is read and written once."""
        y = self._like(self.v)
        final = self._new(self.b, self.h, self.n, self.p)
        pad_n = padded(self.n)
        tile = min(padded(self.p), max(16, 4096 // pad_n))
        _step[(self.b * self.h * ceil_div(self.p, tile),)](
            self.q, self.k, self.v, self.g, self.bonus, self.initial, y, final,
            self.h, self.scale, *self.strides,
            N=self.n, P=self.p, PAD_N=pad_n, TILE_P=tile, BEFORE=self.before,
            INITIAL=self.initial is not None, BONUS=self.bonus is not None, num_warps=4,
        )  # fmt: skip
        return y, final, self._new(0, self.h, self.n, self.p)

    def backward(self, boundaries: Tensor, dy: Tensor | None, dfinal: Tensor | None) -> dict[str, Tensor | None]:
        """Gradients in the types of their tensors; the bonus's is summed over chunks at the end."""
        self._plan()
        if dy is None:
            dy = torch.zeros(self.b, self.t, self.h, self.p, dtype=self.q.dtype, device=self.q.device)
        pull, pull_stride = _rows(dy)
        dfinal = None if dfinal is None else dfinal.contiguous()
        dinitial = None if self.initial is None else self._states()
        entering = self._pass(self.k, self.v, self.strides[1:3], self.initial, crossing=boundaries, reverse=False)
        leaving = self._pass(self.q, pull, (self.strides[0], pull_stride), dfinal, last=dinitial, reverse=True)
        dq, dk, dv, dg = (self._like(rows) for rows in (self.q, self.k, self.v, self.g))
        self._read(leaving, pull, pull_stride, dv, reverse=True)
        dbonus = None if self.bonus is None else self._new(self.chunks, self.h, self.n).zero_()
        # Queries leave the decays' gradients to keys, in fp32.
        flows = dg if dg.dtype == torch.float32 else self._new(*dg.shape)
        kinds = (True, self.launch.differentiate), (False, self.launch.violent)
        for keys, (whole, tiles) in product((False, True), kinds):
            _differentiate[(self.chunks * self.h,)](
                self.q, self.k, self.v, self.g, self.bonus, pull, self.table, entering.least,
                entering.kept, entering.decays, entering.crossing, entering.edge,
                leaving.kept, leaving.decays, leaving.crossing, leaving.edge,
                dq, dk, dg, flows, dbonus, *self.sizes, self.scale, *self.strides, pull_stride,
                PAD_N=padded(self.n), WHOLE=whole, INITIAL=self.initial is not None, FINAL=dfinal is not None,
                BONUS=self.bonus is not None, KEYS=keys, **self._constants(tiles),
            )  # fmt: skip
        return {
            "q": dq,
            "k": dk,
            "v": dv,
            "log_decay": dg,
            "bonus": None if dbonus is None else dbonus.sum(0),
            "initial_state": dinitial,
        }


@lru_cache
def _constants_of(
    tiles: Tiles, chunk: int, n: int, p: int, dtype: torch.dtype, before: bool, packed: bool
) -> dict[str, Any]:
    """What every kernel is compiled for; one mapping for all its calls, not to be changed."""
    width = min(tiles.width, padded(max(n, p)))
    return {
        "N": n,
        "P": p,
        "TILE_N": width,
        "TILE_P": width,
        "CHUNK": chunk,
        "LEVELS": chunk.bit_length() - 1,
        "BEFORE": before,
        "PACKED": packed,
        # Float16 would overflow in states; a single TF32 product cuts factors off, and missed its tolerance.
        "PRODUCT": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
        "PRECISION": fp32_products(exact=dtype != torch.bfloat16),
        "STAGES": tiles.num_stages,
        "num_warps": tiles.num_warps,
    }


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor whose tokens, of all sequences, lie at one distance, their heads side by side; that distance.

    A slice of a wider tensor stays as it is where it allows that; a view would take the host longer than its strides.
    Shapes:  b t h w
    """
    b, t, h, w = tensor.shape
    sequence, token, head, column = tensor.stride()
    if (column != 1 and w != 1) or (head != w and h != 1) or (b > 1 and t > 1 and sequence != t * token):
        return tensor.contiguous(), h * w
    return tensor, sequence if t == 1 else token


@triton.jit
def _stretch(table, index, t, stretches, each, stretch, PACKED: tl.constexpr):
    """Sequence, first row (64 bits), tokens, whether a stretch of the same sequence follows, and goes before.

    Packed, a stretch that no document needs is sequence -1.
    """
    if PACKED:
        first, tokens, sequence, begins, ends = chunk_at(table, index)
        sequence = tl.where(index < taken(table, stretches), sequence, -1)
        follows, precedes = not ends, not begins
    else:
        sequence = index // each
        ordinal = index % each
        first = sequence.to(tl.int64) * t + ordinal * stretch
        tokens = tl.minimum(stretch, t - ordinal * stretch)
        follows = ordinal + 1 < each
        precedes = ordinal > 0
    return sequence, first, tokens, follows, precedes


@triton.jit
def _tile(rows, stride, base, tokens, columns, width, CHUNK: tl.constexpr):
    """CHUNK tokens from `base` on, in the tensor's own type; zeros past the end.  [CHUNK, columns]

    `rows` points at a token of the stretch: offsets within a stretch are small.
    """
    token = base + tl.arange(0, CHUNK)
    mask = (token < tokens)[:, None] & (columns < width)[None, :]
    return tl.load(rows + token[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _tile_transposed(rows, stride, base, tokens, columns, width, CHUNK: tl.constexpr):
    """The same from the same memory, tokens along the second axis.  [columns, CHUNK]"""
    token = base + tl.arange(0, CHUNK)
    mask = (token < tokens)[None, :] & (columns < width)[:, None]
    return tl.load(rows + token[None, :] * stride + columns[:, None], mask=mask, other=0.0)


@triton.jit
def _keep(rows, stride, base, tokens, columns, width, values, CHUNK: tl.constexpr):
    """Write CHUNK tokens of a result."""
    token = base + tl.arange(0, CHUNK)
    mask = (token < tokens)[:, None] & (columns < width)[None, :]
    tl.store(rows + token[:, None] * stride + columns[None, :], values.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _times(left, right, total, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """left @ right + total, factors rounded to PRODUCT, summed in fp32."""
    return tl.dot(left.to(PRODUCT), right.to(PRODUCT), total, input_precision=PRECISION)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "stretches", "each", "stretch", "per", "cuts", "h"])
def _summarise(
    rows, columns, g, table, kept, decayed, least, crossing, last, totals,
    t, h, stretches, each, stretch, per, cuts, scale, row_stride, column_stride, g_stride,
    N: tl.constexpr, P: tl.constexpr, TILE_N: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, KNOWN: tl.constexpr, LAST: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a stretch has written to the state before each of its chunks and in all, and the log decays of both.

    REVERSE: to the gradient of the state after each chunk. What crosses no cut goes to `last`, at its sequence.
    KNOWN: what the whole stretch writes is not wanted.
    Shapes:  kept: chunks h n p    decayed, least: chunks h n    crossing: cuts h n p    last: sequences h n p
             totals: cuts + sequences h n
    """
    N_TILES: tl.constexpr = (N + TILE_N - 1) // TILE_N
    TILES: tl.constexpr = N_TILES * ((P + TILE_P - 1) // TILE_P)
    program = tl.program_id(0)
    tile, head, index = program % TILES, (program // TILES) % h, program // (TILES * h)
    sequence, first, tokens, follows, precedes = _stretch(table, index, t, stretches, each, stretch, PACKED)
    if sequence < 0:
        return
    if REVERSE:
        crosses, cut = precedes, index - sequence - 1
    else:
        crosses, cut = follows, index - sequence
    n = tile % N_TILES * TILE_N + tl.arange(0, TILE_N)
    p = tile // N_TILES * TILE_P + tl.arange(0, TILE_P)
    one = tile // N_TILES == 0  # of those with equal n
    rows_at = rows + first * row_stride + head * N
    columns_at = columns + first * column_stride + head * P
    g_at = g + first * g_stride + head * N
    token, summed = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    offsets = n[None, :] * P + p[:, None]
    inside = (n < N)[None, :] & (p < P)[:, None]

    state = tl.zeros([TILE_P, TILE_N], tl.float32)
    total = tl.zeros([TILE_N], tl.float32)
    chunks = tl.cdiv(tokens, CHUNK)
    for step in tl.range(0, chunks, num_stages=STAGES, disable_licm=True):
        ordinal = step
        if REVERSE:
            ordinal = chunks - 1 - step
        base = ordinal * CHUNK
        place = (index * per + ordinal).to(tl.int64) * h + head
        tl.store(kept + place * (N * P) + offsets, state.to(kept.dtype.element_ty), mask=inside)
        tl.store(decayed + place * N + n, total, mask=(n < N) & one)
        log_decay = _tile(g_at, g_stride, base, tokens, n, N, CHUNK)
        row = _tile(rows_at, row_stride, base, tokens, n, N, CHUNK).to(tl.float32) * scale
        column = _tile_transposed(columns_at, column_stride, base, tokens, p, P, CHUNK)
        if REVERSE:
            row *= decays(until(token, summed, BEFORE), log_decay, PRODUCT, PRECISION)
        else:
            row *= decays(summed > token, log_decay, PRODUCT, PRECISION)
        tl.store(least + place * N + n, tl.min(log_decay.to(tl.float32), axis=0), mask=(n < N) & one)
        passed = tl.sum(log_decay.to(tl.float32), axis=0)
        state = _times(column, row, state * tl.exp2(passed * _LOG2_E)[None, :], PRODUCT, PRECISION)
        total += passed
    if not KNOWN:
        tl.store(crossing + (cut.to(tl.int64) * h + head) * (N * P) + offsets, state, mask=inside & crosses)
        if LAST:
            place = (sequence.to(tl.int64) * h + head) * (N * P)
            tl.store(last + place + offsets, state, mask=inside & (not crosses))
        place = tl.where(crosses, cut, cuts + sequence).to(tl.int64) * h + head
        tl.store(totals + place * N + n, total, mask=(n < N) & one)


@QuickLaunch
@triton.jit(do_not_specialize=["each", "cuts", "h"])
def _compose(
    crossing, last, totals, edge, starts, h, each, size, cuts,
    P: tl.constexpr, TILE: tl.constexpr, TOGETHER: tl.constexpr, GIVEN: tl.constexpr, LAST: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn the writes of a sequence's stretches, in place, into what crosses its cuts, from one edge to the other.

    Shapes:  crossing: cuts h n p    totals: cuts + sequences h n    edge: sequences h n p (initial states, or
             gradients of final ones)    last: sequences h n p (the other of the two)
    """
    tiles = tl.cdiv(size, TILE)
    program = tl.program_id(0)
    tile, head, sequence = program % tiles, (program // tiles) % h, program // (tiles * h)
    if PACKED:
        begin = tl.load(starts + sequence)
        count = tl.load(starts + sequence + 1) - begin - 1
    else:
        begin, count = sequence * each, each - 1
    first = begin - sequence
    offsets = tile * TILE + tl.arange(0, TILE)
    within = offsets < size
    own = (sequence.to(tl.int64) * h + head) * size + offsets
    state = tl.zeros([TILE], tl.float32)
    if GIVEN:
        state = tl.load(edge + own, mask=within, other=0.0).to(tl.float32)
    for base in range(0, count, TOGETHER):
        writes, decays, places = (), (), ()
        for i in tl.static_range(TOGETHER):
            cut = first + base + i
            if REVERSE:
                cut = first + count - 1 - (base + i)
            place = cut.to(tl.int64) * h + head
            mask = within & (base + i < count)
            places += (place,)
            writes += (tl.load(crossing + place * size + offsets, mask=mask, other=0.0),)
            decays += (tl.load(totals + place * (size // P) + offsets // P, mask=mask, other=0.0),)
        for i in tl.static_range(TOGETHER):
            mask = within & (base + i < count)
            state = tl.where(mask, tl.exp2(decays[i] * _LOG2_E) * state + writes[i], state)
            tl.store(crossing + places[i] * size + offsets, state, mask=mask)
    if LAST:
        place = (cuts + sequence).to(tl.int64) * h + head
        decay = tl.load(totals + place * (size // P) + offsets // P, mask=within, other=0.0)
        write = tl.load(last + own, mask=within, other=0.0)
        tl.store(last + own, tl.exp2(decay * _LOG2_E) * state + write, mask=within)


@triton.jit
def _state(
    kept, decayed, crossing, edge, slot, cut, crosses, sequence, head, h, n, p,
    N: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The state before a chunk, or its gradient after it: written within the stretch, and come from outside.  [n, p]"""
    offsets = n[:, None] * P + p[None, :]
    inside = (n < N)[:, None] & (p < P)[None, :]
    outside = tl.load(crossing + (cut.to(tl.int64) * h + head) * (N * P) + offsets, mask=inside & crosses, other=0.0)
    if EDGE:
        given = edge + (sequence.to(tl.int64) * h + head) * (N * P)
        outside += tl.load(given + offsets, mask=inside & (not crosses), other=0.0).to(tl.float32)
    place = slot.to(tl.int64) * h + head
    decay = tl.exp2(tl.load(decayed + place * N + n, mask=n < N, other=0.0) * _LOG2_E)
    written = tl.load(kept + place * (N * P) + offsets, mask=inside, other=0.0).to(tl.float32)
    return written + decay[:, None] * outside


@triton.jit
def _level(least, slot, head, h, N: tl.constexpr, PAD_N: tl.constexpr, LEVELS: tl.constexpr):
    """Blocks of 2^level tokens of the chunk are taken whole."""
    n = tl.arange(0, PAD_N)
    found = tl.load(least + (slot.to(tl.int64) * h + head) * N + n, mask=n < N, other=0.0)
    return whole_level(tl.min(found, axis=0), LEVELS)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "stretches", "each", "stretch", "per", "h"])
def _read(
    q, k, values, g, bonus, kept, decayed, least, crossing, edge, table, result,
    t, h, stretches, each, stretch, per, scale, q_stride, k_stride, value_stride, g_stride,
    N: tl.constexpr, P: tl.constexpr, TILE_N: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PAD_N: tl.constexpr, WHOLE: tl.constexpr, EDGE: tl.constexpr, BONUS: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """y of one chunk and tile of p: scores V and Q S.  REVERSE: the gradient of v, scores^T dY and K G'.

    Shapes:  values, result: b t h p    the rest as `_summarise` and `_compose` leave it
    """
    TILES: tl.constexpr = (P + TILE_P - 1) // TILE_P
    program = tl.program_id(0)
    tile, head, slot = program % TILES, (program // TILES) % h, program // (TILES * h)
    index, base = slot // per, slot % per * CHUNK
    sequence, first, tokens, follows, precedes = _stretch(table, index, t, stretches, each, stretch, PACKED)
    if (sequence < 0) | (base >= tokens):
        return
    smallest = _level(least, slot, head, h, N, PAD_N, LEVELS)
    if (smallest == LEVELS) != WHOLE:
        return
    if REVERSE:
        crosses, cut = follows, index - sequence
    else:
        crosses, cut = precedes, index - sequence - 1
    p = tile * TILE_P + tl.arange(0, TILE_P)
    q_at, k_at = q + first * q_stride + head * N, k + first * k_stride + head * N
    g_at = g + first * g_stride + head * N
    token, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    no_pairs = tl.zeros([CHUNK, CHUNK], tl.float32)

    total = tl.zeros([CHUNK, TILE_P], tl.float32)
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for start in tl.range(0, N, TILE_N, num_stages=STAGES, disable_licm=True):
        n = start + tl.arange(0, TILE_N)
        log_decay = _tile(g_at, g_stride, base, tokens, n, N, CHUNK)
        query = _tile(q_at, q_stride, base, tokens, n, N, CHUNK).to(tl.float32) * scale
        key = _tile(k_at, k_stride, base, tokens, n, N, CHUNK).to(tl.float32)
        entered = totals(until(token, other, BEFORE), log_decay, PRODUCT, PRECISION)
        if REVERSE:
            crossed = key * decays(other > token, log_decay, PRODUCT, PRECISION)
        else:
            crossed = query * tl.exp2(entered * _LOG2_E)
        state = _state(kept, decayed, crossing, edge, slot, cut, crosses, sequence, head, h, n, p, N, P, EDGE)
        total = _times(crossed, state, total, PRODUCT, PRECISION)
        if BONUS:
            weights = tl.load(bonus + head * N + n, mask=n < N, other=0.0).to(tl.float32)
            scores += tl.where(token == other, tl.sum(query * weights[None, :] * key, axis=1)[:, None], 0.0)
        read, written = whole_decays(token, other, log_decay, entered, smallest, WHOLE, BEFORE, PRODUCT, PRECISION)
        if REVERSE:
            met = _times(key * written, tl.trans(query * read), no_pairs, PRODUCT, PRECISION)
            scores += tl.where(within(other, token, smallest, BEFORE), met, 0.0)
        else:
            met = _times(query * read, tl.trans(key * written), no_pairs, PRODUCT, PRECISION)
            scores += tl.where(within(token, other, smallest, BEFORE), met, 0.0)
        if not WHOLE:
            for level in tl.range(smallest, LEVELS, num_stages=1, disable_licm=True):
                decay = decays(ranges(token, other, level, BEFORE), log_decay, PRODUCT, PRECISION)
                if REVERSE:
                    met = _times(key * decay, tl.trans(query * decay), no_pairs, PRODUCT, PRECISION)
                    scores += tl.where(meet(other, token, level), met, 0.0)
                else:
                    met = _times(query * decay, tl.trans(key * decay), no_pairs, PRODUCT, PRECISION)
                    scores += tl.where(meet(token, other, level), met, 0.0)
    value = _tile(values + first * value_stride + head * P, value_stride, base, tokens, p, P, CHUNK)
    total = _times(scores, value, total, PRODUCT, PRECISION)
    _keep(result + (first * h + head) * P, h * P, base, tokens, p, P, total, CHUNK)


@QuickLaunch
@triton.jit
def _step(
    q, k, v, g, bonus, initial, y, final, h, scale, q_stride, k_stride, v_stride, g_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, TILE_P: tl.constexpr, BEFORE: tl.constexpr,
    INITIAL: tl.constexpr, BONUS: tl.constexpr,
):  # fmt: skip
    """The recurrence once, elementwise in fp32."""
    tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    program = tl.program_id(0)
    tile, head, row = program % tiles, (program // tiles) % h, (program // (tiles * h)).to(tl.int64)
    n, p = tl.arange(0, PAD_N), tile * TILE_P + tl.arange(0, TILE_P)
    in_n, in_p = n < N, p < P
    place = (row * h + head) * (N * P) + n[:, None] * P + p[None, :]
    inside = in_n[:, None] & in_p[None, :]
    before = tl.zeros([PAD_N, TILE_P], tl.float32)
    if INITIAL:
        before = tl.load(initial + place, mask=inside, other=0.0).to(tl.float32)
    query = tl.load(q + row * q_stride + head * N + n, mask=in_n, other=0.0).to(tl.float32) * scale
    key = tl.load(k + row * k_stride + head * N + n, mask=in_n, other=0.0).to(tl.float32)
    value = tl.load(v + row * v_stride + head * P + p, mask=in_p, other=0.0).to(tl.float32)
    log_decay = tl.load(g + row * g_stride + head * N + n, mask=in_n, other=0.0).to(tl.float32)
    after = tl.exp2(log_decay * _LOG2_E)[:, None] * before + key[:, None] * value[None, :]
    tl.store(final + place, after, mask=inside)
    if BEFORE:
        result = tl.sum(query[:, None] * before, axis=0)
        if BONUS:
            weight = tl.load(bonus + head * N + n, mask=in_n, other=0.0).to(tl.float32)
            result += tl.sum(query * weight * key, axis=0) * value
    else:
        result = tl.sum(query[:, None] * after, axis=0)
    tl.store(y + (row * h + head) * P + p, result.to(y.dtype.element_ty), mask=in_p)


@triton.jit
def _pull(
    own, others, g, entered, crossed, score_grad, token, other, level,
    CHUNK: tl.constexpr, TILE_N: tl.constexpr, LEVELS: tl.constexpr, WHOLE: tl.constexpr, BEFORE: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's queries and of its log decays by way of them; REVERSE: of keys, from score_grad^T.

    `crossed` is the gradient by the state before the chunk, or by the one after it, with its decays.
    Shapes:  own, others, g, entered, crossed: CHUNK n    score_grad: CHUNK CHUNK
    """
    # Pairs in blocks that are taken whole. Both sides sum the same rounded products, and cancel where they should.
    nothing = tl.zeros([CHUNK, TILE_N], tl.float32)
    read, written = whole_decays(token, other, g, entered, level, WHOLE, BEFORE, PRODUCT, PRECISION)
    if REVERSE:
        met = tl.where(within(other, token, level, BEFORE), score_grad, 0.0)
        part = _times(met, others * read, nothing, PRODUCT, PRECISION)
        grad = crossed + part * written
        flow = -(own * written).to(PRODUCT).to(tl.float32) * part
    else:
        met = tl.where(within(token, other, level, BEFORE), score_grad, 0.0)
        part = _times(met, others * written, nothing, PRODUCT, PRECISION)
        grad = crossed + part * read
        flow = (own * read).to(PRODUCT).to(tl.float32) * part

    # A log decay counts in all later reads of the state before the chunk, in all earlier writes to the one after it,
    # and in its block in later reads less later writes.
    passed = own * crossed
    back = within(other, token, level, BEFORE and not REVERSE)
    if WHOLE and REVERSE:  # all writes less the later ones: one product is for both
        summed = totals(back, flow - passed, PRODUCT, PRECISION) + tl.sum(passed, axis=0)[None, :]
    elif WHOLE:
        summed = totals(back, flow + passed, PRODUCT, PRECISION)
    else:
        counted = other < token if REVERSE else until(other, token, BEFORE)
        summed = totals(counted, passed, PRODUCT, PRECISION)
        summed += totals(back & (level > 0), flow, PRODUCT, PRECISION)
        for half in tl.range(level, LEVELS, num_stages=1, disable_licm=True):
            decay = decays(ranges(token, other, half, BEFORE), g, PRODUCT, PRECISION)
            pairs = meet(other, token, half) if REVERSE else meet(token, other, half)
            part = _times(tl.where(pairs, score_grad, 0.0), others * decay, nothing, PRODUCT, PRECISION) * decay
            grad += part
            summed += totals(ranges(other, token, half, BEFORE), own * part, PRODUCT, PRECISION)
    return grad, summed


@QuickLaunch
@triton.jit(do_not_specialize=["t", "stretches", "each", "stretch", "per", "h"])
def _differentiate(
    q, k, v, g, bonus, dy, table, least,
    kept, decayed, crossing, initial, dkept, ddecayed, dcrossing, dfinal,
    dq, dk, dg, flows, dbonus,
    t, h, stretches, each, stretch, per, scale, q_stride, k_stride, v_stride, g_stride, dy_stride,
    N: tl.constexpr, P: tl.constexpr, TILE_N: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PAD_N: tl.constexpr, WHOLE: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
    BONUS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's queries, keys and log decays, and its part of the bonus's.

    Queries leave their part of the log decays' in `flows` to KEYS, which are a later launch.
    Shapes:  dbonus: chunks h n    the rest as the inputs, and as `_summarise` and `_compose` leave it
    """
    program = tl.program_id(0)
    head, slot = program % h, program // h
    index, base = slot // per, slot % per * CHUNK
    sequence, first, tokens, follows, precedes = _stretch(table, index, t, stretches, each, stretch, PACKED)
    if (sequence < 0) | (base >= tokens):
        return
    smallest = _level(least, slot, head, h, N, PAD_N, LEVELS)
    if (smallest == LEVELS) != WHOLE:
        return
    q_at, k_at = q + first * q_stride + head * N, k + first * k_stride + head * N
    v_at, dy_at = v + first * v_stride + head * P, dy + first * dy_stride + head * P
    g_at, at = g + first * g_stride + head * N, (first * h + head) * N
    token, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]

    if not KEYS:  # what pairs of tokens and the state before the chunk ask for, over all of p
        score_grad = tl.zeros([CHUNK, CHUNK], tl.float32)
        for start in tl.range(0, P, TILE_P, num_stages=1, disable_licm=True):
            p = start + tl.arange(0, TILE_P)
            value = _tile(v_at, v_stride, base, tokens, p, P, CHUNK)
            pull = _tile(dy_at, dy_stride, base, tokens, p, P, CHUNK)
            score_grad = _times(pull, tl.trans(value), score_grad, PRODUCT, PRECISION)
        for tile in tl.range(0, N, TILE_N, num_stages=STAGES, disable_licm=True):
            n = tile + tl.arange(0, TILE_N)
            crossed = tl.zeros([CHUNK, TILE_N], tl.float32)
            for start in tl.range(0, P, TILE_P, num_stages=1, disable_licm=True):
                p = start + tl.arange(0, TILE_P)
                pull = _tile(dy_at, dy_stride, base, tokens, p, P, CHUNK)
                state = _state(
                    kept, decayed, crossing, initial, slot, index - sequence - 1, precedes, sequence, head, h, n, p,
                    N, P, INITIAL,
                )  # fmt: skip
                crossed = _times(pull, tl.trans(state), crossed, PRODUCT, PRECISION)
            log_decay = _tile(g_at, g_stride, base, tokens, n, N, CHUNK)
            query = _tile(q_at, q_stride, base, tokens, n, N, CHUNK).to(tl.float32) * scale
            key = _tile(k_at, k_stride, base, tokens, n, N, CHUNK).to(tl.float32)
            entered = totals(until(token, other, BEFORE), log_decay, PRODUCT, PRECISION)
            crossed *= tl.exp2(entered * _LOG2_E)
            grad, decay_grad = _pull(
                query, key, log_decay, entered, crossed, score_grad, token, other, smallest,
                CHUNK, TILE_N, LEVELS, WHOLE, BEFORE, PRODUCT, PRECISION, False,
            )  # fmt: skip
            if BONUS:  # a token and itself
                weights = tl.load(bonus + head * N + n, mask=n < N, other=0.0).to(tl.float32)
                own = tl.sum(tl.where(token == other, score_grad, 0.0), axis=1)[:, None]
                grad += own * weights[None, :] * key
                place = (slot.to(tl.int64) * h + head) * N
                tl.store(dbonus + place + n, tl.sum(own * query * key, axis=0), mask=n < N)
            _keep(dq + at, h * N, base, tokens, n, N, grad * scale, CHUNK)
            _keep(flows + at, h * N, base, tokens, n, N, decay_grad, CHUNK)
    else:  # with the gradient of the state after the chunk
        score_grad = tl.zeros([CHUNK, CHUNK], tl.float32)
        for start in tl.range(0, P, TILE_P, num_stages=1, disable_licm=True):
            p = start + tl.arange(0, TILE_P)
            value = _tile(v_at, v_stride, base, tokens, p, P, CHUNK)
            pull = _tile(dy_at, dy_stride, base, tokens, p, P, CHUNK)
            score_grad = _times(value, tl.trans(pull), score_grad, PRODUCT, PRECISION)
        for tile in tl.range(0, N, TILE_N, num_stages=STAGES, disable_licm=True):
            n = tile + tl.arange(0, TILE_N)
            crossed = tl.zeros([CHUNK, TILE_N], tl.float32)
            held = tl.zeros([TILE_N], tl.float32)
            for start in tl.range(0, P, TILE_P, num_stages=1, disable_licm=True):
                p = start + tl.arange(0, TILE_P)
                value = _tile(v_at, v_stride, base, tokens, p, P, CHUNK)
                state = _state(
                    kept, decayed, crossing, initial, slot, index - sequence - 1, precedes, sequence, head, h, n, p,
                    N, P, INITIAL,
                )  # fmt: skip
                state_grad = _state(
                    dkept, ddecayed, dcrossing, dfinal, slot, index - sequence, follows, sequence, head, h, n, p,
                    N, P, FINAL,
                )  # fmt: skip
                held += tl.sum(state * state_grad, axis=1)
                crossed = _times(value, tl.trans(state_grad), crossed, PRODUCT, PRECISION)
            log_decay = _tile(g_at, g_stride, base, tokens, n, N, CHUNK)
            held *= tl.exp2(tl.sum(log_decay.to(tl.float32), axis=0) * _LOG2_E)
            crossed *= decays(other > token, log_decay, PRODUCT, PRECISION)
            entered = totals(until(token, other, BEFORE), log_decay, PRODUCT, PRECISION)
            query = _tile(q_at, q_stride, base, tokens, n, N, CHUNK).to(tl.float32) * scale
            key = _tile(k_at, k_stride, base, tokens, n, N, CHUNK).to(tl.float32)
            grad, decay_grad = _pull(
                key, query, log_decay, entered, crossed, score_grad, token, other, smallest,
                CHUNK, TILE_N, LEVELS, WHOLE, BEFORE, PRODUCT, PRECISION, True,
            )  # fmt: skip
            if BONUS:
                weights = tl.load(bonus + head * N + n, mask=n < N, other=0.0).to(tl.float32)
                own = tl.sum(tl.where(token == other, score_grad, 0.0), axis=1)[:, None]
                grad += own * weights[None, :] * query
            _keep(dk + at, h * N, base, tokens, n, N, grad, CHUNK)
            decay_grad += _tile(flows + at, h * N, base, tokens, n, N, CHUNK) + held[None, :]
            _keep(dg + at, h * N, base, tokens, n, N, decay_grad, CHUNK)
