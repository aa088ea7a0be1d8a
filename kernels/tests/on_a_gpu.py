"""What fused kernels promise on a GPU: results within their operators' tolerances, and a call that never waits."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from subquad_kernels.catalogue import CATALOGUE, Kernel
from subquad_kernels.device_limits import device_limits
from subquad_kernels.self_check import judge, kernel_errors
from subquad_kernels.workload import Workload


class Fused(Protocol):
    """A kernel's module."""

    forward: Any
    backward: Any


def assert_within_tolerance(kernel: Kernel, case: Workload, arguments: dict[str, Any], launched: Any = None) -> None:
    """Outputs and all gradients, from the launches that the kernel chooses or from what is bound to others."""
    assert kernel.refusal(case, device_limits("cuda")) is None
    operator = CATALOGUE.operator(kernel.operator)
    errors = kernel_errors(operator, launched or kernel, arguments, gradients=True)
    verdict = judge(operator, kernel, case, errors)
    assert verdict.passed, verdict.reason


def assert_a_graph_replays_with_other_boundaries(fused: Fused, arguments: dict[str, Any], *lengths: int) -> None:
    """Packed boundaries are read on the device: a call in a CUDA graph replays with documents of other lengths."""
    boundaries = arguments["cu_seqlens"]
    other = torch.tensor([0, *torch.tensor(lengths).cumsum(0)]).to(boundaries)
    assert other.shape == boundaries.shape and not torch.equal(other, boundaries)

    def step() -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = fused.forward(**arguments)
        fused.backward(arguments, outputs, outputs[:2])
        return outputs

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    boundaries.copy_(other)
    graph.replay()
    torch.testing.assert_close(outputs[0], fused.forward(**arguments)[0])
