"""The log-linear delta rule in plain torch: the definition every kernel is held against."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from subquad_kernels.log_linear_attention import definition as log_linear
from subquad_kernels.log_linear_attention.definition import batch_and_length, check, empty_outputs
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
    """All states forget under the key, each is read with its level's scale, then the full ones become one.

    Shapes:  q, k: b t h_k n    v: b t h p    level_scales: b t h l    log_decay: b t h or h    write_gate: b t h
             initial_state: states m h n p  ->  y: b t h p    final_state: states m' h n p
    """
    return log_linear.count_states(
        q, k, v, level_scales, log_decay, write_gate, initial_state, cu_seqlens, position, scale, removes=True
    )


REFERENCE = AutogradKernel(reference)


def workload_of(arguments: Arguments, phase: str) -> Workload:
    """The call's workload; `m` are the slots handed in, `l` the scales of a token, `decay` is token, head or none."""
    return replace(log_linear.workload_of(arguments, phase), operator="log_linear_delta_rule")


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
    """As for log-linear attention, with keys of length 1."""
    drawn = log_linear.sample_inputs(workload, seed=seed, device=device)
    k: Any = drawn["k"]
    return drawn | {"k": F.normalize(k.float(), dim=-1).to(k.dtype)}
