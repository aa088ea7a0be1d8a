"""Every kernel of the package that runs on CPUs, against its operator's reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from spread_inputs import LAYOUTS
from torch import Tensor

import subquad_kernels.operators  # noqa: F401  (defines the torch operators)
from subquad_kernels.builtin import KERNELS, OPERATORS
from subquad_kernels.catalogue import CATALOGUE, Kernel, Operator
from subquad_kernels.device_limits import device_limits
from subquad_kernels.self_check import Verdict, VerdictStore, check_kernel, judge, kernel_errors, shape_class
from subquad_kernels.workload import Workload

CASES = [
    pytest.param(kernel, workload, id=f"{kernel.key}-{number}")
    for kernel in KERNELS
    for number, workload in enumerate(CATALOGUE.operator(kernel.operator).examples)
    if kernel.refusal(workload, device_limits("cpu")) is None
]
GPU_CASES = [
    pytest.param(kernel, replace(workload, dtype=dtype), id=f"{kernel.key}-{number}-{dtype}")
    for kernel in KERNELS
    for number, workload in enumerate(CATALOGUE.operator(kernel.operator).examples)
    for dtype in ("float32", "bfloat16")
    if "cuda" in kernel.devices
]


@pytest.mark.parametrize(("kernel", "workload"), CASES)
def test_a_kernel_agrees_with_its_reference(kernel: Kernel, workload: Workload) -> None:
    verdict = check_kernel(kernel, workload, seed=7)
    assert verdict.passed, verdict.reason


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "workload"), GPU_CASES)
def test_a_kernel_agrees_with_its_reference_on_cuda(kernel: Kernel, workload: Workload) -> None:
    refusal = kernel.refusal(workload, device_limits("cuda"))
    if refusal is not None:
        pytest.skip(refusal)
    verdict = check_kernel(kernel, workload, "cuda", seed=7)
    assert verdict.passed, verdict.reason


def verdict_of_layout(layout: str, kernel: Kernel, workload: Workload, device: str) -> Verdict:
    operator, small = CATALOGUE.operator(kernel.operator), shape_class(workload, device)
    arguments = LAYOUTS[layout](operator.torch_half.sample_inputs(small, seed=8, device=device))
    return judge(operator, kernel, small, kernel_errors(operator, kernel, arguments, gradients=small.phase != "decode"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "workload"), CASES)
def test_a_kernel_agrees_where_inputs_do_not_lie_close(kernel: Kernel, workload: Workload, layout: str) -> None:
    verdict = verdict_of_layout(layout, kernel, workload, "cpu")
    assert verdict.passed, verdict.reason


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "workload"), GPU_CASES)
def test_a_kernel_agrees_where_inputs_do_not_lie_close_on_cuda(kernel: Kernel, workload: Workload, layout: str) -> None:
    refusal = kernel.refusal(workload, device_limits("cuda"))
    if refusal is not None:
        pytest.skip(refusal)
    verdict = verdict_of_layout(layout, kernel, workload, "cuda")
    assert verdict.passed, verdict.reason


TRAINED = [case for case in CASES if case.values[1].phase != "decode"]


def gradients_of(
    kernel: Kernel, workload: Workload, hand_over: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What the torch op leaves at those tensors that `hand_over` makes its arguments of, all but these drawn."""
    operator = CATALOGUE.operator(kernel.operator)
    arguments = operator.torch_half.sample_inputs(shape_class(workload, "cpu"), seed=9, device="cpu")
    leaves = {
        name: value[:1].clone().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    expanded = {name: leaf.expand(arguments[name].shape) for name, leaf in leaves.items()}  # type: ignore[union-attr]
    op = getattr(torch.ops.subquad, operator.name)
    found = op(*(arguments | hand_over(expanded)).values(), kernel.name)
    outputs = found[: len(operator.outputs)] if isinstance(found, tuple) else (found,)
    generator = torch.Generator().manual_seed(10)
    sum((torch.randn(out.shape, generator=generator) * out).sum() for out in outputs).backward()  # type: ignore[union-attr]
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize(("kernel", "workload"), TRAINED)
def test_the_gradient_of_an_expanded_input_is_that_of_its_copies(kernel: Kernel, workload: Workload) -> None:
    plain = gradients_of(kernel, workload, lambda given: {name: value.clone() for name, value in given.items()})
    found = gradients_of(kernel, workload, lambda given: given)
    assert plain
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


def alike(given: dict[str, Tensor]) -> dict[str, str]:
    """Queries that may be the keys, keys that may be the values, by shape: the second of each, and the first."""
    wanted = [("q", "k"), ("k", "v"), ("B", "C"), ("x", "z")]
    return {b: a for a, b in wanted if a in given and b in given and given[a].shape == given[b].shape}


def drawn(kernel: Kernel, workload: Workload) -> dict[str, Tensor]:
    functions = CATALOGUE.operator(kernel.operator).torch_half
    arguments = functions.sample_inputs(shape_class(workload, "cpu"), seed=0, device="cpu")
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize(("kernel", "workload"), [case for case in TRAINED if alike(drawn(*case.values))])
def test_a_tensor_that_is_two_arguments_has_both_gradients(kernel: Kernel, workload: Workload) -> None:
    def once(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return given | {second: given[first] for second, first in alike(given).items()}

    def twice(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in once(given).items()}

    torch.testing.assert_close(
        gradients_of(kernel, workload, once), gradients_of(kernel, workload, twice), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(("kernel", "workload"), CASES)
def test_a_kernel_leaves_its_arguments_as_they_are_and_hands_out_none_of_them(
    kernel: Kernel, workload: Workload
) -> None:
    """For one token, too, which training may end with: a state may then be used where it is, and is another's."""
    operator, small = CATALOGUE.operator(kernel.operator), shape_class(workload, "cpu")
    short = replace(small, shape=small.shape | {axis: 1 for axis in ("t", "s") if axis in small.shape})
    if "documents" not in small.shape and kernel.refusal(short, device_limits("cpu")) is None:
        small = short
    arguments = operator.torch_half.sample_inputs(small, seed=11, device="cpu")
    given = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    before = copy.deepcopy(given)
    results = list(kernel.torch_half.forward(**arguments))
    if small.phase != "decode":
        outputs = tuple(result.contiguous() for result in results)
        pulls = tuple(torch.ones_like(output) for output in outputs[: len(operator.outputs)])
        found = kernel.torch_half.backward(arguments, outputs, pulls)
        results += [gradient for gradient in found.values() if gradient is not None]
    torch.testing.assert_close(given, before, atol=0, rtol=0, equal_nan=True)
    assert not any(value.requires_grad for value in given.values())
    memory = {value.untyped_storage().data_ptr() for value in given.values() if value.numel()}
    assert not any(result.untyped_storage().data_ptr() in memory for result in results if result.numel())


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_the_check_finds_a_wrong_gradient_and_an_unwritten_output(operator: Operator) -> None:
    honest = CATALOGUE.kernel(operator.name, operator.defaults["cpu"][0])
    workload = operator.examples[0]
    arguments = operator.torch_half.sample_inputs(shape_class(workload, "cpu"), seed=0, device="cpu")

    class Wrong:
        @staticmethod
        def forward(**arguments: object) -> tuple[torch.Tensor, ...]:
            outputs = list(honest.torch_half.forward(**arguments))  # type: ignore[arg-type]
            outputs[0] = torch.empty_like(outputs[0]).copy_(outputs[0])
            outputs[0].view(-1)[-1] = float("nan")
            return tuple(outputs)

        @staticmethod
        def backward(
            arguments: dict[str, object], outputs: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor, ...]
        ) -> dict[str, torch.Tensor | None]:
            found = honest.torch_half.backward(arguments, outputs, gradients)  # type: ignore[arg-type]
            name = operator.tensors[0]
            gradient = found[name]
            assert gradient is not None
            return found | {name: gradient * 1.01}

    wrong = replace(honest, name="wrong")
    wrong.__dict__["torch_half"] = Wrong
    errors = kernel_errors(operator, wrong, arguments, gradients=True)
    first = operator.outputs[0]
    assert not errors[first] <= operator.tolerances["float32"].output
    assert not errors[f"d_{operator.tensors[0]}"] <= operator.tolerances["float32"].gradient
    assert not check_kernel(wrong, workload).passed


def test_a_kernel_that_raises_has_failed_its_check() -> None:
    operator = OPERATORS[0]
    broken = replace(CATALOGUE.kernel(operator.name, "reference"), name="broken")

    class Raises:
        @staticmethod
        def forward(**arguments: object) -> tuple[torch.Tensor, ...]:
            raise RuntimeError("no such instruction")

    broken.__dict__["torch_half"] = Raises
    verdict = check_kernel(broken, operator.examples[0])
    assert not verdict.passed
    assert "no such instruction" in verdict.reason


def test_verdicts_are_kept_for_this_code_and_machine(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "verdicts.jsonl"
    operator = OPERATORS[0]
    kernel = CATALOGUE.kernel(operator.name, "reference")
    store = VerdictStore(path)
    first = store.check(kernel, operator.examples[0])
    assert first.passed
    with path.open("a") as file:
        file.write('{"format_version": 1, "key": "cut sho')  # a process was killed here
    again = VerdictStore(path)
    assert again.check(kernel, operator.examples[0]) == first
    assert len(path.read_text().splitlines()) == 2
    other_code = replace(kernel)
    other_code.__dict__["version"] = "another"
    again.check(other_code, operator.examples[0])
    assert "another" in path.read_text()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.key)
def test_a_kernels_version_is_a_hash_of_its_source(kernel: Kernel) -> None:
    assert len(kernel.version) == 12
    assert kernel.version == replace(kernel).version
