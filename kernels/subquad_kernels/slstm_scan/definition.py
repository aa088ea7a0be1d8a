"""The scalar LSTM's scan in plain torch: the definition every kernel is held against."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, einsum
from torch.nn.functional import logsigmoid

from subquad_kernels.documents import check_cu_seqlens
from subquad_kernels.samples import draw_boundaries
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.workload import Workload

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs


def reference(
    inputs: Tensor, recurrent: Tensor, bias: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Outputs:
    """The paper's recurrence with its stabiliser m = max(log sigmoid(f) + m, i), one token after the other.

    Shapes:  inputs: b t h 4 p    recurrent: h p 4 p    bias: h 4 p    initial_state: states 3 h p
             ->  y: b t h p    final_state: states 3 h p    trajectory: 3 h (b t) p, left zero
    """
    exact = torch.promote_types(inputs.dtype, torch.float32)
    b, t, h, _, p = inputs.shape
    gates, weights = inputs.to(exact) + bias.to(exact), recurrent.to(exact)
    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    num_states = b if cu_seqlens is None else len(bounds) - 1
    before = no_token(gates, num_states, h, p) if initial_state is None else initial_state.to(exact)
    outputs, final_states = [], []
    for document, (start, stop) in enumerate(pairwise(bounds)):
        entering = before if cu_seqlens is None else before[document : document + 1]
        hidden, c, m = entering.unbind(1)
        n = torch.ones_like(c)
        for token in range(start, stop):
            i, f, z, o = (gates[:, token] + einsum("bhj,hjgp->bhgp", hidden, weights)).unbind(2)
            kept = logsigmoid(f) + m
            m = torch.maximum(kept, i)
            c = (kept - m).exp() * c + (i - m).exp() * z.tanh()
            n = (kept - m).exp() * n + (i - m).exp()
            hidden = o.sigmoid() * c / n
            outputs.append(hidden)
        final_states.append(torch.stack([hidden, c / n, m + n.log()], 1))
    y = torch.stack(outputs, dim=1).to(inputs.dtype)
    return y, torch.cat(final_states), gates.new_zeros(3, h, b * t, p)


REFERENCE = AutogradKernel(reference)


def no_token(like: Tensor, states: int, h: int, p: int) -> Tensor:
    """The state before any token: hidden and mean 0, the log of the weights -inf.  Shape:  states 3 h p"""
    state = like.new_zeros(states, 3, h, p)
    state[:, 2] = -torch.inf
    return state


def check(arguments: Arguments) -> None:
    """Raise ValueError when shapes do not fit."""
    given: dict[str, Any] = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    inputs = given["inputs"]
    if inputs.dim() != 5 or inputs.shape[3] != 4:
        raise ValueError(f"inputs is {tuple(inputs.shape)}, not b t h 4 p: four gates of every head")
    b, t, h, _, p = inputs.shape
    cu_seqlens = given.get("cu_seqlens")
    check_cu_seqlens(cu_seqlens, b)
    if t == 0:
        raise ValueError(f"inputs {tuple(inputs.shape)} has no token: b t h 4 p needs t >= 1")
    states = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = {
        "recurrent": ("h p 4 p", (h, p, 4, p)), "bias": ("h 4 p", (h, 4, p)),
        "initial_state": ("states 3 h p", (states, 3, h, p)),
    }  # fmt: skip
    for name, (axes, shape) in expected.items():
        if name in given and tuple(given[name].shape) != shape:
            raise ValueError(
                f"{name} is {tuple(given[name].shape)}, not {axes} = {shape} (inputs is b t h 4 p = {(b, t, h, 4, p)})"
            )


def empty_outputs(arguments: Arguments) -> Outputs:
    """y: b t h p, final_state: states 3 h p, trajectory: 3 h (b t) p."""
    inputs, cu_seqlens = arguments["inputs"], arguments["cu_seqlens"]
    assert isinstance(inputs, Tensor)
    b, t, h, _, p = inputs.shape
    exact = torch.promote_types(inputs.dtype, torch.float32)
    states = cu_seqlens.shape[0] - 1 if isinstance(cu_seqlens, Tensor) else b
    return (
        inputs.new_empty(b, t, h, p),
        inputs.new_empty(states, 3, h, p, dtype=exact),
        inputs.new_empty(3, h, b * t, p, dtype=exact),
    )


def batch_and_length(arguments: Arguments) -> tuple[int, int]:
    """b and t of the inputs."""
    inputs = arguments["inputs"]
    assert isinstance(inputs, Tensor)
    return inputs.shape[0], inputs.shape[1]


def workload_of(arguments: Arguments, phase: str) -> Workload:
    """The call's workload; its option says whether an initial state is given."""
    inputs, cu_seqlens = arguments["inputs"], arguments["cu_seqlens"]
    assert isinstance(inputs, Tensor)
    b, t, h, _, p = (int(length) for length in inputs.shape)
    shape = dict(b=b, t=t, h=h, p=p)
    if isinstance(cu_seqlens, Tensor):
        shape["documents"] = int(cu_seqlens.shape[0]) - 1
    options: dict[str, Any] = {"initial_state": arguments["initial_state"] is not None}
    dtype: Any = str(inputs.dtype).removeprefix("torch.")
    return Workload(operator="slstm_scan", shape=shape, dtype=dtype, phase=phase, options=options)  # type: ignore[arg-type]


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
    """Forget gates from 5 down to -7 over a head's channels, as the paper starts them; hidden states that matter.

    One channel in four has an input gate of about 20, or of -20: a write that outweighs all before it, or none.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = workload.shape
    b, t, h, p = (shape[axis] for axis in ("b", "t", "h", "p"))
    dtype = getattr(torch, workload.dtype)
    exact = torch.promote_types(dtype, torch.float32)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

    bias = 0.1 * draw(h, 4, p)
    bias[:, 0, ::4] = 20 * draw(h, -(-p // 4)).sign()
    bias[:, 1] += torch.linspace(5, -7, p, device=device)
    boundaries = draw_boundaries(shape, seed, device)
    states = b if boundaries is None else boundaries.shape[0] - 1
    initial = draw(states, 3, h, p)
    initial[:, :2].tanh_()
    return {
        "inputs": draw(b, t, h, 4, p).to(dtype),
        "recurrent": (0.5 * p**-0.5 * draw(h, p, 4, p)).to(exact),
        "bias": bias.to(exact),
        "initial_state": initial.to(exact) if workload.options["initial_state"] else None,
        "cu_seqlens": boundaries,
    }
