"""The causal convolution in plain torch: the definition every kernel is held against."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from subquad_kernels.documents import check_cu_seqlens
from subquad_kernels.samples import draw_boundaries
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.workload import Workload

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs

ACTIVATIONS = ("silu", "none")


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> Outputs:
    """y_t = act( bias + sum_j weight[:, j] x_{t-w+1+j} ): one document after the other, one tap after the other.

    Shapes:  x: b t c    weight: c w    bias: c    initial_state: q (w-1) c  ->  y: b t c    final_state: q (w-1) c
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    b, t, c = x.shape
    w = weight.shape[1]
    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    num_states = b if cu_seqlens is None else len(bounds) - 1
    before = x.new_zeros(num_states, w - 1, c) if initial_state is None else initial_state
    outputs, final_states = [], []
    for document, (start, stop) in enumerate(pairwise(bounds)):
        state = before if cu_seqlens is None else before[document : document + 1]
        seen = torch.cat([state.to(exact), x[:, start:stop].to(exact)], dim=1)
        total = torch.zeros(b, stop - start, c, dtype=exact, device=x.device)
        for tap in range(w):
            total = total + weight[:, tap].to(exact) * seen[:, tap : tap + stop - start]
        outputs.append(total if bias is None else total + bias.to(exact))
        final_states.append(seen[:, stop - start :])
    y = torch.cat(outputs, dim=1)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), torch.cat(final_states).to(x.dtype)


REFERENCE = AutogradKernel(reference)


def check(arguments: Arguments) -> None:
    """Raise ValueError when shapes or options do not fit."""
    given: dict[str, Any] = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    x, weight = given["x"], given["weight"]
    if x.dim() != 3 or weight.dim() != 2:
        raise ValueError(f"x has {x.dim()} axes and weight {weight.dim()}, not 3 and 2: x b t c, weight c w")
    b, t, c = x.shape
    w = weight.shape[1]
    cu_seqlens = given.get("cu_seqlens")
    check_cu_seqlens(cu_seqlens, b)
    if t == 0 or w == 0:
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}: t and w must be 1 or more")
    states = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = {
        "weight": ("c w", (c, w)), "bias": ("c", (c,)), "initial_state": ("q w-1 c", (states, w - 1, c)),
    }  # fmt: skip
    for name, (axes, shape) in expected.items():
        if name in given and tuple(given[name].shape) != shape:
            raise ValueError(f"{name} is {tuple(given[name].shape)}, not {axes} = {shape} (x is b t c = {(b, t, c)})")
    if arguments["activation"] not in ACTIVATIONS:
        raise ValueError(f"activation is '{arguments['activation']}', not one of {', '.join(ACTIVATIONS)}")


def empty_outputs(arguments: Arguments) -> Outputs:
    """y: b t c, final_state: q (w-1) c."""
    x, weight, cu_seqlens = (arguments[name] for name in ("x", "weight", "cu_seqlens"))
    assert isinstance(x, Tensor)
    assert isinstance(weight, Tensor)
    b, t, c = x.shape
    states = cu_seqlens.shape[0] - 1 if isinstance(cu_seqlens, Tensor) else b
    return x.new_empty(b, t, c), x.new_empty(states, weight.shape[1] - 1, c)


def batch_and_length(arguments: Arguments) -> tuple[int, int]:
    """b and t of x."""
    x = arguments["x"]
    assert isinstance(x, Tensor)
    return x.shape[0], x.shape[1]


def workload_of(arguments: Arguments, phase: str) -> Workload:
    """The call's workload; its options say which optional tensors are given."""
    x, weight, cu_seqlens = (arguments[name] for name in ("x", "weight", "cu_seqlens"))
    assert isinstance(x, Tensor)
    assert isinstance(weight, Tensor)
    shape = dict(b=int(x.shape[0]), t=int(x.shape[1]), c=int(x.shape[2]), w=int(weight.shape[1]))
    if isinstance(cu_seqlens, Tensor):
        shape["documents"] = int(cu_seqlens.shape[0]) - 1
    options: dict[str, Any] = {
        "activation": arguments["activation"],
        "bias": arguments["bias"] is not None,
        "initial_state": arguments["initial_state"] is not None,
    }
    dtype: Any = str(x.dtype).removeprefix("torch.")
    return Workload(operator="causal_conv", shape=shape, dtype=dtype, phase=phase, options=options)  # type: ignore[arg-type]


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
    """Inputs of unit scale, one channel in eight twenty times that, and filters drawn as torch's convolutions are."""
    generator = torch.Generator(device).manual_seed(seed)
    shape, options = workload.shape, workload.options
    b, t, c, w = (shape[axis] for axis in ("b", "t", "c", "w"))
    dtype = getattr(torch, workload.dtype)
    exact = torch.promote_types(dtype, torch.float32)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

    def draw_parameter(*size: int) -> Tensor:
        uniform = torch.rand(size, generator=generator, device=device, dtype=torch.float32)
        return uniform.mul_(2).sub_(1).mul_(float(w) ** -0.5).to(exact)

    boundaries = draw_boundaries(shape, seed, device)
    x = draw(b, t, c)
    x[..., ::8] *= 20  # where silu is linear, or zero
    states = b if boundaries is None else boundaries.shape[0] - 1
    return {
        "x": x.to(dtype),
        "weight": draw_parameter(c, w),
        "bias": draw_parameter(c) if options["bias"] else None,
        "initial_state": draw(states, w - 1, c).to(dtype) if options["initial_state"] else None,
        "cu_seqlens": boundaries,
        "activation": str(options["activation"]),
    }
