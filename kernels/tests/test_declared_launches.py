"""The launches that kernels of torch's own declare are those that a call makes, to within a third."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

import subquad_kernels.operators  # noqa: F401  (registers what is declared)
from subquad_kernels.catalogue import CATALOGUE, Kernel, one_launch
from subquad_kernels.samples import draw_boundaries
from subquad_kernels.softmax_attention.flex import mask_function
from subquad_kernels.workload import Phase, Workload, document_sizes, longest_document

NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_local_scalar_dense"}
SIZES = {"t": 300, "h": 1, "h_k": 1, "h_kv": 1, "k": 4, "v": 4, "n": 4, "p": 4, "c": 4, "b": 1}
COMPILED = "flex_attention"
"""Compiled whole on a GPU, but for its mask: counted apart."""
COMPOSED = [
    kernel
    for operator in CATALOGUE
    for kernel in CATALOGUE.kernels(operator.name)
    if kernel.launches is not one_launch and not kernel.compiles
]


class Counting(TorchDispatchMode):
    """Counts calls of aten that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += not func.is_view and func._schema.name.split("::")[1] not in NOTHING
        return func(*args, **(kwargs or {}))


def counted(kernel: Kernel, workload: Workload) -> int:
    operator = CATALOGUE.operator(kernel.operator)
    with torch.no_grad():
        arguments = operator.torch_half.sample_inputs(workload, seed=0, device="cpu")
        outputs = kernel.torch_half.forward(**arguments)
        gradients = tuple(torch.randn_like(output) for output in outputs[: len(operator.outputs)])
        with Counting() as mode:
            if workload.phase == "backward":
                kernel.torch_half.backward(arguments, outputs, gradients)
            else:
                kernel.torch_half.forward(**arguments)
    return mode.count


def workload_of(kernel: Kernel, phase: Phase, t: int) -> Workload:
    """The operator's first example of this phase at a length, narrow: widths change no count."""
    examples = CATALOGUE.operator(kernel.operator).examples
    example = next(e for e in examples if (e.phase == "decode") == (phase == "decode") and "documents" not in e.shape)
    shape = {axis: SIZES.get(axis, size) for axis, size in example.shape.items()}
    options = dict(example.options) | ({"window": 64} if kernel.name == "windowed" else {})
    if phase != "decode":
        shape |= {axis: t for axis in ("t", "s") if axis in shape}
        shape |= {"m": 0} if "m" in shape else {}
    else:
        shape["t"] = 1
    return Workload(operator=kernel.operator, shape=shape, dtype="float32", phase=phase, options=options)


@pytest.mark.parametrize("kernel", COMPOSED, ids=lambda kernel: kernel.key)
@pytest.mark.parametrize("phase", ["forward", "backward", "decode"])
def test_declared_launches_are_those_of_a_call(kernel: Kernel, phase: Phase) -> None:
    if phase == "decode" and kernel.name == "windowed":
        pytest.skip("a window's decode is not its own")
    for t in (300, 900):
        workload = workload_of(kernel, phase, t)
        assert kernel.launches(workload) == pytest.approx(counted(kernel, workload), rel=0.34), (workload.shape, phase)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_window_to_both_sides_launches_as_declared(phase: Phase) -> None:
    kernel = CATALOGUE.kernel("softmax_attention", "windowed")
    workload = replace(workload_of(kernel, phase, 300), options={"causal": False, "window": 64})
    assert kernel.launches(workload) == pytest.approx(counted(kernel, workload), rel=0.1)


@pytest.mark.parametrize("documents", [None, 4])
def test_declared_launches_of_flex_attention_are_those_of_its_mask(documents: int | None) -> None:
    kernel = CATALOGUE.kernel("softmax_attention", COMPILED)
    workload = workload_of(kernel, "forward", 300)
    if documents:
        workload = replace(workload, shape={**workload.shape, "documents": documents})
    boundaries = draw_boundaries(workload.shape, 0, "cpu")
    with torch.no_grad(), Counting() as mode:
        seen = mask_function(300, 300, boundaries, True, 0)
        create_block_mask(seen, None, None, 300, 300, device="cpu")
    assert kernel.launches(workload) == pytest.approx(mode.count + 1, rel=0.1)


def test_known_documents_are_counted_as_they_are() -> None:
    unknown = Workload(operator="delta_rule", shape={"t": 300, "documents": 5}, dtype="float32")
    known = replace(unknown, document_lengths=(1, 0, 130, 5, 164))
    assert longest_document(known) == 164
    assert document_sizes(known) == 3, "1, 5 of up to 8, and two of up to 256"
    assert known.key == unknown.key
    assert known == unknown


def test_the_longest_of_drawn_documents_is_what_is_expected() -> None:
    draw = torch.Generator().manual_seed(0)
    t, documents = 10_000, 8
    cuts = torch.randint(0, t + 1, (4000, documents - 1), generator=draw).sort(dim=1).values
    ends = torch.cat([torch.zeros(4000, 1), cuts, torch.full((4000, 1), t)], dim=1)
    longest = ends.diff(dim=1).max(dim=1).values.mean().item()
    packed = Workload(operator="delta_rule", shape={"t": t, "documents": documents}, dtype="float32")
    assert longest_document(packed) == pytest.approx(longest, rel=0.02)
    assert longest_document(replace(packed, shape={"t": 7})) == 7


@pytest.mark.parametrize("operator", ["linear_attention", "gated_linear_attention"])
def test_a_recurrent_kernel_goes_from_token_to_token_of_the_longest_document(operator: str) -> None:
    steps = CATALOGUE.kernel(operator, "fla_recurrent").serial_steps
    assert steps is not None
    packed = Workload(
        operator=operator, shape={"t": 300, "documents": 3}, dtype="bfloat16", document_lengths=(40, 250, 10)
    )
    alone = Workload(operator=operator, shape={"t": 300}, dtype="bfloat16")
    assert (steps(packed), steps(replace(packed, phase="backward"))) == (250, 500)
    assert (steps(alone), steps(replace(alone, phase="decode"))) == (300, 1)
