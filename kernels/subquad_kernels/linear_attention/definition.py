"""Linear attention in plain torch: the definition every kernel is held against."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, einsum
from torch.nn import functional as F

from subquad_kernels.documents import check_cu_seqlens
from subquad_kernels.linear_attention.declaration import segments
from subquad_kernels.samples import draw_boundaries
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.workload import Workload

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    diagonal: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Outputs:
    """S_t = exp(g_t) S_{t-1} + w_t k_t v_t^T,   y_t = scale (exp(g_t) S_{t-1}^T q_t + d_t (q_t . k_t) v_t).

    Shapes:  q, k: b t h_k n    v: b t h p    log_decay: b t h or h    write_gate, diagonal: b t h
             initial_state: states h n p  ->  y: b t h p    final_state: states h n p    boundaries: segments-1 b h n p
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    b, t, h, p = v.shape
    h_k, n = q.shape[2:]
    queries, keys = (tensor.to(exact).repeat_interleave(h // h_k, dim=2) for tensor in (q, k))
    values = v.to(exact)
    decay = values.new_ones(b, t, h) if log_decay is None else log_decay.to(exact).exp().expand(b, t, h)
    write = values.new_ones(b, t, h) if write_gate is None else write_gate.to(exact)
    own = write if diagonal is None else diagonal.to(exact)

    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    num_states = b if cu_seqlens is None else len(bounds) - 1
    before = values.new_zeros(num_states, h, n, p) if initial_state is None else initial_state.to(exact)
    outputs, final_states = [], []
    for document, (start, stop) in enumerate(pairwise(bounds)):
        state = before if cu_seqlens is None else before[document : document + 1]
        for token in range(start, stop):
            state = decay[:, token, :, None, None] * state
            product = einsum("bhn,bhn->bh", queries[:, token], keys[:, token])
            past = einsum("bhn,bhnp->bhp", queries[:, token], state)
            outputs.append(scale * (past + (own[:, token] * product)[..., None] * values[:, token]))
            state = state + einsum("bh,bhn,bhp->bhnp", write[:, token], keys[:, token], values[:, token])
        final_states.append(state)
    return torch.stack(outputs, dim=1).to(v.dtype), torch.cat(final_states), empty_boundaries(v, n, cu_seqlens).zero_()


REFERENCE = AutogradKernel(reference)


def empty_boundaries(v: Tensor, n: int, cu_seqlens: Argument) -> Tensor:
    """Room for the states between segments of time; kernels that compute them again leave zeros.

    Shape:  segments-1 b h n p
    """
    b, t, h, p = v.shape
    documents = cu_seqlens.shape[0] - 1 if isinstance(cu_seqlens, Tensor) else 0
    exact = torch.promote_types(v.dtype, torch.float32)
    return v.new_empty(segments(b, t, h, documents, n, p) - 1, b, h, n, p, dtype=exact)


def check(arguments: Arguments) -> None:
    """Raise ValueError when shapes do not fit."""
    given: dict[str, Any] = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    q, v = given["q"], given["v"]
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q has {q.dim()} axes and v {v.dim()}, not 4: q b t h_k n, v b t h p")
    b, t, h, p = v.shape
    h_k, n = q.shape[2:]
    cu_seqlens = given.get("cu_seqlens")
    check_cu_seqlens(cu_seqlens, b)
    if t == 0:
        raise ValueError(f"v {tuple(v.shape)} has no token: b t h p needs t >= 1")
    if h_k == 0 or h % h_k:
        raise ValueError(f"v has {h} heads, not a multiple of the {h_k} of q: v b t h p, q b t h_k n")
    states = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gate = ("b t h", (b, t, h))
    expected = {
        "q": ("b t h_k n", (b, t, h_k, n)), "k": ("b t h_k n", (b, t, h_k, n)), "write_gate": gate, "diagonal": gate,
        "log_decay": ("h", (h,)) if "log_decay" in given and given["log_decay"].dim() == 1 else gate,
        "initial_state": ("states h n p", (states, h, n, p)),
    }  # fmt: skip
    for name, (axes, shape) in expected.items():
        if name in given and tuple(given[name].shape) != shape:
            raise ValueError(
                f"{name} is {tuple(given[name].shape)}, not {axes} = {shape} (v is b t h p = {(b, t, h, p)})"
            )
    if not given["k"].dtype == q.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {given['k'].dtype}, {v.dtype}: they must have one type")


def empty_outputs(arguments: Arguments) -> Outputs:
    """y: b t h p, final_state: states h n p, boundaries: segments-1 b h n p."""
    q, v, cu_seqlens = (arguments[name] for name in ("q", "v", "cu_seqlens"))
    assert isinstance(q, Tensor)
    assert isinstance(v, Tensor)
    b, t, h, p = v.shape
    n = q.shape[3]
    states = cu_seqlens.shape[0] - 1 if isinstance(cu_seqlens, Tensor) else b
    return (
        v.new_empty(b, t, h, p),
        v.new_empty(states, h, n, p, dtype=torch.promote_types(v.dtype, torch.float32)),
        empty_boundaries(v, n, cu_seqlens),
    )


def batch_and_length(arguments: Arguments) -> tuple[int, int]:
    """b and t of v."""
    v = arguments["v"]
    assert isinstance(v, Tensor)
    return v.shape[0], v.shape[1]


def workload_of(arguments: Arguments, phase: str) -> Workload:
    """The call's workload; its options say which optional tensors are given, `decay` is token, head or none."""
    q, v, log_decay, cu_seqlens = (arguments[name] for name in ("q", "v", "log_decay", "cu_seqlens"))
    assert isinstance(q, Tensor)
    assert isinstance(v, Tensor)
    b, t, h, p = (int(length) for length in v.shape)
    shape = dict(b=b, t=t, h=h, h_k=int(q.shape[2]), n=int(q.shape[3]), p=p)
    if isinstance(cu_seqlens, Tensor):
        shape["documents"] = int(cu_seqlens.shape[0]) - 1
    options: dict[str, Any] = {
        "decay": "none" if not isinstance(log_decay, Tensor) else "head" if log_decay.dim() == 1 else "token"
    }
    options |= {name: arguments[name] is not None for name in ("write_gate", "diagonal", "initial_state")}
    dtype: Any = str(v.dtype).removeprefix("torch.")
    return Workload(operator="linear_attention", shape=shape, dtype=dtype, phase=phase, options=options)  # type: ignore[arg-type]


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
    """Keys and queries of length about 1; decays from 0.5 to 0.999, RetNet's 1 - 2^-5 .. per head; positive gates."""
    generator = torch.Generator(device).manual_seed(seed)
    shape, options = workload.shape, workload.options
    b, t, h, h_k, n, p = (shape[axis] for axis in ("b", "t", "h", "h_k", "n", "p"))
    dtype = getattr(torch, workload.dtype)
    exact = torch.promote_types(dtype, torch.float32)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

    log_decay = None
    if options["decay"] == "token":
        log_decay = F.logsigmoid(3 + 2 * draw(b, t, h)).to(exact)
    elif options["decay"] == "head":
        log_decay = torch.log1p(-(2.0 ** (-5 - torch.arange(h, device=device, dtype=exact).remainder(8))))
    boundaries = draw_boundaries(shape, seed, device)
    states = b if boundaries is None else boundaries.shape[0] - 1
    return {
        "q": draw(b, t, h_k, n).to(dtype),
        "k": (draw(b, t, h_k, n) * n**-0.5).to(dtype),
        "v": draw(b, t, h, p).to(dtype),
        "log_decay": log_decay,
        "write_gate": torch.sigmoid(draw(b, t, h)).to(exact) if options["write_gate"] else None,
        "diagonal": torch.sigmoid(draw(b, t, h)).to(exact) if options["diagonal"] else None,
        "initial_state": draw(states, h, n, p).to(exact) if options["initial_state"] else None,
        "cu_seqlens": boundaries,
        "scale": n**-0.5,
    }
