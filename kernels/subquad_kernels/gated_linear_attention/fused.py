"""Gated linear attention in Triton: time in stretches walked by one program each, the state in registers.

What a stretch does to a state is a decay and a write. Forward, `_summarise` finds both for every stretch that another
follows, `_compose` passes states from stretch to stretch, `_read` walks the chunks of each stretch and writes y.
Backward, the same two pass the state's gradient from the last stretch to the first; each program of `_differentiate`
then walks its stretch twice, forward to keep the state before every chunk, backward with the state's gradient in
registers. No stretch holds tokens of two documents, so nothing inside knows of packing.

Within a chunk, tokens meet at powers of two, as in `chunked`: all exponents are sums of log decays over a range of
tokens (a matrix of zeros and ones times the chunk's log decays), none is positive, and the gradient of the log decays
is the transposed matrix times that of the exponents. Sums over programs are taken afterwards: no atomics.

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
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.gated_linear_attention.declaration import stretch_len
from subquad_kernels.tile_sizes import ceil_div, padded
from subquad_kernels.triton_chunks import chunk_at, lay_out
from subquad_kernels.triton_decays import decays, meet, ranges, sums, until
from subquad_kernels.triton_launch import QuickLaunch
from subquad_kernels.triton_precision import fp32_products

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs

_LOG2_E = tl.constexpr(1.4426950408889634)
_ENTRIES = 256
"""Numbers of a state that a program of `_compose` passes on, and stretches whose writes it loads together."""
_TOGETHER = 8


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How one kernel is laid out on a device; changes speed, never results beyond rounding.

    `chunk` tokens (16 or more, a power of two) are taken together. `tile` is the width of a program's state where it
    is cut: of v forward, of k backward. `stretch` tokens have one program: the operator's number unless told.
    """

    chunk: int
    tile: int
    num_warps: int = 4
    num_stages: int = 2
    stretch: int | None = None


@lru_cache
def launch_of(n: int, p: int, kernel: str) -> Launch:
    """Sizes for a head: kernel is `summarise`, `read` or `differentiate`.

    16 tokens, the fewest of a tensor core's tile: with 32 the decays, queries and keys of a chunk beside a state of
    64 x 64 outgrow the registers of four warps. `summarise` has no pairs of tokens and takes 64. `read` takes four
    warps at every width: eight repeat what a chunk's pairs need and took 1.8 to 2 times as long. Backward, where the
    whole width of v must be held, eight warps hold up to 128 x 128.
    """
    wide_n, wide_p = padded(n), padded(p)
    if kernel == "differentiate":
        tile = min(wide_n, max(16, 128 * 128 // wide_p))
        large = tile * wide_p > 64 * 64
        return Launch(chunk=16, tile=tile, num_warps=8 if large else 4, num_stages=1 if large else 2)
    tile = min(wide_p, max(16, 64 * 128 // wide_n))
    if kernel == "read":
        return Launch(chunk=16, tile=tile, num_warps=4)
    large = tile * wide_n > 64 * 64
    return Launch(chunk=64 if wide_n <= 128 else 16, tile=tile, num_warps=8 if large else 4)


def forward(launches: Mapping[str, Launch] | None = None, **arguments: Argument) -> Outputs:
    """y, final_state and the residual."""
    values: Any = arguments
    call = _Call(values, launches)
    if call.t == 1 and call.cu_seqlens is None:
        return call.step()
    return call.forward()


def backward(
    arguments: Arguments,
    outputs: Outputs,
    gradients: tuple[Tensor | None, ...],
    launches: Mapping[str, Launch] | None = None,
) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument, from the gradients of y and of final_state."""
    return _Call(arguments, launches).backward(outputs[2], *gradients)


class _Call:
    """The arguments of one call as the kernels take them: every tensor a table of rows, one row a token."""

    def __init__(self, values: Mapping[str, Any], launches: Mapping[str, Launch] | None) -> None:
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
        self.launches = launches or {}
        read = self._launch("read")
        self.stretch = read.stretch or stretch_len(self.n, self.p)
        self.cu_seqlens: Tensor | None = values["cu_seqlens"]

    def _launch(self, kernel: str) -> Launch:
        return self.launches.get(kernel) or launch_of(self.n, self.p, kernel)

    def _plan(self) -> None:
        """Stretches, those that another follows (cuts), and where documents lie; nothing waits for the device.

        Unpacked, every sequence has `each` stretches and no table is needed.
        """
        if self.cu_seqlens is None:
            self.table = self.starts = None
            self.sequences, self.each = self.b, ceil_div(self.t, self.stretch)
            self.stretches, self.cuts = self.b * self.each, self.b * (self.each - 1)
            return
        self.sequences, self.each = self.cu_seqlens.shape[0] - 1, 0
        self.cuts = self.t // self.stretch
        self.stretches = self.cuts + self.sequences
        # An empty document has a stretch of no tokens: the documents before a stretch tell which cut is its own.
        self.table, self.starts = lay_out(self.cu_seqlens, self.stretches, self.stretch, least=1)

    def _constants(self, launch: Launch) -> dict[str, Any]:
        return _constants_of(launch, self.n, self.p, self.q.dtype, self.before, self.cu_seqlens is not None)

    @staticmethod
    def _like(rows: Tensor) -> Tensor:
        return torch.empty_like(rows, memory_format=torch.contiguous_format)

    def _new(self, *shape: int) -> Tensor:
        return self.q.new_empty(shape, dtype=torch.float32)

    def _states(self, given: Tensor | None) -> Tensor:
        """One state a sequence, filled only where a kernel may leave it: an empty document's."""
        shape = (self.sequences, self.h, self.n, self.p)
        if self.table is None:
            return self._new(*shape)
        if given is None:
            return self._new(*shape).zero_()
        return given.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def _cross(
        self, rows: Tensor, columns: Tensor, strides: tuple[int, int], edge: Tensor | None, *, reverse: bool
    ) -> Tensor:
        """What crosses every cut: states, from keys and values; or their gradients, from queries and those of y.

        Shapes:  rows: b t h n    columns: b t h p (tokens at their strides)    edge: sequences h n p  ->  cuts h n p
        """
        states, totals = self._new(self.cuts, self.h, self.n, self.p), self._new(self.cuts, self.h, self.n)
        if self.cuts == 0:
            return states
        launch = self._launch("summarise")
        tile = min(launch.tile, padded(self.p))
        _summarise[(self.stretches * self.h * ceil_div(self.p, tile),)](
            rows, columns, self.g, self.table, states, totals,
            self.t, self.h, self.each, self.stretch, self.scale if reverse else 1.0,
            *strides, self.strides[3],
            PAD_N=padded(self.n), TILE_P=tile, REVERSE=reverse, **self._constants(launch),
        )  # fmt: skip
        size = self.n * self.p
        _compose[(self.sequences * self.h * ceil_div(size, _ENTRIES),)](
            states, totals, edge, self.starts, self.h, self.each, size,
            P=self.p, TILE=_ENTRIES, TOGETHER=_TOGETHER, GIVEN=edge is not None, PACKED=self.starts is not None,
            REVERSE=reverse, num_warps=2,
        )  # fmt: skip
        return states

    def forward(self) -> Outputs:
        """y: b t h p    final_state: states h n p    boundaries: cuts h n p"""
        self._plan()
        boundaries = self._cross(self.k, self.v, self.strides[1:3], self.initial, reverse=False)
        launch = self._launch("read")
        tile = min(launch.tile, padded(self.p))
        y = self._like(self.v)
        final = self._states(self.initial)
        _read[(self.stretches * self.h * ceil_div(self.p, tile),)](
            self.q, self.k, self.v, self.g, self.bonus, self.initial, boundaries, self.table, y, final,
            self.t, self.h, self.each, self.stretch, self.scale,
            *self.strides,
            PAD_N=padded(self.n), TILE_P=tile, INITIAL=self.initial is not None, BONUS=self.bonus is not None,
            **self._constants(launch),
        )  # fmt: skip
        return y, final, boundaries

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
        """Gradients in the types of their tensors; the bonus's is summed over stretches at the end."""
        self._plan()
        if dy is None:
            dy = torch.zeros(self.b, self.t, self.h, self.p, dtype=self.q.dtype, device=self.q.device)
        pull, pull_stride = _rows(dy)
        dfinal = None if dfinal is None else dfinal.contiguous()
        leaving = self._cross(self.q, pull, (self.strides[0], pull_stride), dfinal, reverse=True)
        launch = self._launch("differentiate")
        tile = min(launch.tile, padded(self.n))
        tiles = ceil_div(self.n, tile)
        shape = (self.b, self.t, self.h, self.n)
        dq, dk, dg = (self._like(rows) for rows in (self.q, self.k, self.g))
        # Every tile of n has its part of dv.
        dv = torch.empty(
            tiles, *shape[:3], self.p, dtype=self.v.dtype if tiles == 1 else torch.float32, device=self.v.device
        )
        dbonus = None if self.bonus is None else self._new(self.stretches, self.h, self.n)
        dinitial = None if self.initial is None else self._states(dfinal)
        product = torch.bfloat16 if self.q.dtype == torch.bfloat16 else torch.float32
        held = ceil_div(min(self.stretch, self.t), launch.chunk) * tile * padded(self.p)
        states = torch.empty(self.stretches * self.h * tiles, held, dtype=product, device=self.q.device)
        _differentiate[(self.stretches * self.h * tiles,)](
            self.q, self.k, self.v, self.g, self.bonus, self.initial, boundaries, self.table, pull, dfinal, leaving,
            dq, dk, dv, dg, dbonus, dinitial, states,
            self.b, self.t, self.h, self.each, self.stretch, held, self.scale,
            *self.strides, pull_stride,
            PAD_P=padded(self.p), TILE_N=tile, INITIAL=self.initial is not None, FINAL=dfinal is not None,
            BONUS=self.bonus is not None, **self._constants(launch),
        )  # fmt: skip
        return {
            "q": dq,
            "k": dk,
            "v": dv[0] if tiles == 1 else dv.sum(0),
            "log_decay": dg,
            "bonus": None if dbonus is None else dbonus.sum(0),
            "initial_state": dinitial,
        }


@lru_cache
def _constants_of(launch: Launch, n: int, p: int, dtype: torch.dtype, before: bool, packed: bool) -> dict[str, Any]:
    """What every walk is compiled for; one mapping for all its calls, not to be changed."""
    return {
        "N": n,
        "P": p,
        "CHUNK": launch.chunk,
        "LEVELS": launch.chunk.bit_length() - 1,
        "BEFORE": before,
        "PACKED": packed,
        # Float16 would overflow in states; a single TF32 product cuts factors off, and missed its tolerance.
        "PRODUCT": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
        "PRECISION": fp32_products(exact=dtype != torch.bfloat16),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
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
def _stretch(table, index, t, each, stretch, PACKED: tl.constexpr):
    """Sequence, first row (64 bits), tokens, whether a stretch of the same sequence follows, and goes before."""
    if PACKED:
        first, tokens, sequence, begins, ends = chunk_at(table, index)
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
    """CHUNK tokens from `base` on, in the tensor's own type; zeros past the stretch.  [CHUNK, columns]

    `rows` points at the stretch's first token: offsets within a stretch are small.
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
@triton.jit(do_not_specialize=["t", "each", "stretch"])
def _summarise(
    rows, columns, g, table, states, totals,
    t, h, each, stretch, scale, row_stride, column_stride, g_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """What a stretch writes to the state that leaves it, and its log decay; REVERSE: to the gradient that enters it.

    Shapes:  states: cuts h n p    totals: cuts h n
    """
    tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    program = tl.program_id(0)
    tile, head, index = program % tiles, (program // tiles) % h, program // (tiles * h)
    sequence, first, tokens, follows, precedes = _stretch(table, index, t, each, stretch, PACKED)
    if REVERSE:
        crosses, cut = precedes, index - sequence - 1
    else:
        crosses, cut = follows, index - sequence
    tokens = tl.where(crosses, tokens, 0)
    n, p = tl.arange(0, PAD_N), tile * TILE_P + tl.arange(0, TILE_P)
    rows_at = rows + first * row_stride + head * N
    columns_at = columns + first * column_stride + head * P
    g_at = g + first * g_stride + head * N
    token, summed = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]

    state = tl.zeros([TILE_P, PAD_N], tl.float32)
    total = tl.zeros([PAD_N], tl.float32)
    chunks = tl.cdiv(tokens, CHUNK)
    for step in tl.range(0, chunks, disable_licm=True):
        base = step * CHUNK
        if REVERSE:
            base = (chunks - 1 - step) * CHUNK
        log_decay = _tile(g_at, g_stride, base, tokens, n, N, CHUNK)
        row = _tile(rows_at, row_stride, base, tokens, n, N, CHUNK).to(tl.float32) * scale
        column = _tile_transposed(columns_at, column_stride, base, tokens, p, P, CHUNK)
        if REVERSE:
            row *= decays(until(token, summed, BEFORE), log_decay, PRODUCT, PRECISION)
        else:
            row *= decays(summed > token, log_decay, PRODUCT, PRECISION)
        within = tl.sum(log_decay.to(tl.float32), axis=0)
        state = _times(column, row, state * tl.exp2(within * _LOG2_E)[None, :], PRODUCT, PRECISION)
        total += within
    place = cut.to(tl.int64) * h + head
    inside = (n < N) & crosses
    offsets = n[None, :] * P + p[:, None]
    tl.store(states + place * (N * P) + offsets, state, mask=inside[None, :] & (p < P)[:, None])
    tl.store(totals + place * N + n, total, mask=inside & (tile == 0))


@QuickLaunch
@triton.jit(do_not_specialize=["each"])
def _compose(
    states, totals, edge, starts, h, each, size,
    P: tl.constexpr, TILE: tl.constexpr, TOGETHER: tl.constexpr, GIVEN: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn the writes of a sequence's stretches, in place, into what crosses its cuts, from one edge to the other.

    Shapes:  states: cuts h n p    totals: cuts h n    edge: sequences h n p (initial states, or final gradients)
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
    state = tl.zeros([TILE], tl.float32)
    if GIVEN:
        place = (sequence.to(tl.int64) * h + head) * size
        state = tl.load(edge + place + offsets, mask=within, other=0.0).to(tl.float32)
    for base in range(0, count, TOGETHER):
        writes, decays, places = (), (), ()
        for i in tl.static_range(TOGETHER):
            cut = first + base + i
            if REVERSE:
                cut = first + count - 1 - (base + i)
            place = cut.to(tl.int64) * h + head
            mask = within & (base + i < count)
            places += (place,)
            writes += (tl.load(states + place * size + offsets, mask=mask, other=0.0),)
            decays += (tl.load(totals + place * (size // P) + offsets // P, mask=mask, other=0.0),)
        for i in tl.static_range(TOGETHER):
            state = tl.exp2(decays[i] * _LOG2_E) * state + writes[i]
            tl.store(states + places[i] * size + offsets, state, mask=within & (base + i < count))


@QuickLaunch
@triton.jit(do_not_specialize=["t", "each", "stretch"])
def _read(
    q, k, v, g, bonus, initial, boundaries, table, y, final,
    t, h, each, stretch, scale, q_stride, k_stride, v_stride, g_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    INITIAL: tl.constexpr, BONUS: tl.constexpr,
):  # fmt: skip
    """y of one stretch, and final_state where it is a sequence's last."""
    tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    program = tl.program_id(0)
    tile, head, index = program % tiles, (program // tiles) % h, program // (tiles * h)
    sequence, first, tokens, follows, precedes = _stretch(table, index, t, each, stretch, PACKED)
    n, p = tl.arange(0, PAD_N), tile * TILE_P + tl.arange(0, TILE_P)
    q_at, k_at = q + first * q_stride + head * N, k + first * k_stride + head * N
    v_at, g_at = v + first * v_stride + head * P, g + first * g_stride + head * N
    y_at = y + (first * h + head) * P
    token, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    offsets = n[None, :] * P + p[:, None]
    inside = (n < N)[None, :] & (p < P)[:, None]
    state = _enter(initial, boundaries, sequence, index, precedes, head, h, offsets, inside, N * P, INITIAL)
    own = tl.full([PAD_N], 0.0 if BEFORE else 1.0, tl.float32)
    if BONUS:
        own = tl.load(bonus + head * N + n, mask=n < N, other=0.0).to(tl.float32)

    for base in tl.range(0, tokens, CHUNK, disable_licm=True):
        log_decay = _tile(g_at, g_stride, base, tokens, n, N, CHUNK)
        query = _tile(q_at, q_stride, base, tokens, n, N, CHUNK).to(tl.float32) * scale
        key = _tile(k_at, k_stride, base, tokens, n, N, CHUNK).to(tl.float32)
        value = _tile(v_at, v_stride, base, tokens, p, P, CHUNK)
        value_transposed = _tile_transposed(v_at, v_stride, base, tokens, p, P, CHUNK)
        into = query * decays(until(token, other, BEFORE), log_decay, PRODUCT, PRECISION)
        result = _times(into, tl.trans(state), tl.zeros([CHUNK, TILE_P], tl.float32), PRODUCT, PRECISION)
        scores = tl.where(token == other, tl.sum(query * own[None, :] * key, axis=1)[:, None], 0.0)
        for level in tl.range(0, LEVELS, disable_licm=True):
            decay = decays(ranges(token, other, level, BEFORE), log_decay, PRODUCT, PRECISION)
            met = _times(query * decay, tl.trans(key * decay), tl.zeros([CHUNK, CHUNK], tl.float32), PRODUCT, PRECISION)
            scores += tl.where(meet(token, other, level), met, 0.0)
        result = _times(scores, value, result, PRODUCT, PRECISION)
        _keep(y_at, h * P, base, tokens, p, P, result, CHUNK)
        out_of = key * decays(other > token, log_decay, PRODUCT, PRECISION)
        within = tl.exp2(tl.sum(log_decay.to(tl.float32), axis=0) * _LOG2_E)
        state = _times(value_transposed, out_of, state * within[None, :], PRODUCT, PRECISION)
    if (tokens > 0) & (not follows):
        place = (sequence.to(tl.int64) * h + head) * (N * P)
        tl.store(final + place + offsets, state, mask=inside)


@triton.jit
def _enter(initial, boundaries, sequence, index, precedes, head, h, offsets, inside, size, INITIAL: tl.constexpr):
    """The state before a stretch: what crosses the cut before it, or the sequence's initial state.  [P, N]"""
    crossed = boundaries + ((index - sequence - 1).to(tl.int64) * h + head) * size
    state = tl.load(crossed + offsets, mask=inside & precedes, other=0.0)
    if INITIAL:
        given = initial + (sequence.to(tl.int64) * h + head) * size
        state += tl.load(given + offsets, mask=inside & (not precedes), other=0.0).to(tl.float32)
    return state


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


@QuickLaunch
@triton.jit(do_not_specialize=["b", "t", "each", "stretch"])
def _differentiate(
    q, k, v, g, bonus, initial, boundaries, table, dy, dfinal, leaving,
    dq, dk, dv, dg, dbonus, dinitial, states,
    b, t, h, each, stretch, held, scale, q_stride, k_stride, v_stride, g_stride, dy_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_P: tl.constexpr, TILE_N: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    INITIAL: tl.constexpr, FINAL: tl.constexpr, BONUS: tl.constexpr,
):  # fmt: skip
    """All gradients of one stretch and one tile of n.

    The states before its chunks wait in `states`, which only this program touches; dv of a tile of n is a partial sum.
    """
    tiles: tl.constexpr = (N + TILE_N - 1) // TILE_N
    program = tl.program_id(0)
    tile, head, index = program % tiles, (program // tiles) % h, program // (tiles * h)
    sequence, first, tokens, follows, precedes = _stretch(table, index, t, each, stretch, PACKED)
    n, p = tile * TILE_N + tl.arange(0, TILE_N), tl.arange(0, PAD_P)
    q_at, k_at = q + first * q_stride + head * N, k + first * k_stride + head * N
    v_at, g_at = v + first * v_stride + head * P, g + first * g_stride + head * N
    dy_at = dy + first * dy_stride + head * P
    dq_at, dk_at, dg_at = dq + (first * h + head) * N, dk + (first * h + head) * N, dg + (first * h + head) * N
    dv_at = dv + ((tile.to(tl.int64) * b * t + first) * h + head) * P
    slots = states + program.to(tl.int64) * held + tl.arange(0, PAD_P)[:, None] * TILE_N + tl.arange(0, TILE_N)[None, :]
    token, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    offsets = n[None, :] * P + p[:, None]
    inside = (n < N)[None, :] & (p < P)[:, None]

    state = _enter(initial, boundaries, sequence, index, precedes, head, h, offsets, inside, N * P, INITIAL)
    chunks = tl.cdiv(tokens, CHUNK)
    for step in tl.range(0, chunks, disable_licm=True):
        tl.store(slots + step * (PAD_P * TILE_N), state.to(PRODUCT))
        base = step * CHUNK
        log_decay = _tile(g_at, g_stride, base, tokens, n, N, CHUNK)
        key = _tile(k_at, k_stride, base, tokens, n, N, CHUNK).to(tl.float32)
        value_transposed = _tile_transposed(v_at, v_stride, base, tokens, p, P, CHUNK)
        out_of = key * decays(other > token, log_decay, PRODUCT, PRECISION)
        within = tl.exp2(tl.sum(log_decay.to(tl.float32), axis=0) * _LOG2_E)
        state = _times(value_transposed, out_of, state * within[None, :], PRODUCT, PRECISION)
    # Other threads of the program read what these have written.
    tl.debug_barrier()

    # The gradient of the state after the chunk: across the cut that follows, or final_state's.
    carried = tl.load(
        leaving + ((index - sequence).to(tl.int64) * h + head) * (N * P) + offsets, mask=inside & follows, other=0.0
    )
    if FINAL:
        given = dfinal + (sequence.to(tl.int64) * h + head) * (N * P)
        carried += tl.load(given + offsets, mask=inside & (not follows), other=0.0).to(tl.float32)
    own = tl.full([TILE_N], 0.0 if BEFORE else 1.0, tl.float32)
    if BONUS:
        own = tl.load(bonus + head * N + n, mask=n < N, other=0.0).to(tl.float32)
    own_grad = tl.zeros([TILE_N], tl.float32)
    nothing = tl.zeros([CHUNK, TILE_N], tl.float32)
    no_pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    for step in tl.range(0, chunks, disable_licm=True):
        chunk = chunks - 1 - step
        base = chunk * CHUNK
        log_decay = _tile(g_at, g_stride, base, tokens, n, N, CHUNK)
        query = _tile(q_at, q_stride, base, tokens, n, N, CHUNK).to(tl.float32) * scale
        key = _tile(k_at, k_stride, base, tokens, n, N, CHUNK).to(tl.float32)
        value = _tile(v_at, v_stride, base, tokens, p, P, CHUNK)
        pull = _tile(dy_at, dy_stride, base, tokens, p, P, CHUNK)
        pull_transposed = _tile_transposed(dy_at, dy_stride, base, tokens, p, P, CHUNK)
        entered = tl.load(slots + chunk * (PAD_P * TILE_N))

        # What crosses the chunk's ends: reads of the state before it, writes to the one after it, the decay between.
        decay = decays(until(token, other, BEFORE), log_decay, PRODUCT, PRECISION)
        into = query * decay
        query_grad = _times(pull, entered, nothing, PRODUCT, PRECISION) * decay
        decay_grad = sums(until(other, token, BEFORE), query * query_grad, nothing, PRODUCT, PRECISION)
        decay = decays(other > token, log_decay, PRODUCT, PRECISION)
        out_of = key * decay
        key_grad = _times(value, carried, nothing, PRODUCT, PRECISION) * decay
        decay_grad = sums(token > other, key * key_grad, decay_grad, PRODUCT, PRECISION)
        within = tl.exp2(tl.sum(log_decay.to(tl.float32), axis=0) * _LOG2_E)
        decay_grad += (within * tl.sum(entered.to(tl.float32) * carried, axis=0))[None, :]
        value_grad = _times(out_of, tl.trans(carried), tl.zeros([CHUNK, PAD_P], tl.float32), PRODUCT, PRECISION)
        carried = _times(pull_transposed, into, carried * within[None, :], PRODUCT, PRECISION)

        # Pairs of tokens, once with rows that read and once with rows that were written.
        score_grad = _times(pull, tl.trans(value), no_pairs, PRODUCT, PRECISION)
        score_grad_transposed = _times(value, tl.trans(pull), no_pairs, PRODUCT, PRECISION)
        scores_transposed = tl.where(token == other, tl.sum(query * own[None, :] * key, axis=1)[:, None], 0.0)
        for level in tl.range(0, LEVELS, disable_licm=True):
            decay = decays(ranges(token, other, level, BEFORE), log_decay, PRODUCT, PRECISION)
            queries, keys = query * decay, key * decay
            earlier_first = meet(other, token, level)
            met = _times(keys, tl.trans(queries), no_pairs, PRODUCT, PRECISION)
            scores_transposed += tl.where(earlier_first, met, 0.0)
            met = tl.where(meet(token, other, level), score_grad, 0.0)
            queries_grad = _times(met, keys, nothing, PRODUCT, PRECISION) * decay
            met = tl.where(earlier_first, score_grad_transposed, 0.0)
            keys_grad = _times(met, queries, nothing, PRODUCT, PRECISION) * decay
            query_grad += queries_grad
            key_grad += keys_grad
            terms = query * queries_grad + key * keys_grad
            decay_grad = sums(ranges(other, token, level, BEFORE), terms, decay_grad, PRODUCT, PRECISION)
        value_grad = _times(scores_transposed, pull, value_grad, PRODUCT, PRECISION)

        # A token and itself.
        own_pull = tl.sum(pull.to(tl.float32) * value.to(tl.float32), axis=1)[:, None]
        query_grad += own_pull * own[None, :] * key
        key_grad += own_pull * own[None, :] * query
        own_grad += tl.sum(own_pull * query * key, axis=0)
        _keep(dq_at, h * N, base, tokens, n, N, query_grad * scale, CHUNK)
        _keep(dk_at, h * N, base, tokens, n, N, key_grad, CHUNK)
        _keep(dg_at, h * N, base, tokens, n, N, decay_grad, CHUNK)
        _keep(dv_at, h * P, base, tokens, p, P, value_grad, CHUNK)
    if BONUS:
        tl.store(dbonus + (index.to(tl.int64) * h + head) * N + n, own_grad, mask=n < N)
    if INITIAL and (tokens > 0) & (not precedes):
        place = (sequence.to(tl.int64) * h + head) * (N * P)
        tl.store(dinitial + place + offsets, carried, mask=inside)
