"""The scalar LSTM's scan: the kernel against the definition, both against a scalar loop, and what the paper claims."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.operators import slstm_scan
from subquad_kernels.self_check import kernel_errors
from subquad_kernels.slstm_scan import definition, stepwise
from subquad_kernels.slstm_scan.declaration import OPERATOR
from subquad_kernels.workload import Workload

EXACT = 1e-10
NAMES = OPERATOR.tensors
BOTH = pytest.mark.parametrize("kernel", ["reference", "stepwise"])


def workload(t: int, *, dtype: str = "float64", state: bool = True, **shape: int) -> Workload:
    """b = 2 (1 when packed), two heads of 5 channels."""
    axes = {"b": 1 if "documents" in shape else 2, "t": t, "h": 2, "p": 5} | shape
    return Workload(operator="slstm_scan", shape=axes, dtype=dtype, options={"initial_state": state})  # type: ignore[arg-type]


def sample(case: Workload, seed: int = 0, **changes: Any) -> dict[str, Any]:
    return dict(definition.sample_inputs(case, seed=seed, device="cpu")) | changes


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def errors_of(arguments: dict[str, Any]) -> dict[str, float]:
    """Errors of `stepwise` against the reference in float64, outputs and every gradient, on poisoned memory."""

    class WithoutAutograd:  # as the torch op calls it
        forward = staticmethod(torch.no_grad()(stepwise.forward))
        backward = staticmethod(torch.no_grad()(stepwise.backward))

    record = replace(CATALOGUE.kernel("slstm_scan", "stepwise"))
    record.__dict__["torch_half"] = WithoutAutograd
    found = kernel_errors(OPERATOR, record, arguments, gradients=True)
    given = [name for name in NAMES if arguments[name] is not None and name != "cu_seqlens"]
    assert set(found) == {"y", "final_state", *(f"d_{name}" for name in given)}
    return found


def loop_in_numpy(arguments: dict[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """y and final state, one scalar at a time, from c and n as the paper first writes them: no stabiliser."""
    a = {name: value.numpy() for name, value in arguments.items() if isinstance(value, Tensor)}
    batch, length, heads, _, p = a["inputs"].shape
    hidden, mean, log_weight = (a["initial_state"][:, part].copy() for part in range(3))
    n = np.exp(log_weight)
    c = mean * n
    y = np.zeros((batch, length, heads, p))
    for b in range(batch):
        for t in range(length):
            before = hidden[b].copy()
            for h in range(heads):
                for k in range(p):
                    i, f, z, o = (
                        a["inputs"][b, t, h, gate, k]
                        + a["bias"][h, gate, k]
                        + sum(before[h, j] * a["recurrent"][h, j, gate, k] for j in range(p))
                        for gate in range(4)
                    )
                    forget = 1 / (1 + math.exp(-f))
                    c[b, h, k] = forget * c[b, h, k] + math.exp(i) * math.tanh(z)
                    n[b, h, k] = forget * n[b, h, k] + math.exp(i)
                    hidden[b, h, k] = y[b, t, h, k] = c[b, h, k] / n[b, h, k] / (1 + math.exp(-o))
    return y, np.stack([hidden, c / n, np.log(n)], 1)


@BOTH
def test_every_kernel_equals_a_scalar_loop_in_numpy(kernel: str) -> None:
    arguments = sample(workload(21))
    y, final = slstm_scan(**arguments, kernel=kernel)
    expected_y, expected_final = loop_in_numpy(arguments)
    torch.testing.assert_close(y, torch.from_numpy(expected_y), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(final, torch.from_numpy(expected_final), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("t", [1, 2, 7, 100])
@pytest.mark.parametrize("state", [True, False], ids=["initial state", "no state"])
def test_stepwise_equals_the_reference_with_all_gradients(t: int, state: bool) -> None:
    assert max(errors_of(sample(workload(t, state=state))).values()) < EXACT
    tolerance = OPERATOR.tolerances["float32"]
    errors = errors_of(sample(workload(t, state=state, dtype="float32"), seed=1))
    assert all(e < (tolerance.gradient if name.startswith("d_") else tolerance.output) for name, e in errors.items())


@pytest.mark.parametrize(
    "lengths", [(33,), (0, 5, 1, 0, 1, 20, 6, 0), (1, 7, 7, 3), (1,) * 9, (0, 0, 1), (30, 0, 29)], ids=str
)
@pytest.mark.parametrize("state", [True, False], ids=["initial state", "no state"])
def test_packed_equals_the_reference_with_empty_and_single_token_documents(
    lengths: tuple[int, ...], state: bool
) -> None:
    case = workload(sum(lengths), state=state, documents=len(lengths))
    assert max(errors_of(sample(case, cu_seqlens=bounds(*lengths))).values()) < EXACT


@BOTH
@pytest.mark.parametrize("state", [True, False], ids=["initial state", "no state"])
def test_packed_equals_each_document_by_itself(kernel: str, state: bool) -> None:
    lengths = (0, 5, 1, 12, 6)
    arguments = sample(workload(sum(lengths), state=state, documents=5), cu_seqlens=bounds(*lengths))
    y, final = slstm_scan(**arguments, kernel=kernel)
    for document, (start, stop) in enumerate(pairwise(np.cumsum((0, *lengths)))):
        own = arguments["initial_state"][document : document + 1] if state else None
        if start == stop:
            nothing = torch.tensor([0.0, 0.0, -torch.inf]).double().view(1, 3, 1, 1).expand(1, 3, 2, 5)
            assert torch.equal(final[document : document + 1], own if own is not None else nothing)
            continue
        alone = arguments | {"inputs": arguments["inputs"][:, start:stop], "initial_state": own, "cu_seqlens": None}
        own_y, own_final = slstm_scan(**alone, kernel="reference")
        torch.testing.assert_close(y[:, start:stop], own_y, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(final[document : document + 1], own_final, rtol=EXACT, atol=EXACT)


@BOTH
@pytest.mark.parametrize("m", [1, 30])
def test_splitting_and_passing_the_state_changes_nothing(kernel: str, m: int) -> None:
    arguments = sample(workload(31, state=False))
    y, final = slstm_scan(**arguments, kernel=kernel)
    inputs = arguments["inputs"]
    first, state = slstm_scan(**arguments | {"inputs": inputs[:, :m]}, kernel=kernel)
    second, state = slstm_scan(**arguments | {"inputs": inputs[:, m:], "initial_state": state}, kernel=kernel)
    torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(state, final, rtol=EXACT, atol=EXACT)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("i", "f"), [(300.0, 0.0), (-300.0, 0.0), (0.0, -300.0), (50.0, -50.0), (0.0, 300.0)])
def test_gates_that_overflow_an_exponential_stay_finite(kernel: str, dtype: torch.dtype, i: float, f: float) -> None:
    arguments = sample(workload(40, state=False, dtype=str(dtype).removeprefix("torch.")))
    arguments["bias"][:, 0], arguments["bias"][:, 1] = i, f
    leaves = {name: arguments[name].requires_grad_() for name in ("inputs", "recurrent", "bias")}
    y, final = slstm_scan(**arguments, kernel=kernel)
    assert y.abs().max() <= 1
    for gradient in torch.autograd.grad(y.sum() + final.sum(), list(leaves.values())):
        assert gradient.isfinite().all()


def test_a_constant_on_all_input_gates_changes_nothing_but_the_log_of_the_weights() -> None:
    arguments = sample(workload(30, state=False))
    y, final = slstm_scan(**arguments)
    arguments["bias"][:, 0] += 7
    shifted_y, shifted = slstm_scan(**arguments)
    torch.testing.assert_close(shifted_y, y, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(shifted[:, 2], final[:, 2] + 7, rtol=EXACT, atol=EXACT)


def test_memory_is_mixed_within_a_head_and_not_between_heads() -> None:
    arguments = sample(workload(6, state=False))
    y, _ = slstm_scan(**arguments)
    arguments["inputs"][:, 0, 0, 2, 3] += 1
    changed = (slstm_scan(**arguments)[0] != y).any(0)  # t h p
    assert changed[1:, 0].all(), "the other channels of the head see it a token later"
    assert changed[0, 0].nonzero().tolist() == [[3]]
    assert not changed[:, 1].any()


def test_the_self_check_takes_agreeing_infinities_for_no_error_and_others_for_one() -> None:
    arguments = sample(workload(9, state=False, documents=4), cu_seqlens=bounds(3, 0, 0, 6))
    assert errors_of(arguments)["final_state"] < EXACT

    class Forgetful:
        @staticmethod
        def forward(**values: Any) -> tuple[Tensor, ...]:
            y, final, trajectory = stepwise.forward(**values)
            return y, final.nan_to_num(neginf=-1e4), trajectory

        backward = staticmethod(stepwise.backward)

    record = replace(CATALOGUE.kernel("slstm_scan", "stepwise"), name="forgetful")
    record.__dict__["torch_half"] = Forgetful
    assert not kernel_errors(OPERATOR, record, arguments, gradients=False)["final_state"] < 1


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("inputs", (2, 3, 2, 3, 5), "four gates of every head"),
        ("inputs", (2, 0, 2, 4, 5), "has no token"),
        ("recurrent", (2, 5, 4, 4), r"not h p 4 p = \(2, 5, 4, 5\)"),
        ("bias", (2, 5, 4), r"not h 4 p = \(2, 4, 5\)"),
        ("initial_state", (3, 3, 2, 5), r"not states 3 h p = \(2, 3, 2, 5\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slstm_scan(**sample(workload(3)) | {name: torch.zeros(shape, dtype=torch.float64)})


def test_work_is_linear_in_time_and_no_step_can_be_taken_beside_another() -> None:
    work = [OPERATOR.work(workload(t, state=False)) for t in (64, 128)]
    assert work[1].flops == 2 * work[0].flops
    assert [w.serial_steps for w in work] == [64, 128]
