"""Log-linear attention in plain torch: the definition every kernel is held against."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, einsum
from torch.nn import functional as F

from subquad_kernels.documents import check_cu_seqlens
from subquad_kernels.log_linear_attention.declaration import slots
from subquad_kernels.samples import draw_boundaries
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.workload import Workload

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_scales: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    position: int,
    scale: float,
) -> Outputs:
    """All states decay, each is read with its level's scale, then the full ones become one (`count_states`).

    Shapes:  q, k: b t h_k n    v: b t h p    level_scales: b t h l    log_decay: b t h or h    write_gate: b t h
             initial_state: states m h n p  ->  y: b t h p    final_state: states m' h n p
    """
    return count_states(
        q, k, v, level_scales, log_decay, write_gate, initial_state, cu_seqlens, position, scale, removes=False
    )


def count_states(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_scales: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    position: int,
    scale: float,
    *,
    removes: bool,
) -> Outputs:
    """A binary counter of states, token after token; where it `removes`, states also forget what lies under the key.

        S <- exp(log_decay) S,  then where it removes  S <- S - write_gate k (k^T S);     a new state  write_gate k v^T

    Shapes:  as `reference`
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    b, t, h, p = v.shape
    h_k, n = q.shape[2:]
    queries, keys = (tensor.to(exact).repeat_interleave(h // h_k, dim=2) for tensor in (q, k))
    values, scales = v.to(exact), level_scales.to(exact)
    last = scales.shape[-1] - 1
    decay = values.new_ones(b, t, h) if log_decay is None else log_decay.to(exact).exp().expand(b, t, h)
    write = values.new_ones(b, t, h) if write_gate is None else write_gate.to(exact)

    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, final_states = [], []
    for document, (start, stop) in enumerate(pairwise(bounds)):
        rows = slice(None) if cu_seqlens is None else slice(document, document + 1)
        kept: dict[int, Tensor] = {}
        if initial_state is not None:
            kept = {slot: initial_state[rows, slot].to(exact) for slot in set_bits(position)}
        for token in range(start, stop):
            kept = {slot: decay[:, token, :, None, None] * state for slot, state in kept.items()}
            if removes:
                gated = write[:, token, :, None] * keys[:, token]
                kept = {
                    slot: state - einsum("bhn,bhm,bhmp->bhnp", gated, keys[:, token], state)
                    for slot, state in kept.items()
                }
            own = einsum("bh,bhn,bhp->bhnp", write[:, token], keys[:, token], values[:, token])
            y = scales[:, token, :, :1] * einsum("bhn,bhnp->bhp", queries[:, token], own)
            for slot, state in kept.items():
                level = min(slot + 1, last)
                y = y + scales[:, token, :, level, None] * einsum("bhn,bhnp->bhp", queries[:, token], state)
            outputs.append(scale * y)
            free = 0
            while (position + token - start) >> free & 1:
                own = own + kept.pop(free) if free in kept else own
                free += 1
            kept[free] = own
        empty = values.new_zeros(b if cu_seqlens is None else 1, h, n, p)
        states = [kept.get(slot, empty) for slot in range(slots(position + t))]
        final_states.append(torch.stack(states, dim=1))
    return torch.stack(outputs, dim=1).to(v.dtype), torch.cat(final_states)


REFERENCE = AutogradKernel(reference)


def symbolic_slots(tokens: int) -> int:
    """`slots` of a number that may be symbolic: torch.compile would make a graph for each outcome of a comparison."""
    if isinstance(tokens, int):
        return slots(tokens)
    ones: list[int] = [torch.sym_min(1, tokens // 2**bit) for bit in range(32)]
    return sum(ones)


def set_bits(number: int) -> list[int]:
    """The places of the ones of a number, lowest first: the slots that hold a bucket after so many tokens."""
    return [bit for bit in range(slots(number)) if number >> bit & 1]


def check(arguments: Arguments) -> None:
    """Raise ValueError when shapes do not fit."""
    values: Any = arguments
    given: dict[str, Any] = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    q, v, scales = given["q"], given["v"], given["level_scales"]
    if q.dim() != 4 or v.dim() != 4 or scales.dim() != 4:
        raise ValueError(
            f"q, v, level_scales have {q.dim()}, {v.dim()}, {scales.dim()} axes, not 4: b t h_k n, b t h p, b t h l"
        )
    b, t, h, p = v.shape
    h_k, n = q.shape[2:]
    cu_seqlens = given.get("cu_seqlens")
    check_cu_seqlens(cu_seqlens, b)
    if t == 0:
        raise ValueError(f"v {tuple(v.shape)} has no token: b t h p needs t >= 1")
    if h_k == 0 or h % h_k:
        raise ValueError(f"v has {h} heads, not a multiple of the {h_k} of q: v b t h p, q b t h_k n")
    levels, position = scales.shape[3], values["position"]
    if levels == 0:
        raise ValueError("level_scales has no level: b t h l needs l >= 1")
    if position < 0:
        raise ValueError(f"position is {position}, not 0 or more")
    if position > 0 and "initial_state" not in given:
        raise ValueError(f"{position} tokens came before, and no initial_state is given: states m h n p")
    states = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = {
        "q": ("b t h_k n", (b, t, h_k, n)), "k": ("b t h_k n", (b, t, h_k, n)),
        "level_scales": ("b t h l", (b, t, h, levels)), "write_gate": ("b t h", (b, t, h)),
        "log_decay": ("h", (h,)) if "log_decay" in given and given["log_decay"].dim() == 1 else ("b t h", (b, t, h)),
        "initial_state": ("states m h n p", (states, symbolic_slots(position), h, n, p)),
    }  # fmt: skip
    for name, (axes, shape) in expected.items():
        if name in given and tuple(given[name].shape) != shape:
            raise ValueError(
                f"{name} is {tuple(given[name].shape)}, not {axes} = {shape} (v is b t h p = {(b, t, h, p)},"
                f" {position} tokens before)"
            )
    if not given["k"].dtype == q.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {given['k'].dtype}, {v.dtype}: they must have one type")


def empty_outputs(arguments: Arguments) -> Outputs:
    """y: b t h p, final_state: states m' h n p."""
    values: Any = arguments
    q, v, cu_seqlens = (values[name] for name in ("q", "v", "cu_seqlens"))
    b, t, h, p = v.shape
    states = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    exact = torch.promote_types(v.dtype, torch.float32)
    after = symbolic_slots(values["position"] + t)
    return v.new_empty(b, t, h, p), v.new_empty(states, after, h, q.shape[3], p, dtype=exact)


def batch_and_length(arguments: Arguments) -> tuple[int, int]:
    """b and t of v."""
    v = arguments["v"]
    assert isinstance(v, Tensor)
    return v.shape[0], v.shape[1]


def workload_of(arguments: Arguments, phase: str) -> Workload:
    """The call's workload; `m` are the slots handed in, `l` the scales of a token, `decay` is token, head or none."""
    values: Any = arguments
    q, v, log_decay, cu_seqlens = (values[name] for name in ("q", "v", "log_decay", "cu_seqlens"))
    b, t, h, p = (int(length) for length in v.shape)
    state = values["initial_state"]
    shape = dict(b=b, t=t, h=h, h_k=int(q.shape[2]), n=int(q.shape[3]), p=p, l=int(values["level_scales"].shape[3]))
    shape["m"] = 0 if state is None else int(state.shape[1])
    if cu_seqlens is not None:
        shape["documents"] = int(cu_seqlens.shape[0]) - 1
    options: dict[str, Any] = {
        "decay": "none" if log_decay is None else "head" if log_decay.dim() == 1 else "token",
        "write_gate": values["write_gate"] is not None,
    }
    dtype: Any = str(v.dtype).removeprefix("torch.")
    return Workload(operator="log_linear_attention", shape=shape, dtype=dtype, phase=phase, options=options)  # type: ignore[arg-type]


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
    """Keys and queries of length about 1; decays from 0.5 to 0.999, RetNet's per head; scales as softplus gives them.

    A call with m slots stands in the middle of their span, where slots hold buckets and others hold none.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape, options = workload.shape, workload.options
    b, t, h, h_k, n, p, levels, m = (shape[axis] for axis in ("b", "t", "h", "h_k", "n", "p", "l", "m"))
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
    position = 2 ** (m - 1) + seed % 2 ** (m - 1) if m else 0
    initial_state = None
    if m:
        held = torch.tensor([position >> slot & 1 for slot in range(m)], device=device)
        initial_state = (draw(states, m, h, n, p) * held[:, None, None, None]).to(exact)
    return {
        "q": draw(b, t, h_k, n).to(dtype),
        "k": (draw(b, t, h_k, n) * n**-0.5).to(dtype),
        "v": draw(b, t, h, p).to(dtype),
        "level_scales": F.softplus(draw(b, t, h, levels)).to(exact),
        "log_decay": log_decay,
        "write_gate": torch.sigmoid(draw(b, t, h)).to(exact) if options["write_gate"] else None,
        "initial_state": initial_state,
        "cu_seqlens": boundaries,
        "position": position,
        "scale": n**-0.5,
    }
