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
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from subquad_kernels.boundaries import layout_of
from subquad_kernels.slstm_scan.definition import no_token

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs


def forward(**arguments: Argument) -> Outputs:
    """y, final_state, and the states after every token."""
    return _Call(arguments).forward()


def backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument, from the gradients of y and of final_state."""
    return _Call(arguments).backward(outputs[2], *gradients)


class _Steps:
    """The tokens of a call in the order of its steps: the first tokens of all sequences, the second ones, ...

    Within a step sequences stand by rank, the longest first. `sizes` are the sequences of every step; `earlier` is
    where each token's sequence stood one step before, from the second step on.
    """

    earlier: Tensor | slice

    def __init__(self, b: int, t: int, cu_seqlens: Tensor | None, device: torch.device) -> None:
        if cu_seqlens is not None:
            self.ranked, self.order, self.earlier, self.sizes = layout_of(_by_length, cu_seqlens)
            return
        self.ranked = torch.arange(b, device=device)
        self.order = torch.arange(b * t, device=device).unflatten(0, (b, t)).t().flatten()
        self.sizes = [b] * t
        self.earlier = slice(-b)

    def lay(self, rows: Tensor) -> Tensor:
        """Heads first, tokens in the order of steps.  Shapes:  b t h ...  ->  h (b t) ..."""
        return rows.flatten(0, 1)[self.order].transpose(0, 1).contiguous()

    def take(self, laid: Tensor, like: Tensor) -> Tensor:
        """The inverse of `lay`, of the type of `like`.  Shapes:  h (b t) ...  ->  b t h ..."""
        rows = like.new_empty(laid.shape[1], laid.shape[0], *laid.shape[2:])
        rows[self.order] = laid.transpose(0, 1).to(like.dtype)
        return rows.unflatten(0, like.shape[:2])  # type: ignore[no-any-return]

    def by_rank(self, states: Tensor) -> Tensor:
        """Shapes:  states 3 h p  ->  3 h states p"""
        return states[self.ranked].permute(1, 2, 0, 3).contiguous()

    def of_ranks(self, ranked: Tensor) -> Tensor:
        """The inverse of `by_rank`.  Shapes:  3 h states p  ->  states 3 h p"""
        states = ranked.new_empty(ranked.shape[2], *ranked.shape[:2], ranked.shape[3])
        states[self.ranked] = ranked.permute(2, 0, 1, 3)
        return states

    def before(self, initial: Tensor, after: Tensor) -> Tensor:
        """The states before every token, from the initial ones and those after every token.

        Shapes:  initial: 3 h states p    after: 3 h (b t) p  ->  3 h (b t) p
        """
        return torch.cat([initial[:, :, : self.sizes[0]], after[:, :, self.earlier]], dim=2)

    def after_all(self, initial: Tensor, after: Tensor) -> Tensor:
        """The states after the last tokens; a sequence without any ends as it began.

        Shapes:  initial: 3 h states p    after: 3 h (b t) p  ->  3 h states p
        """
        stops = [*accumulate(self.sizes)]
        ends = [
            after[:, :, stop - size + left : stop]
            for stop, size, left in zip(stops, self.sizes, [*self.sizes[1:], 0])
            if left < size
        ]
        return torch.cat([*reversed(ends), initial[:, :, self.sizes[0] :]], dim=2)


def _by_length(bounds: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """`ranked`, `order`, `earlier` and `sizes` of the steps of packed documents."""
    start, lengths = torch.tensor(bounds[:-1]), torch.tensor(bounds).diff()
    ranked = lengths.argsort(descending=True, stable=True)
    document = torch.arange(len(lengths)).repeat_interleave(lengths)
    position = torch.arange(len(document)) - start[document]
    order = (position * len(lengths) + ranked.argsort()[document]).argsort()
    sizes = position.bincount()
    # A sequence keeps its rank: it stood one step's size before where it stands.
    earlier = torch.arange(int(sizes[0]), len(order)) - sizes[:-1].repeat_interleave(sizes[1:])
    return ranked.to(device), order.to(device), earlier.to(device), sizes.tolist()


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
        hidden, mean, log_weight = self.initial
        for size, gates, *after in zip(self.steps.sizes, *self._by_step(self.gates, *trajectory)):
            raw = torch.baddbmm(gates, hidden[:, :size], self.weights)
            i, f, z, o = raw.unflatten(2, (4, self.p)).unbind(2)
            u = i - logsigmoid(f) - log_weight[:, :size]
            mean = torch.lerp(mean[:, :size], z.tanh(), u.sigmoid(), out=after[1])
            hidden = torch.mul(o.sigmoid(), mean, out=after[0])
            log_weight = torch.sub(i, logsigmoid(u), out=after[2])
        final = self.steps.after_all(self.initial, trajectory)
        return self.steps.take(trajectory[0], self.inputs), self.steps.of_ranks(final), trajectory

    def backward(self, trajectory: Tensor, dy: Tensor | None, dfinal: Tensor | None) -> dict[str, Tensor | None]:
        """All gradients; those of a sequence's last states join the loop where it ends."""
        hidden, mean, log_weight = self.steps.before(self.initial, trajectory)
        raw = torch.baddbmm(self.gates, hidden, self.weights)
        i, f, z, o = raw.unflatten(2, (4, self.p)).unbind(2)
        u = i - logsigmoid(f) - log_weight
        write, keep, value, shown = u.sigmoid(), (-u).sigmoid(), z.tanh(), o.sigmoid()
        u_of_mean = (value - mean) * write * keep
        f_of_u = -(-f).sigmoid()
        z_of_mean = write * (1 - value.square())
        o_of_hidden = trajectory[1] * shown * (1 - shown)

        exact = self.gates.dtype
        dY = torch.zeros_like(hidden) if dy is None else self.steps.lay(dy.to(exact))
        last = torch.zeros_like(self.initial) if dfinal is None else self.steps.by_rank(dfinal.to(exact))
        dgates = torch.empty_like(raw)
        known = (shown, keep, u_of_mean, f_of_u, z_of_mean, o_of_hidden)
        by_step = self._by_step(dY, dgates, *known, *dgates.unflatten(2, (4, self.p)).unbind(2))
        back = self.weights.transpose(1, 2)
        dstates = last[:, :, :0].unbind()
        for size, *step in reversed(list(zip(self.steps.sizes, *by_step))):
            dhidden, dmean, dlog = self._joined(dstates, last, size)
            dy_t, all_gates, shown_t, keep_t, u_of_mean_t, f_of_u_t, z_of_mean_t, o_of_hidden_t, di, df, dz, do = step
            dhidden = dhidden + dy_t
            dmean = torch.addcmul(dmean, dhidden, shown_t)
            du = torch.addcmul(dmean * u_of_mean_t, keep_t, dlog, value=-1)
            torch.add(dlog, du, out=di)
            torch.mul(du, f_of_u_t, out=df)
            torch.mul(dmean, z_of_mean_t, out=dz)
            torch.mul(dhidden, o_of_hidden_t, out=do)
            dstates = (torch.bmm(all_gates, back), dmean * keep_t, -du)
        dinitial = torch.stack(self._joined(dstates, last, last.shape[2]))
        h = self.gates.shape[0]
        return {
            "inputs": self.steps.take(dgates.unflatten(2, (4, self.p)), self.inputs),
            "recurrent": (hidden.transpose(1, 2) @ dgates).view(h, self.p, 4, self.p),
            "bias": dgates.sum(1).view(h, 4, self.p),
            "initial_state": self.steps.of_ranks(dinitial),
        }

    def _by_step(self, *laid: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """Views of every step's tokens.  Shapes:  h (b t) ...  ->  steps of h size ..."""
        return tuple(tensor.split(self.steps.sizes, dim=1) for tensor in laid)

    @staticmethod
    def _joined(dstates: tuple[Tensor, ...], last: Tensor, size: int) -> tuple[Tensor, ...]:
        """Gradients of the first `size` ranks' states: what the loop has, and of the others what they end with."""
        held = dstates[0].shape[1]
        if held == size:
            return dstates
        return tuple(torch.cat([one, rest[:, held:size]], 1) for one, rest in zip(dstates, last))
