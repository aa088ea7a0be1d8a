"""The self-check finds planted faults, each where it matters and only there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad_kernels import self_check
from subquad_kernels.builtin import OPERATORS
from subquad_kernels.catalogue import CATALOGUE, Kernel, Operator, nothing_shared
from subquad_kernels.linear_attention import definition
from subquad_kernels.samples import draw_boundaries
from subquad_kernels.self_check import (
    VerdictStore,
    check_kernel,
    judge,
    kernel_errors,
    shape_class,
    stack_versions,
    verdict_key,
)
from subquad_kernels.workload import DType, Workload

Outputs = tuple[Tensor, ...]
Fault = Callable[[dict[str, Any], Outputs], Outputs]
GradientFault = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
SOUND_OUTPUTS: Fault = lambda arguments, outputs: outputs  # noqa: E731
SOUND_GRADIENTS: GradientFault = lambda arguments, gradients: gradients  # noqa: E731


def planted(
    operator: Operator, *, outputs: Fault = SOUND_OUTPUTS, gradients: GradientFault = SOUND_GRADIENTS
) -> Kernel:
    """The operator's default kernel on CPUs, with a fault."""
    honest = CATALOGUE.kernel(operator.name, operator.defaults["cpu"][0])

    class Faulty:
        @staticmethod
        def forward(**arguments: Any) -> Outputs:
            return outputs(arguments, honest.torch_half.forward(**arguments))

        @staticmethod
        def backward(arguments: Any, found: Outputs, pulls: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
            return gradients(arguments, honest.torch_half.backward(arguments, found, pulls))

    kernel = replace(honest, name="planted", origin="a test")
    kernel.__dict__["torch_half"] = Faulty
    return kernel


TRAINED = [operator for operator in OPERATORS if operator.takes_sequences]


def training(operator: Operator, *, packed: bool = False, dtype: DType = "float32", **shape: int) -> Workload:
    """The operator's first example of training, packed or not, with other lengths of some axes."""
    example = next(
        example
        for example in operator.examples
        if example.dtype == "float32" and example.phase != "decode" and ("documents" in example.shape) == packed
    )
    return replace(example, shape=dict(example.shape) | shape, dtype=dtype)


def verdict(kernel: Kernel, workload: Workload) -> self_check.Verdict:
    return VerdictStore(None).check(kernel, workload)


def by_name(operator: Operator) -> str:
    return operator.name


def differentiable(operator: Operator) -> list[str]:
    arguments = operator.torch_half.sample_inputs(training(operator), seed=0, device="cpu")
    return [name for name in operator.tensors if isinstance(arguments[name], Tensor) and name != "cu_seqlens"]


@pytest.mark.parametrize(
    ("operator", "name"),
    [pytest.param(op, name, id=f"{op.name}-{name}") for op in TRAINED for name in differentiable(op)],
)
def test_one_wrong_gradient_is_found_and_named(operator: Operator, name: str) -> None:
    def one_percent_off(arguments: dict[str, Any], gradients: dict[str, Any]) -> dict[str, Any]:
        return gradients | {name: 1.01 * gradients[name]}

    found = verdict(planted(operator, gradients=one_percent_off), training(operator))
    assert not found.passed
    assert found.reason.startswith(f"d_{name} is off by")


def a_decay_per_head(seed: int) -> tuple[Workload, dict[str, Any]]:
    """Packed linear attention of one head: the gradient of its decay is one sum, which may all but vanish."""
    shape = {"b": 1, "t": 40, "h": 1, "h_k": 1, "n": 8, "p": 8, "documents": 4}
    example = CATALOGUE.operator("linear_attention").examples[0]
    workload = replace(example, shape=shape, dtype="bfloat16", options=dict(example.options) | {"decay": "head"})
    return workload, definition.sample_inputs(workload, seed=seed, device="cpu")


def test_a_sum_over_tokens_is_held_against_its_terms_and_not_against_what_is_left_of_them() -> None:
    """Values off by half a unit of bfloat16, all else exact, are a rounding of operands: no draw may fail for it.

    Against the sum itself these two do, of the first ten, in which little of it is left.
    """
    operator = CATALOGUE.operator("linear_attention")
    chunked = CATALOGUE.kernel("linear_attention", "chunked")
    allowed = operator.tolerances["bfloat16"].gradient

    class Rounded:
        forward = staticmethod(chunked.torch_half.forward)

        @staticmethod
        def backward(arguments: Any, found: Outputs, pulls: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
            exact = {name: arguments[name].float() for name in "qkv"}
            draw = torch.Generator().manual_seed(0)
            exact["v"] *= 1 + 2**-8 * (torch.rand(exact["v"].shape, generator=draw) - 0.5)
            return chunked.torch_half.backward(arguments | exact, found, pulls)

    kernel = replace(chunked, name="rounded")
    kernel.__dict__["torch_half"] = Rounded
    as_sums = replace(operator, spread=nothing_shared)
    for seed in (5, 8):
        workload, arguments = a_decay_per_head(seed)
        errors = kernel_errors(operator, kernel, arguments, gradients=True, seed=seed)
        assert judge(operator, kernel, workload, errors).passed, errors
        assert kernel_errors(as_sums, kernel, arguments, gradients=True, seed=seed)["d_log_decay"] > allowed


def test_a_wrong_sum_over_tokens_is_found_all_the_same() -> None:
    operator = CATALOGUE.operator("linear_attention")

    def doubled(arguments: dict[str, Any], gradients: dict[str, Any]) -> dict[str, Any]:
        return gradients | {"log_decay": 2 * gradients["log_decay"]}

    twice = planted(operator, gradients=doubled)
    workload, arguments = a_decay_per_head(0)
    errors = kernel_errors(operator, twice, arguments, gradients=True)
    assert judge(operator, twice, workload, errors).reason.startswith("d_log_decay is off by")


WITH_HEADS = [operator for operator in TRAINED if "k" in operator.examples[0].shape]


@pytest.mark.parametrize("operator", WITH_HEADS, ids=by_name)
def test_a_fault_at_one_head_width_is_found_at_that_width(operator: Operator) -> None:
    def wrong_at_64(arguments: dict[str, Any], outputs: Outputs) -> Outputs:
        return (1.05 * outputs[0], *outputs[1:]) if arguments["q"].shape[-1] == 64 else outputs

    kernel = planted(operator, outputs=wrong_at_64)
    assert verdict(kernel, training(operator, k=32, v=32)).passed
    assert not verdict(kernel, training(operator, k=64, v=64, t=4096, **_keys(operator, 4096))).passed


def _keys(operator: Operator, t: int) -> dict[str, int]:
    return {"s": t} if "s" in operator.examples[0].shape else {}


PACKED = [operator for operator in OPERATORS if "cu_seqlens" in operator.tensors]
"""Those that know of documents."""


def later_documents_begin_wrong(arguments: dict[str, Any], outputs: Outputs) -> Outputs:
    bounds, first = arguments["cu_seqlens"], outputs[0]
    if bounds is None:
        return outputs
    firsts = bounds[1:-1][bounds[1:-1] < first.shape[1]].long().unique()
    wrong = first.clone()
    wrong[:, firsts] *= 1.05
    return wrong, *outputs[1:]


@pytest.mark.parametrize("operator", PACKED, ids=by_name)
def test_a_fault_at_the_boundary_of_documents_is_found_when_packed(operator: Operator) -> None:
    kernel = planted(operator, outputs=later_documents_begin_wrong)
    assert verdict(kernel, training(operator)).passed
    assert not verdict(kernel, training(operator, packed=True)).passed


@pytest.mark.parametrize("operator", PACKED, ids=by_name)
def test_a_fault_of_documents_of_one_token_is_found(operator: Operator) -> None:
    def single_tokens_wrong(arguments: dict[str, Any], outputs: Outputs) -> Outputs:
        bounds = arguments["cu_seqlens"]
        if bounds is None:
            return outputs
        wrong = outputs[0].clone()
        wrong[:, bounds[:-1][bounds.diff() == 1].long()] *= 1.05
        return wrong, *outputs[1:]

    assert not verdict(planted(operator, outputs=single_tokens_wrong), training(operator, packed=True)).passed


def test_a_fault_under_strong_decay_alone_is_found() -> None:
    """Steps above 3 leave less than 5 % of a state after one token."""
    operator = CATALOGUE.operator("selective_scan")

    def strong_decays_wrong(arguments: dict[str, Any], outputs: Outputs) -> Outputs:
        step = torch.nn.functional.softplus(arguments["dt"] + arguments["dt_bias"])
        return (torch.where(step > 3, 1.02 * outputs[0], outputs[0]), *outputs[1:])

    assert not verdict(planted(operator, outputs=strong_decays_wrong), training(operator)).passed


@pytest.mark.parametrize("operator", TRAINED, ids=by_name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unwritten_last_row_is_found(operator: Operator, dtype: DType) -> None:
    def last_row_unwritten(arguments: dict[str, Any], outputs: Outputs) -> Outputs:
        fresh = torch.empty_like(outputs[0])
        fresh[:, :-1] = outputs[0][:, :-1]
        return fresh, *outputs[1:]

    assert not verdict(planted(operator, outputs=last_row_unwritten), training(operator, dtype=dtype)).passed


def test_every_kind_of_workload_has_a_draw_of_its_own_that_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = CATALOGUE.operator("softmax_attention")
    kernel = CATALOGUE.kernel(operator.name, "reference")
    seeds: list[int] = []
    draw = operator.torch_half.sample_inputs

    def remember(workload: Workload, *, seed: int, device: str) -> dict[str, Any]:
        seeds.append(seed)
        return draw(workload, seed=seed, device=device)

    monkeypatch.setattr(operator.torch_half, "sample_inputs", remember)
    for workload in (training(operator), training(operator, k=32, v=32), training(operator)):
        check_kernel(kernel, workload)
    first, second, again = seeds
    assert first == again != second


def test_a_verdict_is_for_one_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = CATALOGUE.kernel("softmax_attention", "reference")
    workload = training(CATALOGUE.operator("softmax_attention"))
    assert f"driver {self_check.driver_version()}" in stack_versions()
    before = verdict_key(kernel, workload)
    monkeypatch.setattr(self_check, "driver_version", lambda: "999.99.99")
    assert verdict_key(kernel, workload) != before


@pytest.mark.parametrize("operator", TRAINED, ids=by_name)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_shape_class_keeps_widths_and_is_longer_than_a_tile(operator: Operator, device: str) -> None:
    long = training(operator, t=100_000, **_keys(operator, 100_000))
    small = shape_class(long, device)
    assert {axis: small.shape[axis] for axis in ("k", "v", "n", "w") if axis in small.shape} == {
        axis: long.shape[axis] for axis in ("k", "v", "n", "w") if axis in long.shape
    }
    assert small.shape["t"] > {"cpu": 64, "cuda": 256}[device]
    assert small.shape["t"] % 2 == 1


@pytest.mark.parametrize("seed", range(50))
def test_packed_samples_always_have_an_empty_document_and_one_of_one_token(seed: int) -> None:
    bounds = draw_boundaries({"t": 7, "documents": 4}, seed, "cpu")
    assert bounds is not None
    assert (bounds[0], bounds[-1], len(bounds)) == (0, 7, 5)
    lengths = bounds.diff().tolist()
    assert 0 in lengths
    assert 1 in lengths
    assert min(lengths) == 0
    for documents in (1, 2, 3):
        few = draw_boundaries({"t": 1, "documents": documents}, seed, "cpu")
        assert few is not None
        assert len(few) == documents + 1
        assert (few.diff() >= 0).all()


@pytest.mark.parametrize("operator", TRAINED, ids=by_name)
def test_a_check_takes_less_than_a_second(operator: Operator) -> None:
    kernel = CATALOGUE.kernel(operator.name, operator.defaults["cpu"][0])
    workload = training(operator, t=8192, **_keys(operator, 8192))
    check_kernel(kernel, workload)
    began = time.process_time()
    assert check_kernel(kernel, workload).passed
    assert time.process_time() - began < 1


@pytest.mark.parametrize("heads", [(16, 16), (16, 4), (12, 3), (4, 1)])
@pytest.mark.parametrize(("name", "shared"), [("delta_rule", "h_k"), ("linear_attention", "h_k"),
                                              ("softmax_attention", "h_kv")])  # fmt: skip
def test_a_sound_kernel_passes_however_many_heads_share_a_key_head(
    name: str, shared: str, heads: tuple[int, int]
) -> None:
    operator = CATALOGUE.operator(name)
    workload = operator.examples[0]
    workload = replace(workload, shape=dict(workload.shape) | {"h": heads[0], shared: heads[1]})
    small = shape_class(workload, "cpu").shape
    assert small["h"] * heads[1] == heads[0] * small[shared]
    assert small["h"] < 3 or heads[0] // heads[1] > 1
    assert check_kernel(CATALOGUE.kernel(name, operator.defaults["cpu"][0]), workload).passed
