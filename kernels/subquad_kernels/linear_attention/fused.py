"""Linear attention in Triton: a program walks over time with its state in registers, one chunk of 64 tokens a step.

A program holds the states [N, TILE_P] of one head of one sequence (of a tile of its values) and does every product of
a chunk on tensor cores; no state of a chunk goes to memory. Where heads are too few for the device, time is cut into
segments, and a direction takes three steps: `_summarise` finds what each segment does to a state (a decay and a
write), `_compose` runs through the segments and leaves the state that enters each, and a walk computes the results of
every segment. Those states are the residual of the forward; the backward starts its walk for dq from them and finds
the gradients of states, for its walk for dk and dv, by the same three steps from the end. The decay's gradient is a
sum over later tokens, taken in that last walk and begun anew at every segment from the two states that meet there.
Packed documents are laid out in chunks on the device, none of which holds tokens of two documents: the walks then read
where a chunk lies from a table. `walk_back.py` holds the backward's walks, `launches.py` what is chosen for a device.
README.md has the equations and the reasons for the sizes.
"""

# What Triton compiles has no Python types, and tuples that grow.
# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.linear_attention import kept_states, shared_keys, walk_back
from subquad_kernels.linear_attention.chunk_tiles import (
    ages_of,
    count_chunks,
    fades_between,
    find_chunk,
    find_place,
    load_gates,
    load_state,
    load_tile,
    replace_state,
    weigh,
)
from subquad_kernels.linear_attention.declaration import chunk_slots, segment_len
from subquad_kernels.linear_attention.launches import Launch, has_room, launch_of
from subquad_kernels.tile_sizes import ceil_div, padded
from subquad_kernels.triton_chunks import lay_out
from subquad_kernels.triton_launch import QuickLaunch
from subquad_kernels.triton_precision import fp32_products

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs


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
            packed=self.cu_seqlens is not None, room=has_room(self.v.device),
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

    def sizes(self) -> tuple[int, ...]:
        """Lengths and counts that every walk is told."""
        return (self.t, self.b, self.h, self.h // self.h_k, self.chunks, self.segments, self.chunks_per_segment)

    def constants(self, launch: Launch) -> dict[str, Any]:
        """What every walk is compiled for."""
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
        constants = self.constants(launch) | {"INITIAL": self.initial is not None}
        if self.walks > 1:
            decays = self.new(self.segments - 1, self.b, self.h)
            _summarise[(self.lanes * (self.segments - 1),)](
                self.k, self.v, self.log_decay, self.write_gate, self.initial, self.table, decays, boundaries,
                *self.sizes(), *self.strides[2:],
                **constants,
            )  # fmt: skip
            self.compose(decays, boundaries, reverse=False)
        _read[(self.lanes * self.walks,)](
            self.q, self.k, self.v, self.log_decay, self.write_gate, self.diagonal, self.initial, self.table,
            boundaries, y, final,
            self.scale, *self.sizes(), self.walked, *self.strides,
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
            found = walk_back.backward(self, launch, *given)
        if self.decay == 2 and found["log_decay"] is not None:
            found["log_decay"] = found["log_decay"].sum((0, 1))
        return found


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
    tile, head, head_k, sequence, segment = find_place(b, h, group, P, TILE_P)
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
    for index in tl.range(segment * per_segment, end, num_stages=STAGES):
        row, limit, owner, begins, _ = find_chunk(table, index, sequence, t, CHUNK, PACKED)
        keys = load_tile(k + row * k_stride, k_stride, tokens, limit, lines, N)
        values = load_tile(v + row * v_stride, v_stride, tokens, limit, columns, P)
        ages, whole = ages_of(log_decay, row * h + head, h, head, tokens, limit, DECAY)
        writes_left = tl.exp2(whole - ages) * load_gates(write_gate, row * h + head, h, tokens, limit, GATE)
        if PACKED:
            left = tl.where(begins, 0.0, left)
            state = replace_state(state, begins, initial, owner * h + head, offsets, within, STATE, INITIAL)
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
    tile, head, head_k, sequence, walk = find_place(b, h, group, P, TILE_P)
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
            if PACKED:
                state = replace_state(state, begins, initial, owner * h + head, offsets, within, STATE, INITIAL)
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
