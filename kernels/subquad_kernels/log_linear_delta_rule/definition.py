"""The log-linear delta rule in plain torch: the definition every kernel is held against."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, einsum
from torch.nn import functional as F

from subquad_kernels.log_linear_attention import definition as log_linear
from subquad_kernels.log_linear_attention.declaration import slots
from subquad_kernels.log_linear_attention.definition import batch_and_length, check, empty_outputs, set_bits
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.workload import Workload

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs

__all__ = ["REFERENCE", "batch_and_length", "check", "empty_outputs", "reference", "sample_inputs", "workload_of"]


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
    """A binary counter of states: all forget under the key, each is read with its scale, then the full ones become one.

    Shapes:  q, k: b t h_k n    v: b t h p    level_scales: b t h l    log_decay: b t h or h    write_gate: b t h
             initial_state: states m h n p  ->  y: b t h p    final_state: states m' h n p
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    b, t, h, p = v.shape
    h_k, n = q.shape[2:]
    queries, keys = (tensor.to(exact).repeat_interleave(h // h_k, dim=2) for tensor in (q, k))
    values, scales = v.to(exact), level_scales.to(exact)
    last = scales.shape[-1] - 1
    decay = values.new_ones(b, t, h) if log_decay is None else log_decay.to(exact).exp().expand(b, t, h)
    beta = values.new_ones(b, t, h) if write_gate is None else write_gate.to(exact)

    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, final_states = [], []
    for document, (start, stop) in enumerate(pairwise(bounds)):
        rows = slice(None) if cu_seqlens is None else slice(document, document + 1)
        kept: dict[int, Tensor] = {}
        if initial_state is not None:
            kept = {slot: initial_state[rows, slot].to(exact) for slot in set_bits(position)}
        for token in range(start, stop):
            key, query, gate = keys[:, token], queries[:, token], beta[:, token, :, None, None]
            for slot, state in kept.items():
                state = decay[:, token, :, None, None] * state
                under_key = einsum("bhn,bhnp->bhp", key, state)
                kept[slot] = state - gate * einsum("bhn,bhp->bhnp", key, under_key)
            own = gate * einsum("bhn,bhp->bhnp", key, values[:, token])
            y = scales[:, token, :, :1] * einsum("bhn,bhnp->bhp", query, own)
            for slot, state in kept.items():
                level = min(slot + 1, last)
                y = y + scales[:, token, :, level, None] * einsum("bhn,bhnp->bhp", query, state)
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


def workload_of(arguments: Arguments, phase: str) -> Workload:
    """The call's workload; `m` are the slots handed in, `l` the scales of a token, `decay` is token, head or none."""
    return replace(log_linear.workload_of(arguments, phase), operator="log_linear_delta_rule")


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
    """As for log-linear attention, with keys of length 1."""
    drawn = log_linear.sample_inputs(workload, seed=seed, device=device)
    k: Any = drawn["k"]
    return drawn | {"k": F.normalize(k.float(), dim=-1).to(k.dtype)}
