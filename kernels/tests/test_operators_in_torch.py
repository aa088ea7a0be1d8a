"""What every operator promises inside torch: its rules, torch.compile, autocast, checkpointing, graphs, long strides.

Parametrised over the package's operators: a new one joins by being declared, with examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import subquad_kernels.operators
from subquad_kernels.builtin import OPERATORS
from subquad_kernels.catalogue import CATALOGUE, Kernel, Operator
from subquad_kernels.device_limits import device_limits
from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.workload import DType, Workload

GIBI = 2**30
Names = list[str]


def by_name(operator: Operator) -> str:
    return operator.name


TRAINED = [operator for operator in OPERATORS if operator.takes_sequences]
FORMS = [
    pytest.param(operator, packed, id=f"{operator.name}-{'packed' if packed else 'whole'}")
    for operator in TRAINED
    for packed in (False, True)
    if not packed or "cu_seqlens" in operator.tensors  # one that takes each token by itself knows no documents
]


def training(operator: Operator, *, packed: bool = False, dtype: DType = "float32", **shape: int) -> Workload:
    """The operator's first example of training, packed or not, with other lengths of some axes."""
    example = next(
        example
        for example in operator.examples
        if example.dtype == "float32" and example.phase != "decode" and ("documents" in example.shape) == packed
    )
    lengths = dict(example.shape) | shape
    if "s" in lengths and "t" in shape:
        lengths["s"] = shape["t"]
    return replace(example, shape=lengths, dtype=dtype)


def sample(operator: Operator, workload: Workload, device: str = "cpu") -> dict[str, Any]:
    return operator.torch_half.sample_inputs(workload, seed=0, device=device)


def op_of(operator: Operator) -> Any:
    return getattr(torch.ops.subquad, operator.name).default


def floating(operator: Operator, arguments: dict[str, Any]) -> Names:
    return [name for name in operator.tensors if arguments[name] is not None and arguments[name].is_floating_point()]


def as_function(
    operator: Operator, arguments: dict[str, Any], names: Names, kernel: str = DEFAULT
) -> Callable[..., Any]:
    """The operator as a function of these tensors; the other arguments stay."""

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = op_of(operator)(**arguments | dict(zip(names, tensors)) | {"kernel": kernel})
        return tuple(found[: len(operator.outputs)]) if isinstance(found, tuple | list) else (found,)

    return function


def outputs_and_gradients(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    pulls = [
        torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output) for output in outputs
    ]
    gradients = torch.autograd.grad(outputs, leaves, pulls, allow_unused=True)
    return [*outputs, *(torch.zeros(()) if gradient is None else gradient for gradient in gradients)]


@pytest.mark.parametrize(("operator", "packed"), FORMS)
def test_the_op_keeps_the_rules_of_torch_library(operator: Operator, packed: bool) -> None:
    arguments = sample(operator, training(operator, packed=packed))
    for name in floating(operator, arguments):
        arguments[name].requires_grad_()
    torch.library.opcheck(op_of(operator), (*arguments.values(), DEFAULT))


@pytest.mark.parametrize("operator", TRAINED, ids=by_name)
def test_the_op_compiles_to_one_graph_for_every_batch_and_length(operator: Operator) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def remember(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(graph_module)
        return graph_module

    def call(*values: Any) -> Any:
        return op_of(operator)(*values, DEFAULT)

    compiled = torch.compile(call, backend=remember, fullgraph=True, dynamic=True)
    for b, t in ((7, 37), (3, 41), (5, 20)):  # equal to no other axis, or torch takes the two for one
        arguments = sample(operator, training(operator, b=b, t=t))
        for one, other in zip(compiled(*arguments.values()), call(*arguments.values()), strict=True):
            assert torch.equal(one, other)
    assert len(graphs) == 1
    named = [node for node in graphs[0].graph.nodes if node.target is op_of(operator)]
    assert len(named) == 1


@pytest.mark.parametrize(("operator", "packed"), FORMS)
def test_gradients_of_the_compiled_op_are_those_of_the_op(operator: Operator, packed: bool) -> None:
    torch._dynamo.reset()
    arguments = sample(operator, training(operator, packed=packed))
    names = floating(operator, arguments)
    function, tensors = as_function(operator, arguments, names), [arguments[name] for name in names]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    found, expected = (outputs_and_gradients(one, tensors) for one in (compiled, function))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("operator", TRAINED, ids=by_name)
def test_autocast_changes_nothing_between_the_inputs_types_and_the_outputs(operator: Operator) -> None:
    """Autocast decides what a mixer's projections hand over; the op computes in that, and parameters stay in fp32."""
    for dtype in ("float32", "bfloat16"):
        arguments = sample(operator, training(operator, dtype=dtype))  # type: ignore[arg-type]
        names = floating(operator, arguments)
        function, tensors = as_function(operator, arguments, names), [arguments[name] for name in names]
        plain = outputs_and_gradients(function, tensors)
        assert plain[0].dtype == getattr(torch, dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = outputs_and_gradients(function, tensors)
        for one, other in zip(plain, cast, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        for name, gradient in zip(names, plain[len(operator.outputs) :], strict=True):
            assert gradient.dtype == arguments[name].dtype or not gradient.any()


@pytest.mark.parametrize(("operator", "packed"), FORMS)
def test_activation_checkpointing_changes_no_bit(operator: Operator, packed: bool) -> None:
    arguments = sample(operator, training(operator, packed=packed))
    names = floating(operator, arguments)
    function, tensors = as_function(operator, arguments, names), [arguments[name] for name in names]
    kept = outputs_and_gradients(function, tensors)
    again = outputs_and_gradients(lambda *values: checkpoint(function, *values, use_reentrant=False), tensors)
    for one, other in zip(kept, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("operator", TRAINED, ids=by_name)
def test_the_flop_counter_sees_forward_and_backward_as_declared(operator: Operator) -> None:
    workload = training(operator)
    arguments = sample(operator, workload)
    names = floating(operator, arguments)
    with FlopCounterMode(display=False) as counter:
        outputs_and_gradients(as_function(operator, arguments, names), [arguments[name] for name in names])
    counts = counter.get_flop_counts()["Global"]
    packet = getattr(torch.ops.subquad, operator.name)
    assert counts[packet] == operator.work(operator.torch_half.workload_of(arguments, "forward")).flops
    backward = getattr(torch.ops.subquad, f"{operator.name}_backward")
    assert counts[backward] == operator.work(operator.torch_half.workload_of(arguments, "backward")).flops


@pytest.mark.parametrize("operator", TRAINED, ids=by_name)
def test_the_op_is_exported_as_one_node(operator: Operator) -> None:
    arguments = sample(operator, training(operator))
    names = floating(operator, arguments)
    function = as_function(operator, arguments, names)

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return function(*tensors)

    tensors = tuple(arguments[name] for name in names)
    program = torch.export.export(Module(), tensors)
    assert sum(node.target is op_of(operator) for node in program.graph.nodes) == 1
    for one, other in zip(program.module()(*tensors), function(*tensors), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("operator", TRAINED, ids=by_name)
def test_without_gradients_nothing_is_recorded(operator: Operator) -> None:
    arguments = sample(operator, training(operator))
    names = floating(operator, arguments)
    function, tensors = as_function(operator, arguments, names), [arguments[name] for name in names]
    assert not any(output.requires_grad for output in function(*tensors))
    tensors[0].requires_grad_()
    assert function(*tensors)[0].requires_grad
    with torch.no_grad():
        assert not any(output.requires_grad for output in function(*tensors))
    with torch.inference_mode():
        assert not any(output.requires_grad for output in function(*tensors))


# --- CUDA: the kernels in Triton -------------------------------------------------------------


TRITON_KERNELS = [
    pytest.param(operator, kernel, id=kernel.key)
    for operator in TRAINED
    for kernel in CATALOGUE.kernels(operator.name)
    if "cuda" in kernel.devices and kernel.requires and kernel.name != "flex_attention"  # which is torch's own
]


def widths(operator: Operator) -> dict[str, int]:
    """Multiples of 16, for which Triton compiles as for any wide buffer: equal bits can be asked for."""
    sizes = {"k": 64, "v": 64, "c": 96, "n": 16}
    return {axis: size for axis, size in sizes.items() if axis in operator.examples[0].shape}


def supported(kernel: Kernel, workload: Workload) -> None:
    refusal = kernel.refusal(workload, device_limits("cuda"))
    if refusal is not None:
        pytest.skip(refusal)


@pytest.mark.gpu
@pytest.mark.parametrize(("operator", "kernel"), TRITON_KERNELS)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_a_captured_call_replays_on_other_values(operator: Operator, kernel: Kernel, packed: bool) -> None:
    """Forward and backward in one CUDA graph: nothing waits for the device, and nothing is remembered but shapes."""
    if packed and "cu_seqlens" not in operator.tensors:
        pytest.skip("takes each token by itself")
    workload = training(operator, packed=packed, dtype="bfloat16", t=300, **widths(operator))
    supported(kernel, workload)
    arguments = sample(operator, workload, "cuda")
    names = floating(operator, arguments)
    function = as_function(operator, arguments, names, kernel.name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # gradients flow on the stream on which their leaves were made
        leaves = [arguments[name].clone().requires_grad_() for name in names]

    def step() -> list[Tensor]:
        output = function(*leaves)[0]
        return [output, *torch.autograd.grad(output.float().square().sum(), leaves)]

    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    with torch.no_grad():
        for leaf, name in zip(leaves, names):
            leaf.copy_(arguments[name] * 0.5)
    graph.replay()
    torch.cuda.synchronize()
    replayed = [tensor.clone() for tensor in captured]
    with torch.cuda.stream(stream):
        again = step()
    torch.cuda.synchronize()
    for one, other in zip(replayed, again, strict=True):
        assert torch.equal(one, other)


def strided_past_2_31(tensor: Tensor) -> Tensor:
    """The same values as a slice of a buffer of more than 2^31 elements, whose last row lies beyond."""
    b, t = tensor.shape[:2]
    inner = tensor[0, 0].numel()
    row = -(-(2**31 + 2**24) // (b * t)) // 16 * 16
    assert row >= inner
    buffer = torch.empty(b * t * row, dtype=tensor.dtype, device=tensor.device)
    inside = tensor[0, 0].stride()
    view = buffer.as_strided(tensor.shape, (t * row, row, *inside))
    assert (b - 1) * t * row + (t - 1) * row >= 2**31
    return view.copy_(tensor)


@pytest.mark.gpu
@pytest.mark.parametrize(("operator", "kernel"), TRITON_KERNELS)
def test_strides_may_pass_2_31_elements(operator: Operator, kernel: Kernel) -> None:
    """x is a slice of a wide buffer of 4 GiB; results equal those of a copy to the last bit."""
    workload = training(operator, dtype="bfloat16", b=1, t=1000, **widths(operator))
    supported(kernel, workload)
    if torch.cuda.mem_get_info()[0] < 30 * GIBI:
        pytest.skip("needs 30 GiB of free device memory")
    arguments = sample(operator, workload, "cuda")
    name = operator.tensors[0]
    strided = arguments | {name: strided_past_2_31(arguments[name].contiguous())}
    half = kernel.torch_half
    results = []
    for values in (arguments, strided):
        outputs = half.forward(**values)
        pulls = (torch.ones_like(outputs[0]), *(None for _ in operator.outputs[1:]))
        gradients = half.backward(values, outputs, pulls)
        results.append([*outputs[: len(operator.outputs)], *(gradients[one] for one in floating(operator, values))])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one, other)
            assert torch.isfinite(one[:, -1]).all() if one.dim() > 1 else True


def test_every_operator_has_a_function_for_mixers() -> None:
    assert {operator.name for operator in OPERATORS} <= set(subquad_kernels.operators.__all__)
