"""The delta rule in chunks, in plain torch: a triangular system a chunk in place of a rank-one update a token.

Inside a chunk, with b_i the sum of its log decays up to token i, the state is known to all tokens but for what the
tokens themselves write; that is a unit lower triangular system (README.md). Exponents are differences b_i - b_j with
j <= i, masked before exp, never positive. The forward keeps the state that enters each chunk; the backward computes a
chunk again from it and differentiates it, from the last chunk to the first, so that memory grows linearly in t.
Packed documents of similar length are padded with tokens that neither decay nor write.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad_kernels.delta_rule.declaration import CHUNK, num_chunks
from subquad_kernels.documents import DocumentGroup, document_groups
from subquad_kernels.torch_operator import recording

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs

_VECTOR_CHUNK = 16
"""Tokens of a step where each key channel has its decay: scores then pass through a tensor of c c n."""

_NAMES = ("q", "k", "v", "log_decay", "write_gate", "remove", "insert")


@dataclass(frozen=True)
class _Tokens:
    """Some tokens of parallel sequences, all of one type.

    Shapes:  q, k, remove, insert: b h c n    v: b h c p    log_decay: b h c m (m = 1 or n; fp64)    write_gate: b h c 1
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    write_gate: Tensor
    remove: Tensor | None
    insert: Tensor | None


def forward(**arguments: Argument) -> Outputs:
    """y, final_state and the residuals."""
    values: Any = arguments
    v, initial, cu_seqlens = values["v"], values["initial_state"], values["cu_seqlens"]
    exact = torch.promote_types(v.dtype, torch.float32)
    b, t, h, p = v.shape
    n = values["k"].shape[3]
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y, writes = v.new_empty(v.shape), v.new_empty(v.shape)
    if initial is None:
        final = v.new_zeros(documents or b, h, n, p, dtype=exact)
    else:
        final = initial.to(exact, copy=True)
    boundaries, step = v.new_zeros(num_chunks(b, t, documents), h, p, n), _step(values)
    for rows in _rows(b, t, cu_seqlens, v.device):
        state = final[rows.states]
        for tokens in rows.steps(CHUNK):
            if len(boundaries):
                rows.keep(boundaries, tokens, state.transpose(2, 3).to(v.dtype))
            for part in rows.steps(step, tokens):
                outs, news, state = _walk(rows.read(values, part), state, values["scale"])
                rows.write(y, part, outs, step)
                rows.write(writes, part, news, step)
        final[rows.states] = state
    return y, final, writes, boundaries


def backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument, from the gradients of y and of final_state."""
    values: Any = arguments
    v, initial, cu_seqlens = values["v"], values["initial_state"], values["cu_seqlens"]
    exact = torch.promote_types(v.dtype, torch.float32)
    b, t = v.shape[:2]
    final, boundaries = outputs[1], outputs[3]
    dy, dfinal = gradients
    dy = torch.zeros_like(v) if dy is None else dy
    dstates = torch.zeros_like(final) if dfinal is None else dfinal.to(exact, copy=True)
    found = {name: given.new_zeros(given.shape, dtype=exact) for name in _NAMES if (given := values[name]) is not None}
    for rows in _rows(b, t, cu_seqlens, v.device):
        dstate = dstates[rows.states]
        for tokens in reversed(list(rows.steps(CHUNK))):
            if len(boundaries):
                state = boundaries[rows.chunk(tokens)].transpose(2, 3).to(exact)
            else:
                state = torch.zeros_like(dstate) if initial is None else initial.to(exact)
            dstate = _differentiate(values, rows, tokens, state, dy, dstate, found)
        dstates[rows.states] = dstate
    return {name: found.get(name) for name in _NAMES} | {"initial_state": None if initial is None else dstates}


def _differentiate(
    values: Mapping[str, Any], rows: _Rows, tokens: slice, state: Tensor, dy: Tensor, dstate: Tensor,
    found: Mapping[str, Tensor],
) -> Tensor:  # fmt: skip
    """Write the gradients of a chunk's tokens into `found`; return that of the state that enters it."""
    with recording():
        leaves = {name: rows.pad(values[name], tokens).to(found[name].dtype).requires_grad_() for name in found}
        entering = leaf = state.detach().requires_grad_()
        outs = []
        for part in rows.steps(_step(values), slice(0, tokens.stop - tokens.start)):
            out, _, entering = _walk(_laid_out(leaves, part), entering, values["scale"])
            outs.append(out)
        pulls = rows.pad(dy, tokens).to(state.dtype).transpose(1, 2)
        results = torch.autograd.grad([torch.cat(outs, dim=2), entering], [*leaves.values(), leaf], [pulls, dstate])
    for tensor, gradient in zip(found.values(), results):
        rows.write(tensor, tokens, gradient.transpose(1, 2), CHUNK)
    return results[-1]


def _step(values: Mapping[str, Any]) -> int:
    decay = values["log_decay"]
    return _VECTOR_CHUNK if decay is not None and decay.dim() == 4 else CHUNK


def _laid_out(tensors: Mapping[str, Tensor | None], tokens: slice) -> _Tokens:
    """Heads before tokens, key heads repeated, absent decays and gates filled in.  Shapes:  b t h n  ->  b h c n"""

    def lay(name: str) -> Tensor | None:
        tensor = tensors.get(name)
        if tensor is None:
            return None
        return (tensor[:, tokens] if tensor.dim() == 4 else tensor[:, tokens, :, None]).transpose(1, 2)

    q, k, v = lay("q"), lay("k"), lay("v")
    assert q is not None and k is not None and v is not None
    q, k = (part.repeat_interleave(v.shape[1] // part.shape[1], dim=1) for part in (q, k))
    gate, decay = lay("write_gate"), lay("log_decay")
    return _Tokens(
        q, k, v,
        # Sums of fp32 decays that cancel would lose digits.
        v.new_zeros(*v.shape[:3], 1) if decay is None else decay.double(),
        v.new_ones(*v.shape[:3], 1) if gate is None else gate,
        lay("remove"), lay("insert"),
    )  # fmt: skip


def _walk(tokens: _Tokens, state: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Results and writes of some tokens, and the state after them.

    Shapes:  state: b h n p  ->  b h c p, b h c p, b h n p
    """
    sums = tokens.log_decay.cumsum(2)
    last = sums[:, :, -1:]
    here, rest = sums.exp().to(state.dtype), (last - sums).exp().to(state.dtype)
    gated = tokens.write_gate * tokens.v
    if tokens.remove is None or tokens.insert is None:
        known = tokens.write_gate * _scores(tokens.k, sums, tokens.k, sums, -1)
        fresh = gated - tokens.write_gate * ((here * tokens.k) @ state)
        writes = torch.linalg.solve_triangular(known, fresh, upper=False, unitriangular=True)
        out = _scores(tokens.q, sums, tokens.k, sums, 0) @ writes
        written = (rest * tokens.k).mT @ writes
    else:
        # `remove` reads before the token's own decay.
        before = sums - tokens.log_decay
        known = -_scores(tokens.remove, before, tokens.insert, sums, -1)
        fresh = (before.exp().to(state.dtype) * tokens.remove) @ state
        fresh = fresh + _scores(tokens.remove, before, tokens.k, sums, -1) @ gated
        writes = torch.linalg.solve_triangular(known, fresh, upper=False, unitriangular=True)
        out = _scores(tokens.q, sums, tokens.k, sums, 0) @ gated
        out = out + _scores(tokens.q, sums, tokens.insert, sums, 0) @ writes
        written = (rest * tokens.k).mT @ gated + (rest * tokens.insert).mT @ writes
    out = scale * (out + (here * tokens.q) @ state)
    return out, writes, last.exp().to(state.dtype).mT * state + written


def _scores(left: Tensor, left_sums: Tensor, right: Tensor, right_sums: Tensor, diagonal: int) -> Tensor:
    """sum_n left_in right_jn exp(left_sums_in - right_sums_jn) for j <= i + diagonal, else 0.

    Shapes:  left, right: b h c n    sums: b h c m  ->  b h c c
    """
    exponents = left_sums.unsqueeze(3) - right_sums.unsqueeze(2)  # b h c c m
    hidden = torch.ones(exponents.shape[2:4], dtype=torch.bool, device=left.device).triu(diagonal + 1)
    decays = exponents.masked_fill(hidden.unsqueeze(-1), -math.inf).exp().to(left.dtype)
    if decays.shape[-1] == 1:
        return (left @ right.mT) * decays.squeeze(-1)
    return torch.einsum("bhin,bhjn,bhijn->bhij", left, right, decays)


@dataclass(frozen=True)
class _Rows:
    """Sequences walked side by side: those of a batch, or documents of similar length.

    Shapes:  index: b t (rows of the flattened b t axis)    states: b (their places among the states)
             first_chunk, last_chunk: b (the places of the states that enter these)
    """

    index: Tensor
    states: Tensor
    first_chunk: Tensor
    last_chunk: Tensor
    documents: DocumentGroup | None = None

    def steps(self, size: int, within: slice | None = None) -> Iterator[slice]:
        """Runs of `size` tokens."""
        begin, end = (0, self.index.shape[1]) if within is None else (within.start, within.stop)
        return (slice(start, min(start + size, end)) for start in range(begin, end, size))

    def chunk(self, tokens: slice) -> Tensor:
        """Where the state that enters these tokens' chunk is kept; of a sequence that has ended, its last."""
        return torch.minimum(self.first_chunk + tokens.start // CHUNK, self.last_chunk)

    def keep(self, boundaries: Tensor, tokens: slice, states: Tensor) -> None:
        """Keep the states that enter these tokens' chunk; a sequence that has ended keeps its last as it is."""
        chunk = self.chunk(tokens)
        if self.documents is not None:
            ended = self.first_chunk + tokens.start // CHUNK > self.last_chunk
            states = torch.where(ended[:, None, None, None], boundaries[chunk], states)
        boundaries[chunk] = states

    def pad(self, tensor: Tensor, tokens: slice) -> Tensor:
        """The tokens of every row, zeros after its end.  Shapes:  b t ...  ->  rows c ..."""
        rows = tensor.flatten(0, 1)[self.index[:, tokens]]
        if self.documents is None or self.documents.whole:
            return rows
        real = self.documents.real[:, tokens]
        return rows * real.reshape(*real.shape, *(1 for _ in rows.shape[2:])).to(rows.dtype)

    def read(self, values: Mapping[str, Any], tokens: slice) -> _Tokens:
        """These tokens of every argument, in at least fp32."""
        exact = torch.promote_types(values["v"].dtype, torch.float32)
        given = {name: self.pad(values[name], tokens).to(exact) for name in _NAMES if values[name] is not None}
        return _laid_out(given, slice(None))

    def write(self, tensor: Tensor, tokens: slice, rows: Tensor, size: int) -> None:
        """Write heads-first results of a run of `size` tokens to their places.  Shapes:  rows h c ...  ->  b t h ..."""
        laid = rows.transpose(1, 2).to(tensor.dtype)
        flat = tensor.view(-1, *tensor.shape[2:])
        if self.documents is None:
            flat[self.index[:, tokens]] = laid
        else:
            slots, places = self.documents.runs(size)[tokens.start // size]
            flat[places] = laid.flatten(0, 1)[slots]


def _rows(b: int, t: int, cu_seqlens: Tensor | None, device: torch.device) -> Iterator[_Rows]:
    """The batch, or the documents grouped by length."""
    if cu_seqlens is None:
        sequences = torch.arange(b, device=device)
        index, count = sequences[:, None] * t + torch.arange(t, device=device), -(-t // CHUNK)
        yield _Rows(index, sequences, sequences * count, sequences * count + count - 1)
        return
    counts = (cu_seqlens.diff().long() + CHUNK - 1) // CHUNK
    after = counts.cumsum(0)
    for group in document_groups(cu_seqlens):
        mine = group.documents
        yield _Rows(group.tokens, mine, after[mine] - counts[mine], after[mine] - 1, group)
