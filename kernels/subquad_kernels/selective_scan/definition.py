"""The selective scan in plain torch: the definition every kernel is held against."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, einsum
from torch.nn import functional as F

from subquad_kernels.documents import check_cu_seqlens
from subquad_kernels.samples import draw_boundaries
from subquad_kernels.selective_scan.cuts import CHUNK
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.workload import Workload

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs


def reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    reversed: bool,
) -> Outputs:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,   y_t = (C_t . h_t + D x_t) silu(z_t): one token after the other.

    `reversed` begins at the last token: h_{t+1} in place of h_{t-1}.

    Shapes:  x, dt, z: b t c    A: c n    B, C: b t n    D, dt_bias: c    initial_state: q c n
             ->  y: b t c    final_state: q c n    boundaries: (t-1)//16 b n c    ungated: b t c or 0
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    inputs, step, A, B, C = (tensor.to(exact) for tensor in (x, dt, A, B, C))
    b, t, c = x.shape
    n = A.shape[1]
    if dt_bias is not None:
        step = step + dt_bias.to(exact)
    if softplus:
        step = F.softplus(step)
    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    num_states = b if cu_seqlens is None else len(bounds) - 1
    before = inputs.new_zeros(num_states, c, n) if initial_state is None else initial_state.to(exact)

    direction = -1 if reversed else 1
    outputs: list[Tensor] = []
    boundaries: list[Tensor] = []
    final_states: list[Tensor] = []
    for document, (start, stop) in list(enumerate(pairwise(bounds)))[::direction]:
        state = before if cu_seqlens is None else before[document : document + 1]
        tokens = range(start, stop)[::direction]
        for token in tokens:
            scanned = len(outputs)
            if scanned and scanned % CHUNK == 0:
                boundaries.append((state if token != tokens[0] else torch.zeros_like(state)).transpose(1, 2))
            decay = (step[:, token, :, None] * A).exp()
            write = einsum("bc,bn->bcn", step[:, token] * inputs[:, token], B[:, token])
            state = decay * state + write
            outputs.append(einsum("bcn,bn->bc", state, C[:, token]))
        final_states.append(state)

    y = torch.stack(outputs[::direction], dim=1)
    if D is not None:
        y = y + D.to(exact) * inputs
    ungated = y if z is not None else y.new_empty(0)
    if z is not None:
        y = y * F.silu(z.to(exact))
    entering = torch.stack(boundaries) if boundaries else y.new_empty(0, b, n, c)
    return y.to(x.dtype), torch.cat(final_states[::direction]), entering, ungated


REFERENCE = AutogradKernel(reference)


def check(arguments: Arguments) -> None:
    """Raise ValueError when shapes do not fit."""
    given: dict[str, Any] = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    x, A = given["x"], given["A"]
    if x.dim() != 3 or A.dim() != 2:
        raise ValueError(f"x has {x.dim()} axes and A {A.dim()}, not 3 and 2: x b t c, A c n")
    b, t, c = x.shape
    n = A.shape[1]
    cu_seqlens = given.get("cu_seqlens")
    check_cu_seqlens(cu_seqlens, b)
    if t == 0:
        raise ValueError(f"x {tuple(x.shape)} has no token: b t c needs t >= 1")
    states = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = {
        "dt": ("b t c", (b, t, c)), "A": ("c n", (c, n)), "B": ("b t n", (b, t, n)), "C": ("b t n", (b, t, n)),
        "D": ("c", (c,)), "z": ("b t c", (b, t, c)), "dt_bias": ("c", (c,)), "initial_state": ("q c n", (states, c, n)),
    }  # fmt: skip
    for name, (axes, shape) in expected.items():
        if name in given and tuple(given[name].shape) != shape:
            raise ValueError(f"{name} is {tuple(given[name].shape)}, not {axes} = {shape} (x is b t c = {(b, t, c)})")


def empty_outputs(arguments: Arguments) -> Outputs:
    """y: b t c, final_state: q c n, boundaries: (t-1)//16 b n c, ungated: b t c or 0."""
    x, A, z, cu_seqlens = (arguments[name] for name in ("x", "A", "z", "cu_seqlens"))
    assert isinstance(x, Tensor)
    assert isinstance(A, Tensor)
    b, t, c = x.shape
    n = A.shape[1]
    exact = torch.promote_types(x.dtype, torch.float32)
    states = cu_seqlens.shape[0] - 1 if isinstance(cu_seqlens, Tensor) else b
    return (
        x.new_empty(b, t, c),
        x.new_empty(states, c, n, dtype=exact),
        x.new_empty((t - 1) // CHUNK, b, n, c, dtype=exact),
        x.new_empty(b, t, c, dtype=exact) if z is not None else x.new_empty(0, dtype=exact),
    )


def batch_and_length(arguments: Arguments) -> tuple[int, int]:
    """b and t of x."""
    x = arguments["x"]
    assert isinstance(x, Tensor)
    return x.shape[0], x.shape[1]


def workload_of(arguments: Arguments, phase: str) -> Workload:
    """The call's workload; its options say which optional tensors are given."""
    x, A, cu_seqlens = (arguments[name] for name in ("x", "A", "cu_seqlens"))
    assert isinstance(x, Tensor)
    assert isinstance(A, Tensor)
    shape = dict(b=int(x.shape[0]), t=int(x.shape[1]), c=int(x.shape[2]), n=int(A.shape[1]))
    if isinstance(cu_seqlens, Tensor):
        shape["documents"] = int(cu_seqlens.shape[0]) - 1
    options: dict[str, Any] = {
        "softplus": bool(arguments["softplus"]),
        "skip": arguments["D"] is not None,
        "gate": arguments["z"] is not None,
        "dt_bias": arguments["dt_bias"] is not None,
        "initial_state": arguments["initial_state"] is not None,
    }
    if arguments["reversed"]:  # left out where it is not, as in workloads that were recorded before it was known
        options["reversed"] = True
    dtype: Any = str(x.dtype).removeprefix("torch.")
    return Workload(operator="selective_scan", shape=shape, dtype=dtype, phase=phase, options=options)  # type: ignore[arg-type]


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
    """Step sizes from 1e-3 to 1e-1 and A = -1 .. -n, as Mamba starts: decays from 0.2 to 0.999.

    One channel in four has a step from 10 down to 1e-4, as training may leave them: decays from 0 to 1.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape, options = workload.shape, workload.options
    b, t, c, n = (shape[axis] for axis in ("b", "t", "c", "n"))
    dtype = getattr(torch, workload.dtype)
    exact = torch.promote_types(dtype, torch.float32)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

    start = (torch.rand(c, generator=generator, device=device) * math.log(100) + math.log(1e-3)).exp()
    start[::4] = torch.logspace(1, -4, -(-c // 4), device=device)
    if options["softplus"]:  # the inverse of softplus
        start = start + (-(-start).expm1()).log()
        raw = start + 0.5 * draw(b, t, c)
    else:
        raw = start * (0.5 * draw(b, t, c)).exp()
    boundaries = draw_boundaries(shape, seed, device)
    states = b if boundaries is None else boundaries.shape[0] - 1
    rates = -torch.arange(1, n + 1, device=device, dtype=torch.float32).expand(c, n)
    return {
        "x": draw(b, t, c).to(dtype),
        "dt": (raw - start if options["dt_bias"] else raw).to(dtype),
        "A": (rates * (0.2 * draw(c, n)).exp()).to(exact),
        "B": draw(b, t, n).to(dtype),
        "C": draw(b, t, n).to(dtype),
        "D": (1 + 0.1 * draw(c)).to(exact) if options["skip"] else None,
        "z": draw(b, t, c).to(dtype) if options["gate"] else None,
        "dt_bias": start.to(exact) if options["dt_bias"] else None,
        "initial_state": draw(states, c, n).to(exact) if options["initial_state"] else None,
        "cu_seqlens": boundaries,
        "softplus": bool(options["softplus"]),
        "reversed": bool(options.get("reversed", False)),
    }
