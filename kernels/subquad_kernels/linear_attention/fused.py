"""Linear attention in Triton: a program walks over time with its state in registers, one chunk of 64 tokens a step.

A program holds the states [N, TILE_P] of one head of one sequence (of a tile of its values) and does every product of
a chunk on tensor cores; no state of a chunk goes to memory. Where heads are too few for the device, time is cut into
segments, and a direction takes three steps: `_summarise` finds what each segment does to a state (a decay and a
write), `_compose` runs through the segments and leaves the state that enters each, and a walk computes the results of
every segment. Those states are the residual of the forward; the backward starts its walk for dq from them and finds
the gradients of states, for its walk for dk and dv, by the same three steps from the end. The decay's gradient is a
sum over later tokens, taken in that last walk and begun anew at every segment from the two states that meet there.
Packed documents are laid out in chunks on the device, none of which holds tokens of two documents: the walks then read
where a chunk lies from a table. README.md has the equations and the reasons for the sizes.
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

from subquad_kernels.device_limits import device_limits
from subquad_kernels.linear_attention import kept_states, shared_keys
from subquad_kernels.linear_attention.chunk_states import MOST, Size
from subquad_kernels.linear_attention.chunk_tiles import (
    ages_of,
    count_chunks,
    fades_between,
    find_chunk,
    load_gates,
    load_state,
    load_tile,
    walk_stages,
    weigh,
)
from subquad_kernels.linear_attention.declaration import (
    CHUNK,
    CUT_BELOW,
    chunk_slots,
    keeps_states,
    segment_len,
    takes_several_heads,
    value_tile,
)
from subquad_kernels.linear_attention.kept_states import Kept
from subquad_kernels.linear_attention.shared_keys import Shared
from subquad_kernels.tile_sizes import ceil_div, padded
from subquad_kernels.triton_chunks import lay_out
from subquad_kernels.triton_launch import QuickLaunch
from subquad_kernels.triton_precision import fp32_products

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How one direction is laid out on a device; changes speed, never results beyond rounding.

    `tile_p` columns of values a program; `registers` caps those of a lane. Time is cut where fewer than `enough`
    programs would run. `chunk` tokens a step and `segment_len` tokens a segment (None: what the declaration says)
    decide the shape of the residual: forward and backward must agree, and calls through the torch op keep both.
    With `shared`, programs take several heads of q and k that these share (`shared_keys`); with `kept`, those of a
    backward take a chunk each (`kept_states`). Of the rest of this `chunk` and `segment_len` count then.
    """

    tile_p: int
    num_warps: int = 4
    num_stages: int = 2
    registers: int | None = None
    enough: int = CUT_BELOW
    chunk: int = CHUNK
    segment_len: int | None = None
    shared: Shared | None = None
    kept: Kept | None = None


@lru_cache
def launch_of(
    n: int, p: int, dtype: torch.dtype, *, backward: bool, group: int = 1, packed: bool = False, room: bool = True
) -> Launch:
    """Sizes for a state of n rows and p columns: at most 64 registers a lane for it.

    Four warps hold one 64-row tile a product; eight would repeat products of 64 rows, and serve larger states alone.
    The backward holds whole values up to 128 columns: narrower tiles would each write a part of dq and dk. It takes
    values of few columns in tiles as wide as those of keys, up to 64, from where on rows in shared memory have one
    layout: ptxas 12.8 may read an operand with rows of 64 bytes from nowhere where others are of 128 (README).
    Where `group` heads share keys of 64 columns or 128, and their values have 64, a program takes several heads. Where
    both have 128 or more, a walk of the backward would spill, and states go to memory. Either needs `room` in shared
    memory.
    """
    rows, half = padded(n), dtype != torch.float32
    if room and takes_several_heads(n, p, half=half, group=group):
        return shared_launch(backward=backward, packed=packed)
    tile_p = value_tile(n, p, half=half, backward=backward)
    wide = keeps_states(n, p, half=half) and max(rows, padded(p)) > MOST
    if room and backward and keeps_states(n, p, half=half):
        return kept_launch(tile_p, tiled=wide)
    if not half or (wide and not backward and not packed):  # four warps took 1.0 ms where eight took 1.35 (README)
        return Launch(tile_p=tile_p, num_stages=1)
    return Launch(tile_p=tile_p, num_warps=4 if rows * tile_p <= 8192 else 8, num_stages=2 if rows <= 128 else 1)


def kept_launch(tile_p: int, *, tiled: bool = False) -> Launch:
    """Sizes where states are kept: two programs a multiprocessor by registers and shared memory, walks and chunks.

    A walk loads nothing ahead: on an H200 stages gained nothing, and three leave it no room beside another. Where a
    state is several tiles no product of a chunk's loops feeds another, eight warps share their sums, and three stages
    gain a fourteenth.
    """
    walk = Size(num_warps=8, num_stages=1, registers=128)
    chunks = Size(num_warps=8, num_stages=3) if tiled else Size(num_warps=4)
    return Launch(tile_p=tile_p, kept=Kept(borders=walk, states=walk, chunks=chunks))


def shared_launch(*, backward: bool, packed: bool) -> Launch:
    """Sizes where a program takes several heads: chunks of 128 halve the states that a forward writes.

    Packed, the residual lies by chunks of 64, as the backward walks them. Chosen on an H200 (README).
    """
    queries = Size(num_warps=8, num_stages=3)
    if packed:  # with documents to look after, other walks would spill
        walk = Size(num_warps=8, num_stages=3, registers=128)
        return Launch(tile_p=64, shared=Shared(borders=walk, states=walk, queries=queries))
    if backward:
        borders = Size(num_warps=8, num_stages=3, registers=80)
        return Launch(
            tile_p=64, shared=Shared(borders=borders, states=Size(num_stages=3, registers=168), queries=queries)
        )
    return Launch(tile_p=64, chunk=128, shared=Shared(read=Size(num_warps=8, num_stages=3)))


@lru_cache
def _has_room(device: torch.device) -> bool:
    """Whether a program may have the shared memory that several heads' tiles take, or a chunk's with its states.

    What only compiles may.
    """
    return device.type != "cuda" or device_limits(str(device)).shared_memory_bytes >= 200 * 1024


def forward(launch: Launch | None = None, **arguments: Argument) -> Outputs:
    """y, final_state and the residual."""
    call = Call(arguments)
    return call.forward(launch or call.launch(backward=False))


def backward(
    arguments: Arguments,
    outputs: Outputs,
    gradients: tuple[Tensor | None, ...],
    launch: Launch | None = None,
) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument, from the gradients of y and of final_state."""
    _, final, boundaries = outputs
    call = Call(arguments)
    return call.backward(launch or call.launch(backward=True), final, boundaries, *gradients)


class Call:
    """The arguments of one call as the kernels take them: q, k and v tables of rows, one row a token."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        v = values["v"]
        if v.dtype == torch.float64:
            raise TypeError("linear_attention/fused computes in float32; for float64 use kernel='chunked'")
        self.b, self.t, self.h, self.p = v.shape
        self.h_k, self.n = values["q"].shape[2:]
        (self.q, q_strides), (self.k, k_strides), (self.v, v_strides) = _rows(values["q"]), _rows(values["k"]), _rows(v)
        self.strides = (*q_strides, *k_strides, *v_strides)
        self.log_decay, self.write_gate, self.diagonal, self.initial = (
            None if values[name] is None else values[name].contiguous()
            for name in ("log_decay", "write_gate", "diagonal", "initial_state")
        )
        self.cu_seqlens: Tensor | None = values["cu_seqlens"]
        self.documents = 0 if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        self.scale = float(values["scale"])
        # None, by token or by head: the kernels' DECAY.
        self.decay = 0 if self.log_decay is None else 1 if self.log_decay.dim() == 3 else 2

    def launch(self, *, backward: bool) -> Launch:
        """The sizes of a direction, unless others are asked for."""
        return launch_of(
            self.n, self.p, self.v.dtype, backward=backward, group=self.h // self.h_k,
            packed=self.cu_seqlens is not None, room=_has_room(self.v.device),
        )  # fmt: skip

    def new(self, *shape: int) -> Tensor:
        return self.v.new_empty(shape, dtype=torch.float32)

    def states(self, given: Tensor | None) -> Tensor:
        """One state a sequence or document, filled only where a kernel may leave it: an empty document's."""
        if not self.documents:
            return self.new(self.b, self.h, self.n, self.p)
        if given is None:
            return self.new(self.documents, self.h, self.n, self.p).zero_()
        return given.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def cut(self, launch: Launch) -> None:
        """Set the tiles of values, the chunks, the segments, and how many segments a walk between two cuts has."""
        self.tiles = ceil_div(self.p, launch.tile_p)
        tokens = launch.segment_len or segment_len(self.b, self.t, self.h, self.n, self.p)
        self.chunks_per_segment = ceil_div(tokens, launch.chunk)
        self.chunks = chunk_slots(self.t, self.documents, launch.chunk)
        self.segments = ceil_div(self.chunks, self.chunks_per_segment)
        self.lanes = self.tiles * self.h * self.b
        self.walked = self.segments if self.lanes >= launch.enough else 1
        self.walks = self.segments // self.walked
        self.table = None if self.cu_seqlens is None else lay_out(self.cu_seqlens, self.chunks, launch.chunk)[0]

    def _sizes(self) -> tuple[int, ...]:
        return (self.t, self.b, self.h, self.h // self.h_k, self.chunks, self.segments, self.chunks_per_segment)

    def _constants(self, launch: Launch) -> dict[str, Any]:
        gated, packed = self.write_gate is not None, self.cu_seqlens is not None
        return _constants_of(launch, self.n, self.p, self.v.dtype, self.decay, gated, packed)

    def compose(self, decays: Tensor, writes: Tensor, *, reverse: bool, copies: Tensor | None = None) -> None:
        """Turn what segments write into the states between them, in place; `copies` are rounded to their type."""
        size = self.n * self.p
        _compose[(self.b * self.h, ceil_div(size, 512))](
            decays, writes, copies, size, self.b * self.h, self.segments - 1, BLOCK=512, REVERSE=reverse, num_warps=4
        )

    def forward(self, launch: Launch) -> Outputs:
        """y: b t h p    final_state: states h n p    boundaries: segments-1 b h n p"""
        alone = self.t == 1 and not self.documents
        if launch.shared is not None and not alone:
            return shared_keys.forward(self, launch, launch.shared)
        y = torch.empty_like(self.v, memory_format=torch.contiguous_format)
        final = self.states(self.initial)
        if alone:
            self._step(y, final)
            return y, final, self.new(0, self.b, self.h, self.n, self.p)
        self.cut(launch)
        boundaries = self.new(self.segments - 1, self.b, self.h, self.n, self.p)
        constants = self._constants(launch) | {"INITIAL": self.initial is not None}
        if self.walks > 1:
            decays = self.new(self.segments - 1, self.b, self.h)
            _summarise[(self.lanes * (self.segments - 1),)](
                self.k, self.v, self.log_decay, self.write_gate, self.initial, self.table, decays, boundaries,
                *self._sizes(), *self.strides[2:],
                **constants,
            )  # fmt: skip
            self.compose(decays, boundaries, reverse=False)
        _read[(self.lanes * self.walks,)](
            self.q, self.k, self.v, self.log_decay, self.write_gate, self.diagonal, self.initial, self.table,
            boundaries, y, final,
            self.scale, *self._sizes(), self.walked, *self.strides,
            DIAGONAL=self.diagonal is not None, CUT=self.walks > 1, **constants,
        )  # fmt: skip
        return y, final, boundaries

    def _step(self, y: Tensor, final: Tensor) -> None:
        """One token: bound by the state's bytes, so that tiles are narrow until there are programs enough."""
        tile_p = min(64, padded(self.p))
        while tile_p > 16 and self.b * self.h * ceil_div(self.p, tile_p) < 528:
            tile_p //= 2
        _step[(self.b * self.h * ceil_div(self.p, tile_p),)](
            self.q, self.k, self.v, self.log_decay, self.write_gate, self.diagonal, self.initial, y, final,
            self.scale, self.h, self.h // self.h_k, *self.strides,
            N=self.n, P=self.p, PAD_N=padded(self.n), TILE_P=tile_p,
            DECAY=self.decay,
            GATE=self.write_gate is not None, DIAGONAL=self.diagonal is not None, INITIAL=self.initial is not None,
            num_warps=4,
        )  # fmt: skip

    def backward(
        self, launch: Launch, final: Tensor, boundaries: Tensor, dy: Tensor | None, dfinal: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Gradients in the types of their tensors; parts of heads that share q and k are added at the end."""
        dy, dy_strides = (self.v.new_zeros(self.p), (0, 0)) if dy is None else _rows(dy)
        dfinal = None if dfinal is None else dfinal.contiguous()
        given = (final, boundaries, dy, dy_strides, dfinal)
        if launch.shared is not None:
            found = shared_keys.backward(self, launch, launch.shared, *given)
        elif launch.kept is not None:
            found = kept_states.backward(self, launch, launch.kept, *given)
        else:
            found = self._walk_back(launch, *given)
        if self.decay == 2 and found["log_decay"] is not None:
            found["log_decay"] = found["log_decay"].sum((0, 1))
        return found

    def _walk_back(
        self,
        launch: Launch,
        final: Tensor,
        boundaries: Tensor,
        dy: Tensor,
        dy_strides: tuple[int, int],
        dfinal: Tensor | None,
    ) -> dict[str, Tensor | None]:
        """The gradients, that of a decay per head still by token."""
        self.cut(launch)
        b, t, h, n, tiles = self.b, self.t, self.h, self.n, self.tiles
        dq, dk = (torch.empty(b, t, h, tiles, n, dtype=self.v.dtype, device=self.v.device) for _ in range(2))
        dv = torch.empty_like(self.v, memory_format=torch.contiguous_format)
        # Rows: q . dq of every token, and the gates' gradients; one a tile of values.
        rows, dlog_decay, dwrite_gate, ddiagonal = (
            None if gate is None else self.new(b, t, h, tiles)
            for gate in (self.log_decay, self.log_decay, self.write_gate, self.diagonal)
        )
        dinitial = None if self.initial is None else self.states(dfinal)
        constants = self._constants(launch)
        strides = (*self.strides, *dy_strides)
        _differentiate_q[(self.lanes * self.segments,)](
            self.q, self.k, self.v, self.log_decay, self.write_gate, self.diagonal, self.initial, self.table,
            boundaries, dy, dq, rows,
            self.scale, *self._sizes(), *strides,
            DIAGONAL=self.diagonal is not None, INITIAL=self.initial is not None, **constants,
        )  # fmt: skip
        dboundaries = None
        if self.walks > 1:
            decays = self.new(self.segments - 1, b, h)
            dboundaries = torch.empty_like(boundaries)
            _summarise_gradients[(self.lanes * (self.segments - 1),)](
                self.q, self.log_decay, self.table, dy, dfinal, decays, dboundaries,
                self.scale, *self._sizes(), *self.strides[:2], *dy_strides,
                FINAL=dfinal is not None, **constants,
            )  # fmt: skip
            self.compose(decays, dboundaries, reverse=True)
        _differentiate_kv[(self.lanes * self.walks,)](
            self.q, self.k, self.v, self.log_decay, self.write_gate, self.diagonal, self.table,
            boundaries, dboundaries, final, dy, dfinal, rows, dk, dv, dlog_decay, dwrite_gate, ddiagonal, dinitial,
            self.scale, *self._sizes(), self.walked, *strides,
            DIAGONAL=self.diagonal is not None, INITIAL=self.initial is not None, FINAL=dfinal is not None,
            **constants,
        )  # fmt: skip
        if h * tiles > self.h_k:
            dq, dk = (part.view(b, t, self.h_k, -1, n).sum(3) for part in (dq, dk))
        dlog_decay, dwrite_gate, ddiagonal = (
            None if gradient is None else gradient.sum(3) if tiles > 1 else gradient.view(b, t, h)
            for gradient in (dlog_decay, dwrite_gate, ddiagonal)
        )
        return {
            "q": dq.view(b, t, self.h_k, n),
            "k": dk.view(b, t, self.h_k, n),
            "v": dv,
            "log_decay": dlog_decay,
            "write_gate": dwrite_gate,
            "diagonal": ddiagonal,
            "initial_state": dinitial,
        }


@lru_cache
def _constants_of(
    launch: Launch, n: int, p: int, dtype: torch.dtype, decay: int, gated: bool, packed: bool
) -> dict[str, Any]:
    """What every walk is compiled for; one mapping for all its calls, not to be changed."""
    return {
        "N": n,
        "P": p,
        "PAD_N": padded(n),
        "TILE_P": launch.tile_p,
        "CHUNK": launch.chunk,
        "DECAY": decay,
        "GATE": gated,
        "PACKED": packed,
        "PRECISION": fp32_products() if dtype == torch.float32 else "ieee",
        "STAGES": launch.num_stages,
        "num_warps": launch.num_warps,
    } | ({} if launch.registers is None else {"maxnreg": launch.registers})


def _rows(tensor: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A tensor whose tokens, of all sequences, lie at one distance; that distance, and the one between heads.

    A slice of a wider tensor stays as it is where it allows that; a view would take the host longer than its strides.
    Shapes:  b t h n
    """
    b, t, _, n = tensor.shape
    sequence, token, head, column = tensor.stride()
    if (column != 1 and n != 1) or (b > 1 and t > 1 and sequence != t * token):
        tensor = tensor.contiguous()
        sequence, token, head, _ = tensor.stride()
    return tensor, (sequence if t == 1 else token, head)


@triton.jit
def _place(b, h, group, P: tl.constexpr, TILE_P: tl.constexpr):
    """Tile, head, its head of q and k, sequence (64 bits) and segment (or walk); neighbours share q and k."""
    program = tl.program_id(0)
    TILES: tl.constexpr = (P + TILE_P - 1) // TILE_P
    tile = program % TILES
    head = (program // TILES) % h
    sequence = ((program // (TILES * h)) % b).to(tl.int64)
    return tile, head, head // group, sequence, program // (TILES * h * b)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment", "h"])
def _summarise(
    k, v, log_decay, write_gate, initial, table, decays, writes,
    t, b, h, group, chunks, segments, per_segment, k_stride, k_head_stride, v_stride, v_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """What a segment does to the state that enters it:  S -> decay S + write.  The last segment has no use for it.

    Shapes:  decays: segments-1 b h    writes: segments-1 b h n p
    """
    tile, head, head_k, sequence, segment = _place(b, h, group, P, TILE_P)
    tokens, lines = tl.arange(0, CHUNK), tl.arange(0, PAD_N)
    columns = tile * TILE_P + tl.arange(0, TILE_P)
    STATE: tl.constexpr = N * P
    offsets = lines[:, None] * P + columns[None, :]
    within = (lines[:, None] < N) & (columns[None, :] < P)
    k += head_k * k_head_stride
    v += head * v_head_stride
    # Left over of a state that enters; 0 once a state begins inside.
    left = 1.0
    place = sequence * h + head
    state = load_state(initial, place, offsets, within & (segment == 0), STATE, INITIAL and not PACKED)
    end = tl.minimum((segment + 1) * per_segment, count_chunks(table, chunks, PACKED))
    for index in tl.range(segment * per_segment, end, num_stages=walk_stages(STAGES, PACKED and INITIAL)):
        row, limit, owner, begins, _ = find_chunk(table, index, sequence, t, CHUNK, PACKED)
        keys = load_tile(k + row * k_stride, k_stride, tokens, limit, lines, N)
        values = load_tile(v + row * v_stride, v_stride, tokens, limit, columns, P)
        ages, whole = ages_of(log_decay, row * h + head, h, head, tokens, limit, DECAY)
        writes_left = tl.exp2(whole - ages) * load_gates(write_gate, row * h + head, h, tokens, limit, GATE)
        if PACKED and begins:
            left = 0.0
            state = load_state(initial, owner * h + head, offsets, within, STATE, INITIAL)
        decay = tl.exp2(whole)
        left *= decay
        values = (values.to(tl.float32) * writes_left[:, None]).to(v.dtype.element_ty)
        state = tl.dot(tl.trans(keys), values, state * decay, input_precision=PRECISION)
    place = (segment * b + sequence) * h + head
    tl.store(writes + place * STATE + offsets, state, mask=within)
    if tile == 0:
        tl.store(decays + place, left)


@QuickLaunch
@triton.jit(do_not_specialize=["heads", "rows"])
def _compose(decays, states, copies, size, heads, rows, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """states_i = decays_i states_{i-1} + states_i, in place, from the first row on or from the last.

    Eight rows are loaded together, so that one does not wait for another.
    Shapes:  decays: rows heads    states: rows heads size
    """
    head = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    state = tl.zeros([BLOCK], tl.float32)
    for base in range(0, rows, 8):
        factors, writes = (), ()
        for i in tl.static_range(8):
            row = base + i
            if REVERSE:
                row = rows - 1 - row
            place = row.to(tl.int64) * heads + head
            inside = base + i < rows
            factors += (tl.load(decays + place, mask=inside, other=0.0),)
            writes += (tl.load(states + place * size + columns, mask=inside & (columns < size), other=0.0),)
        for i in tl.static_range(8):
            row = base + i
            if REVERSE:
                row = rows - 1 - row
            state = factors[i] * state + writes[i]
            place = (row.to(tl.int64) * heads + head) * size
            inside = (base + i < rows) & (columns < size)
            tl.store(states + place + columns, state, mask=inside)
            if copies is not None:
                tl.store(copies + place + columns, state.to(copies.dtype.element_ty), mask=inside)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment", "walked", "h"])
def _read(
    q, k, v, log_decay, write_gate, diagonal, initial, table, boundaries, y, final,
    scale, t, b, h, group, chunks, segments, per_segment, walked,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, GATE: tl.constexpr, DIAGONAL: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr,
    CUT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y of `walked` segments, and final_state. Where time is not cut, the states between segments are left here."""
    tile, head, head_k, sequence, walk = _place(b, h, group, P, TILE_P)
    tokens, lines = tl.arange(0, CHUNK), tl.arange(0, PAD_N)
    columns = tile * TILE_P + tl.arange(0, TILE_P)
    offsets = lines[:, None] * P + columns[None, :]
    within = (lines[:, None] < N) & (columns[None, :] < P)
    STATE: tl.constexpr = N * P
    q += head_k * q_head_stride
    k += head_k * k_head_stride
    v += head * v_head_stride
    y += head * P
    is_own = tokens[:, None] == tokens[None, :]
    place = sequence * h + head
    state = load_state(initial, place, offsets, within & (walk == 0), STATE, INITIAL and not PACKED)
    if CUT and walk > 0:
        state = load_state(boundaries, ((walk - 1) * b + sequence) * h + head, offsets, within, STATE, CUT)
    count = count_chunks(table, chunks, PACKED)
    for segment in range(walk * walked, (walk + 1) * walked):
        end = tl.minimum((segment + 1) * per_segment, count)
        for index in tl.range(segment * per_segment, end, num_stages=STAGES):
            row, limit, owner, begins, ends = find_chunk(table, index, sequence, t, CHUNK, PACKED)
            queries = load_tile(q + row * q_stride, q_stride, tokens, limit, lines, N)
            keys = load_tile(k + row * k_stride, k_stride, tokens, limit, lines, N)
            values = load_tile(v + row * v_stride, v_stride, tokens, limit, columns, P)
            ages, whole = ages_of(log_decay, row * h + head, h, head, tokens, limit, DECAY)
            gates = load_gates(write_gate, row * h + head, h, tokens, limit, GATE)
            own = load_gates(diagonal, row * h + head, h, tokens, limit, DIAGONAL)
            if PACKED and begins:
                state = load_state(initial, owner * h + head, offsets, within, STATE, INITIAL)
            fades = fades_between(ages[:, None], ages[None, :], tokens[:, None], tokens[None, :], DECAY, DIAGONAL)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            scores = weigh(scores, fades, gates[None, :], own[None, :], is_own, GATE, DIAGONAL)
            past = tl.dot(queries, state.to(q.dtype.element_ty), input_precision=PRECISION)
            past *= tl.exp2(ages)[:, None]
            result = tl.dot(scores.to(v.dtype.element_ty), values, past, input_precision=PRECISION) * scale
            at = y + row * h * P + tokens[:, None] * h * P + columns[None, :]
            mask = (tokens[:, None] < limit) & (columns[None, :] < P)
            tl.store(at, result.to(y.dtype.element_ty), mask=mask)
            writes_left = tl.exp2(whole - ages) * gates
            values = (values.to(tl.float32) * writes_left[:, None]).to(v.dtype.element_ty)
            state = tl.dot(tl.trans(keys), values, state * tl.exp2(whole), input_precision=PRECISION)
            if PACKED and ends:
                tl.store(final + (owner * h + head) * STATE + offsets, state, mask=within)
        if segment < segments - 1:
            if not CUT:
                place = ((segment * b + sequence) * h + head) * STATE
                tl.store(boundaries + place + offsets, state, mask=within)
        elif not PACKED:
            tl.store(final + (sequence * h + head) * STATE + offsets, state, mask=within)


@QuickLaunch
@triton.jit
def _step(
    q, k, v, log_decay, write_gate, diagonal, initial, y, final,
    scale, h, group, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, TILE_P: tl.constexpr, DECAY: tl.constexpr,
    GATE: tl.constexpr, DIAGONAL: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """One token of every sequence: the state is read once and written once."""
    TILES: tl.constexpr = (P + TILE_P - 1) // TILE_P
    program = tl.program_id(0)
    tile, head = program % TILES, (program // TILES) % h
    sequence = (program // (TILES * h)).to(tl.int64)
    lines = tl.arange(0, PAD_N)
    columns = tile * TILE_P + tl.arange(0, TILE_P)
    STATE: tl.constexpr = N * P
    offsets = lines[:, None] * P + columns[None, :]
    within = (lines[:, None] < N) & (columns[None, :] < P)
    place = sequence * h + head
    head_k = head // group
    in_n, in_p = lines < N, columns < P
    query = tl.load(q + sequence * q_stride + head_k * q_head_stride + lines, mask=in_n, other=0.0).to(tl.float32)
    key = tl.load(k + sequence * k_stride + head_k * k_head_stride + lines, mask=in_n, other=0.0).to(tl.float32)
    value = tl.load(v + sequence * v_stride + head * v_head_stride + columns, mask=in_p, other=0.0).to(tl.float32)
    gate = 1.0
    if GATE:
        gate = tl.load(write_gate + place).to(tl.float32)
    own = gate
    if DIAGONAL:
        own = tl.load(diagonal + place).to(tl.float32)
    state = tl.zeros([PAD_N, TILE_P], tl.float32)
    if INITIAL:
        state = tl.load(initial + place * STATE + offsets, mask=within, other=0.0).to(tl.float32)
    if DECAY == 1:
        state *= tl.exp(tl.load(log_decay + place).to(tl.float32))
    elif DECAY == 2:
        state *= tl.exp(tl.load(log_decay + head).to(tl.float32))
    result = tl.sum(query[:, None] * state, axis=0) + own * tl.sum(query * key) * value
    tl.store(y + place * P + columns, (scale * result).to(y.dtype.element_ty), mask=in_p)
    state += key[:, None] * (gate * value)[None, :]
    tl.store(final + place * STATE + offsets, state, mask=within)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment", "h"])
def _differentiate_q(
    q, k, v, log_decay, write_gate, diagonal, initial, table, boundaries, dy, dq, rows,
    scale, t, b, h, group, chunks, segments, per_segment,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, dy_stride, dy_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, GATE: tl.constexpr, DIAGONAL: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of a segment, and q . dq of its tokens. The state is held transposed, [TILE_P, N]: values lie inside dy S^T.

    Shapes:  dq: b t h tiles n    rows: b t h tiles
    """
    tile, head, head_k, sequence, segment = _place(b, h, group, P, TILE_P)
    TILES: tl.constexpr = (P + TILE_P - 1) // TILE_P
    tokens, lines = tl.arange(0, CHUNK), tl.arange(0, PAD_N)
    columns = tile * TILE_P + tl.arange(0, TILE_P)
    offsets = lines[None, :] * P + columns[:, None]
    within = (lines[None, :] < N) & (columns[:, None] < P)
    STATE: tl.constexpr = N * P
    q += head_k * q_head_stride
    k += head_k * k_head_stride
    v += head * v_head_stride
    dy += head * dy_head_stride
    is_own = tokens[:, None] == tokens[None, :]
    place = sequence * h + head
    state = load_state(initial, place, offsets, within & (segment == 0), STATE, INITIAL and not PACKED)
    if segment > 0:
        state = load_state(boundaries, ((segment - 1) * b + sequence) * h + head, offsets, within, STATE, True)
    end = tl.minimum((segment + 1) * per_segment, count_chunks(table, chunks, PACKED))
    for index in tl.range(segment * per_segment, end, num_stages=walk_stages(STAGES, PACKED and INITIAL)):
        row, limit, owner, begins, _ = find_chunk(table, index, sequence, t, CHUNK, PACKED)
        pulls = load_tile(dy + row * dy_stride, dy_stride, tokens, limit, columns, P)
        values = load_tile(v + row * v_stride, v_stride, tokens, limit, columns, P)
        keys = load_tile(k + row * k_stride, k_stride, tokens, limit, lines, N)
        ages, whole = ages_of(log_decay, row * h + head, h, head, tokens, limit, DECAY)
        gates = load_gates(write_gate, row * h + head, h, tokens, limit, GATE)
        own = load_gates(diagonal, row * h + head, h, tokens, limit, DIAGONAL)
        if PACKED and begins:
            state = load_state(initial, owner * h + head, offsets, within, STATE, INITIAL)
        fades = fades_between(ages[:, None], ages[None, :], tokens[:, None], tokens[None, :], DECAY, DIAGONAL)
        mixed = tl.dot(pulls, tl.trans(values), input_precision=PRECISION) * scale
        mixed = weigh(mixed, fades, gates[None, :], own[None, :], is_own, GATE, DIAGONAL)
        past = tl.dot(pulls, state.to(v.dtype.element_ty), input_precision=PRECISION)
        past *= (tl.exp2(ages) * scale)[:, None]
        result = tl.dot(mixed.to(v.dtype.element_ty), keys, past, input_precision=PRECISION)
        place = (row * h + head) * TILES + tile
        mask = (tokens[:, None] < limit) & (lines[None, :] < N)
        at = dq + place * N + tokens[:, None] * (h * TILES * N) + lines[None, :]
        tl.store(at, result.to(dq.dtype.element_ty), mask=mask)
        if DECAY > 0:
            queries = load_tile(q + row * q_stride, q_stride, tokens, limit, lines, N)
            sums = tl.sum(queries.to(tl.float32) * result, axis=1)
            tl.store(rows + place + tokens * (h * TILES), sums, mask=tokens < limit)
        writes_left = tl.exp2(whole - ages) * gates
        keys = (keys.to(tl.float32) * writes_left[:, None]).to(v.dtype.element_ty)
        state = tl.dot(tl.trans(values), keys, state * tl.exp2(whole), input_precision=PRECISION)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment", "h"])
def _summarise_gradients(
    q, log_decay, table, dy, dfinal, decays, writes,
    scale, t, b, h, group, chunks, segments, per_segment, q_stride, q_head_stride, dy_stride, dy_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, FINAL: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """What a segment does to the gradient of the state that leaves it:  G -> decay G + write, of that which enters it.

    Row i of the results is segment i + 1's; final_state's gradient is in the write of its document's last segment.
    Shapes:  decays: segments-1 b h    writes: segments-1 b h n p
    """
    tile, head, head_k, sequence, index_of_row = _place(b, h, group, P, TILE_P)
    segment = index_of_row + 1
    tokens, lines = tl.arange(0, CHUNK), tl.arange(0, PAD_N)
    columns = tile * TILE_P + tl.arange(0, TILE_P)
    STATE: tl.constexpr = N * P
    offsets = lines[:, None] * P + columns[None, :]
    within = (lines[:, None] < N) & (columns[None, :] < P)
    q += head_k * q_head_stride
    dy += head * dy_head_stride
    left = 1.0
    last = segment == segments - 1
    state = load_state(dfinal, sequence * h + head, offsets, within & last, STATE, FINAL and not PACKED)
    first = segment * per_segment
    end = tl.minimum((segment + 1) * per_segment, count_chunks(table, chunks, PACKED))
    for back in tl.range(0, end - first, num_stages=STAGES):
        index = end - 1 - back
        row, limit, owner, begins, ends = find_chunk(table, index, sequence, t, CHUNK, PACKED)
        queries = load_tile(q + row * q_stride, q_stride, tokens, limit, lines, N)
        pulls = load_tile(dy + row * dy_stride, dy_stride, tokens, limit, columns, P)
        ages, whole = ages_of(log_decay, row * h + head, h, head, tokens, limit, DECAY)
        if PACKED and ends:
            left = 0.0
            state = load_state(dfinal, owner * h + head, offsets, within, STATE, FINAL)
        decay = tl.exp2(whole)
        left *= decay
        pulls = (pulls.to(tl.float32) * (tl.exp2(ages) * scale)[:, None]).to(q.dtype.element_ty)
        state = tl.dot(tl.trans(queries), pulls, state * decay, input_precision=PRECISION)
        if PACKED and begins:
            left = 0.0
            state = tl.zeros([PAD_N, TILE_P], tl.float32)
    place = (index_of_row * b + sequence) * h + head
    tl.store(writes + place * STATE + offsets, state, mask=within)
    if tile == 0:
        tl.store(decays + place, left)


@QuickLaunch
@triton.jit(do_not_specialize=["t", "b", "chunks", "segments", "per_segment", "walked", "h"])
def _differentiate_kv(
    q, k, v, log_decay, write_gate, diagonal, table,
    boundaries, dboundaries, final, dy, dfinal, rows, dk, dv, dlog_decay, dwrite_gate, ddiagonal, dinitial,
    scale, t, b, h, group, chunks, segments, per_segment, walked,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, dy_stride, dy_head_stride,
    N: tl.constexpr, P: tl.constexpr, PAD_N: tl.constexpr, TILE_P: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, GATE: tl.constexpr, DIAGONAL: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr,
    FINAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All other gradients of `walked` segments, chunks from last to first; `grad` is that of the state that leaves one.

    Products are taken transposed, [keys, queries]: no tile that was just computed is transposed as a left operand,
    which Triton 3.4 to 3.7 miscompile on Hopper. dk mixes by the same rounded numbers as dq, so that in q . dq - k . dk
    the rounding of a chunk's pairs cancels.
    Shapes:  dk: b t h tiles n    rows, dlog_decay, dwrite_gate, ddiagonal: b t h tiles
    """
    tile, head, head_k, sequence, walk = _place(b, h, group, P, TILE_P)
    TILES: tl.constexpr = (P + TILE_P - 1) // TILE_P
    tokens, lines = tl.arange(0, CHUNK), tl.arange(0, PAD_N)
    columns = tile * TILE_P + tl.arange(0, TILE_P)
    offsets = lines[:, None] * P + columns[None, :]
    within = (lines[:, None] < N) & (columns[None, :] < P)
    STATE: tl.constexpr = N * P
    q += head_k * q_head_stride
    k += head_k * k_head_stride
    v += head * v_head_stride
    dy += head * dy_head_stride
    dv += head * P
    is_own = tokens[:, None] == tokens[None, :]
    count = count_chunks(table, chunks, PACKED)
    grad = tl.zeros([PAD_N, TILE_P], tl.float32)
    carried = 0.0  # the gradient of the log decay of the token after the current chunk
    for segment_back in range(walked):
        segment = (walk + 1) * walked - 1 - segment_back
        first = segment * per_segment
        end = tl.minimum(first + per_segment, count)
        if segment < segments - 1:
            place = (segment * b + sequence) * h + head
            if dboundaries is not None:
                grad = load_state(dboundaries, place, offsets, within, STATE, True)
            if DECAY > 0:
                left = load_state(boundaries, place, offsets, within, STATE, True)
                carried = tl.sum(grad.to(v.dtype.element_ty).to(tl.float32) * left)
        elif FINAL and not PACKED:
            grad = load_state(dfinal, sequence * h + head, offsets, within, STATE, FINAL)
            if DECAY > 0:
                left = load_state(final, sequence * h + head, offsets, within, STATE, True)
                carried = tl.sum(grad.to(v.dtype.element_ty).to(tl.float32) * left)
        for back in tl.range(0, end - first, num_stages=walk_stages(STAGES, PACKED and FINAL)):
            index = end - 1 - back
            row, limit, owner, begins, ends = find_chunk(table, index, sequence, t, CHUNK, PACKED)
            queries = load_tile(q + row * q_stride, q_stride, tokens, limit, lines, N)
            keys = load_tile(k + row * k_stride, k_stride, tokens, limit, lines, N)
            values = load_tile(v + row * v_stride, v_stride, tokens, limit, columns, P)
            pulls = load_tile(dy + row * dy_stride, dy_stride, tokens, limit, columns, P)
            ages, whole = ages_of(log_decay, row * h + head, h, head, tokens, limit, DECAY)
            gates = load_gates(write_gate, row * h + head, h, tokens, limit, GATE)
            own = load_gates(diagonal, row * h + head, h, tokens, limit, DIAGONAL)
            if PACKED and ends:
                carried = 0.0
                grad = load_state(dfinal, owner * h + head, offsets, within, STATE, FINAL)
                if FINAL and DECAY > 0:
                    left = load_state(final, owner * h + head, offsets, within, STATE, True)
                    carried = tl.sum(grad.to(v.dtype.element_ty).to(tl.float32) * left)
            rounded = grad.to(v.dtype.element_ty)
            until = tl.exp2(whole - ages)
            fades = fades_between(ages[None, :], ages[:, None], tokens[None, :], tokens[:, None], DECAY, DIAGONAL)

            pairs = tl.dot(values, tl.trans(pulls), input_precision=PRECISION) * scale
            mixed = weigh(pairs, fades, gates[:, None], own[:, None], is_own, GATE, DIAGONAL)
            dkeys = tl.dot(values, tl.trans(rounded), input_precision=PRECISION) * (until * gates)[:, None]
            dkeys = tl.dot(mixed.to(v.dtype.element_ty), queries, dkeys, input_precision=PRECISION)
            place = (row * h + head) * TILES + tile
            by_token = tokens * (h * TILES)
            real = tokens < limit
            mask = real[:, None] & (lines[None, :] < N)
            at = dk + place * N + by_token[:, None] * N + lines[None, :]
            tl.store(at, dkeys.to(dk.dtype.element_ty), mask=mask)
            if DECAY > 0:
                flow = tl.load(rows + place + by_token, mask=real, other=0.0)
                flow -= tl.sum(keys.to(tl.float32) * dkeys, axis=1)
                later = tl.cumsum(flow, reverse=True) + carried
                tl.store(dlog_decay + place + by_token, later, mask=real)
                carried += tl.sum(flow)

            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
            mixed = scores * scale * fades
            dvalues = tl.dot(keys, rounded, input_precision=PRECISION) * until[:, None]
            dvalues = tl.dot(mixed.to(v.dtype.element_ty), pulls, dvalues, input_precision=PRECISION)
            if GATE:
                sums = tl.sum(values.to(tl.float32) * dvalues, axis=1)
                tl.store(dwrite_gate + place + by_token, sums, mask=real)
                dvalues *= gates[:, None]
            if DIAGONAL:
                own_scores = tl.sum(tl.where(is_own, scores, 0.0), axis=1)
                own_pairs = tl.sum(tl.where(is_own, pairs, 0.0), axis=1)
                tl.store(ddiagonal + place + by_token, own_scores * own_pairs, mask=real)
                dvalues += (own * own_scores * scale)[:, None] * pulls.to(tl.float32)
            mask = real[:, None] & (columns[None, :] < P)
            at = dv + row * h * P + tokens[:, None] * h * P + columns[None, :]
            tl.store(at, dvalues.to(dv.dtype.element_ty), mask=mask)

            pulls = (pulls.to(tl.float32) * (tl.exp2(ages) * scale)[:, None]).to(v.dtype.element_ty)
            grad = tl.dot(tl.trans(queries), pulls, grad * tl.exp2(whole), input_precision=PRECISION)
            if PACKED and INITIAL and begins:
                tl.store(dinitial + (owner * h + head) * STATE + offsets, grad, mask=within)
    if INITIAL and not PACKED and walk == 0:
        tl.store(dinitial + (sequence * h + head) * STATE + offsets, grad, mask=within)
