"""Gated DeltaNet in Triton: what a chunk can do alone runs side by side, a chain of three products a chunk does not.

Forward, chunks of 64 tokens:  `_invert` solves each chunk's triangular system, T = (I + A)^-1;  `_scan` walks the
chunks of a sequence with the state in registers, U = T beta (V - e^b K S) and S <- e^b_C S + (e^(b_C - b) K)^T U;
`_read` forms y. Backward:  `_invert` again, `_read_back` (the gradient of U by y), `_scan_back` from the last chunk to
the first (the gradient of states), then the gradients by query, and those by key, of what it writes and of what it
reads, in one launch or in two: all of them in one kernel went wrong in float32 (README.md).
The scans hold transposed states [TILE_P, N]: a state and what was computed from it are left operands of products,
which stay in registers; right operands come from memory. Exponents are masked differences of sums inside a chunk,
never positive. No atomics: the same bits every time. README.md derives the equations.
"""

# What Triton compiles has no Python types, and tuples that grow.
# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.delta_rule.declaration import CHUNK, SEGMENT_CHUNKS, num_chunks, segment_programs
from subquad_kernels.delta_rule.inverse import BLOCK, invert_chunk, pairs_of, store_inverse
from subquad_kernels.delta_rule.segments import Segments, is_taken, segment_of, start_of_map, store_map
from subquad_kernels.delta_rule.tiles import (
    chunk_of,
    fetch,
    fetch_transposed,
    load,
    load_transposed,
    rows_of,
    store,
    store_transposed,
)
from subquad_kernels.tile_sizes import ceil_div, padded
from subquad_kernels.triton_chunks import lay_out
from subquad_kernels.triton_launch import QuickLaunch
from subquad_kernels.triton_precision import fp32_products

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs

_LOG2_E = tl.constexpr(math.log2(math.e))
_HALF_COLUMNS = 64
"""Columns of half precision from which rows in shared memory have one layout, of 128 bytes: of narrower tiles beside
wider ones, ptxas 12.8 (triton 3.6 to 3.7) may read operands from nowhere (README)."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a call is laid out on a device; changes speed, never results beyond rounding.

    `scan_tile_p` value channels a program of the two scans, whose loops hold `scan_stages` and `scan_back_stages`
    chunks in shared memory; time is cut until `scan_programs` of them run, into segments of `segment_chunks` at least
    (`segments.py`). `read_tile_p` of `_read` and `_read_back`, `decode_tile_p` of a decode. Both gradients by key are
    found by one launch if `differentiate_together`.
    """

    scan_tile_p: int = 64
    scan_warps: int = 4
    scan_stages: int = 3
    scan_back_stages: int = 2
    scan_programs: int = 256
    segment_chunks: int = SEGMENT_CHUNKS
    read_tile_p: int = 64
    read_warps: int = 4
    invert_warps: int = 1
    differentiate_tile_p: int = 64
    differentiate_warps: int = 4
    differentiate_together: bool = False
    decode_tile_p: int = 32
    decode_warps: int = 4


def launch_of(n: int, element_bytes: int) -> Launch:
    """Sizes by key width and type: what a chunk's tiles leave of 227 KiB of shared memory and 255 registers a lane.

    In float32 a program is one warp group wherever a row of keys fits: eight warps on the 64 rows of a chunk compute
    some products twice, in two layouts. Both gradients by key come from one launch where that was timed and faster: in
    half precision at widths of 64 and 128 (README.md).
    """
    wide, programs = n > 64, segment_programs(n)
    if element_bytes == 4:
        return Launch(
            scan_programs=programs,
            scan_tile_p=64 if n <= 64 else 32 if n <= 128 else 16,
            scan_stages=1,
            scan_back_stages=1,
            differentiate_tile_p=32 if wide else 64,
            differentiate_warps=8 if n > 128 else 4,
        )
    if n > 128:
        return Launch(
            scan_programs=programs, scan_warps=8, scan_stages=2, scan_back_stages=1, differentiate_warps=8
        )  # fmt: skip
    if wide:
        return Launch(scan_programs=programs, scan_warps=8, differentiate_warps=8, differentiate_together=True)
    return Launch(scan_programs=programs, differentiate_together=True)


def forward(launch: Launch | None = None, **arguments: Argument) -> Outputs:
    """y, final_state and the residuals."""
    return _Call(arguments, launch).forward()


def backward(
    arguments: Arguments,
    outputs: Outputs,
    gradients: tuple[Tensor | None, ...],
    launch: Launch | None = None,
) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument, from the gradients of y and of final_state."""
    _, _, writes, boundaries = outputs
    return _Call(arguments, launch).backward(writes, boundaries, *gradients)


class _Call:
    """The arguments of one call as the kernels take them: every tensor a table of rows, one row a token."""

    def __init__(self, values: Mapping[str, Any], launch: Launch | None) -> None:
        v = values["v"]
        if v.dtype == torch.float64:
            raise TypeError("delta_rule/fused computes in float32; for float64 use kernel='chunked'")
        decay = values["log_decay"]
        if values["remove"] is not None or (decay is not None and decay.dim() == 4):
            raise TypeError("delta_rule/fused takes one decay per head and no remove or insert: use kernel='chunked'")
        self.b, self.t, self.h, self.p = v.shape
        self.h_k, self.n = values["k"].shape[2:]
        self.q, self.k, self.v = (rows_of(values[name]) for name in ("q", "k", "v"))
        self.log_decay, self.gate, self.initial = (
            None if values[name] is None else values[name].contiguous()
            for name in ("log_decay", "write_gate", "initial_state")
        )
        self.scale = float(values["scale"])
        self.bounds = None if values["cu_seqlens"] is None else values["cu_seqlens"].contiguous()
        self.documents = 0 if self.bounds is None else self.bounds.shape[0] - 1
        self.launch = launch or launch_of(self.n, v.element_size())
        self.tokens = self.b * self.t
        self.chunks = num_chunks(self.b, self.t, self.documents) or self.b
        self._terms = 1 if v.dtype == torch.float32 else 2
        self.table, self.offsets = (None, None) if self.bounds is None else lay_out(self.bounds, self.chunks, CHUNK)

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.v.new_empty(shape, dtype=dtype or self.v.dtype)

    def _sizes(self) -> tuple[int, ...]:
        """Chunks of all sequences, tokens and chunks of one, heads, and value heads a key head."""
        return self.chunks, self.t, ceil_div(self.t, CHUNK), self.h, self.h // self.h_k

    def _constants(self) -> dict[str, Any]:
        return {
            "N": self.n,
            "PAD_N": padded(self.n),
            "P": self.p,
            "CHUNK": CHUNK,
            "PACKED": self.bounds is not None,
            "PRECISION": fp32_products(exact=self.v.dtype == torch.float32),
        }

    def forward(self) -> Outputs:
        """y: b t h p    final_state: states h n p    writes: b t h p    boundaries: chunks h p n"""
        launch, b, t, h, n, p = self.launch, self.b, self.t, self.h, self.n, self.p
        y, writes = self._new(b, t, h, p), self._new(b, t, h, p)
        states = self.documents or b
        final = self._new(states, h, n, p, dtype=torch.float32)
        if t == 1 and self.bounds is None:
            tile_p = min(launch.decode_tile_p, padded(p))
            _decode[(b * h * ceil_div(p, tile_p),)](
                self.q, self.k, self.v, self.log_decay, self.gate, self.initial, y, final, writes,
                h, h // self.h_k, self.q.stride(0), self.k.stride(0), self.v.stride(0), self.scale,
                N=n, PAD_N=padded(n), P=p, TILE_P=tile_p, DECAY=self.log_decay is not None,
                GATE=self.gate is not None, INITIAL=self.initial is not None, num_warps=launch.decode_warps,
            )  # fmt: skip
            return y, final, writes, self._new(0, h, p, n)
        boundaries = self._new(self.chunks, h, p, n)
        vectors, inverse = self._invert()
        constants = self._constants() | {"DECAY": self.log_decay is not None}
        segments = self._segments()

        def scan(programs: tuple[int], entering: Tensor | None, maps: Tensor | None) -> None:
            _scan[programs](
                self.k, self.v, inverse, vectors, self.initial, entering, self.bounds, self.offsets, segments.table,
                final, writes, boundaries, maps,
                *self._sizes(), segments.chunks, segments.slots, self.k.stride(0), self.v.stride(0),
                TILE_P=segments.tile_p, CUT=segments.cut, MAPS=maps is not None, INITIAL=self.initial is not None,
                TERMS=self._terms, STAGES=launch.scan_stages, num_warps=launch.scan_warps, **constants,
            )  # fmt: skip

        segments.walk(scan, self.initial, reversed=False)
        tile_p = min(launch.read_tile_p, padded(p))
        _read[(self.chunks * h * ceil_div(p, tile_p),)](
            self.q, self.k, writes, vectors, boundaries, self.table, y,
            *self._sizes(), self.q.stride(0), self.k.stride(0), self.scale,
            TILE_P=tile_p, num_warps=launch.read_warps, **constants,
        )  # fmt: skip
        return y, final, writes, boundaries

    def _segments(self) -> Segments:
        launch, tile_p = self.launch, min(self.launch.scan_tile_p, padded(self.p))
        v = self.v.view(self.b, self.t, self.h, self.p)
        return Segments.of(v, self.n, self.bounds, tile_p, programs=launch.scan_programs, least=launch.segment_chunks)

    def _invert(self) -> tuple[Tensor, Tensor]:
        """Vectors of each chunk, and T.  Shapes:  4 chunks h 64, terms chunks h 64 64

        Half types hold T as the sum of two terms: U = T R cancels where gates reach 2 and keys repeat, and what one
        term of 8 bits rounds away is then as large as half of what y may be off by.
        The vectors: sums of log2 decays b, write gates, e^b, and e^(b_C - b), all but the first 0 past a chunk's end.
        """
        # Sums in fp64 where inputs are fp32: small decays beside large ones would lose digits that the rest has.
        exact = torch.float64 if self.v.dtype == torch.float32 else torch.float32
        vectors = self._new(4, self.chunks, self.h, CHUNK, dtype=exact)
        inverse = self._new(self._terms, self.chunks, self.h, CHUNK, CHUNK)
        _invert[(self.chunks * self.h,)](
            self.k, self.log_decay, self.gate, self.table, vectors, inverse,
            *self._sizes(), self.k.stride(0),
            DECAY=self.log_decay is not None, GATE=self.gate is not None, TERMS=self._terms,
            num_warps=self.launch.invert_warps, **self._constants(),
        )  # fmt: skip
        return vectors, inverse

    def backward(
        self, writes: Tensor, boundaries: Tensor, dy: Tensor | None, dfinal: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Gradients; those of q and k are summed over the value heads that share a key head."""
        launch, b, t, h, n, p = self.launch, self.b, self.t, self.h, self.n, self.p
        dy = self.v.new_zeros(self.tokens, h * p) if dy is None else dy.reshape(self.tokens, h * p)
        dfinal = None if dfinal is None else dfinal.contiguous()
        if t == 1 and self.bounds is None:  # a decode keeps no boundary: it is the initial state
            boundaries = self._new(b, h, p, n)
            boundaries.copy_(self.initial.transpose(2, 3)) if self.initial is not None else boundaries.zero_()
        vectors, inverse = self._invert()
        decayed, gated = self.log_decay is not None, self.gate is not None
        constants = self._constants() | {"DECAY": decayed}
        # The gradient of U by y, which the scan replaces by that of T U.
        dwrites = self._new(self.tokens, h, p)
        tile_p = min(launch.read_tile_p, padded(p))
        _read_back[(self.chunks * h * ceil_div(p, tile_p),)](
            self.q, self.k, dy, vectors, self.table, dwrites,
            *self._sizes(), self.q.stride(0), self.k.stride(0), self.scale,
            TILE_P=tile_p, num_warps=launch.read_warps, **constants,
        )  # fmt: skip
        dstates = self._new(self.chunks, h, p, n)
        dinitial = self._new(self.documents or b, h, n, p, dtype=torch.float32)
        segments = self._segments()

        def scan_back(programs: tuple[int], leaving: Tensor | None, maps: Tensor | None) -> None:
            _scan_back[programs](
                self.q, self.k, dy, inverse, dwrites, vectors, dfinal, leaving, self.bounds, self.offsets,
                segments.table, dinitial, dstates, maps,
                *self._sizes(), segments.chunks, segments.slots, self.q.stride(0), self.k.stride(0), self.scale,
                TILE_P=segments.tile_p, CUT=segments.cut, MAPS=maps is not None, FINAL=dfinal is not None,
                TERMS=self._terms, STAGES=launch.scan_back_stages, num_warps=launch.scan_warps, **constants,
            )  # fmt: skip

        segments.walk(scan_back, dfinal, reversed=True)
        shared = torch.float32 if h != self.h_k else None
        dq, dk = (self._new(b, t, h, n, dtype=shared) for _ in range(2))
        dv = self._new(b, t, h, p)
        ddecay = self._new(b, t, h, dtype=torch.float32) if decayed else None
        dgate = self._new(b, t, h, dtype=torch.float32) if gated else None
        # The gradient by decays is summed from launch to launch.
        grid, sizes = (self.chunks * h,), self._sizes()
        least = 1 if self.v.dtype == torch.float32 else _HALF_COLUMNS
        pad_n, pad_p = (max(padded(width), least) for width in (n, p))
        constants |= {
            "PAD_N": pad_n,
            "PAD_P": pad_p,
            "TILE_P": min(launch.differentiate_tile_p, pad_p),
            "num_warps": launch.differentiate_warps,
        }
        _differentiate_query[grid](
            self.q, self.k, dy, writes, boundaries, vectors, self.table, dq, ddecay,
            *sizes, self.q.stride(0), self.k.stride(0), self.scale, **constants,
        )  # fmt: skip
        together = launch.differentiate_together
        part = None if together else self._new(b, t, h, n, dtype=torch.float32)
        for written, read in ((True, True),) if together else ((True, False), (False, True)):
            _differentiate_key[grid](
                self.q, self.k, self.v, dy, writes, dwrites, boundaries, dstates, vectors, self.table, part, dk, dv,
                ddecay, dgate, *sizes, self.q.stride(0), self.k.stride(0), self.v.stride(0), self.scale, GATE=gated,
                WRITTEN=written, READ=read, **constants,
            )  # fmt: skip
        if shared is not None:
            dq, dk = (part.view(b, t, self.h_k, -1, n).sum(3) for part in (dq, dk))
        return {
            "q": dq,
            "k": dk,
            "v": dv,
            "log_decay": ddecay,
            "write_gate": dgate,
            "initial_state": None if self.initial is None else dinitial,
        }


@triton.jit
def _power(exponent):
    """2 to a sum of log2 decays or a difference of two, which has fp64 where inputs are fp32."""
    return tl.exp2(exponent.to(tl.float32))


@triton.jit
def _scale_rows(tile, sums, DECAY: tl.constexpr):
    """exp2(sums) tile, row by row."""
    if DECAY:
        tile *= _power(sums)[:, None]
    return tile


@triton.jit
def _decayed(tile, later, earlier, shown, DECAY: tl.constexpr):
    """exp2(later - earlier) tile where shown, else 0: the exponent is masked, so that it is never positive."""
    if DECAY:
        tile *= _power(tl.where(shown, later - earlier, 0.0))
    return tl.where(shown, tile, 0.0)


@triton.jit
def _system(k, size, stride, sums, gates, later, earlier, N: tl.constexpr, PAD_N: tl.constexpr, DECAY: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """A_ij = beta_i (k_i . k_j) exp(b_i - b_j) where j < i, of blocks of later tokens i and earlier ones j.

    Shapes:  later, earlier: blocks length (tokens of the chunk)  ->  blocks length length
    """
    # 64 bytes of a row at a time: four blocks of that are what one warp can keep in registers.
    TILE_N: tl.constexpr = min(PAD_N, 64 // (k.dtype.element_ty.primitive_bitwidth // 8))
    product = tl.zeros([later.shape[0], later.shape[1], later.shape[1]], tl.float32)
    for n in tl.range(0, PAD_N, TILE_N, num_stages=1):
        columns = n + tl.arange(0, TILE_N)
        in_n = columns < N
        left_at = k + later[:, :, None] * stride + columns[None, None, :]
        left = tl.load(left_at, mask=(later < size)[:, :, None] & in_n[None, None, :], other=0.0)
        right_at = k + earlier[:, None, :] * stride + columns[None, :, None]
        right = tl.load(right_at, mask=(earlier < size)[:, None, :] & in_n[None, :, None], other=0.0)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    product *= tl.load(gates + later).to(tl.float32)[:, :, None]
    shown = later[:, :, None] > earlier[:, None, :]
    return _decayed(product, tl.load(sums + later)[:, :, None], tl.load(sums + earlier)[:, None, :], shown, DECAY)


@QuickLaunch
@triton.jit(do_not_specialize=["slots", "t", "chunks", "heads"])
def _invert(
    k, log_decay, gate, table, vectors, inverses,
    slots, t, chunks, heads, group, k_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr,
    DECAY: tl.constexpr, GATE: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T = (I + A)^-1 of a chunk and head (`inverse.py`)."""
    program = tl.program_id(0)
    head, chunk = program % heads, program // heads
    first, size = chunk_of(table, chunk, t, chunks, CHUNK, PACKED)
    k += first * k_stride + head // group * N

    # What the kernels to come need of decays and gates: see `_Call._invert`.
    span = tl.arange(0, CHUNK)
    within, at = span < size, (first + span) * heads + head
    exact: tl.constexpr = vectors.dtype.element_ty
    vectors += (chunk.to(tl.int64) * heads + head) * CHUNK
    plane = slots.to(tl.int64) * heads * CHUNK
    beta = tl.where(within, 1.0, 0.0)
    if GATE:
        beta = tl.load(gate + at, mask=within, other=0.0).to(tl.float32)
    tl.store(vectors + plane + span, beta.to(exact))
    sums = tl.zeros([CHUNK], exact)
    if DECAY:
        decay = tl.load(log_decay + at, mask=within, other=0.0).to(exact) * _LOG2_E
        decay = tl.maximum(decay, -160.0)  # where exp2 is 0: sums stay finite
        sums = tl.cumsum(decay, 0)
        here, rest = tl.where(within, _power(sums), 0.0), tl.where(within, _power(tl.sum(decay, 0) - sums), 0.0)
        tl.store(vectors + 2 * plane + span, here.to(exact))
        tl.store(vectors + 3 * plane + span, rest.to(exact))
    tl.store(vectors + span, sums)
    # Other threads of the program read what these have written.
    tl.debug_barrier()

    gates, tokens = vectors + plane, tl.arange(0, CHUNK // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    diagonal = _system(k, size, k_stride, vectors, gates, tokens, tokens, N, PAD_N, DECAY, PRECISION)
    earlier, later = pairs_of(BLOCK, CHUNK)
    near = _system(k, size, k_stride, vectors, gates, later, earlier, N, PAD_N, DECAY, PRECISION)
    earlier, later = pairs_of(2 * BLOCK, CHUNK)
    far = _system(k, size, k_stride, vectors, gates, later, earlier, N, PAD_N, DECAY, PRECISION)
    inverse = invert_chunk(tl.permute(diagonal, (0, 2, 1)), near, far, PRECISION)
    store_inverse(inverses + program.to(tl.int64) * (CHUNK * CHUNK), plane * CHUNK, inverse, CHUNK, TERMS)


@QuickLaunch
@triton.jit(do_not_specialize=["slots", "t", "chunks", "heads", "per", "segment_slots"])
def _scan(
    k, v, inverses, vectors, initial, entering, bounds, offsets, segments, final, writes, boundaries, maps,
    slots, t, chunks, heads, group, per, segment_slots, k_stride, v_stride,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, CUT: tl.constexpr, MAPS: tl.constexpr, DECAY: tl.constexpr, INITIAL: tl.constexpr,
    TERMS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of a segment: U of each, the state that enters it, and the last state; or find its map (MAPS)."""
    tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    walked: tl.constexpr = tiles + (N + TILE_P - 1) // TILE_P if MAPS else tiles
    program = tl.program_id(0)
    tile, head, place = program % walked, program // walked % heads, program // (walked * heads)
    if not is_taken(segments, segment_slots, place, PACKED, CUT):
        return
    sequence, first, length, chunk, _, ends = segment_of(
        segments, bounds, offsets, place, t, chunks, per, CHUNK, PACKED, CUT
    )
    if MAPS and ends:
        return
    values, keys = tile * TILE_P + tl.arange(0, TILE_P), tl.arange(0, PAD_N)
    in_p, in_n = values < P, keys < N  # no value belongs to the identity's rows
    span = tl.arange(0, CHUNK)
    square = span[:, None] * CHUNK + span[None, :]
    within = in_p[:, None] & in_n[None, :]
    state_at = (sequence * heads + head) * (N * P) + keys[None, :] * P + values[:, None]
    dtype: tl.constexpr = k.dtype.element_ty

    state = tl.zeros([TILE_P, PAD_N], tl.float32)
    if MAPS:
        state = start_of_map(values, keys, tiles, TILE_P)
    elif CUT:
        state = load(entering + (place.to(tl.int64) * heads + head) * (P * N), values, N, keys, in_p, in_n)
    elif INITIAL:
        state = tl.load(initial + state_at, mask=within, other=0.0).to(tl.float32)
    k += first * k_stride + head // group * N
    v += first * v_stride + head * P
    writes += (first * heads + head) * P
    inverses += (chunk * heads + head) * (CHUNK * CHUNK)
    boundaries += (chunk * heads + head) * (P * N)
    plane = slots.to(tl.int64) * heads * CHUNK
    gates = vectors + plane + (chunk * heads + head) * CHUNK
    # A chunk's place in a tensor takes 64 bits, a token's place in its chunk does not.
    key_step, value_step = k_stride.to(tl.int64) * CHUNK, v_stride.to(tl.int64) * CHUNK
    write_step, inverse_step = heads.to(tl.int64) * (CHUNK * P), heads.to(tl.int64) * (CHUNK * CHUNK)
    boundary_step, vector_step = heads.to(tl.int64) * (P * N), heads.to(tl.int64) * CHUNK
    for c in tl.range(0, tl.cdiv(length, CHUNK), num_stages=STAGES):
        size = tl.minimum(length - c * CHUNK, CHUNK)
        rows, in_t = tl.minimum(span, size - 1), span < size
        if not MAPS:
            store(boundaries + c * boundary_step, values, N, keys, in_p, in_n, state)
        key = fetch(k + c * key_step, rows, k_stride, keys, in_n)
        value = fetch_transposed(v + c * value_step, rows, v_stride, values, in_p)
        inverse = tl.load(inverses + c * inverse_step + square)
        # Tokens past the end repeat the last one with a closed gate.
        gate = tl.load(gates + c * vector_step + span).to(tl.float32)
        known = tl.dot(state.to(dtype), tl.trans(key), input_precision=PRECISION)
        if DECAY:
            here = gates + plane + c * vector_step
            known *= tl.load(here + span).to(tl.float32)[None, :]
            state *= tl.load(here + size - 1).to(tl.float32)
        fresh = ((value.to(tl.float32) - known) * gate[None, :]).to(dtype)
        write = tl.dot(fresh, tl.trans(inverse), input_precision=PRECISION)
        if TERMS == 2:
            inverse = tl.load(inverses + plane * CHUNK + c * inverse_step + square)
            write = tl.dot(fresh, tl.trans(inverse), write, input_precision=PRECISION)
        if not MAPS:
            store_transposed(writes + c * write_step, span, heads * P, values, in_t, in_p, write)
        if DECAY:
            write *= tl.load(gates + 2 * plane + c * vector_step + span).to(tl.float32)[None, :]
        state += tl.dot(write.to(dtype), key, input_precision=PRECISION)
    if MAPS:
        store_map(maps, place, head, heads, values, keys, state, N, P, tiles, TILE_P)
    elif ends:
        tl.store(final + state_at, state, mask=within)


@QuickLaunch
@triton.jit(do_not_specialize=["slots", "t", "chunks", "heads"])
def _read(
    q, k, writes, vectors, boundaries, table, y,
    slots, t, chunks, heads, group, q_stride, k_stride, scale,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = scale ( (e^b Q) S + tril(Q K^T e^(b_i - b_j)) U ) of a chunk, head and tile of values."""
    tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    program = tl.program_id(0)
    tile, head, chunk = program % tiles, program // tiles % heads, program // (tiles * heads)
    first, size = chunk_of(table, chunk, t, chunks, CHUNK, PACKED)
    span, keys, values = tl.arange(0, CHUNK), tl.arange(0, PAD_N), tile * TILE_P + tl.arange(0, TILE_P)
    in_t, in_n, in_p = span < size, keys < N, values < P
    dtype: tl.constexpr = k.dtype.element_ty
    query = load(q + first * q_stride + head // group * N, span, q_stride, keys, in_t, in_n)
    key = load_transposed(k + first * k_stride + head // group * N, span, k_stride, keys, in_t, in_n)
    place = (first * heads + head) * P
    write = load(writes + place, span, heads * P, values, in_t, in_p)
    saved = boundaries + (chunk.to(tl.int64) * heads + head) * (P * N)
    state = load_transposed(saved, values, N, keys, in_p, in_n)
    sums = tl.load(vectors + (chunk.to(tl.int64) * heads + head) * CHUNK + span)

    result = _scale_rows(tl.dot(query, state, input_precision=PRECISION), sums, DECAY)
    scores = tl.dot(query, key, input_precision=PRECISION)
    shown = (span[:, None] >= span[None, :]) & in_t[:, None]
    scores = _decayed(scores, sums[:, None], sums[None, :], shown, DECAY)
    result += tl.dot(scores.to(dtype), write, input_precision=PRECISION)
    store(y + place, span, heads * P, values, in_t, in_p, result * scale)


@QuickLaunch
@triton.jit(do_not_specialize=["slots", "t", "chunks", "heads"])
def _read_back(
    q, k, dy, vectors, table, dwrites,
    slots, t, chunks, heads, group, q_stride, k_stride, scale,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dU by y alone:  scale tril(Q K^T e^(b_i - b_j))^T dy."""
    tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    program = tl.program_id(0)
    tile, head, chunk = program % tiles, program // tiles % heads, program // (tiles * heads)
    first, size = chunk_of(table, chunk, t, chunks, CHUNK, PACKED)
    span, keys, values = tl.arange(0, CHUNK), tl.arange(0, PAD_N), tile * TILE_P + tl.arange(0, TILE_P)
    in_t, in_n, in_p = span < size, keys < N, values < P
    dtype: tl.constexpr = k.dtype.element_ty
    query = load_transposed(q + first * q_stride + head // group * N, span, q_stride, keys, in_t, in_n)
    key = load(k + first * k_stride + head // group * N, span, k_stride, keys, in_t, in_n)
    place = (first * heads + head) * P
    pull = load(dy + place, span, heads * P, values, in_t, in_p)
    sums = tl.load(vectors + (chunk.to(tl.int64) * heads + head) * CHUNK + span)
    scores = tl.dot(key, query, input_precision=PRECISION)
    shown = (span[:, None] <= span[None, :]) & in_t[None, :]
    scores = _decayed(scores, sums[None, :], sums[:, None], shown, DECAY) * scale
    store(
        dwrites + place, span, heads * P, values, in_t, in_p,
        tl.dot(scores.to(dtype), pull.to(dtype), input_precision=PRECISION),
    )  # fmt: skip


@QuickLaunch
@triton.jit(do_not_specialize=["slots", "t", "chunks", "heads", "per", "segment_slots"])
def _scan_back(
    q, k, dy, inverses, dwrites, vectors, dfinal, leaving, bounds, offsets, segments, dinitial, dstates, maps,
    slots, t, chunks, heads, group, per, segment_slots, q_stride, k_stride, scale,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, CUT: tl.constexpr, MAPS: tl.constexpr, DECAY: tl.constexpr, FINAL: tl.constexpr,
    TERMS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk a segment's chunks from last to first, or find its map (MAPS).

    `dwrites` holds dU by y and is left holding dR = T^T dU.
    """
    tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    walked: tl.constexpr = tiles + (N + TILE_P - 1) // TILE_P if MAPS else tiles
    program = tl.program_id(0)
    tile, head, place = program % walked, program // walked % heads, program // (walked * heads)
    if not is_taken(segments, segment_slots, place, PACKED, CUT):
        return
    sequence, first, length, chunk, begins, _ = segment_of(
        segments, bounds, offsets, place, t, chunks, per, CHUNK, PACKED, CUT
    )
    if MAPS and begins:
        return
    values, keys = tile * TILE_P + tl.arange(0, TILE_P), tl.arange(0, PAD_N)
    in_p, in_n = values < P, keys < N  # no value belongs to the identity's rows
    span = tl.arange(0, CHUNK)
    square = span[:, None] * CHUNK + span[None, :]
    within = in_p[:, None] & in_n[None, :]
    state_at = (sequence * heads + head) * (N * P) + keys[None, :] * P + values[:, None]
    dtype: tl.constexpr = k.dtype.element_ty

    dstate = tl.zeros([TILE_P, PAD_N], tl.float32)
    if MAPS:
        dstate = start_of_map(values, keys, tiles, TILE_P)
    elif CUT:
        dstate = load(leaving + (place.to(tl.int64) * heads + head) * (P * N), values, N, keys, in_p, in_n)
    elif FINAL:
        dstate = tl.load(dfinal + state_at, mask=within, other=0.0).to(tl.float32)
    q += first * q_stride + head // group * N
    k += first * k_stride + head // group * N
    dy += (first * heads + head) * P
    dwrites += (first * heads + head) * P
    plane = slots.to(tl.int64) * heads * CHUNK
    gates = vectors + plane + (chunk * heads + head) * CHUNK
    inverses += (chunk * heads + head) * (CHUNK * CHUNK)
    dstates += (chunk * heads + head) * (P * N)
    state_step, inverse_step = heads.to(tl.int64) * (P * N), heads.to(tl.int64) * (CHUNK * CHUNK)
    value_step, vector_step = heads.to(tl.int64) * (CHUNK * P), heads.to(tl.int64) * CHUNK
    query_step, key_step = q_stride.to(tl.int64) * CHUNK, k_stride.to(tl.int64) * CHUNK
    steps = tl.cdiv(length, CHUNK)
    for back in tl.range(0, steps, num_stages=STAGES):
        c = steps - 1 - back
        size = tl.minimum(length - c * CHUNK, CHUNK)
        rows, in_t = tl.minimum(span, size - 1), span < size
        if not MAPS:
            store(dstates + c * state_step, values, N, keys, in_p, in_n, dstate)
        query = fetch(q + c * query_step, rows, q_stride, keys, in_n)
        key = fetch(k + c * key_step, rows, k_stride, keys, in_n)
        pull = fetch_transposed(dy + c * value_step, rows, heads * P, values, in_p)
        dwrite = fetch_transposed(dwrites + c * value_step, rows, heads * P, values, in_p)
        inverse = tl.load(inverses + c * inverse_step + square)
        # Tokens past the end repeat the last one with factors 0.
        gate = tl.load(gates + c * vector_step + span).to(tl.float32)
        here = tl.where(in_t, 1.0, 0.0)
        rest, kept = here, 1.0
        if DECAY:
            at = gates + plane + c * vector_step
            here, kept = tl.load(at + span).to(tl.float32), tl.load(at + size - 1).to(tl.float32)
            rest = tl.load(at + plane + span).to(tl.float32)
        reached = tl.dot(dstate.to(dtype), tl.trans(key), input_precision=PRECISION) * rest[None, :]
        # T has unit rows for tokens past the end: what they hold stays theirs, and is not stored.
        reached = (dwrite.to(tl.float32) + reached).to(dtype)
        dfresh = tl.dot(reached, inverse, input_precision=PRECISION)
        if TERMS == 2:
            inverse = tl.load(inverses + plane * CHUNK + c * inverse_step + square)
            dfresh = tl.dot(reached, inverse, dfresh, input_precision=PRECISION)
        if not MAPS:
            store_transposed(dwrites + c * value_step, span, heads * P, values, in_t, in_p, dfresh)
        dstate *= kept
        pull = (pull.to(tl.float32) * (here * scale)[None, :]).to(dtype)
        dstate += tl.dot(pull, query, input_precision=PRECISION)
        dfresh = (dfresh * (-gate * here)[None, :]).to(dtype)
        dstate += tl.dot(dfresh, key, input_precision=PRECISION)
    if MAPS:
        store_map(maps, place, head, heads, values, keys, dstate, N, P, tiles, TILE_P)
    elif begins:
        tl.store(dinitial + state_at, dstate, mask=within)


@QuickLaunch
@triton.jit(do_not_specialize=["slots", "t", "chunks", "heads"])
def _differentiate_query(
    q, k, dy, writes, boundaries, vectors, table, dq, ddecay,
    slots, t, chunks, heads, group, q_stride, k_stride, scale,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, PAD_P: tl.constexpr, TILE_P: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = scale ( e^b (dy S^T) + (dy U^T e^(b_i - b_j)) K ); `ddecay` is left holding q . dq."""
    program = tl.program_id(0)
    head, chunk = program % heads, program // heads
    first, size = chunk_of(table, chunk, t, chunks, CHUNK, PACKED)
    span, keys = tl.arange(0, CHUNK), tl.arange(0, PAD_N)
    in_t, in_n = span < size, keys < N
    dtype: tl.constexpr = k.dtype.element_ty
    row_stride = heads * P
    dy += (first * heads + head) * P
    writes += (first * heads + head) * P
    boundaries += (chunk.to(tl.int64) * heads + head) * (P * N)
    sums = tl.load(vectors + (chunk.to(tl.int64) * heads + head) * CHUNK + span)

    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    total = tl.zeros([CHUNK, PAD_N], tl.float32)
    for start in tl.range(0, PAD_P, TILE_P, num_stages=1):
        values = start + tl.arange(0, TILE_P)
        in_p = values < P
        pull = load(dy, span, row_stride, values, in_t, in_p).to(dtype)
        write = load_transposed(writes, span, row_stride, values, in_t, in_p)
        state = load(boundaries, values, N, keys, in_p, in_n)
        scores = tl.dot(pull, write, scores, input_precision=PRECISION)
        total = tl.dot(pull, state, total, input_precision=PRECISION)
    shown = (span[:, None] >= span[None, :]) & in_t[:, None]
    scores = _decayed(scores, sums[:, None], sums[None, :], shown, DECAY)
    total = _scale_rows(total, sums, DECAY)
    key = load(k + first * k_stride + head // group * N, span, k_stride, keys, in_t, in_n)
    total = tl.dot(scores.to(dtype), key, total, input_precision=PRECISION) * scale
    store(dq + (first * heads + head) * N, span, heads * N, keys, in_t, in_n, total)
    if DECAY:
        query = load(q + first * q_stride + head // group * N, span, q_stride, keys, in_t, in_n)
        tl.store(ddecay + (first + span) * heads + head, tl.sum(total * query.to(tl.float32), axis=1), mask=in_t)


@QuickLaunch
@triton.jit(do_not_specialize=["slots", "t", "chunks", "heads"])
def _differentiate_key(
    q, k, v, dy, writes, dfresh, boundaries, dstates, vectors, table, part, dk, dv, ddecay, dgate,
    slots, t, chunks, heads, group, q_stride, k_stride, v_stride, scale,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, PAD_P: tl.constexpr, TILE_P: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
    WRITTEN: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """What the key is as written and what it reads itself: dk, dv, and the gradients of gates and decays.

    The decay up to a token multiplies what it reads and divides what it wrote, so that its gradient is
    q . dq + beta k . read - k . wrote. `ddecay` holds q . dq and is left holding the decays' gradient.
    In two launches WRITTEN leaves its half in `part`, and in `ddecay`, to READ.
    """
    program = tl.program_id(0)
    head, chunk = program % heads, program // heads
    first, size = chunk_of(table, chunk, t, chunks, CHUNK, PACKED)
    span, keys = tl.arange(0, CHUNK), tl.arange(0, PAD_N)
    in_t, in_n = span < size, keys < N
    dtype: tl.constexpr = k.dtype.element_ty
    row_stride = heads * P
    dy += (first * heads + head) * P
    dv += (first * heads + head) * P
    writes += (first * heads + head) * P
    dfresh += (first * heads + head) * P
    state_at = (chunk.to(tl.int64) * heads + head) * (P * N)
    at = vectors + (chunk.to(tl.int64) * heads + head) * CHUNK
    sums, last = tl.load(at + span), tl.load(at + CHUNK - 1)
    gate = tl.load(at + slots.to(tl.int64) * heads * CHUNK + span).to(tl.float32)
    place, row = (first * heads + head) * N, (first + span) * heads + head

    if WRITTEN:  # for states, queries and keys to come
        by_query = tl.zeros([CHUNK, CHUNK], tl.float32)
        by_key = tl.zeros([CHUNK, CHUNK], tl.float32)
        wrote = tl.zeros([CHUNK, PAD_N], tl.float32)
        kept_state = 0.0
        for start in tl.range(0, PAD_P, TILE_P, num_stages=1):
            values = start + tl.arange(0, TILE_P)
            in_p = values < P
            write = load(writes, span, row_stride, values, in_t, in_p)
            pull = load_transposed(dy, span, row_stride, values, in_t, in_p).to(dtype)
            fresh = load_transposed(dfresh, span, row_stride, values, in_t, in_p)
            dstate = load(dstates + state_at, values, N, keys, in_p, in_n)
            by_query = tl.dot(write, pull, by_query, input_precision=PRECISION)
            by_key = tl.dot(write, fresh, by_key, input_precision=PRECISION)
            wrote = tl.dot(write, dstate, wrote, input_precision=PRECISION)
            if DECAY:
                state = load(boundaries + state_at, values, N, keys, in_p, in_n)
                kept_state += tl.sum(state.to(tl.float32) * dstate.to(tl.float32))
        key = load(k + first * k_stride + head // group * N, span, k_stride, keys, in_t, in_n)
        dlast = 0.0
        if DECAY:
            wrote *= _power(tl.where(in_t, last - sums, 0.0))[:, None]
            dlast = tl.sum(wrote * key.to(tl.float32)) + _power(last) * kept_state
        later = (span[:, None] <= span[None, :]) & in_t[None, :]
        by_query = _decayed(by_query, sums[None, :], sums[:, None], later, DECAY) * scale
        query = load(q + first * q_stride + head // group * N, span, q_stride, keys, in_t, in_n)
        wrote = tl.dot(by_query.to(dtype), query, wrote, input_precision=PRECISION)
        later = (span[:, None] < span[None, :]) & in_t[None, :]
        by_key = _decayed(by_key, sums[None, :], sums[:, None], later, DECAY) * -gate[None, :]
        wrote = tl.dot(by_key.to(dtype), key, wrote, input_precision=PRECISION)
        dsums = tl.zeros([CHUNK], tl.float32)
        if DECAY:
            dsums = tl.load(ddecay + row, mask=in_t, other=0.0) - tl.sum(wrote * key.to(tl.float32), axis=1)
            dsums += tl.where(span == size - 1, dlast, 0.0)
        if not READ:
            store(part + place, span, heads * N, keys, in_t, in_n, wrote)
            if DECAY:
                tl.store(ddecay + row, dsums, mask=in_t)

    if READ:  # E K - e^b (dR S^T), its value and gate
        scores = tl.zeros([CHUNK, CHUNK], tl.float32)
        read = tl.zeros([CHUNK, PAD_N], tl.float32)
        dbeta = tl.zeros([CHUNK], tl.float32)
        for start in tl.range(0, PAD_P, TILE_P, num_stages=1):
            values = start + tl.arange(0, TILE_P)
            in_p = values < P
            fresh = load(dfresh, span, row_stride, values, in_t, in_p)
            write = load_transposed(writes, span, row_stride, values, in_t, in_p)
            state = load(boundaries + state_at, values, N, keys, in_p, in_n)
            scores = tl.dot(fresh, write, scores, input_precision=PRECISION)
            read = tl.dot(fresh, state, read, input_precision=PRECISION)
            if GATE:
                value = load(v + first * v_stride + head * P, span, v_stride, values, in_t, in_p)
                dbeta += tl.sum(fresh.to(tl.float32) * value.to(tl.float32), axis=1)
            store(dv, span, row_stride, values, in_t, in_p, fresh.to(tl.float32) * gate[:, None])
        shown = (span[:, None] > span[None, :]) & in_t[:, None]
        scores = _decayed(scores, sums[:, None], sums[None, :], shown, DECAY)
        read = _scale_rows(read, sums, DECAY)
        if not WRITTEN:
            key = load(k + first * k_stride + head // group * N, span, k_stride, keys, in_t, in_n)
        read = -tl.dot(scores.to(dtype), key, read, input_precision=PRECISION)
        if not WRITTEN:
            wrote = load(part + place, span, heads * N, keys, in_t, in_n)
            dsums = tl.zeros([CHUNK], tl.float32)
            if DECAY:
                dsums = tl.load(ddecay + row, mask=in_t, other=0.0)
        store(dk + place, span, heads * N, keys, in_t, in_n, wrote + read * gate[:, None])
        if GATE or DECAY:
            along = tl.sum(read * key.to(tl.float32), axis=1)
            if GATE:
                tl.store(dgate + row, dbeta + along, mask=in_t)
            if DECAY:
                tl.store(ddecay + row, tl.cumsum(dsums + gate * along, 0, reverse=True), mask=in_t)


@QuickLaunch
@triton.jit(do_not_specialize=["heads"])
def _decode(
    q, k, v, log_decay, gate, initial, y, final, writes,
    heads, group, q_stride, k_stride, v_stride, scale,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr,
    DECAY: tl.constexpr, GATE: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """The recurrence once: a tile [N, TILE_P] of a state is read, changed, read out and written."""
    tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    program = tl.program_id(0)
    tile, head = program % tiles, program // tiles % heads
    row = (program // (tiles * heads)).to(tl.int64)
    keys, values = tl.arange(0, PAD_N), tile * TILE_P + tl.arange(0, TILE_P)
    in_n, in_p = keys < N, values < P
    within = in_n[:, None] & in_p[None, :]
    at = row * heads + head
    place = at * (N * P) + keys[:, None] * P + values[None, :]
    query = tl.load(q + row * q_stride + head // group * N + keys, mask=in_n, other=0.0).to(tl.float32)
    key = tl.load(k + row * k_stride + head // group * N + keys, mask=in_n, other=0.0).to(tl.float32)
    write = tl.load(v + row * v_stride + head * P + values, mask=in_p, other=0.0).to(tl.float32)
    state = tl.zeros([PAD_N, TILE_P], tl.float32)
    if INITIAL:
        state = tl.load(initial + place, mask=within, other=0.0).to(tl.float32)
        if DECAY:
            state *= tl.exp2(tl.load(log_decay + at).to(tl.float32) * _LOG2_E)
        write -= tl.sum(state * key[:, None], axis=0)
    if GATE:
        write *= tl.load(gate + at).to(tl.float32)
    state += key[:, None] * write[None, :]
    tl.store(final + place, state, mask=within)
    result = tl.sum(state * query[:, None], axis=0) * scale
    tl.store(y + at * P + values, result.to(y.dtype.element_ty), mask=in_p)
    tl.store(writes + at * P + values, write.to(writes.dtype.element_ty), mask=in_p)
