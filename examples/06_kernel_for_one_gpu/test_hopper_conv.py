"""The suite of subquad for the kernel, in Triton's interpreter where there is no GPU, and what it refuses."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels then run in Python, on the CPU

from subquad.registry import load_registry
from subquad.testing.kernel_suite import KernelSuite
from subquad_kernels import DeviceLimits, Workload
from subquad_kernels.self_check import judge, kernel_errors

HOPPER = DeviceLimits(kind="cuda", name="a Hopper GPU", capability=(9, 0))
HERE = "cuda" if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 else "cpu"
PLAIN = Workload(
    operator="causal_conv", shape={"b": 2, "t": 40, "c": 12, "w": 4}, dtype="float32",
    options={"activation": "silu", "bias": True, "initial_state": False},
)  # fmt: skip
load_registry()  # the plugins' kernels join the catalogue


class TestHopperTiles(KernelSuite):
    operator, kernel, device = "causal_conv", "hopper_tiles", HERE
    limits: ClassVar = HOPPER


@pytest.mark.parametrize(("t", "c", "w"), [(1, 1, 1), (1, 5, 4), (2, 3, 4), (33, 130, 3)])
def test_lengths_below_the_filter_and_edges_of_tiles(t: int, c: int, w: int) -> None:
    suite = TestHopperTiles()
    small = replace(PLAIN, shape={"b": 2, "t": t, "c": c, "w": w}, phase="backward")
    arguments = suite.operator_record.torch_half.sample_inputs(small, seed=t, device=HERE)
    errors = kernel_errors(suite.operator_record, suite.kernel_record, arguments, gradients=True)
    verdict = judge(suite.operator_record, suite.kernel_record, small, errors)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    ("workload", "limits", "reason"),
    [
        (PLAIN, replace(HOPPER, capability=(8, 0)), "compute capability 9"),
        (PLAIN, DeviceLimits(kind="cpu", name="a processor"), "cuda only"),
        (replace(PLAIN, shape=dict(PLAIN.shape) | {"documents": 2}), HOPPER, "packed documents"),
        (replace(PLAIN, dtype="float64"), HOPPER, "float64"),
    ],
)
def test_it_says_where_it_does_not_apply(workload: Workload, limits: DeviceLimits, reason: str) -> None:
    assert reason in str(TestHopperTiles().kernel_record.refusal(workload, limits))
