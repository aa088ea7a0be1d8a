"""Gated linear attention in plain torch: the definition every kernel is held against."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, einsum
from torch.nn import functional as F

from subquad_kernels.documents import check_cu_seqlens
from subquad_kernels.gated_linear_attention.declaration import stretch_len
from subquad_kernels.samples import draw_boundaries
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.workload import Workload

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    read: str,
) -> Outputs:
    """S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T, read after or before the write: one token after the other.

    Shapes:  q, k, log_decay: b t h n    v: b t h p    bonus: h n    initial_state: states h n p
             ->  y: b t h p    final_state: states h n p    boundaries: cuts h n p
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values, log_decays = (tensor.to(exact) for tensor in (q, k, v, log_decay))
    b, t, h, n = q.shape
    p = v.shape[3]
    stretch = stretch_len(n, p)
    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    num_states = b if cu_seqlens is None else len(bounds) - 1
    before = keys.new_zeros(num_states, h, n, p) if initial_state is None else initial_state.to(exact)

    outputs, final_states, crossing = [], [], []
    for document, (start, stop) in enumerate(pairwise(bounds)):
        state = before if cu_seqlens is None else before[document : document + 1]
        for token in range(start, stop):
            if token > start and (token - start) % stretch == 0:
                crossing.append(state)
            decayed = log_decays[:, token].exp().unsqueeze(-1) * state
            after = decayed + einsum("bhn,bhp->bhnp", keys[:, token], values[:, token])
            y = einsum("bhn,bhnp->bhp", queries[:, token], after if read == "after" else state)
            if bonus is not None:
                weight = (queries[:, token] * bonus.to(exact) * keys[:, token]).sum(-1, keepdim=True)
                y = y + weight * values[:, token]
            state = after
            outputs.append(scale * y)
        final_states.append(state)

    boundaries = keys.new_zeros(num_cuts(b, t, n, p, packed=cu_seqlens is not None), h, n, p)
    if crossing:  # of every sequence the cuts follow each other
        found = torch.stack(crossing, dim=1).flatten(0, 1)
        boundaries = torch.cat([found, boundaries[len(found) :]])
    return torch.stack(outputs, dim=1).to(q.dtype), torch.cat(final_states), boundaries


REFERENCE = AutogradKernel(reference)


def num_cuts(b: int, t: int, n: int, p: int, *, packed: bool) -> int:
    """Rows of the residual: states that cross from one stretch to the next; when packed, the most there can be."""
    stretch = stretch_len(n, p)
    return t // stretch if packed else b * ((t - 1) // stretch)


def check(arguments: Arguments) -> None:
    """Raise ValueError when shapes do not fit, or `read` and `bonus` do not."""
    given: dict[str, Any] = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    q, v, read = given["q"], given["v"], arguments["read"]
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q has {q.dim()} axes and v {v.dim()}, not 4: q b t h n, v b t h p")
    b, t, h, n = q.shape
    p = v.shape[3]
    cu_seqlens = given.get("cu_seqlens")
    check_cu_seqlens(cu_seqlens, b)
    if t == 0:
        raise ValueError(f"q {tuple(q.shape)} has no token: b t h n needs t >= 1")
    if read not in ("after", "before"):
        raise ValueError(f"read is {read!r}, not 'after' or 'before' (the write of the same token)")
    if read == "after" and "bonus" in given:
        raise ValueError("bonus weighs the current token where the state is read before its write: read='before'")
    states = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = {
        "k": ("b t h n", (b, t, h, n)), "v": ("b t h p", (b, t, h, p)), "log_decay": ("b t h n", (b, t, h, n)),
        "bonus": ("h n", (h, n)), "initial_state": ("states h n p", (states, h, n, p)),
    }  # fmt: skip
    for name, (axes, shape) in expected.items():
        if name in given and tuple(given[name].shape) != shape:
            raise ValueError(f"{name} is {tuple(given[name].shape)}, not {axes} = {shape}: q is {(b, t, h, n)}")


def empty_outputs(arguments: Arguments) -> Outputs:
    """y: b t h p    final_state: states h n p    boundaries: cuts h n p"""
    q, v, cu_seqlens = (arguments[name] for name in ("q", "v", "cu_seqlens"))
    assert isinstance(q, Tensor)
    assert isinstance(v, Tensor)
    b, t, h, n = q.shape
    p = v.shape[3]
    exact = torch.promote_types(q.dtype, torch.float32)
    packed = isinstance(cu_seqlens, Tensor)
    states = cu_seqlens.shape[0] - 1 if isinstance(cu_seqlens, Tensor) else b
    return (
        q.new_empty(b, t, h, p),
        q.new_empty(states, h, n, p, dtype=exact),
        q.new_empty(num_cuts(b, t, n, p, packed=packed), h, n, p, dtype=exact),
    )


def batch_and_length(arguments: Arguments) -> tuple[int, int]:
    """b and t of q."""
    q = arguments["q"]
    assert isinstance(q, Tensor)
    return q.shape[0], q.shape[1]


def workload_of(arguments: Arguments, phase: str) -> Workload:
    """The call's workload; its options say which optional tensors are given and in which type the decay comes."""
    q, v, log_decay, cu_seqlens = (arguments[name] for name in ("q", "v", "log_decay", "cu_seqlens"))
    assert isinstance(q, Tensor)
    assert isinstance(v, Tensor)
    assert isinstance(log_decay, Tensor)
    shape = dict(zip("bthn", (int(length) for length in q.shape))) | {"p": int(v.shape[3])}
    if isinstance(cu_seqlens, Tensor):
        shape["documents"] = int(cu_seqlens.shape[0]) - 1
    options: dict[str, Any] = {
        "read": arguments["read"],
        "bonus": arguments["bonus"] is not None,
        "initial_state": arguments["initial_state"] is not None,
        "decay_dtype": str(log_decay.dtype).removeprefix("torch."),
    }
    dtype: Any = str(q.dtype).removeprefix("torch.")
    return Workload(operator="gated_linear_attention", shape=shape, dtype=dtype, phase=phase, options=options)  # type: ignore[arg-type]


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
    """log_decay = logsigmoid(x) / 16 with x of standard deviation 3, as GLA has it: decays from 0.5 to 0.9999."""
    generator = torch.Generator(device).manual_seed(seed)
    shape, options = workload.shape, workload.options
    b, t, h, n, p = (shape[axis] for axis in ("b", "t", "h", "n", "p"))
    dtype = getattr(torch, workload.dtype)
    exact = torch.promote_types(dtype, torch.float32)
    decay_dtype = torch.promote_types(dtype, getattr(torch, str(options["decay_dtype"])))

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

    boundaries = draw_boundaries(shape, seed, device)
    states = b if boundaries is None else boundaries.shape[0] - 1
    return {
        "q": draw(b, t, h, n).to(dtype),
        "k": draw(b, t, h, n).to(dtype),
        "v": draw(b, t, h, p).to(dtype),
        "log_decay": (F.logsigmoid(3 * draw(b, t, h, n)) / 16).to(decay_dtype),
        "bonus": draw(h, n).to(exact) if options["bonus"] else None,
        "initial_state": draw(states, h, n, p).to(exact) if options["initial_state"] else None,
        "cu_seqlens": boundaries,
        "scale": n**-0.5,
        "read": str(options["read"]),
    }
