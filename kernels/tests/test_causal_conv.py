"""The causal convolution: kernels against the definition, the definition against independent oracles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.causal_conv import conv1d, declaration, definition, taps
from subquad_kernels.causal_conv.operator import OP
from subquad_kernels.operators import causal_conv
from subquad_kernels.workload import Workload

NAMES = declaration.OPERATOR.tensors
KERNELS = pytest.mark.parametrize("kernel", [taps, conv1d], ids=["taps", "conv1d"])
EXACT = 1e-12


def workload(
    t: int, *, w: int = 4, dtype: str = "float64", full: bool = True, activation: str = "silu", **shape: int
) -> Workload:
    """b = 2 (1 when packed), c = 5 unless told; `full` gives bias and initial state."""
    axes = {"b": 1 if "documents" in shape else 2, "t": t, "c": 5, "w": w} | shape
    options = {"activation": activation, "bias": full, "initial_state": full}
    return Workload(operator="causal_conv", shape=axes, dtype=dtype, options=options)  # type: ignore[arg-type]


def sample(case: Workload, seed: int = 0, **changes: Any) -> dict[str, Any]:
    return definition.sample_inputs(case, seed=seed, device="cpu") | changes


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def distance(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max( max |expected|, 1e-6 )"""
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float((found.double() - expected.double()).abs().max() / max(float(expected.abs().max()), 1e-6))


def differences(arguments: dict[str, Any], kernel: Any) -> tuple[float, float]:
    """The largest error of outputs, and of gradients, against the reference in float64."""
    exact = in_double(arguments)
    expected, found = definition.REFERENCE.forward(**exact), kernel.forward(**arguments)
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in expected]
    pulls = [pull.to(out.dtype).double() for pull, out in zip(pulls, found)]
    wanted = definition.REFERENCE.backward(exact, expected, tuple(pulls))
    got = kernel.backward(arguments, found, tuple(pull.to(out.dtype) for pull, out in zip(pulls, found)))
    errors = [distance(got[name], grad) for name, grad in wanted.items() if grad is not None]
    return max(distance(a, b) for a, b in zip(found, expected)), max(errors)


def loop_in_numpy(arguments: dict[str, Any], lengths: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """y of a packed sequence, one scalar at a time."""
    x, weight, bias, state = (arguments[name].numpy() for name in ("x", "weight", "bias", "initial_state"))
    width = weight.shape[1]
    y = np.zeros_like(x)
    start = 0
    for document, length in enumerate(lengths):
        for t in range(length):
            for c in range(x.shape[2]):
                total = bias[c]
                for back in range(width):  # how many tokens ago
                    value = x[0, start + t - back, c] if back <= t else state[document, width - 1 + t - back, c]
                    total += weight[c, width - 1 - back] * value
                y[0, start + t, c] = total / (1 + np.exp(-total))
        start += length
    return y


@pytest.mark.parametrize("kernel", ["reference", "taps", "conv1d"])
@pytest.mark.parametrize("w", [1, 2, 4])
def test_every_kernel_equals_a_scalar_loop_in_numpy_that_stops_at_documents(kernel: str, w: int) -> None:
    lengths = (5, 0, 1, 2, 9)
    arguments = sample(workload(17, w=w, documents=5), cu_seqlens=bounds(*lengths))
    y, _ = causal_conv(**arguments, kernel=kernel)
    assert distance(y, torch.from_numpy(loop_in_numpy(arguments, lengths))) < EXACT


@KERNELS
@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
@pytest.mark.parametrize("w", [1, 2, 4])
@pytest.mark.parametrize("t", [1, 2, 7, 33, 100])
def test_every_kernel_equals_the_reference_with_every_gradient(kernel: Any, t: int, w: int, full: bool) -> None:
    case = workload(t, w=w, full=full, activation="silu" if full else "none")
    assert max(differences(sample(case), kernel)) < EXACT
    output, gradient = differences(sample(replace(case, dtype="float32")), kernel)
    tolerance = declaration.OPERATOR.tolerances["float32"]
    assert output < tolerance.output
    assert gradient < tolerance.gradient


@KERNELS
@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
@pytest.mark.parametrize("lengths", [(9,), (0, 5, 1, 0, 2, 9, 0), (1,) * 6, (0, 0, 1), (3, 3, 3)], ids=str)
def test_packed_equals_the_reference_with_empty_and_single_token_documents(
    kernel: Any, lengths: tuple[int, ...], full: bool
) -> None:
    case = workload(sum(lengths), full=full, documents=len(lengths))
    assert max(differences(sample(case, cu_seqlens=bounds(*lengths)), kernel)) < EXACT


@pytest.mark.parametrize("kernel", ["reference", "taps", "conv1d"])
def test_splitting_anywhere_and_passing_the_last_inputs_changes_nothing(kernel: str) -> None:
    arguments = sample(workload(12))
    y, final = causal_conv(**arguments, kernel=kernel)
    x = arguments["x"]
    for m in range(1, 12):
        first, state = causal_conv(**arguments | {"x": x[:, :m]}, kernel=kernel)
        second, state = causal_conv(**arguments | {"x": x[:, m:], "initial_state": state}, kernel=kernel)
        assert distance(torch.cat([first, second], dim=1), y) < EXACT
        assert torch.equal(state, final)


def test_the_final_state_of_a_short_sequence_keeps_older_inputs() -> None:
    arguments = sample(workload(2, w=4))
    _, final = causal_conv(**arguments)
    assert torch.equal(final, torch.cat([arguments["initial_state"][:, 2:], arguments["x"]], dim=1))


@pytest.mark.parametrize("kernel", ["reference", "taps", "conv1d"])
def test_no_output_depends_on_a_later_token_or_on_one_beyond_the_filter(kernel: str) -> None:
    arguments = sample(workload(20, w=3, dtype="float32", full=False))
    before, _ = causal_conv(**arguments, kernel=kernel)
    changed = arguments["x"].clone()
    changed[:, 11] += 1
    after, _ = causal_conv(**arguments | {"x": changed}, kernel=kernel)
    moved = (before != after).any(dim=2).any(dim=0).nonzero().flatten().tolist()
    assert moved == [11, 12, 13]


@KERNELS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(kernel: Any, dtype: str) -> None:
    """Sums are fp32, so the error is that of rounding results: half a unit in the last place, 2^-9 and 2^-12."""
    tolerance = declaration.OPERATOR.tolerances[dtype]
    output, gradient = differences(sample(workload(33, dtype=dtype)), kernel)
    assert output < tolerance.output
    assert gradient < tolerance.gradient


@pytest.mark.parametrize("kernel", ["reference", "taps", "conv1d"])
@pytest.mark.parametrize("cu_seqlens", [None, bounds(3, 0, 4)], ids=["whole", "packed"])
def test_the_op_passes_gradcheck_with_initial_and_final_states(kernel: str, cu_seqlens: Tensor | None) -> None:
    shape = {} if cu_seqlens is None else {"documents": 3}
    arguments = sample(workload(7, w=3, c=2, **shape), cu_seqlens=cu_seqlens)
    names = ["x", "weight", "bias", "initial_state"]

    def convolve(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv(**dict(zip(names, tensors)), cu_seqlens=cu_seqlens, kernel=kernel)

    assert torch.autograd.gradcheck(convolve, [arguments[name].requires_grad_() for name in names])


@pytest.mark.parametrize("kernel", ["taps", "conv1d"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_op_keeps_the_rules_of_torch_library(packed: bool, kernel: str) -> None:
    case = workload(9, documents=3) if packed else workload(9)
    arguments = sample(case, cu_seqlens=bounds(4, 0, 5) if packed else None)
    for name in ("x", "weight", "bias", "initial_state"):
        arguments[name].requires_grad_()
    torch.library.opcheck(OP, (*arguments.values(), kernel))


def test_a_perturbed_kernel_is_caught() -> None:
    """A tap that reaches one token too far is what this file must find."""

    class Shifted:
        backward = staticmethod(taps.backward)

        @staticmethod
        def forward(**arguments: Any) -> tuple[Tensor, ...]:
            return taps.forward(**arguments | {"weight": arguments["weight"].roll(1, dims=1)})

    assert differences(sample(workload(9)), Shifted)[0] > 1e-2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight", lambda weight: weight[:-1], "weight is .* not c w"),
        ("bias", lambda bias: bias[:-1], "bias is .* not c"),
        ("initial_state", lambda state: state[:, :-1], "initial_state is .* not q w-1 c"),
        ("x", lambda x: x[:, :0], "t and w must be 1 or more"),
        ("activation", lambda _: "relu", "'relu', not one of silu, none"),
        ("cu_seqlens", lambda _: bounds(9), "batch 1, not 2"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name: str, change: Any, message: str) -> None:
    arguments = sample(workload(9))
    with pytest.raises(ValueError, match=message):
        causal_conv(**arguments | {name: change(arguments[name])})


def moved_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_bytes_are_the_sizes_of_the_tensors(dtype: str, full: bool, packed: bool) -> None:
    case = workload(20, dtype=dtype, full=full, **({"documents": 3} if packed else {}))
    arguments = sample(case)
    assert definition.workload_of(arguments, "forward") == case
    inputs = [arguments[name] for name in NAMES]
    results = taps.forward(**arguments)
    found = declaration.work(case)
    assert found.bytes_moved == found.saved_bytes == moved_bytes(*inputs, *results)
    grads = [tensor for tensor in inputs if tensor is not None and tensor.is_floating_point()]
    assert declaration.work(replace(case, phase="backward")).bytes_moved == moved_bytes(*inputs, *results, *grads)
    assert declaration.work(replace(case, phase="decode")).saved_bytes == 0


def test_arithmetic_is_linear_in_tokens_and_taps() -> None:
    base = workload(64, full=False, activation="none")
    assert declaration.work(base).vector_flops == 2 * 64 * 5 * 2 * 4
    assert declaration.work(workload(128, full=False, activation="none")).flops == 2 * declaration.work(base).flops
    assert declaration.work(workload(64, w=8, full=False, activation="none")).flops == 2 * declaration.work(base).flops


def test_the_fake_promises_what_every_kernel_returns() -> None:
    for case in (workload(9), workload(1, w=1), workload(9, documents=3)):
        arguments = sample(case)
        for kernel in (definition.REFERENCE, taps, conv1d):
            for promised, result in zip(definition.empty_outputs(arguments), kernel.forward(**arguments), strict=True):
                assert (promised.shape, promised.dtype) == (result.shape, result.dtype)
