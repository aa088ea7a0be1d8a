"""Linear attention in chunks of 64 tokens, in torch: matrix products within chunks, one short loop between them.

With b_i the sum of log decays from the chunk's first token to its i-th, S the state that enters a chunk, E_ij =
exp(b_i - b_j) for j <= i (0 above), and B the sum over the whole chunk:

    Y  = scale ( ((Q K^T) o M) V + exp(b) Q S ),    M_ij = E_ij w_j below the diagonal, d_i on it
    S' = exp(B) S + (exp(B - b) w K)^T V

Exponents are masked before exp, so that none is positive. README.md derives the backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from subquad_kernels.boundaries import layout_of
from subquad_kernels.linear_attention.declaration import CHUNK
from subquad_kernels.linear_attention.definition import empty_boundaries

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs

_LEAST = {torch.float32: -128.0, torch.float64: -1024.0}
"""exp of it is 0: a smaller log decay does nothing more, and would take digits from the sums it enters."""


def forward(chunk: int = CHUNK, **arguments: Argument) -> Outputs:
    """y, final_state, and boundaries left zero: the backward computes the states again."""
    call = _Call(arguments, chunk)
    y, final = call.forward()
    return y, final, empty_boundaries(call.v, call.n, arguments["cu_seqlens"]).zero_()


def backward(
    arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...], chunk: int = CHUNK
) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument, from the gradients of y and of final_state."""
    return _Call(arguments, chunk).backward(*gradients)


class _Grid:
    """The tokens of a call laid out in chunks, none of which holds tokens of two documents.

    `entries` and `exits` are the states (sequences or documents) that begin and end with a chunk; -1 for none. `slots`
    are where the tokens of a packed sequence are laid, one after the other.
    """

    def __init__(self, t: int, cu_seqlens: Tensor | None, chunk: int) -> None:
        self.t, self.chunk = t, chunk
        self.slots: Tensor | None = None
        if cu_seqlens is None:
            self.count = -(-t // chunk)
        else:
            self.entries, self.exits, self.slots = layout_of(_spans, cu_seqlens, chunk)
            self.count = len(self.entries)

    def lay(self, rows: Tensor) -> Tensor:
        """Chunks of tokens, zeros where a chunk is short.  Shapes:  b t h ...  ->  b c h chunk ..."""
        if self.slots is None:
            padded = F.pad(rows, (0, 0) * (rows.dim() - 2) + (0, self.count * self.chunk - self.t))
            laid: Tensor = padded.unflatten(1, (self.count, self.chunk))
        else:
            flat = rows.new_zeros(self.count * self.chunk, *rows.shape[2:])
            flat[self.slots] = rows[0]
            laid = flat.unflatten(0, (1, self.count, self.chunk))
        return laid.transpose(2, 3)

    def take(self, laid: Tensor) -> Tensor:
        """The inverse of `lay`.  Shapes:  b c h chunk ...  ->  b t h ..."""
        rows = laid.transpose(2, 3)
        if self.slots is None:
            return rows.flatten(1, 2)[:, : self.t]
        return rows[0].flatten(0, 1)[self.slots].unsqueeze(0)


def _spans(bounds: tuple[int, ...], device: torch.device, chunk: int) -> tuple[list[int], list[int], Tensor]:
    """`entries`, `exits` and `slots` of a `_Grid`."""
    spans = [
        (first, min(first + chunk, stop), document)
        for document, (start, stop) in enumerate(pairwise(bounds))
        for first in range(start, stop, chunk)
    ]
    entries = [document if first == bounds[document] else -1 for first, _, document in spans]
    exits = [document if stop == bounds[document + 1] else -1 for _, stop, document in spans]
    slots = [torch.arange(stop - first) + chunk * number for number, (first, stop, _) in enumerate(spans)]
    return entries, exits, torch.cat(slots).to(device)


class _Call:
    """The arguments of one call, in chunks and in the type the states have."""

    def __init__(self, values: Mapping[str, Any], chunk: int) -> None:
        self.q, self.k, self.v = values["q"], values["k"], values["v"]
        self.b, self.t, self.h, self.p = self.v.shape
        self.h_k, self.n = self.q.shape[2:]
        self.exact = torch.promote_types(self.v.dtype, torch.float32)
        self.scale = float(values["scale"])
        self.log_decay = values["log_decay"]
        cu_seqlens = values["cu_seqlens"]
        self.packed = cu_seqlens is not None
        self.states = cu_seqlens.shape[0] - 1 if self.packed else self.b
        self.initial = None if values["initial_state"] is None else values["initial_state"].to(self.exact)
        grid = self.grid = _Grid(self.t, cu_seqlens, chunk)

        self.Q, self.K = (
            grid.lay(rows.to(self.exact)).repeat_interleave(self.h // self.h_k, dim=2) for rows in (self.q, self.k)
        )
        self.V = grid.lay(self.v.to(self.exact))
        self.w, self.d = (
            None if values[name] is None else grid.lay(values[name].to(self.exact))
            for name in ("write_gate", "diagonal")
        )
        rates = self.v.new_zeros(1, dtype=self.exact) if self.log_decay is None else self.log_decay.to(self.exact)
        rates = rates.clamp(min=_LEAST[self.exact]).expand(self.b, self.t, self.h)
        ages = grid.lay(rates).cumsum(-1)
        # Without the diagonal where that has a weight of its own.
        below = torch.ones(chunk, chunk, dtype=torch.bool, device=self.v.device).tril(-1 if self.d is not None else 0)
        self.E = (ages[..., :, None] - ages[..., None, :]).masked_fill_(~below, -torch.inf).exp_()
        self.since = ages.exp()[..., None]  # what is left at a token of the state that enters its chunk
        self.until = (ages[..., -1:] - ages).exp()[..., None]  # what is left at the chunk's end of a token's write
        self.whole = ages[..., -1].exp()[..., None, None]
        self.weights = self.until if self.w is None else self.until * self.w[..., None]

    def _mixed(self, products: Tensor) -> Tensor:
        """products o M.  Shapes:  b c h chunk chunk"""
        mixed = products * self.E
        if self.w is not None:
            mixed *= self.w[..., None, :]
        if self.d is not None:
            mixed.diagonal(dim1=-2, dim2=-1).copy_(self.d * products.diagonal(dim1=-2, dim2=-1))
        return mixed

    def _walk(self) -> tuple[Tensor, Tensor]:
        """The states that enter the chunks and those that leave.  Shapes:  b c h n p"""
        leaving = (self.K * self.weights).transpose(-1, -2) @ self.V
        entering = torch.empty_like(leaving)
        state = leaving.new_zeros(self.b, self.h, self.n, self.p)
        if self.initial is not None and not self.packed:
            state = self.initial
        for c in range(self.grid.count):
            if self.packed and (document := self.grid.entries[c]) >= 0:
                state = torch.zeros_like(state) if self.initial is None else self.initial[document : document + 1]
            entering[:, c] = state
            state = leaving[:, c].addcmul_(self.whole[:, c], state)
        return entering, leaving

    def _final(self, leaving: Tensor) -> Tensor:
        """The states after the last tokens; an empty document ends as it began."""
        if not self.packed:
            return leaving[:, -1].clone()
        final = leaving.new_zeros(self.states, self.h, self.n, self.p) if self.initial is None else self.initial.clone()
        for c, document in enumerate(self.grid.exits):
            if document >= 0:
                final[document] = leaving[0, c]
        return final

    def forward(self) -> tuple[Tensor, Tensor]:
        """y: b t h p    final_state: states h n p"""
        entering, leaving = self._walk()
        y = self._mixed(self.Q @ self.K.transpose(-1, -2)) @ self.V
        y += self.since * (self.Q @ entering)
        return self.grid.take(y * self.scale).to(self.v.dtype), self._final(leaving)

    def _walk_back(self, direct: Tensor, dfinal: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients of the states that leave the chunks, and of the initial ones.  Shapes:  b c h n p, states h n p"""
        after = torch.empty_like(direct)
        carried = direct.new_zeros(self.b, self.h, self.n, self.p)
        dinitial = direct.new_zeros(self.states, self.h, self.n, self.p) if dfinal is None else dfinal.clone()
        if dfinal is not None and not self.packed:
            carried = dfinal
        for c in reversed(range(self.grid.count)):
            if self.packed and (document := self.grid.exits[c]) >= 0:
                carried = torch.zeros_like(carried) if dfinal is None else dfinal[document : document + 1]
            after[:, c] = carried
            carried = direct[:, c].addcmul_(self.whole[:, c], carried)
            if self.packed and (document := self.grid.entries[c]) >= 0:
                dinitial[document] = carried[0]
        return after, dinitial if self.packed else carried

    def backward(self, dy: Tensor | None, dfinal: Tensor | None) -> dict[str, Tensor | None]:
        """All gradients; those of q, k and v scale with dY, and the gates' come from their products."""
        dY = torch.zeros_like(self.V) if dy is None else self.grid.lay(dy.to(self.exact)) * self.scale
        dfinal = None if dfinal is None else dfinal.to(self.exact)
        Q, K, V = self.Q, self.K, self.V
        entering, leaving = self._walk()
        after, dinitial = self._walk_back((Q * self.since).transpose(-1, -2) @ dY, dfinal)

        scores, pulls = Q @ K.transpose(-1, -2), dY @ V.transpose(-1, -2)
        mixed_pulls = self._mixed(pulls)
        dQ = mixed_pulls @ K + self.since * (dY @ entering.transpose(-1, -2))
        dK = mixed_pulls.transpose(-1, -2) @ Q + self.weights * (V @ after.transpose(-1, -2))
        dV = (scores * self.E).transpose(-1, -2) @ dY + self.until * (K @ after)  # before the write gate
        dw = dd = None
        if self.w is not None:
            dw = self.grid.take((V * dV).sum(-1))
            dV *= self.w[..., None]
        if self.d is not None:
            own = scores.diagonal(dim1=-2, dim2=-1)
            dd = self.grid.take(own * pulls.diagonal(dim1=-2, dim2=-1))
            dV += (self.d * own)[..., None] * dY

        dlog_decay = None
        if self.log_decay is not None:
            # What flows into a chunk's tokens and not out of them again, from the end of the chunk backwards.
            rows = (Q * dQ).sum(-1) - (K * dK).sum(-1)
            sums = rows.flip(-1).cumsum(-1).flip(-1) + (after * leaving).sum((-1, -2))[..., None]
            dlog_decay = self.grid.take(sums)
            if self.log_decay.dim() == 1:
                dlog_decay = dlog_decay.sum((0, 1))

        def shared(gradient: Tensor) -> Tensor:
            return self.grid.take(gradient.unflatten(2, (self.h_k, -1)).sum(3))

        return {
            "q": shared(dQ),
            "k": shared(dK),
            "v": self.grid.take(dV),
            "log_decay": dlog_decay,
            "write_gate": dw,
            "diagonal": dd,
            "initial_state": dinitial,
        }
