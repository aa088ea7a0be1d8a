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
    turned = {"d_angles"} if arguments["angles"] is not None else set()
    assert set(errors) == {"rotated_q", "rotated_k", "d_q", "d_k"} | turned
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


def given(angles: str, pairs: int, dtype: str = "float32", **shape: int) -> dict[str, Any]:
    options = dict(BASE.options) | {"angles": angles, "pairs": pairs}
    case = replace(BASE, shape=dict(BASE.shape) | shape, options=options, dtype=dtype)  # type: ignore[arg-type]
    return definition.sample_inputs(case, seed=3, device=DEVICE)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("t", [1, 2, 31, 97])
def test_angles_that_are_given_turn_neighbours_and_have_a_gradient(kernel: str, t: int) -> None:
    for width, pairs in ((2, 1), (7, 3), (16, 8), (16, 3), (12, 1)):
        assert_exact(kernel, given("shared", pairs, t=t, k=width))
        assert_exact(kernel, given("own", pairs, t=t, k=width, h_kv=3))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_given_angles_turn_is_rounded_once(kernel: str, dtype: str) -> None:
    arguments = given("own", 5, dtype, h_kv=3, k=32)
    assert arguments["angles"].dtype == torch.float32
    record = CATALOGUE.kernel("rotary", kernel)
    errors = kernel_errors(declaration.OPERATOR, record, arguments, gradients=True)
    assert judge(declaration.OPERATOR, record, replace(BASE, dtype=dtype), errors).passed  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", KERNELS)
def test_given_angles_turn_slices_where_they_stand_and_leave_the_rest(kernel: str) -> None:
    wide, angles = torch.randn(2, 9, 8, 10, device=DEVICE), torch.randn(2, 9, 3, 2, device=DEVICE)
    q, k = rotary(wide[:, :, :3], wide[:, :, 5:], angles=angles, kernel=kernel)
    a, b = wide[:, :, :3, 2], wide[:, :, :3, 3]
    angle = angles[..., 1]
    assert torch.allclose(q[..., 2], a * angle.cos() - b * angle.sin(), atol=1e-6)
    assert torch.allclose(q[..., 3], a * angle.sin() + b * angle.cos(), atol=1e-6)
    assert torch.equal(q[..., 4:], wide[:, :, :3, 4:])
    assert torch.equal(k[..., 4:], wide[:, :, 5:, 4:])


def test_given_angles_of_another_sign_are_seen() -> None:
    """The check can fail: the gradient of the angles turned around."""
    arguments = given("own", 4, h_kv=3)
    outputs = definition.reference(**arguments)
    right = definition.REFERENCE.backward(arguments, outputs, outputs)["angles"]
    wrong = definition.REFERENCE.backward(arguments | {"angles": -arguments["angles"]}, outputs, outputs)["angles"]
    assert right is not None and wrong is not None
    assert not torch.allclose(right, wrong, atol=1e-2)


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
        ({"angles": torch.zeros(2, 9, 3, 2), "start": 0}, "not b t a s"),
        ({"angles": torch.zeros(2, 9, 1, 6), "start": 0}, "6 angles"),
        ({"angles": torch.zeros(2, 9, 1, 5)}, "start"),
        ({"angles": torch.zeros(2, 9, 1, 5), "start": 0, "position": torch.zeros(1, dtype=torch.int64)}, "position"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        definition.check(sample() | changes)


@pytest.mark.parametrize(("angles", "steps"), [("", 1), ("shared", 6), ("own", 2)])
def test_heads_that_share_given_angles_are_turned_one_after_the_other(angles: str, steps: int) -> None:
    workload = declaration._example("bfloat16", angles=angles, h_kv=4 if angles == "own" else 2)
    counted = CATALOGUE.kernel("rotary", "fused").serial_steps
    assert counted is not None and counted(workload) == steps
