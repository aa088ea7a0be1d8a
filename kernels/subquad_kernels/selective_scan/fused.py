"""The selective scan in one Triton kernel a direction: states stay in registers, everything around them is fused.

A program is one warp. It holds the states [TILE_C, N] of a tile of channels and walks over the tokens of one segment
of one sequence; four lanes share a channel (at n = 16), so that sums over n are short, and loads of x, dt and z are
contiguous in channels. What is a vector over channels is made for 16 tokens at once, in a layout of its own, and
passed through scratch memory that only the program touches. Where sequences times tiles are too few for the device,
time is cut into segments: while the first is scanned, the same launch finds what each of the others but the last does
to a state (a decay and a write); every program of a second launch starts where the first ended and composes what lies
between. The backward walks chunks of 16 tokens from last to first, computes the states inside a chunk again from the
saved one, and cuts time too: one kernel finds what every segment but the first does to a gradient, another begins with
composing. Sums over channels and over sequences are written as one partial sum a program, and added afterwards: no
atomics, the same bits every time.
One token has a kernel of its own. README.md has the equations and the reasons for the sizes.
"""

# What Triton compiles has no Python types, and tuples that grow.
# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.selective_scan.cuts import CHUNK, Launch, cut, launch_of
from subquad_kernels.selective_scan.fused_backward import differentiate, summarise_gradients
from subquad_kernels.selective_scan.fused_forward import scan
from subquad_kernels.selective_scan.fused_step import step_one
from subquad_kernels.selective_scan.tiles import row_of
from subquad_kernels.tile_sizes import ceil_div, power_of_two
from subquad_kernels.triton_documents import find_documents, halvings
from subquad_kernels.triton_launch import QuickLaunch

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs

_MARKS = 128
"""Tokens that one program of `_mark` marks."""
_LANES, _NUMBERS_A_LANE = 32, 4
"""Of a warp, and what one loads at most at once (16 bytes): Triton lays a tile of states out so, row after row."""
_STEP_STATES = 1024
"""Numbers of the state that a program of `step_one` takes."""


def forward(launch: Launch | None = None, **arguments: Argument) -> Outputs:
    """y, final_state and the residuals."""
    call = _Call(arguments)
    if call.t == 1 and call.marks is None:
        return call.step()
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

    def _constants(self, launch: Launch) -> dict[str, Any]:
        limited = launch.registers is not None and torch.version.hip is None  # Triton cannot tell AMD's compiler
        most = {"maxnreg": launch.registers} if limited else {}
        return most | {
            "N": self.n,
            "PAD_N": power_of_two(self.n),
            "TILE_C": launch.tile_c,
            "CHUNK": CHUNK,
            "GROUP": launch.group,
            "SOFTPLUS": self.softplus,
            "BIAS": self.dt_bias is not None,
            "PACKED": self.marks is not None,
            "AHEAD": -1 if self.reversed else 1,
            "EVICT": launch.evict,
            "SUB": min(launch.tile_c, _NUMBERS_A_LANE * _LANES // power_of_two(self.n)),
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
        tiles, _, segment_len, first_len, others = cut(launch, self.b, self.t, self.c)
        y = torch.empty(self.b, self.t, self.c, dtype=self.x.dtype, device=self.x.device)
        ungated = self._new(0) if self.z is None else self._new(self.b, self.t, self.c)
        boundaries = self._new((self.t - 1) // CHUNK, self.b, self.n, self.c)
        final = self._states(self.initial)
        decays, writes = (self._new(others, self.b, self.c, self.n) for _ in range(2))
        constants = self._constants(launch) | {"INITIAL": self.initial is not None}
        pad = constants["PAD_N"]
        programs = tiles * self.b * max(others, 1)
        scratch = self._new(programs, CHUNK * (3 * launch.tile_c + 2 * pad) + launch.tile_c * pad)
        for scanned in range(min(others, 1) + 1):
            scan[(programs,)](
                self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias, self.initial, self.marks,
                decays, writes, y, final, boundaries, ungated, scratch,
                self.t, self.c, self.b, first_len, segment_len, scanned,
                self.x.stride(0), self.dt.stride(0), self.B.stride(0), self.C.stride(0), _stride(self.z),
                SKIP=self.D is not None, GATE=self.z is not None, **constants,
            )  # fmt: skip
        return y, final, boundaries, ungated

    def step(self) -> Outputs:
        """One token a sequence: as `forward`, by programs that read a part of the state once."""
        pad = power_of_two(self.n)
        tile = max(1, min(_STEP_STATES // pad, power_of_two(self.c)))
        y = torch.empty(self.b, 1, self.c, dtype=self.x.dtype, device=self.x.device)
        ungated = self._new(0) if self.z is None else self._new(self.b, 1, self.c)
        final = self._new(self.b, self.c, self.n)
        step_one[(self.b * ceil_div(self.c, tile),)](
            self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias, self.initial, y, final, ungated,
            self.c, self.x.stride(0), self.dt.stride(0), self.B.stride(0), self.C.stride(0), _stride(self.z),
            N=self.n, PAD_N=pad, TILE_C=tile, SOFTPLUS=self.softplus, BIAS=self.dt_bias is not None,
            INITIAL=self.initial is not None, SKIP=self.D is not None, GATE=self.z is not None, num_warps=4,
        )  # fmt: skip
        return y, final, self._new(0, self.b, self.n, self.c), ungated

    def backward(
        self, launch: Launch, boundaries: Tensor, ungated: Tensor, dy: Tensor | None, dfinal: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Gradients in the types of their tensors; sums over programs are taken at the end."""
        tiles, segments, segment_len, _, _ = cut(launch, self.b, self.t, self.c)
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
        packed, has_final = self.marks is not None, dfinal is not None
        constants = self._constants(launch) | {"FINAL": packed and has_final, "GATE": self.z is not None}
        pad = constants["PAD_N"]
        held = (CHUNK // launch.group) * launch.tile_c * pad + CHUNK * (6 * launch.tile_c + 2 * pad)
        scratch = self._new(tiles * b * segments, held)
        if not packed and dfinal is None:
            dfinal = scratch  # not read: Triton compiles for an address, and so once with and without that gradient
        if segments > 1:
            summarise_gradients[(tiles * b * (segments - 1),)](
                self.dt, self.A, self.C, self.z, self.dt_bias, self.marks, dy, dfinal, decays, writes, scratch,
                t, c, b, segments, segment_len, int(has_final),
                self.dt.stride(0), self.C.stride(0), _stride(self.z), dy.stride(0),
                **constants,
            )  # fmt: skip
        differentiate[(tiles * b * segments,)](
            self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias, self.initial, self.marks,
            boundaries, ungated, dy, dfinal, decays, writes,
            dx, ddt, dz, dmaps, drates, dchannels, dinitial, scratch,
            t, c, b, segments, segment_len, int(has_final),
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
    _mark[(ceil_div(t, _MARKS),)](
        cu_seqlens, marks, t, documents, halvings(documents), TILE_T=_MARKS, AHEAD=-1 if reversed else 1, num_warps=1
    )
    return marks


@QuickLaunch
@triton.jit(do_not_specialize=["t", "documents", "steps"])
def _mark(cu_seqlens, marks, t, documents, steps, TILE_T: tl.constexpr, AHEAD: tl.constexpr):
    places = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    tokens = row_of(0, places, t, AHEAD)
    document = find_documents(cu_seqlens, documents, steps, tokens)
    lowest = (tl.load(cu_seqlens + document) == tokens).to(tl.int32)
    highest = (tl.load(cu_seqlens + document + 1) == tokens + 1).to(tl.int32)
    edges = 2 * highest + lowest if AHEAD > 0 else 2 * lowest + highest
    tl.store(marks + places, 4 * document + edges, mask=places < t)
