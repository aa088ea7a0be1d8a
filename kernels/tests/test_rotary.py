"""The rotary embedding: every kernel against complex products in float64, whatever the position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.operators import rotary
from subquad_kernels.rotary import declaration, definition
from subquad_kernels.self_check import judge, kernel_errors
from subquad_kernels.workload import Workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE = Workload(
    operator="rotary", shape={"b": 2, "t": 9, "h": 3, "h_kv": 1, "k": 10}, dtype="float32", options={"theta": 1e4}
)
KERNELS = ("tables", "fused")


def sample(**shape: int) -> dict[str, Any]:
    case = replace(BASE, shape=dict(BASE.shape) | shape)
    return definition.sample_inputs(case, seed=3, device=DEVICE)


def assert_exact(kernel: str, arguments: dict[str, Any]) -> None:
    record = CATALOGUE.kernel("rotary", kernel)
    errors = kernel_errors(declaration.OPERATOR, record, arguments, gradients=True)
    assert set(errors) == {"rotated_q", "rotated_k", "d_q", "d_k"}
    verdict = judge(declaration.OPERATOR, record, BASE, errors)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("t", [1, 2, 31, 97])
def test_every_length_and_width_is_turned_by_its_angle(kernel: str, t: int) -> None:
    for width in (2, 6, 16):
        assert_exact(kernel, sample(t=t, k=width))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_batch_longer_than_a_tile_and_many_heads(kernel: str) -> None:
    assert_exact(kernel, sample(b=3, t=70, h=5, h_kv=2, k=64))


@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_positions_begin_anew_with_every_document(kernel: str) -> None:
    bounds = torch.tensor([0, 4, 4, 5, 12], dtype=torch.int32, device=DEVICE)
    arguments = sample(b=1, t=12) | {"cu_seqlens": bounds, "start": 0}
    assert_exact(kernel, arguments)
    q, k = rotary(arguments["q"], arguments["k"], bounds, theta=1e4, kernel=kernel)
    alone, _ = rotary(arguments["q"][:, 5:], arguments["k"][:, 5:], theta=1e4, kernel=kernel)
    assert torch.allclose(q[:, 5:], alone, atol=1e-6)
    assert k.shape == arguments["k"].shape


@pytest.mark.parametrize("kernel", KERNELS)
def test_angles_of_far_positions_keep_their_precision(kernel: str) -> None:
    """Beyond 2^24 a position is no fp32 number, and its angle would be off by whole turns."""
    assert_exact(kernel, sample() | {"start": 2**31 + 12345})


@pytest.mark.parametrize("kernel", KERNELS)
def test_slices_of_a_wider_tensor_are_read_where_they_stand(kernel: str) -> None:
    wide = torch.randn(2, 9, 7, 10, device=DEVICE)
    q, k = rotary(wide[:, :, :4], wide[:, :, 5:], start=7, theta=1e4, kernel=kernel)
    copied = rotary(wide[:, :, :4].contiguous(), wide[:, :, 5:].contiguous(), start=7, theta=1e4, kernel=kernel)
    assert torch.equal(q, copied[0])
    assert torch.equal(k, copied[1])


def test_lengths_are_kept_and_scores_depend_on_distance_alone() -> None:
    q, k = (torch.randn(1, 6, 2, 8, dtype=torch.float64) for _ in range(2))
    near, far = (rotary(q, k, start=start, theta=1e4) for start in (0, 1000))
    assert torch.allclose(near[0].norm(dim=-1), q.norm(dim=-1))
    scores = [torch.einsum("bthk,bshk->bhts", *pair) for pair in (near, far)]
    assert torch.allclose(*scores, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": -1}, "start is -1"),
        ({"q": torch.zeros(2, 9, 10)}, "axes"),
        ({"k": torch.zeros(2, 8, 1, 10)}, "differ"),
        ({"q": torch.zeros(2, 9, 3, 9), "k": torch.zeros(2, 9, 1, 9)}, "pairs"),
        ({"k": torch.zeros(2, 9, 1, 10, dtype=torch.float64)}, "one type"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        definition.check(sample() | changes)
