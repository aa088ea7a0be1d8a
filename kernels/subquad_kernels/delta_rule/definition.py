"""The delta rule in plain torch: the definition every kernel is held against."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, einsum

from subquad_kernels.delta_rule.declaration import CHUNK, num_chunks
from subquad_kernels.documents import check_cu_seqlens
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
    remove: Tensor | None,
    insert: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Outputs:
    """S_t = Diag(exp g_t) S_{t-1} + ..., one token after the other, as the operator's page writes it.

    Shapes:  q, k: b t h_k n    v: b t h p    log_decay: b t h or b t h n    write_gate: b t h
             remove, insert: b t h n    initial_state: states h n p
             ->  y: b t h p    final_state: states h n p    writes: b t h p    boundaries: chunks h p n
    """
    exact = torch.promote_types(v.dtype, torch.float32)
    b, t, h, p = v.shape
    n = k.shape[-1]
    q, k = (tensor.to(exact).repeat_interleave(h // k.shape[2], dim=2) for tensor in (q, k))
    values = v.to(exact)
    beta = values.new_ones(b, t, h) if write_gate is None else write_gate.to(exact)
    decay = values.new_ones(b, t, h, 1) if log_decay is None else log_decay.to(exact).exp().reshape(b, t, h, -1)

    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    states = b if cu_seqlens is None else len(bounds) - 1
    before = values.new_zeros(states, h, n, p) if initial_state is None else initial_state.to(exact)
    outputs, writes, final_states, boundaries = [], [], [], []
    for document, (start, stop) in enumerate(pairwise(bounds)):
        state = before if cu_seqlens is None else before[document : document + 1]
        for i in range(start, stop):
            if (i - start) % CHUNK == 0:
                boundaries.append(state.transpose(2, 3))
            decayed = decay[:, i, :, :, None] * state
            if remove is None or insert is None:
                write = beta[:, i, :, None] * (values[:, i] - einsum("bhnp,bhn->bhp", decayed, k[:, i]))
                state = decayed + einsum("bhn,bhp->bhnp", k[:, i], write)
            else:
                write = einsum("bhnp,bhn->bhp", state, remove[:, i].to(exact))
                state = decayed + einsum("bhn,bhp->bhnp", insert[:, i].to(exact), write)
                state = state + einsum("bh,bhn,bhp->bhnp", beta[:, i], k[:, i], values[:, i])
            writes.append(write)
            outputs.append(scale * einsum("bhnp,bhn->bhp", state, q[:, i]))
        final_states.append(state)

    y = torch.stack(outputs, dim=1)
    entering = _saved(boundaries, num_chunks(b, t, 0 if cu_seqlens is None else states), y.new_empty(0, h, p, n))
    return y.to(v.dtype), torch.cat(final_states), torch.stack(writes, dim=1).to(v.dtype), entering.to(v.dtype)


def _saved(boundaries: list[Tensor], count: int, empty: Tensor) -> Tensor:
    """Boundaries chunk by chunk of each sequence, zeros where a packed call has fewer than it might.

    Shapes:  c x (b h p n)  ->  count h p n
    """
    if count == 0:
        return empty
    found = torch.stack(boundaries, dim=1).flatten(0, 1)
    return torch.cat([found, found.new_zeros(count - len(found), *found.shape[1:])])


REFERENCE = AutogradKernel(reference)


def check(arguments: Arguments) -> None:
    """Raise ValueError when shapes or types do not fit."""
    given: dict[str, Any] = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    k, v = given["k"], given["v"]
    if k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"k has {k.dim()} axes and v {v.dim()}, not 4: k b t h_k n, v b t h p")
    b, t, h, p = v.shape
    h_k, n = k.shape[2:]
    cu_seqlens = given.get("cu_seqlens")
    check_cu_seqlens(cu_seqlens, b)
    if t == 0:
        raise ValueError(f"v {tuple(v.shape)} has no token: b t h p needs t >= 1")
    if h_k == 0 or h % h_k:
        raise ValueError(f"h_k = {h_k} key heads do not divide h = {h} value heads")
    if ("remove" in given) != ("insert" in given):
        raise ValueError("remove and insert come together: one of them is missing")
    if not given["q"].dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {given['q'].dtype}, {k.dtype} and {v.dtype}: one type is needed")
    states = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    per_head, per_channel = ("b t h", (b, t, h)), ("b t h n", (b, t, h, n))
    vector = "log_decay" in given and given["log_decay"].dim() == 4
    expected = {
        "q": ("b t h_k n", (b, t, h_k, n)), "k": ("b t h_k n", (b, t, h_k, n)), "write_gate": per_head,
        "log_decay": per_channel if vector else per_head, "remove": per_channel, "insert": per_channel,
        "initial_state": ("states h n p", (states, h, n, p)),
    }  # fmt: skip
    for name, (axes, shape) in expected.items():
        if name in given and tuple(given[name].shape) != shape:
            raise ValueError(
                f"{name} is {tuple(given[name].shape)}, not {axes} = {shape} (v is b t h p = {(b, t, h, p)})"
            )


def empty_outputs(arguments: Arguments) -> Outputs:
    """y: b t h p, final_state: states h n p, writes: b t h p, boundaries: chunks h p n."""
    k, v, cu_seqlens = (arguments[name] for name in ("k", "v", "cu_seqlens"))
    assert isinstance(k, Tensor)
    assert isinstance(v, Tensor)
    b, t, h, p = v.shape
    n = k.shape[3]
    documents = cu_seqlens.shape[0] - 1 if isinstance(cu_seqlens, Tensor) else 0
    return (
        v.new_empty(b, t, h, p),
        v.new_empty(documents or b, h, n, p, dtype=torch.promote_types(v.dtype, torch.float32)),
        v.new_empty(b, t, h, p),
        v.new_empty(num_chunks(b, t, documents), h, p, n),
    )


def batch_and_length(arguments: Arguments) -> tuple[int, int]:
    """b and t of v."""
    v = arguments["v"]
    assert isinstance(v, Tensor)
    return v.shape[0], v.shape[1]


def workload_of(arguments: Arguments, phase: str) -> Workload:
    """The call's workload; its options say which optional tensors are given, and how wide a decay is."""
    k, v, log_decay, cu_seqlens = (arguments[name] for name in ("k", "v", "log_decay", "cu_seqlens"))
    assert isinstance(k, Tensor)
    assert isinstance(v, Tensor)
    b, t, h, p = (int(size) for size in v.shape)
    shape = dict(b=b, t=t, h=h, h_k=int(k.shape[2]), n=int(k.shape[3]), p=p)
    if isinstance(cu_seqlens, Tensor):
        shape["documents"] = int(cu_seqlens.shape[0]) - 1
    decay = "none" if not isinstance(log_decay, Tensor) else ("scalar" if log_decay.dim() == 3 else "vector")
    options: dict[str, Any] = {
        "decay": decay,
        "write_gate": arguments["write_gate"] is not None,
        "low_rank": arguments["remove"] is not None,
        "initial_state": arguments["initial_state"] is not None,
    }
    dtype: Any = str(v.dtype).removeprefix("torch.")
    return Workload(operator="delta_rule", shape=shape, dtype=dtype, phase=phase, options=options)  # type: ignore[arg-type]


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
    """Keys of length 1, gates in (0, 1); decays from 0.5 to 0.999 per head, or as RWKV-7 starts them per channel."""
    generator = torch.Generator(device).manual_seed(seed)
    shape, options = workload.shape, workload.options
    b, t, h, h_k, n, p = (shape[axis] for axis in ("b", "t", "h", "h_k", "n", "p"))
    dtype = getattr(torch, workload.dtype)
    exact = torch.promote_types(dtype, torch.float32)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

    def unit(*size: int) -> Tensor:
        return torch.nn.functional.normalize(draw(*size), dim=-1)

    boundaries = draw_boundaries(shape, seed, device)
    states = b if boundaries is None else boundaries.shape[0] - 1
    k = unit(b, t, h_k, n)
    log_decay = None
    if options["decay"] == "scalar":
        log_decay = -(torch.rand(h, generator=generator, device=device) * 6.5 - 7 + 0.5 * draw(b, t, h)).exp()
    elif options["decay"] == "vector":
        log_decay = -0.60653 * draw(b, t, h, n).sigmoid()
    remove = insert = None
    if options["low_rank"]:
        direction = unit(b, t, h, n)
        remove, insert = -direction, direction * draw(b, t, h, n).sigmoid()
    return {
        "q": unit(b, t, h_k, n).mul(n**0.5).to(dtype),
        "k": k.to(dtype),
        "v": draw(b, t, h, p).to(dtype),
        "log_decay": None if log_decay is None else log_decay.to(exact),
        "write_gate": draw(b, t, h).sigmoid().to(exact) if options["write_gate"] else None,
        "remove": None if remove is None else remove.to(dtype),
        "insert": None if insert is None else insert.to(dtype),
        "initial_state": draw(states, h, n, p).mul(n**-0.5).to(exact) if options["initial_state"] else None,
        "cu_seqlens": boundaries,
        "scale": n**-0.5,
    }
