"""The suites of subquad for the mixer and its kernel, and the operator against what it says it is."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels then run in Python, on the CPU

from leaky_sum.operator import leaky_sum

from subquad.testing.kernel_suite import KernelSuite
from subquad.testing.mixer_suite import MixerSuite
from subquad_kernels import DeviceLimits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class TestMixer(MixerSuite):
    mixer = "leaky_sum"
    config: ClassVar = {"longest_half_life": 9.0}


class TestFused(KernelSuite):
    operator, kernel, device = "leaky_sum", "fused", DEVICE
    limits: ClassVar = None if DEVICE == "cuda" else DeviceLimits(kind="cuda", name="interpreter", capability=(9, 0))


@pytest.mark.parametrize("kernel", ["reference", "fused"])
@pytest.mark.parametrize("t", [1, 9])
def test_the_sum_is_a_product_with_a_matrix_of_decays(kernel: str, t: int) -> None:
    """y = M x with M[t, s] = decay^(t - s) for s <= t: a second definition, which shares no code with the first."""
    x, log_decay, state = torch.randn(2, t, 3).double(), -torch.rand(3).double(), torch.randn(2, 3).double()
    steps = torch.arange(t)
    distance = (steps[:, None] - steps).double()
    matrix = torch.where(distance[..., None] >= 0, (distance[..., None] * log_decay).exp(), 0.0)
    before = ((steps[:, None] + 1) * log_decay).exp() * state[:, None]
    expected = torch.einsum("tsc,bsc->btc", matrix, x) + before
    kind: Any = torch.float64 if kernel == "reference" else torch.float32
    y, last = leaky_sum(*(tensor.to(DEVICE, kind) for tensor in (x, log_decay, state)), kernel=kernel)
    assert torch.allclose(y.cpu().double(), expected, atol=1e-12 if kernel == "reference" else 1e-5)
    assert torch.equal(last, y[:, -1])
