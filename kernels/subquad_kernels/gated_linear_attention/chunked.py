"""Gated linear attention in chunks: batched matrix products, and one short loop over the states between chunks.

Every decay between two tokens is exp of a sum of log decays over a range of tokens, and such a sum is a row of zeros
and ones times the chunk's log decays. Two tokens of a chunk meet at one power of two: the smallest pair of
neighbouring blocks that holds both, the earlier in its first block, the later in its second. Split at the middle of
that pair,

    exp(g_{j+1} + ... + g_i) = exp(g_{j+1} + ... + g_m) exp(g_{m+1} + ... + g_i),

scores of all pairs of blocks of one size are one matrix product of decayed queries and keys. No exponent is positive,
no sum is a difference of longer ones, so nothing overflows or cancels, however strong the decay. Gradients take the
same way back: those of the log decays are the transposed zeros and ones times those of the exponents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad_kernels.boundaries import layout_of
from subquad_kernels.gated_linear_attention.declaration import stretch_len
from subquad_kernels.gated_linear_attention.definition import num_cuts

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs

CHUNK = 32
"""Tokens a chunk, a power of two that divides every stretch."""


def forward(**arguments: Argument) -> Outputs:
    """y, final_state and the residual."""
    values: Any = arguments
    if values["q"].shape[1] == 1 and values["cu_seqlens"] is None:
        return _one_token(values)
    return _Call(values).forward()


def backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument, from the gradients of y and of final_state."""
    return _Call(arguments).backward(*gradients)


def _one_token(values: Mapping[str, Any]) -> Outputs:
    """The recurrence once: what a decode is.  Shapes:  b 1 h n, b 1 h p, b h n p"""
    exact = torch.promote_types(values["q"].dtype, torch.float32)
    q, k, v, log_decay = (values[name][:, 0].to(exact) for name in ("q", "k", "v", "log_decay"))
    state = k.unsqueeze(-1) * v.unsqueeze(-2)
    initial = values["initial_state"]
    after = values["read"] == "after"
    if initial is not None:
        before = initial.to(exact)
        state.addcmul_(log_decay.exp().unsqueeze(-1), before)
    rows = (q * values["scale"]).unsqueeze(-2)
    if after:
        y = rows @ state
    else:
        y = torch.zeros_like(v).unsqueeze(-2) if initial is None else rows @ before
        if values["bonus"] is not None:
            weights = rows * values["bonus"].to(exact).unsqueeze(-2) * k.unsqueeze(-2)
            y = y + weights.sum(-1, keepdim=True) * v.unsqueeze(-2)
    return y.squeeze(-2).unsqueeze(1).to(values["q"].dtype), state, state.new_empty(0, *state.shape[1:])


@dataclass(frozen=True)
class _Chunks:
    """Where the chunks of all sequences lie; no chunk holds tokens of two documents.

    Shapes:  tokens: c CHUNK (rows of the flattened b t; clamped where `real` is false)    real: c CHUNK
    `steps` lists, for the first, second, ... chunk of every sequence that has it, (chunks, sequences). `whole` chunks
    hold real tokens alone. `slots` are where the tokens of a packed sequence are laid, one after the other.
    """

    tokens: Tensor
    real: Tensor
    whole: bool
    slots: Tensor | None
    steps: list[tuple[Tensor, Tensor]]

    @staticmethod
    def of(b: int, t: int, cu_seqlens: Tensor | None, device: torch.device) -> _Chunks:
        if cu_seqlens is not None:
            return layout_of(_Chunks.of_documents, cu_seqlens)
        sequences, count = torch.arange(b, device=device), -(-t // CHUNK)
        first = (t * sequences[:, None] + CHUNK * torch.arange(count, device=device)).flatten()
        limit = (t * (sequences + 1)).repeat_interleave(count)
        steps = [(count * sequences + step, sequences) for step in range(count)]
        tokens, real = _tokens(first, limit)
        return _Chunks(tokens, real, t % CHUNK == 0, None, steps)

    @staticmethod
    def of_documents(bounds: tuple[int, ...], device: torch.device) -> _Chunks:
        starts = [
            (ordinal, start, stop, sequence)
            for sequence, (begin, stop) in enumerate(pairwise(bounds))
            for ordinal, start in enumerate(range(begin, stop, CHUNK))
        ]
        whole = all(stop - start >= CHUNK for _, start, stop, _ in starts)
        sizes = Counter(ordinal for ordinal, *_ in starts)
        order = sorted(range(len(starts)), key=lambda chunk: starts[chunk][0])  # stable: chunks in their order
        columns = [[start for _, start, _, _ in starts], [stop for _, _, stop, _ in starts]]
        columns += [order, [starts[chunk][3] for chunk in order]]
        first, limit, chunks, owners = torch.tensor(columns, dtype=torch.long)
        each = [sizes[ordinal] for ordinal in sorted(sizes)]
        tokens, real = _tokens(first, limit)
        return _Chunks(
            tokens.to(device),
            real.to(device),
            whole,
            real.flatten().nonzero()[:, 0].to(device),
            list(zip(chunks.to(device).split(each), owners.to(device).split(each), strict=True)),
        )

    def lay(self, tensor: Tensor, exact: torch.dtype) -> Tensor:
        """Zeros where no token is.  Shapes:  b t h w  ->  c h CHUNK w"""
        flat = tensor.flatten(0, 1).index_select(0, self.tokens.flatten()).to(exact)
        rows: Tensor = flat.unflatten(0, self.tokens.shape)
        if not self.whole:
            rows.masked_fill_(~self.real[..., None, None], 0)
        return rows.transpose(1, 2).contiguous()

    def collect(self, laid: Tensor, b: int, t: int) -> Tensor:
        """Shapes:  c h CHUNK w  ->  b t h w"""
        rows = laid.transpose(1, 2)
        if self.slots is None:
            return rows.reshape(b, -1, *rows.shape[2:])[:, :t].contiguous()
        return rows.flatten(0, 1)[self.slots].unsqueeze(0)


def _tokens(first: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """`tokens` and `real` of chunks that begin at `first`, in sequences that end at `limit`."""
    tokens = first[:, None] + torch.arange(CHUNK, device=first.device)
    return torch.minimum(tokens, limit[:, None] - 1), tokens < limit[:, None]


@cache
def _ranges(
    exclusive: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Zeros and ones [token, summed token]: from the chunk's start to a token, from a token to the chunk's end, and for
    every size of block (what to sum within the token's block, [later, earlier] tokens that meet there).

    A sum from the start to a token holds the token itself unless `exclusive`; one to the end never does.
    """
    row, column = torch.arange(CHUNK, device=device)[:, None], torch.arange(CHUNK, device=device)
    into = column < row if exclusive else column <= row
    out_of = column > row
    levels = []
    size = 1
    while size < CHUNK:
        block_row, block_column = row // size, column // size
        later = block_row % 2 == 1
        levels.append(
            (
                ((block_row == block_column) & torch.where(later, into, out_of)).to(dtype),
                (later & (block_column == block_row - 1)).to(dtype),
            )
        )
        size *= 2
    return into.to(dtype), out_of.to(dtype), levels


class _Call:
    """One call, laid out for the kernel.

    Shapes:  q (scaled), k, g: c h CHUNK n    v: c h CHUNK p    initial: states h n p
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        q, v, cu_seqlens = values["q"], values["v"], values["cu_seqlens"]
        self.b, self.t, self.h, self.n = q.shape
        self.p = v.shape[3]
        self.dtype = q.dtype
        self.exact = torch.promote_types(q.dtype, torch.float32)
        self.scale = values["scale"]
        self.packed = cu_seqlens is not None
        self.num_states = len(cu_seqlens) - 1 if self.packed else self.b
        self.chunks = _Chunks.of(self.b, self.t, cu_seqlens, q.device)
        self.q = self.chunks.lay(q, self.exact).mul_(self.scale)
        self.k, self.v, self.g = (self.chunks.lay(values[name], self.exact) for name in ("k", "v", "log_decay"))
        # The weight of a token's own write in its read: what the decays leave out.
        self.own: Tensor | float = 1.0
        if values["read"] == "before":
            bonus = values["bonus"]
            self.own = 0.0 if bonus is None else bonus.to(self.exact).unsqueeze(1)
        self.has_bonus = values["bonus"] is not None
        into, out_of, self.levels = _ranges(values["read"] == "before", self.exact, q.device)
        self.into, self.out_of = into, out_of
        self.q_decay, self.k_decay = (into @ self.g).exp_(), (out_of @ self.g).exp_()
        self.decay = self.g.sum(2).exp_()  # of a whole chunk: c h n
        initial = values["initial_state"]
        self.initial: Tensor | None = None if initial is None else initial.to(self.exact)

    def _edge(self, given: Tensor | None) -> Tensor:
        """States at one end of all sequences, to be changed in place.  Shape: states h n p"""
        if given is None:
            return self.k.new_zeros(self.num_states, self.h, self.n, self.p)
        return given.to(self.exact, copy=True)

    def _entering(self) -> tuple[Tensor, Tensor]:
        """The state that enters every chunk (c h n p), and the one that leaves every sequence."""
        states = (self.k * self.k_decay).transpose(2, 3) @ self.v
        carried = self._edge(self.initial)
        for rows, sequences in self.chunks.steps:
            entering = carried[sequences]
            carried[sequences] = torch.addcmul(states[rows], self.decay[rows].unsqueeze(-1), entering)
            states[rows] = entering
        return states, carried

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """For every size of block: what is summed, decays, decayed q and k, and who meets."""
        for ranges, meet in self.levels:
            decay = (ranges @ self.g).exp_()
            yield ranges, decay, self.q * decay, self.k * decay, meet

    def forward(self) -> Outputs:
        """y: b t h p    final_state: states h n p    boundaries: cuts h n p"""
        states, final = self._entering()
        y = (self.q * self.q_decay) @ states
        scores = torch.diag_embed((self.q * self.own * self.k).sum(-1))
        for _, _, queries, keys, meet in self._pairs():
            scores.addcmul_(queries @ keys.transpose(2, 3), meet)
        y += scores @ self.v
        boundaries = states.new_zeros(num_cuts(self.b, self.t, self.n, self.p, packed=self.packed), *states.shape[1:])
        every = stretch_len(self.n, self.p) // CHUNK
        cuts = [rows for rows, _ in self.chunks.steps[every::every]]
        if cuts:
            # Chunks are numbered sequence by sequence: sorted, so are the cuts.
            found = torch.cat(cuts).sort().values
            boundaries[: len(found)] = states[found]
        return self.chunks.collect(y, self.b, self.t).to(self.dtype), final, boundaries

    def backward(self, dy: Tensor | None, dfinal: Tensor | None) -> dict[str, Tensor | None]:
        """The gradient of the state that leaves every chunk, then everything within chunks at once."""
        pull = torch.zeros_like(self.v) if dy is None else self.chunks.lay(dy, self.exact)
        states, _ = self._entering()
        decayed_q, decayed_k = self.q * self.q_decay, self.k * self.k_decay
        leaving = decayed_q.transpose(2, 3) @ pull
        carried = self._edge(dfinal)
        for rows, sequences in reversed(self.chunks.steps):
            after = carried[sequences]
            carried[sequences] = torch.addcmul(leaving[rows], self.decay[rows].unsqueeze(-1), after)
            leaving[rows] = after

        # What crosses chunks: reads of the entering state, writes to the leaving one, and its decay on the way.
        dq = (pull @ states.transpose(2, 3)).mul_(self.q_decay)
        dk = (self.v @ leaving.transpose(2, 3)).mul_(self.k_decay)
        dg = self.into.T @ (self.q * dq) + self.out_of.T @ (self.k * dk)
        dg += (self.decay * (states * leaving).sum(-1)).unsqueeze(2)
        dv = decayed_k @ leaving
        # Pairs within a chunk.
        dscores = pull @ self.v.transpose(2, 3)
        scores = torch.diag_embed((self.q * self.own * self.k).sum(-1))
        for ranges, decay, queries, keys, meet in self._pairs():
            scores.addcmul_(queries @ keys.transpose(2, 3), meet)
            met = dscores * meet
            dqueries = (met @ keys).mul_(decay)
            dkeys = (met.transpose(2, 3) @ queries).mul_(decay)
            dg += ranges.T @ (self.q * dqueries + self.k * dkeys)
            dq += dqueries
            dk += dkeys
        dv += scores.transpose(2, 3) @ pull
        # A token and itself.
        own = dscores.diagonal(dim1=2, dim2=3).unsqueeze(-1)
        dq += own * self.own * self.k
        dk += own * self.own * self.q
        found = {"q": dq.mul_(self.scale), "k": dk, "v": dv, "log_decay": dg}
        results: dict[str, Tensor | None] = {
            name: self.chunks.collect(gradient, self.b, self.t) for name, gradient in found.items()
        }
        results["bonus"] = (own * self.q * self.k).sum((0, 2)) if self.has_bonus else None
        results["initial_state"] = carried
        return results
