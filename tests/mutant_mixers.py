"""A small mixer that keeps every promise, and copies of it with one fault each: the conformance suite must find it.

y_t = n^-1/2 S_t^T q_t W_o,    S_t = a_h S_{t-1} + k_t v_t^T,    a_h = exp(-softplus(rate_h))
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, softplus

from subquad.contracts import MixerContext
from subquad_kernels.operators import causal_conv, linear_attention

HEADS = 2


@dataclass(kw_only=True)
class NoConfig:
    """Nothing to set."""


class State(NamedTuple):
    """Shape: b h n n"""

    state: Tensor


class Sound(nn.Module):
    """The mixer without a fault."""

    def __init__(self, config: NoConfig, context: MixerContext) -> None:
        super().__init__()
        d = context.d_model
        self.in_proj = nn.Linear(d, 3 * d, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.rate = nn.Parameter(torch.empty(HEADS))

    def init_parameters(self, std: float) -> None:
        nn.init.normal_(self.in_proj.weight, std=std)
        nn.init.normal_(self.o_proj.weight, std=std)
        nn.init.uniform_(self.rate, -3.0, -0.5)

    def log_decay(self) -> Tensor:
        return -softplus(self.rate)

    def mix(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = self.in_proj(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        y, state = linear_attention(q, k, v, self.log_decay(), initial_state=state, cu_seqlens=cu_seqlens)
        return self.o_proj(y.flatten(-2)), state

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.mix(x, None, cu_seqlens)[0]

    def empty_carry(self, batch_size: int) -> State:
        n = self.o_proj.weight.shape[0] // HEADS
        return State(self.rate.new_zeros(batch_size, HEADS, n, n))

    def prefill(self, x: Tensor, carry: State) -> tuple[Tensor, State]:
        y, state = self.mix(x, carry.state, None)
        return y, State(state)

    def decode(self, x_t: Tensor, carry: State) -> tuple[Tensor, State]:
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry


class LeaksOneFutureToken(Sound):
    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return super().forward(x + 1e-9 * pad(x[:, 1:], (0, 0, 0, 1)), cu_seqlens)


class LeaksAcrossTheBatch(Sound):
    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return super().forward(x + 1e-3 * x[:1], cu_seqlens)


class ForgetsToResetAtABoundary(Sound):
    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return super().forward(x, None)


class DecaysTwiceWhenDecoding(Sound):
    def decode(self, x_t: Tensor, carry: State) -> tuple[Tensor, State]:
        decay = self.log_decay().exp()[:, None, None]
        return super().decode(x_t, State(carry.state * decay))


class DropsTheGradientOfTheInitialState(Sound):
    def prefill(self, x: Tensor, carry: State) -> tuple[Tensor, State]:
        return super().prefill(x, State(carry.state.detach()))


class DropsTheGradientOfTheDecay(Sound):
    def log_decay(self) -> Tensor:
        # Its value follows the parameter, its gradient is half of what it should be.
        return -0.5 * softplus(self.rate) - 0.5 * softplus(self.rate.detach())


class DeclaresLessWorkThanItDoes(Sound):
    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        every_pair = (x @ x.transpose(-1, -2)).tril()
        return super().forward(x + 0 * every_pair.diagonal(dim1=-2, dim2=-1).unsqueeze(-1), cu_seqlens)


class WritesAsManyNumbersAsThereArePairs(Sound):
    """No matrix product, so that no arithmetic is counted."""

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        every_pair = x[..., 0].unsqueeze(-1) + x[..., 0].unsqueeze(-2)
        return super().forward(x + 0 * every_pair.diagonal(dim1=-2, dim2=-1).unsqueeze(-1), cu_seqlens)


class Growing(NamedTuple):
    """The state, and every token so far.  Shapes:  b h n n,  b t d"""

    state: Tensor
    tokens: Tensor


class DeclaresASmallerCarryThanItHas(Sound):
    def empty_carry(self, batch_size: int) -> Growing:  # type: ignore[override]
        weight = self.o_proj.weight
        return Growing(super().empty_carry(batch_size).state, weight.new_zeros(batch_size, 0, weight.shape[0]))

    def prefill(self, x: Tensor, carry: Growing) -> tuple[Tensor, Growing]:  # type: ignore[override]
        y, state = self.mix(x, carry.state, None)
        return y, Growing(state, torch.cat([carry.tokens, x], 1))


class DecodesTheTokenBefore(Sound):
    def decode(self, x_t: Tensor, carry: State) -> tuple[Tensor, State]:
        q, k, v = self.in_proj(x_t.unsqueeze(1)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        # Reads the state before this token's own write.
        y, state = linear_attention(
            q, k, v, self.log_decay(), diagonal=torch.zeros_like(q[..., 0]), initial_state=carry.state
        )
        return self.o_proj(y.flatten(-2)).squeeze(1), State(state)


class MutatesItsInput(Sound):
    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        y = super().forward(x, cu_seqlens)
        with torch.no_grad():
            x.mul_(1.5)
        return y


class MutatesTheCarryItIsGiven(Sound):
    def decode(self, x_t: Tensor, carry: State) -> tuple[Tensor, State]:
        y, after = super().decode(x_t, carry)
        with torch.no_grad():
            carry.state.copy_(after.state)
        return y, after


class HandsOutItsInputAsCarry(Sound):
    """A view of a buffer that the caller will write the next tokens to."""

    def empty_carry(self, batch_size: int) -> Growing:  # type: ignore[override]
        weight = self.o_proj.weight
        return Growing(super().empty_carry(batch_size).state, weight.new_zeros(batch_size, 1, weight.shape[0]))

    def prefill(self, x: Tensor, carry: Growing) -> tuple[Tensor, Growing]:  # type: ignore[override]
        y, state = self.mix(x, carry.state, None)
        return y, Growing(state, x[:, -1:])


class HandsOutOneEmptyCarry(Sound):
    """The state is written in place, into the carry that every sequence begins with."""

    def __init__(self, config: NoConfig, context: MixerContext) -> None:
        super().__init__(config, context)
        self.shared: dict[int, State] = {}

    def empty_carry(self, batch_size: int) -> State:
        if batch_size not in self.shared or self.shared[batch_size].state.dtype != self.rate.dtype:
            self.shared[batch_size] = super().empty_carry(batch_size)
        return self.shared[batch_size]

    def prefill(self, x: Tensor, carry: State) -> tuple[Tensor, State]:
        y, after = super().prefill(x, carry)
        if not torch.is_grad_enabled():
            carry.state.copy_(after.state)
        return y, after


class IsNotDeterministic(Sound):
    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return super().forward(x, cu_seqlens) + 1e-14 * torch.rand_like(x)


class LosesTheTypeOfItsInput(Sound):
    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        y = super().forward(x, cu_seqlens)
        return y if y.dtype == torch.float64 else y.float()


class LosesTheTypeOfItsCarry(Sound):
    def prefill(self, x: Tensor, carry: State) -> tuple[Tensor, State]:
        y, after = super().prefill(x, carry)
        return y, State(after.state.to(x.dtype))


class RoundsWhatIsPinned(Sound):
    def mix(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = self.in_proj(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        decay = -softplus(self.rate.to(q.dtype))
        y, state = linear_attention(q, k, v, decay, initial_state=state, cu_seqlens=cu_seqlens)
        return self.o_proj(y.flatten(-2)), state


class KeepsATensorOutOfItsStateDict(Sound):
    bias: Tensor

    def __init__(self, config: NoConfig, context: MixerContext) -> None:
        super().__init__(config, context)
        self.register_buffer("bias", torch.zeros(context.d_model), persistent=False)

    def init_parameters(self, std: float) -> None:
        super().init_parameters(std)
        nn.init.normal_(self.bias, std=std)

    def mix(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        return super().mix(x + self.bias, state, cu_seqlens)


class ComputesABufferOnlyWhenBuilt(Sound):
    """Built on meta and filled later, the buffer holds what memory held."""

    table: Tensor

    def __init__(self, config: NoConfig, context: MixerContext) -> None:
        super().__init__(config, context)
        self.register_buffer("table", torch.linspace(0.5, 1, context.d_model), persistent=False)

    def mix(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        return super().mix(x * self.table, state, cu_seqlens)


class SharesItsWeightsWithItsCopies(Sound):
    def __deepcopy__(self, memo: dict[int, object]) -> SharesItsWeightsWithItsCopies:
        return copy.copy(self)


class BreaksTheGraph(Sound):
    def prefill(self, x: Tensor, carry: State) -> tuple[Tensor, State]:
        torch._dynamo.graph_break()
        return super().prefill(x, carry)


class LooksAtValues(Sound):
    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return super().forward(x if float(x.detach().sum()) < 1e9 else -x, cu_seqlens)


class CallsAnOperatorItDoesNotDeclare(Sound):
    def __init__(self, config: NoConfig, context: MixerContext) -> None:
        super().__init__(config, context)
        self.taps = nn.Parameter(torch.ones(context.d_model, 1))

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return super().forward(causal_conv(x, self.taps, activation="none")[0], cu_seqlens)


class ChoosesItsKernel(Sound):
    def mix(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = self.in_proj(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        y, state = linear_attention(
            q, k, v, self.log_decay(), initial_state=state, cu_seqlens=cu_seqlens, kernel="reference"
        )
        return self.o_proj(y.flatten(-2)), state


class IgnoresAParameter(Sound):
    def log_decay(self) -> Tensor:
        return -softplus(0 * self.rate)


class DrawsFromARandomnessOfItsOwn(Sound):
    def init_parameters(self, std: float) -> None:
        super().init_parameters(std)
        nn.init.normal_(self.o_proj.weight, std=std, generator=torch.Generator().manual_seed(torch.seed() % 2**31))


class MakesTensorsOnTheCpu(Sound):
    def __init__(self, config: NoConfig, context: MixerContext) -> None:
        super().__init__(config, context)
        self.rate = nn.Parameter(torch.zeros(HEADS, device="cpu"))


class ForgetsTheLastTokenOfLongSequences(Sound):
    """Right up to a chunk of 64, wrong beyond it."""

    def prefill(self, x: Tensor, carry: State) -> tuple[Tensor, State]:
        y, after = super().prefill(x, carry)
        return (y, after) if x.shape[1] <= 64 else (y, super().prefill(x[:, :-1], carry)[1])


class MixesWithAnUnusedGate(Sound):
    """A projection whose output is multiplied by nothing that depends on the token."""

    def mix(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        y, state = super().mix(x, state, cu_seqlens)
        return linear(torch.zeros_like(y), self.o_proj.weight) + y * 0, state


class DecodesOtherwiseInPlace(Sound):
    def with_room(self, carry: State, tokens: int) -> State:
        return State(carry.state.clone())

    def decode_in_place(self, x_t: Tensor, carry: State) -> tuple[Tensor, State]:
        y_t, after = self.decode(x_t, carry)
        return y_t, State(carry.state.copy_(after.state * (1 - 1e-6)))

    def without_room(self, carry: State) -> State:
        return carry


class DecodesInPlaceInTheCarryItIsGiven(DecodesOtherwiseInPlace):
    def with_room(self, carry: State, tokens: int) -> State:
        return carry

    def decode_in_place(self, x_t: Tensor, carry: State) -> tuple[Tensor, State]:
        y_t, after = self.decode(x_t, carry)
        return y_t, State(carry.state.copy_(after.state))


class DecodesInPlaceInACarryThatGrows(DecodesOtherwiseInPlace):
    def decode_in_place(self, x_t: Tensor, carry: State) -> tuple[Tensor, State]:
        state = carry.state[: len(x_t)]
        y_t, after = self.decode(x_t, State(state))
        return y_t, State(torch.cat([after.state, after.state]))

    def without_room(self, carry: State) -> State:
        return State(carry.state.chunk(2)[0])
