"""The leaky sum in plain torch: the definition that every kernel is held against."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from subquad_kernels import Workload
from subquad_kernels.documents import check_cu_seqlens
from subquad_kernels.samples import draw_boundaries
from subquad_kernels.torch_operator import AutogradKernel


def reference(
    x: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y_t = exp(log_decay) y_{t-1} + x_t: one document after the other, one token after the other."""
    exact = torch.promote_types(x.dtype, torch.float32)
    b, t, c = x.shape
    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    states = b if cu_seqlens is None else len(bounds) - 1
    initial = x.new_zeros(states, c, dtype=exact) if initial_state is None else initial_state.to(exact)
    decay = log_decay.to(exact).exp()
    outputs, final_states = [x.new_empty(b, 0, c, dtype=exact)], []
    for document, (start, stop) in enumerate(pairwise(bounds)):
        y = initial if cu_seqlens is None else initial[document : document + 1]
        for token in x[:, start:stop].to(exact).unbind(1):
            y = decay * y + token
            outputs.append(y[:, None])
        final_states.append(y)
    return torch.cat(outputs, dim=1).to(x.dtype), torch.cat(final_states)


REFERENCE = AutogradKernel(reference)


def check(arguments: dict[str, Any]) -> None:
    """Raise ValueError when shapes do not fit."""
    x, log_decay, initial = arguments["x"], arguments["log_decay"], arguments["initial_state"]
    if x.dim() != 3:
        raise ValueError(f"x has {x.dim()} axes, not 3: b t c")
    b, _, c = x.shape
    check_cu_seqlens(arguments["cu_seqlens"], b)
    if tuple(log_decay.shape) != (c,):
        raise ValueError(f"log_decay is {tuple(log_decay.shape)}, not c = {(c,)}")
    if initial is not None and tuple(initial.shape) != (_states(arguments), c):
        raise ValueError(f"initial_state is {tuple(initial.shape)}, not q c = {(_states(arguments), c)}")


def empty_outputs(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """y: b t c, final_state: q c."""
    x = arguments["x"]
    exact = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(_states(arguments), x.shape[2], dtype=exact)


def batch_and_length(arguments: dict[str, Any]) -> tuple[int, int]:
    """b and t of x."""
    b, t, _ = arguments["x"].shape
    return b, t


def workload_of(arguments: dict[str, Any], phase: Any) -> Workload:
    """The call's workload; its option says whether a state comes in."""
    x = arguments["x"]
    shape = dict(zip("btc", map(int, x.shape)))
    if arguments["cu_seqlens"] is not None:
        shape["documents"] = _states(arguments)
    dtype: Any = str(x.dtype).removeprefix("torch.")
    options = {"initial_state": arguments["initial_state"] is not None}
    return Workload(operator="leaky_sum", shape=shape, dtype=dtype, phase=phase, options=options)


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Any]:
    """Inputs and states of unit scale, and decays from almost 1 to almost 0."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, workload.dtype)
    exact = torch.promote_types(dtype, torch.float32)
    b, t, c = (workload.shape[axis] for axis in "btc")
    boundaries = draw_boundaries(workload.shape, seed, device)
    states = b if boundaries is None else len(boundaries) - 1
    x, initial = (torch.randn(size, generator=generator, device=device) for size in ((b, t, c), (states, c)))
    rate = torch.rand(c, generator=generator, device=device) * 12 - 9
    return {
        "x": x.to(dtype),
        "log_decay": -rate.exp().to(exact),
        "initial_state": initial.to(exact) if workload.options["initial_state"] else None,
        "cu_seqlens": boundaries,
    }


def _states(arguments: dict[str, Any]) -> int:
    cu_seqlens = arguments["cu_seqlens"]
    return int(arguments["x"].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
