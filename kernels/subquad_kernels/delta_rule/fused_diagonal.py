"""The delta rule with a decay per key channel, or any diagonal plus rank one, in Triton (KDA, RWKV-7).

Forward, chunks of 64 tokens:  `relate` takes the decays out, once for what the chunk's system solves for (keys, or
`insert`) and with `remove` once for keys: scores, what reads the state that enters and what is written to the one that
leaves;  `invert` solves, T = (I + A)^-1;  `scan` walks the chunks with the state in registers;  `read` forms y.
Backward: the first two again, `read_back` and `scan_back` (gradients of writes and states), the `pull_` kernels
(gradients of all that `relate` wrote) and `differentiate`, which puts the decays back. No exponent is positive, but in
blocks whose decays are mild (`diagonal_levels`). No atomics: the same bits every time. README.md derives the equations.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def,var-annotated"

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.delta_rule import diagonal_chunks, diagonal_walk
from subquad_kernels.delta_rule.declaration import CHUNK, SEGMENT_CHUNKS, num_chunks, segment_programs
from subquad_kernels.delta_rule.segments import Segments
from subquad_kernels.delta_rule.tiles import rows_of
from subquad_kernels.tile_sizes import ceil_div, padded
from subquad_kernels.triton_chunks import lay_out
from subquad_kernels.triton_launch import QuickLaunch
from subquad_kernels.triton_precision import fp32_products

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs

_LOG2_E = tl.constexpr(math.log2(math.e))
_PRODUCTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_MILD = {torch.float32: 60, torch.bfloat16: 60, torch.float16: 6}
"""Blocks that keep 2^-this of every channel are mild: factors of up to 2^60 leave queries and keys half of the range of
exponents, and float16 holds them 2^6 times as large where they stay below 1,000."""
_LEVELS = CHUNK.bit_length() - 1
_FOUND_N = 32
"""Channels whose decays are looked at together."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a call is laid out on a device; changes speed, never results beyond rounding.

    `relate_tile_n` and `differentiate_tile_n` key channels at once where decays are applied (`.._registers` at most for
    a thread, None: the compiler's choice); `scan_tile_p` value channels a program of the two scans, whose loops hold
    `scan_stages` chunks in shared memory, until `scan_programs` run on segments of `segment_chunks` at least
    (`segments.py`); `tile_p` of all that a chunk does alone.
    """

    relate_tile_n: int = 64
    relate_warps: int = 8
    differentiate_tile_n: int = 64
    differentiate_warps: int = 8
    differentiate_registers: int | None = None
    scan_tile_p: int = 64
    scan_warps: int = 4
    scan_stages: int = 2
    scan_programs: int = 256
    segment_chunks: int = SEGMENT_CHUNKS
    tile_p: int = 64
    warps: int = 4
    decode_tile_p: int = 32


def launch_of(n: int, element_bytes: int) -> Launch:
    """Sizes by key width and type: in half precision at a width of 64 what was fastest on an H200 (README).

    No gradient is taken in tiles of 32 columns: of those `fused` and `gated_linear_attention` were wrong on Hopper.
    """
    programs = segment_programs(n)
    if element_bytes == 4:
        return Launch(
            relate_tile_n=32, differentiate_tile_n=16, scan_tile_p=64 if n <= 64 else 32 if n <= 128 else 16,
            scan_stages=1, scan_programs=programs, tile_p=32, warps=8 if n > 128 else 4,
        )  # fmt: skip
    if n > 64:
        return Launch(
            scan_tile_p=64 if n <= 128 else 32, scan_warps=8, scan_stages=1, scan_programs=programs, warps=8
        )  # fmt: skip
    return Launch(relate_warps=4) if n > 32 else Launch(differentiate_tile_n=16)


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


@dataclass(frozen=True)
class _Written:
    """What a chunk's queries and readers have to do with one kind of written keys, and its readers' own (`relate`).

    Shapes:  scores, pairs: chunks h 64 64    leaving: chunks h 64 n
    """

    keys: Tensor
    group: int
    scores: Tensor
    pairs: Tensor
    leaving: Tensor


@dataclass(frozen=True)
class _Chunks:
    """A call without its decays.

    Shapes:  sums, entering, reading: chunks h 64 n    kept: chunks h n    gates: chunks h 64
             inverse: terms chunks h 64 64    lowest: chunks h tiles of n (`diagonal_levels`)
    """

    solved: _Written
    given: _Written | None
    sums: Tensor
    lowest: Tensor
    entering: Tensor
    reading: Tensor
    kept: Tensor
    gates: Tensor
    inverse: Tensor


class _Call:
    """The arguments of one call as the kernels take them: every tensor a table of rows, one row a token."""

    def __init__(self, values: Mapping[str, Any], launch: Launch | None) -> None:
        v, decay = values["v"], values["log_decay"]
        if v.dtype not in _PRODUCTS:
            raise TypeError(f"delta_rule/fused_diagonal computes in float32, not {v.dtype}: use kernel='chunked'")
        self.b, self.t, self.h, self.p = v.shape
        self.h_k, self.n = values["k"].shape[2:]
        self.q, self.k, self.v = (rows_of(values[name]) for name in ("q", "k", "v"))
        self.free = values["remove"] is not None
        self.remove, self.insert = (rows_of(values[name]) if self.free else self.k for name in ("remove", "insert"))
        self.decays = 0 if decay is None else decay.dim() - 2  # 1 per head, 2 per key channel
        self.log_decay = v.new_zeros(self.b, self.t, self.h, dtype=torch.float32) if decay is None else decay
        self.log_decay = self.log_decay.contiguous()
        self.gate, self.initial = (
            None if values[name] is None else values[name].contiguous() for name in ("write_gate", "initial_state")
        )
        self.scale = float(values["scale"])
        self.bounds = None if values["cu_seqlens"] is None else values["cu_seqlens"].contiguous()
        self.documents = 0 if self.bounds is None else self.bounds.shape[0] - 1
        self.launch = launch or launch_of(self.n, v.element_size())
        self.chunks = num_chunks(self.b, self.t, self.documents) or self.b
        self.table, self.offsets = (None, None) if self.bounds is None else lay_out(self.bounds, self.chunks, CHUNK)
        # The inverse of half types is the sum of two terms: T R cancels where keys repeat (`fused`).
        self.terms = 1 if v.dtype == torch.float32 else 2
        self.precision = fp32_products(exact=v.dtype == torch.float32)
        self.sizes = (self.t, ceil_div(self.t, CHUNK), self.h)
        """Tokens and chunks of a sequence, heads."""

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.v.new_empty(shape, dtype=dtype or self.v.dtype)

    def _decayed(self, tile_n: int) -> dict[str, Any]:
        """Constants of the kernels that apply decays."""
        return {
            "N": self.n,
            "PAD_N": padded(self.n),
            "TILE_N": min(tile_n, padded(self.n)),
            "FOUND_N": min(_FOUND_N, padded(self.n)),
            "CHUNK": CHUNK,
            "LEVELS": _LEVELS,
            "MILD": _MILD[self.v.dtype],
            "PACKED": self.bounds is not None,
            "GATE": self.gate is not None,
            "FREE": self.free,
            "PRODUCT": _PRODUCTS[self.v.dtype],
            "PRECISION": self.precision,
        }

    def _walked(self, tile_p: int) -> dict[str, Any]:
        """Constants of all others."""
        return {
            "P": self.p,
            "TILE_P": min(tile_p, padded(self.p)),
            "CHUNK": CHUNK,
            "PACKED": self.bounds is not None,
            "PRECISION": self.precision,
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
                self.q, self.k, self.v, self.log_decay, self.gate, self.remove, self.insert, self.initial,
                y, final, writes, h, h // self.h_k, *(x.stride(0) for x in (self.q, self.k, self.v, self.remove)),
                self.insert.stride(0), self.scale, N=n, PAD_N=padded(n), P=p, TILE_P=tile_p, VECTOR=self.decays == 2,
                GATE=self.gate is not None, FREE=self.free, INITIAL=self.initial is not None, num_warps=4,
            )  # fmt: skip
            return y, final, writes, self._new(0, h, p, n)
        boundaries = self._new(self.chunks, h, p, n)
        chunks = self._relate()
        given = chunks.given
        scores_k, pairs_k, leaving_k = (None,) * 3 if given is None else (given.scores, given.pairs, given.leaving)
        widths = {"N": n, "PAD_N": padded(n), "FREE": self.free}
        segments = self._segments()
        constants = self._walked(segments.tile_p) | widths

        def scan(programs: tuple[int], entering: Tensor | None, maps: Tensor | None) -> None:
            diagonal_walk.scan[programs](
                self.v, chunks.gates, chunks.reading, chunks.solved.leaving, chunks.kept, chunks.inverse, pairs_k,
                leaving_k, self.initial, entering, self.bounds, self.offsets, segments.table, final, writes, boundaries,
                maps, self.chunks, *self.sizes, segments.chunks, segments.slots, self.v.stride(0),
                CUT=segments.cut, MAPS=maps is not None, INITIAL=self.initial is not None, TERMS=self.terms,
                STAGES=launch.scan_stages, num_warps=launch.scan_warps, **constants,
            )  # fmt: skip

        segments.walk(scan, self.initial, reversed=False)
        constants = self._walked(launch.tile_p) | widths
        diagonal_walk.read[(self.chunks * h * ceil_div(p, constants["TILE_P"]),)](
            self.v, chunks.gates, chunks.entering, chunks.solved.scores, scores_k, writes, boundaries, self.table, y,
            *self.sizes, self.v.stride(0), self.scale, num_warps=launch.warps, **constants,
        )  # fmt: skip
        return y, final, writes, boundaries

    def _segments(self) -> Segments:
        launch, tile_p = self.launch, min(self.launch.scan_tile_p, padded(self.p))
        v = self.v.view(self.b, self.t, self.h, self.p)
        return Segments.of(v, self.n, self.bounds, tile_p, programs=launch.scan_programs, least=launch.segment_chunks)

    def _relate(self) -> _Chunks:
        """Take the decays out of every chunk, and solve its system."""
        chunks, h, n = self.chunks, self.h, self.n
        entering, reading = (self._new(chunks, h, CHUNK, n) for _ in range(2))
        kept, gates = (self._new(chunks, h, size, dtype=torch.float32) for size in (n, CHUNK))
        # Sums in fp64 where inputs are fp32: small decays beside large ones would lose digits that the rest has.
        sums = self._new(chunks, h, CHUNK, n, dtype=torch.float64 if self.v.dtype == torch.float32 else torch.float32)
        tile_n = min(_FOUND_N, padded(n))
        tiles = ceil_div(n, tile_n)
        lowest = self._new(chunks, h, tiles, dtype=torch.int32)
        diagonal_chunks.accumulate[(chunks * h * tiles,)](
            self.log_decay, self.table, sums, lowest, *self.sizes, N=n, TILE_N=tile_n, CHUNK=CHUNK, LEVELS=_LEVELS,
            MILD=_MILD[self.v.dtype], PACKED=self.bounds is not None, VECTOR=self.decays == 2, num_warps=4,
        )  # fmt: skip
        group = h // self.h_k
        reader_group = 1 if self.free else group

        def written(keys: Tensor, written_group: int, *, system: bool) -> _Written:
            scores = self._new(chunks, h, CHUNK, CHUNK)
            pairs = self._new(chunks, h, CHUNK, CHUNK, dtype=torch.float32 if system else None)
            leaving = self._new(chunks, h, CHUNK, n)
            diagonal_chunks.relate[(chunks * h,)](
                self.q, self.remove, keys, sums, lowest, self.gate, self.table,
                scores, pairs, entering, reading, leaving, kept, gates, *self.sizes, group, reader_group, written_group,
                self.q.stride(0), self.remove.stride(0), keys.stride(0),
                SYSTEM=system, num_warps=self.launch.relate_warps, **self._decayed(self.launch.relate_tile_n),
            )  # fmt: skip
            return _Written(keys, written_group, scores, pairs, leaving)

        solved = written(self.insert, reader_group, system=True)
        given = written(self.k, group, system=False) if self.free else None
        inverse = self._new(self.terms, chunks, h, CHUNK, CHUNK)
        diagonal_chunks.invert[(chunks * h,)](
            solved.pairs, inverse, chunks * h, CHUNK=CHUNK, TERMS=self.terms, PRECISION=self.precision, num_warps=1
        )
        return _Chunks(solved, given, sums, lowest, entering, reading, kept, gates, inverse)

    def backward(
        self, writes: Tensor, boundaries: Tensor, dy: Tensor | None, dfinal: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Gradients; those of q and k are summed over the value heads that share a key head."""
        launch, b, t, h, n, p = self.launch, self.b, self.t, self.h, self.n, self.p
        tokens = b * t
        dy = self.v.new_zeros(tokens, h * p) if dy is None else dy.reshape(tokens, h * p)
        if t == 1 and self.bounds is None:  # a decode keeps no boundary: it is the initial state
            boundaries = self._new(b, h, p, n)
            boundaries.copy_(self.initial.transpose(2, 3)) if self.initial is not None else boundaries.zero_()
        chunks = self._relate()
        solved, given = chunks.solved, chunks.given
        dwrites = self._read_back(dy, solved)
        dstates, dinitial = self._scan_back(chunks, dy, None if dfinal is None else dfinal.contiguous(), dwrites)

        grid, widths = (self.chunks * h,), {"N": n, "PAD_N": padded(n)}
        constants = self._walked(launch.tile_p) | {"PAD_P": padded(p), "num_warps": launch.warps}
        dv = self._new(b, t, h, p)
        dgate = None if self.gate is None else self._new(b, t, h, dtype=torch.float32)
        by_y, pairs_k, leaving_k = (
            (None,) * 3 if given is None else (self._read_back(dy, given), given.pairs, given.leaving)
        )
        diagonal_walk.pull_values[grid](
            self.v, chunks.gates, by_y, pairs_k, leaving_k, dwrites, dstates, self.table, dv, dgate,
            *self.sizes, self.v.stride(0), GATE=dgate is not None, FREE=self.free, **widths, **constants,
        )  # fmt: skip
        dentering, dreading = (self._new(self.chunks, h, CHUNK, n) for _ in range(2))
        diagonal_walk.pull_reads[grid](
            dy, dwrites, boundaries, self.table, dentering, dreading, *self.sizes, self.scale, **widths, **constants
        )
        dkept = self._new(self.chunks, h, n, dtype=torch.float32)

        def pulled(written: _Written, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Gradients of `scores`, `pairs` and `leaving`, all of which multiply the factor: W, or V'."""
            dscores, dpairs = (self._new(self.chunks, h, CHUNK, CHUNK) for _ in range(2))
            diagonal_walk.pull_scores[grid](
                factor, chunks.gates, dy, dwrites, self.table, dscores, dpairs, *self.sizes, factor.stride(0),
                self.scale, VALUES=written is given, **constants,
            )  # fmt: skip
            dleaving = self._new(self.chunks, h, CHUNK, n)
            diagonal_walk.pull_writes[grid](
                factor, chunks.gates, boundaries, dstates, self.table, dleaving, dkept, *self.sizes, factor.stride(0),
                VALUES=written is given, **widths, **constants,
            )  # fmt: skip
            return dscores, dpairs, dleaving

        dscores, dpairs, dleaving = pulled(solved, writes.view(tokens, h * p))
        dscores_k, dpairs_k, dleaving_k = (None,) * 3 if given is None else pulled(given, self.v)

        def gradient(group: int) -> Tensor:
            """Of fp32 where heads that share it are still to be added up."""
            return self._new(b, t, h, n, dtype=torch.float32 if group > 1 else None)

        group = h // self.h_k
        most = {} if launch.differentiate_registers is None else {"maxnreg": launch.differentiate_registers}
        dq, dsolved, ddecay = gradient(group), gradient(solved.group), self._new(b, t, h, n, dtype=torch.float32)
        dremove, dgiven = (None, None) if given is None else (gradient(1), gradient(group))
        diagonal_chunks.differentiate[grid](
            self.q, self.remove, solved.keys, self.k, chunks.sums, chunks.lowest, self.gate, self.table,
            dscores, dpairs, dscores_k, dpairs_k, dentering, dreading, dleaving, dleaving_k, dkept,
            dq, dremove, dsolved, dgiven, ddecay, dgate, *self.sizes, group, solved.group,
            self.q.stride(0), self.remove.stride(0), solved.keys.stride(0), self.k.stride(0),
            num_warps=launch.differentiate_warps, **most, **self._decayed(launch.differentiate_tile_n),
        )  # fmt: skip
        dk = dsolved if dgiven is None else dgiven
        if h != self.h_k:
            dq, dk = (part.view(b, t, self.h_k, -1, n).sum(3) for part in (dq, dk))
        return {
            "q": dq,
            "k": dk,
            "v": dv,
            "log_decay": None if self.decays == 0 else ddecay.sum(3) if self.decays == 1 else ddecay,
            "write_gate": dgate,
            "remove": dremove,
            "insert": dsolved if self.free else None,
            "initial_state": None if self.initial is None else dinitial,
        }

    def _read_back(self, dy: Tensor, written: _Written) -> Tensor:
        """The gradient by y of what the scores multiply.  Shapes:  chunks h 64 p"""
        found = self._new(self.chunks, self.h, CHUNK, self.p)
        constants = self._walked(self.launch.tile_p)
        diagonal_walk.read_back[(self.chunks * self.h * ceil_div(self.p, constants["TILE_P"]),)](
            dy, written.scores, self.table, found, *self.sizes, self.scale, num_warps=self.launch.warps, **constants
        )
        return found

    def _scan_back(self, chunks: _Chunks, dy: Tensor, dfinal: Tensor | None, dwrites: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the states that leave the chunks, and of the initial ones; dwrites becomes that of T's right."""
        launch, h, n, p = self.launch, self.h, self.n, self.p
        states = self.documents or self.b
        dstates = self._new(self.chunks, h, p, n)
        dinitial = self._new(states, h, n, p, dtype=torch.float32)
        segments = self._segments()
        constants = self._walked(segments.tile_p) | {"N": n, "PAD_N": padded(n)}

        def scan_back(programs: tuple[int], passed: Tensor | None, maps: Tensor | None) -> None:
            diagonal_walk.scan_back[programs](
                dy, chunks.entering, chunks.reading, chunks.solved.leaving, chunks.kept, chunks.inverse, dwrites,
                dfinal, passed, self.bounds, self.offsets, segments.table, dinitial, dstates, maps,
                self.chunks, *self.sizes, segments.chunks, segments.slots, self.scale,
                CUT=segments.cut, MAPS=maps is not None, FINAL=dfinal is not None, TERMS=self.terms,
                STAGES=launch.scan_stages, num_warps=launch.scan_warps, **constants,
            )  # fmt: skip

        segments.walk(scan_back, dfinal, reversed=True)
        return dstates, dinitial


@QuickLaunch
@triton.jit(do_not_specialize=["heads"])
def _decode(
    q, k, v, log_decay, gate, remove, insert, initial, y, final, writes,
    heads, group, q_stride, k_stride, v_stride, remove_stride, insert_stride, scale,
    N: tl.constexpr, PAD_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr,
    VECTOR: tl.constexpr, GATE: tl.constexpr, FREE: tl.constexpr, INITIAL: tl.constexpr,
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
    value = tl.load(v + row * v_stride + head * P + values, mask=in_p, other=0.0).to(tl.float32)
    state = tl.zeros([PAD_N, TILE_P], tl.float32)
    if INITIAL:
        state = tl.load(initial + place, mask=within, other=0.0).to(tl.float32)
    if VECTOR:
        decay = tl.load(log_decay + at * N + keys, mask=in_n, other=0.0).to(tl.float32)
        decay = tl.exp2(decay * _LOG2_E)[:, None]
    else:
        decay = tl.exp2(tl.load(log_decay + at).to(tl.float32) * _LOG2_E)
    beta = 1.0
    if GATE:
        beta = tl.load(gate + at).to(tl.float32)
    if FREE:
        reader = tl.load(remove + row * remove_stride + head * N + keys, mask=in_n, other=0.0).to(tl.float32)
        inserted = tl.load(insert + row * insert_stride + head * N + keys, mask=in_n, other=0.0).to(tl.float32)
        write = tl.sum(state * reader[:, None], axis=0)
        state = state * decay + inserted[:, None] * write[None, :] + key[:, None] * (beta * value)[None, :]
    else:
        state *= decay
        write = beta * (value - tl.sum(state * key[:, None], axis=0))
        state += key[:, None] * write[None, :]
    tl.store(final + place, state, mask=within)
    result = tl.sum(state * query[:, None], axis=0) * scale
    tl.store(y + at * P + values, result.to(y.dtype.element_ty), mask=in_p)
    tl.store(writes + at * P + values, write.to(writes.dtype.element_ty), mask=in_p)
