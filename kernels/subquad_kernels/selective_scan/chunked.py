"""The selective scan in chunks of 16 tokens: what can be done for a whole chunk at once is, the recurrence is not.

Inside, time comes first and channels last ([t, p, n, c], p parallel sequences), so that a token's states are one
contiguous run and every broadcast runs along channels. Exponentials, outer products and sums over n, c or t are taken
for a chunk; the recurrence itself is one fused multiply-add per token, in place. Buffers hold one chunk and are used
again, so that the work stays in cache. The forward keeps the state at each chunk's start; the backward computes the
inside of a chunk again from it. Exponents are never positive, nothing is ever divided by a decay. A reversed scan is a
scan of reversed tensors: a copy each, 1/n of the work (torch has no view of it). README.md counts the passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from subquad_kernels.selective_scan.cuts import CHUNK
from subquad_kernels.selective_scan.lanes import Lanes
from subquad_kernels.selective_scan.turned import turned

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs

_RESULTS = ("y", "final_state", "boundaries", "ungated")


def forward(**arguments: Argument) -> Outputs:
    """y, final_state and the residuals."""
    values: Any = arguments
    if values["x"].shape[1] == 1 and values["cu_seqlens"] is None:
        return _one_token(values)
    if not values["reversed"]:
        return _Scan(values).forward()
    results = dict(zip(_RESULTS, _Scan(turned(values, values["cu_seqlens"])).forward()))
    return tuple(turned(results, values["cu_seqlens"]).values())


def backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """Gradients of every tensor argument, from the gradients of y and of final_state."""
    given: Any = dict(arguments)
    _, _, boundaries, ungated = outputs
    dy, dfinal = gradients
    if not given["reversed"]:
        return _Scan(given).backward(boundaries, ungated, dy, dfinal)
    cu_seqlens = given["cu_seqlens"]
    rest = turned({"ungated": ungated, "y": dy, "final_state": dfinal}, cu_seqlens)
    return turned(_Scan(turned(given, cu_seqlens)).backward(boundaries, *rest.values()), cu_seqlens)


def _one_token(values: Mapping[str, Any]) -> Outputs:
    """The recurrence once, with nothing kept: what a decode is.  Shapes:  b 1 c, b c n"""
    x, initial_state = values["x"], values["initial_state"]
    exact = torch.promote_types(x.dtype, torch.float32)
    step = values["dt"][:, 0].to(exact)
    if values["dt_bias"] is not None:
        step = step + values["dt_bias"].to(exact)
    if values["softplus"]:
        step = F.softplus(step)
    inputs = x[:, 0].to(exact)
    state = (step * inputs).unsqueeze(-1) * values["B"].to(exact)  # [b, c, 1] * [b, 1, n]
    if initial_state is not None:
        state.addcmul_((step.unsqueeze(-1) * values["A"].to(exact)).exp_(), initial_state.to(exact))
    y = torch.matmul(state, values["C"].to(exact).transpose(1, 2)).transpose(1, 2)
    if values["D"] is not None:
        y = torch.addcmul(y, x.to(exact), values["D"].to(exact))
    boundaries = y.new_empty(0, x.shape[0], state.shape[2], state.shape[1])
    if values["z"] is None:
        return y.to(x.dtype), state, boundaries, y.new_empty(0)
    return (y * F.silu(values["z"].to(exact))).to(x.dtype), state, boundaries, y


class _Scan:
    """One call, laid out for the kernel.

    Shapes:  x, dt, z: t p c    B, C: t p n  (views, in their own types)    rates: n c (A)    initial: q n c
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        x, A, cu_seqlens = values["x"], values["A"], values["cu_seqlens"]
        self.shape, self.dtype = x.shape, x.dtype
        self.exact = torch.promote_types(x.dtype, torch.float32)
        self.lanes = lanes = Lanes.of(x.shape[0], x.shape[1], cu_seqlens)
        self.x: Tensor = lanes.lay(x)
        self.dt, self.B, self.C = (lanes.lay(values[name]) for name in ("dt", "B", "C"))
        self.z = None if values["z"] is None else lanes.lay(values["z"])
        self.D = None if values["D"] is None else values["D"].to(self.exact)
        self.dt_bias = None if values["dt_bias"] is None else values["dt_bias"].to(self.exact)
        self.softplus = values["softplus"]
        self.rates: Tensor = A.to(self.exact).T.contiguous()
        self.binary_rates = self.rates * math.log2(math.e)
        initial = values["initial_state"]
        self.initial: Tensor | None = None if initial is None else initial.to(self.exact).transpose(1, 2).contiguous()
        self.starts, self.ends = lanes.starts(cu_seqlens), lanes.ends(cu_seqlens)
        self.t, self.p, self.c = self.x.shape
        self.n = A.shape[1]
        self.chunks = -(-self.t // CHUNK)
        # One chunk each: h_t, decay_t (t p n c) and dt, dt x (t p c).
        self.states, self.decay = self._buffer(self.n, self.c), self._buffer(self.n, self.c)
        self.step, self.drive = self._buffer(self.c), self._buffer(self.c)

    def _buffer(self, *axes: int) -> Tensor:
        return self.x.new_empty(min(CHUNK, self.t), self.p, *axes, dtype=self.exact)

    def _like_x(self) -> tuple[Tensor, Tensor]:
        """A new b t c, and the kernel's view of it."""
        tensor = self.x.new_empty(self.shape, dtype=self.exact)
        return tensor, self.lanes.lay(tensor)

    def _tokens(self, index: int) -> tuple[slice, int]:
        begin = index * CHUNK
        size = min(CHUNK, self.t - begin)
        return slice(begin, begin + size), size

    def _entering(self) -> Tensor:
        """The state before the first token of each lane.  Shape: p n c"""
        if self.initial is not None and self.starts is None:
            return self.initial
        return self.rates.new_zeros(self.p, self.n, self.c)

    def _chunk(self, index: int, entering: Tensor) -> Tensor | None:
        """Fill step, drive, decay and states; return the decays at document starts, which are zero in `decay`.

        Shapes:  entering: p n c
        """
        tokens, size = self._tokens(index)
        step, drive, decay, states = (part[:size] for part in (self.step, self.drive, self.decay, self.states))
        if self.dt_bias is None:
            step.copy_(self.dt[tokens])
        else:
            torch.add(self.dt[tokens], self.dt_bias, out=step)
        if self.softplus:
            torch.ops.aten.softplus.out(step, out=step)
        torch.mul(step, self.x[tokens], out=drive)
        # exp(dt A) = 2^(dt A log2 e): exp2 is twice as fast as exp on CPU, and has no slow path near underflow.
        torch.mul(step[:, :, None], self.binary_rates, out=decay)
        decay.exp2_()
        torch.mul(drive[:, :, None], self.B[tokens].unsqueeze(-1), out=states)
        kept = None
        if self.starts is not None:
            rows, documents = self.starts.at(index)
            if len(rows):
                flat = decay.flatten(0, 1)
                if self.initial is not None:
                    kept = flat[rows]
                    states.flatten(0, 1).index_add_(0, rows, kept * self.initial[documents])
                flat.index_fill_(0, rows, 0)
        state = entering
        for decay_t, state_t in zip(decay.unbind(0), states.unbind(0)):
            state = state_t.addcmul_(decay_t, state)
        return kept

    def forward(self) -> Outputs:
        """y: b t c    final_state: q c n    boundaries: (t-1)//16 b n c    ungated: b t c or 0"""
        pre, laid_pre = self._like_x()
        y = pre if self.z is None else pre.new_empty(self.shape, dtype=self.dtype)
        laid_y = self.lanes.lay(y)
        read = self._buffer(self.c)
        boundaries = self.lanes.new_boundaries(self.rates)
        entering = self._entering()
        if self.ends is None:
            final = torch.empty_like(entering)
        elif self.initial is None:
            final = self.rates.new_zeros(self.ends.documents, self.n, self.c)
        else:  # an empty document ends as it began
            final = self.initial.clone()
        for index in range(self.chunks):
            tokens, size = self._tokens(index)
            if index:
                self.lanes.boundary(boundaries, index).copy_(entering)
            self._chunk(index, entering)
            states = self.states[:size]
            rows = self.C[tokens].to(self.exact).reshape(size * self.p, 1, self.n)
            torch.bmm(rows, states.view(-1, self.n, self.c), out=read[:size].view(-1, 1, self.c))
            if self.D is None:
                laid_pre[tokens] = read[:size]
            else:
                torch.addcmul(read[:size], self.x[tokens].to(self.exact), self.D, out=laid_pre[tokens])
            if self.z is not None:
                laid_y[tokens] = F.silu(self.z[tokens].to(self.exact)).mul_(laid_pre[tokens])
            if self.ends is not None:
                ending, documents = self.ends.at(index)
                final[documents] = states.flatten(0, 1)[ending]
            entering = states[-1].clone()
        if self.ends is None:
            final = entering
        if self.starts is not None:
            self.starts.clear(boundaries)
        ungated = pre.new_empty(0) if self.z is None else pre
        return y.to(self.dtype), final.transpose(1, 2).contiguous(), boundaries, ungated

    def backward(
        self, boundaries: Tensor, ungated: Tensor, dy: Tensor | None, dfinal: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Chunks from last to first; `after` is what the next chunk sends back to this chunk's last state.

        g_t = C_t dy_t + decay_{t+1} g_{t+1}  is the gradient of h_t, and  w_t = g_t decay_t h_{t-1}  that of dt_t A.
        """
        (dx, laid_dx), (ddt, laid_ddt) = self._like_x(), self._like_x()
        dz, laid_dz = (None, None) if self.z is None else self._like_x()
        dB, dC = (self.x.new_empty(*self.shape[:2], self.n, dtype=self.exact) for _ in range(2))
        laid_dB, laid_dC = self.lanes.lay(dB), self.lanes.lay(dC)
        laid_dy = None if dy is None else self.lanes.lay(dy)
        laid_ungated = None if self.z is None else self.lanes.lay(ungated)
        dD, dbias = self.rates.new_zeros(self.c), self.rates.new_zeros(self.c)
        drates = self.rates.new_zeros(self.p, self.n, self.c)
        grads, dpre, ddrive, dstep = (self._buffer(*axes) for axes in ((self.n, self.c), *3 * ((self.c,),)))
        ending = None if dfinal is None else dfinal.to(self.exact).transpose(1, 2).contiguous()
        after = self.rates.new_zeros(self.p, self.n, self.c)
        dinitial: Tensor | None = None
        if self.starts is not None:
            # Only an empty document hands its initial state on; the others' rows are written below.
            dinitial = ending.clone() if ending is not None else after.new_zeros(self.starts.documents, self.n, self.c)
        elif ending is not None:
            after = ending

        for index in reversed(range(self.chunks)):
            tokens, size = self._tokens(index)
            entering = self.lanes.boundary(boundaries, index) if index else self._entering()
            kept = self._chunk(index, entering)
            step, drive, a, h = (part[:size] for part in (self.step, self.drive, self.decay, self.states))
            x = self.x[tokens].to(self.exact)
            v, g = dpre[:size], grads[:size]

            if laid_dy is None:
                v.zero_()
            else:
                v.copy_(laid_dy[tokens])
            if self.z is not None and laid_dz is not None and laid_ungated is not None:
                z = self.z[tokens].to(self.exact)
                laid_dz[tokens] = torch.ops.aten.silu_backward(laid_ungated[tokens] * v, z)
                v.mul_(F.silu(z))

            torch.mul(v[:, :, None], self.C[tokens].unsqueeze(-1), out=g)
            if self.ends is not None and ending is not None:
                rows, documents = self.ends.at(index)
                g.flatten(0, 1).index_add_(0, rows, ending[documents])
            a_tokens, g_tokens = a.unbind(0), g.unbind(0)
            g_tokens[-1].add_(after)
            for token in range(size - 2, -1, -1):
                g_tokens[token].addcmul_(a_tokens[token + 1], g_tokens[token + 1])
            after = a_tokens[0] * g_tokens[0]

            # Sums over c as row times transposed matrix: ten times faster than matrix times column on CPU.
            flat_g, flat_h = g.view(-1, self.n, self.c), h.view(-1, self.n, self.c)
            laid_dC[tokens] = torch.bmm(v.view(-1, 1, self.c), flat_h.transpose(1, 2)).view(size, self.p, self.n)
            laid_dB[tokens] = torch.bmm(drive.view(-1, 1, self.c), flat_g.transpose(1, 2)).view(size, self.p, self.n)
            rows_B = self.B[tokens].to(self.exact).reshape(-1, 1, self.n)
            torch.bmm(rows_B, flat_g, out=ddrive[:size].view(-1, 1, self.c))

            w = a  # the decays are not needed any more
            w[1:].mul_(h[:-1])
            w[0].mul_(entering)
            w.mul_(g)
            if self.starts is not None and dinitial is not None and kept is not None and self.initial is not None:
                rows, documents = self.starts.at(index)
                dinitial[documents] = kept.mul_(flat_g[rows])
                w.flatten(0, 1)[rows] = kept * self.initial[documents]
            torch.sum(torch.mul(w, self.rates, out=h), 2, out=dstep[:size])
            for w_t, step_t in zip(w.unbind(0), step.unsqueeze(2).unbind(0)):
                drates.addcmul_(w_t, step_t)

            dstep[:size].addcmul_(ddrive[:size], x)
            torch.mul(ddrive[:size], step, out=laid_dx[tokens])
            if self.D is not None:
                laid_dx[tokens].addcmul_(v, self.D)
                dD += (v * x).sum((0, 1))
            if self.softplus:
                # d softplus(u) / du = sigmoid(u) = 1 - exp(-softplus(u))
                dstep[:size].mul_(step.neg_().expm1_().neg_())
            laid_ddt[tokens] = dstep[:size]
            dbias += dstep[:size].sum((0, 1))

        return {
            "x": dx,
            "dt": ddt,
            "A": drates.sum(0).T,
            "B": dB,
            "C": dC,
            "D": dD,
            "z": dz,
            "dt_bias": dbias,
            "initial_state": (after if dinitial is None else dinitial).transpose(1, 2),
        }
