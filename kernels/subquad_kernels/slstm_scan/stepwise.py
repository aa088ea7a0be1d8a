"""The scalar LSTM one step after the other, in torch: all sequences and heads at once, a matrix product a step.

Documents are ranked by length, so that a step's are the first of the ranks: no step computes padding. The forward keeps
the states after every token; from them the backward computes all gates again in one product, and its loop only passes
gradients on. With w = sigmoid(u), u = i - log sigmoid(f) - l, and gradients dh, da, dl of the states after a token,

    da += dh sigmoid(o)      du = da (tanh z - a) w (1 - w) - (1 - w) dl          (a, l: before the token)
    di = dl + du             df = -du sigmoid(-f)      dz = da w (1 - tanh^2 z)      do = dh a' sigmoid(o) sigmoid(-o)
    before the token:        dh = R (di, df, dz, do)   da (1 - w)                    -du
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from subquad_kernels.documents import document_ids, document_positions
from subquad_kernels.slstm_scan.definition import no_token

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs


def forward(**arguments: Argument) -> Outputs:
    """y, final_state, and the states after every token."""
    return _Call(arguments).forward()


def backward(
    arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]
) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument, from the gradients of y and of final_state."""
    return _Call(arguments).backward(outputs[2], *gradients)


class _Steps:
    """The tokens of a call in the order of its steps: the first tokens of all sequences, the second ones, ...

    Within a step sequences stand by rank, the longest first. `sizes` are the sequences of every step.
    """

    def __init__(self, b: int, t: int, cu_seqlens: Tensor | None, device: torch.device) -> None:
        if cu_seqlens is None:
            self.ranked = torch.arange(b, device=device)
            self.order = torch.arange(b * t, device=device).unflatten(0, (b, t)).t().flatten()
            self.sizes = [b] * t
        else:
            lengths = cu_seqlens.diff().long()
            self.ranked = lengths.argsort(descending=True, stable=True)
            positions = document_positions(cu_seqlens, t)
            ranks = torch.empty_like(self.ranked)
            ranks[self.ranked] = torch.arange(len(lengths), device=device)
            self.order = (positions * len(lengths) + ranks[document_ids(cu_seqlens, t)]).argsort()
            self.sizes = positions.bincount().tolist()
        self.starts = [0]
        for size in self.sizes[:-1]:
            self.starts.append(self.starts[-1] + size)

    def lay(self, rows: Tensor) -> Tensor:
        """Heads first, tokens in the order of steps.  Shapes:  b t h ...  ->  h (b t) ..."""
        return rows.flatten(0, 1)[self.order].transpose(0, 1).contiguous()

    def take(self, laid: Tensor, like: Tensor) -> Tensor:
        """The inverse of `lay`, of the type of `like`.  Shapes:  h (b t) ...  ->  b t h ..."""
        rows = like.new_empty(laid.shape[1], laid.shape[0], *laid.shape[2:])
        rows[self.order] = laid.transpose(0, 1).to(like.dtype)
        return rows.unflatten(0, like.shape[:2])

    def by_rank(self, states: Tensor) -> Tensor:
        """Shapes:  states 3 h p  ->  3 h states p"""
        return states[self.ranked].permute(1, 2, 0, 3).contiguous()

    def of_ranks(self, ranked: Tensor) -> Tensor:
        """The inverse of `by_rank`.  Shapes:  3 h states p  ->  states 3 h p"""
        states = ranked.new_empty(ranked.shape[2], *ranked.shape[:2], ranked.shape[3])
        states[self.ranked] = ranked.permute(2, 0, 1, 3)
        return states

    def before(self, initial: Tensor, after: Tensor) -> Tensor:
        """The states before every token, from the initial ones and those after it.

        Shapes:  initial: 3 h states p    after: 3 h (b t) p  ->  3 h (b t) p
        """
        if len(self.sizes) == 1:
            return initial[:, :, : self.sizes[0]]
        sizes = torch.tensor(self.sizes, device=after.device)
        # A sequence keeps its rank: it stands one step's size behind where it stood.
        places = torch.arange(self.sizes[0], after.shape[2], device=after.device)
        earlier = after[:, :, places - sizes[:-1].repeat_interleave(sizes[1:])]
        return torch.cat([initial[:, :, : self.sizes[0]], earlier], dim=2)


class _Call:
    """The arguments of one call, in the order of its steps and in the type the states have."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.inputs, recurrent, bias = values["inputs"], values["recurrent"], values["bias"]
        b, t, h, _, self.p = self.inputs.shape
        exact = torch.promote_types(self.inputs.dtype, torch.float32)
        cu_seqlens, initial = values["cu_seqlens"], values["initial_state"]
        self.steps = _Steps(b, t, cu_seqlens, self.inputs.device)
        if initial is None:
            states = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
            initial = no_token(self.inputs.new_empty(0, dtype=exact), states, h, self.p)
        self.initial = self.steps.by_rank(initial.to(exact))
        self.gates = self.steps.lay(self.inputs.to(exact) + bias.to(exact)).flatten(2)
        self.weights = recurrent.to(exact).flatten(2)

    def forward(self) -> Outputs:
        """y: b t h p    final_state: states 3 h p    trajectory: 3 h (b t) p"""
        trajectory = self.initial.new_empty(3, *self.gates.shape[:2], self.p)
        states = self.initial.clone()
        for start, size in zip(self.steps.starts, self.steps.sizes):
            hidden, mean, log_weight = states[:, :, :size]
            raw = torch.baddbmm(self.gates[:, start : start + size], hidden, self.weights)
            i, f, z, o = raw.unflatten(2, (4, self.p)).unbind(2)
            u = i - logsigmoid(f) - log_weight
            mean = torch.lerp(mean, z.tanh(), u.sigmoid())
            after = torch.stack([o.sigmoid() * mean, mean, i - logsigmoid(u)])
            trajectory[:, :, start : start + size] = after
            states[:, :, :size] = after
        return self.steps.take(trajectory[0], self.inputs), self.steps.of_ranks(states), trajectory

    def backward(self, trajectory: Tensor, dy: Tensor | None, dfinal: Tensor | None) -> dict[str, Tensor | None]:
        """All gradients; the loop holds those of the states by rank, which of a sequence yet to come are its last."""
        steps, exact = self.steps, self.gates.dtype
        hidden, mean, log_weight = steps.before(self.initial, trajectory)
        raw = torch.baddbmm(self.gates, hidden, self.weights)
        i, f, z, o = raw.unflatten(2, (4, self.p)).unbind(2)
        u = i - logsigmoid(f) - log_weight
        write, keep, value, shown = u.sigmoid(), (-u).sigmoid(), z.tanh(), o.sigmoid()
        u_of_mean = (value - mean) * write * keep
        f_of_u = -(-f).sigmoid()
        z_of_mean = write * (1 - value.square())
        o_of_hidden = trajectory[1] * shown * (1 - shown)

        dY = torch.zeros_like(hidden) if dy is None else steps.lay(dy.to(exact))
        dstates = torch.zeros_like(self.initial) if dfinal is None else steps.by_rank(dfinal.to(exact))
        dgates = torch.empty_like(raw)
        back = self.weights.transpose(1, 2)
        for start, size in zip(reversed(steps.starts), reversed(steps.sizes)):
            now = slice(start, start + size)
            dhidden, dmean, dlog = dstates[:, :, :size]
            dhidden = dhidden + dY[:, now]
            dmean = torch.addcmul(dmean, dhidden, shown[:, now])
            du = dmean * u_of_mean[:, now] - keep[:, now] * dlog
            di, df, dz, do = dgates[:, now].unflatten(2, (4, self.p)).unbind(2)
            torch.add(dlog, du, out=di)
            torch.mul(du, f_of_u[:, now], out=df)
            torch.mul(dmean, z_of_mean[:, now], out=dz)
            torch.mul(dhidden, o_of_hidden[:, now], out=do)
            dstates[0, :, :size] = dgates[:, now] @ back
            dstates[1, :, :size] = dmean * keep[:, now]
            dstates[2, :, :size] = -du
        h = self.gates.shape[0]
        return {
            "inputs": steps.take(dgates.unflatten(2, (4, self.p)), self.inputs),
            "recurrent": (hidden.transpose(1, 2) @ dgates).view(h, self.p, 4, self.p),
            "bias": dgates.sum(1).view(h, 4, self.p),
            "initial_state": steps.of_ranks(dstates),
        }
