"""An operator becomes a torch.library op: one node for torch.fx, torch.export and torch.compile, with gradients.

`define` registers, for an operator `NAME`,

    subquad::NAME(arguments..., str kernel) -> outputs, residuals
    subquad::NAME_backward(arguments..., str kernel, Tensor[] outputs, Tensor?[] gradients) -> Tensor[]

Both look the kernel up in the catalogue when they run, so that a graph pass chooses one by editing a string.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from subquad_kernels.catalogue import CATALOGUE, Kernel, Operator
from subquad_kernels.device_limits import device_limits
from subquad_kernels.kernel_table import DEFAULT, look_up
from subquad_kernels.workload import Workload

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

_LIBRARY = torch.library.Library("subquad", "FRAGMENT")


def kernel_for(operator: Operator, text: str, arguments: Arguments) -> Kernel:
    """The kernel that a call runs: by name, by table, or the operator's default on the device of its tensors."""
    name = look_up(text, *operator.torch_half.batch_and_length(arguments))
    if name == DEFAULT:
        device = _first_tensor(arguments).device
        wanted = default_kernels(operator, device.type)
        # A lone default is not asked whether it supports the call: it would be run all the same.
        name = wanted[0] if len(wanted) == 1 else _first_supporting(
            wanted, operator.torch_half.workload_of(arguments, "forward"), str(device)
        )
    return CATALOGUE.kernel(operator.name, name)


def default_kernels(operator: Operator, device_kind: str) -> tuple[str, ...]:
    """What runs on a kind of device when nobody chose, most wanted first; `reference` where none is named."""
    return operator.defaults.get(device_kind, ("reference",))


@lru_cache(maxsize=4096)
def _first_supporting(wanted: tuple[str, ...], workload: Workload, device: str) -> str:
    """The first kernel that is installed and supports the workload; the last one if none says so."""
    limits = device_limits(device)
    refusals = {name: CATALOGUE.kernel(workload.operator, name).refusal(workload, limits) for name in wanted}
    return next((name for name in wanted if refusals[name] is None), wanted[-1])


def differentiable(operator: Operator, arguments: Arguments) -> list[str]:
    """The tensor arguments that are given and have gradients, in the operator's order."""
    return [
        name
        for name in operator.tensors
        if isinstance(value := arguments[name], Tensor) and value.is_floating_point()
    ]


def define(operator: Operator, signature: str) -> Callable[..., Any]:
    """Register the op and its backward, with fakes, autograd and FLOP formulas, and return the op.

    `signature` is the torch schema from `(` on; its last argument is `str kernel`, its tensors are
    `operator.tensors` and its results `operator.outputs` then `operator.residuals`.
    """
    parameters = _parameter_names(signature)
    if parameters[-1] != "kernel":
        raise ValueError(f"the last argument of {operator.name} must be 'str kernel'")
    names = parameters[:-1]
    inputs, _, _ = signature.rpartition("->")
    backward_name = f"{operator.name}_backward"
    backward_inputs = inputs.strip()[:-1] + ", Tensor[] outputs, Tensor?[] gradients)"
    _LIBRARY.define(operator.name + signature)
    _LIBRARY.define(f"{backward_name}{backward_inputs} -> Tensor[]")
    num_outputs = len(operator.outputs)

    def run(*values: Any) -> Any:
        arguments = dict(zip(names, values))
        definition = operator.torch_half
        definition.check(arguments)
        kernel = kernel_for(operator, values[-1], arguments)
        results = kernel.torch_half.forward(**arguments)
        return _unwrapped(tuple(result.contiguous() for result in results))

    def fake(*values: Any) -> Any:
        arguments = dict(zip(names, values))
        definition = operator.torch_half
        definition.check(arguments)
        return _unwrapped(definition.empty_outputs(arguments))

    def run_backward(*values: Any) -> list[Tensor]:
        *call, kernel_text, outputs, gradients = values
        arguments = dict(zip(names, call))
        kernel = kernel_for(operator, kernel_text, arguments)
        found = kernel.torch_half.backward(arguments, tuple(outputs), tuple(gradients))
        return [_gradient(found.get(name), arguments[name]) for name in differentiable(operator, arguments)]

    def fake_backward(*values: Any) -> list[Tensor]:
        arguments = dict(zip(names, values))
        return [
            torch.empty_like(arguments[name], memory_format=torch.contiguous_format)
            for name in differentiable(operator, arguments)
        ]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        ctx.set_materialize_grads(False)
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.save_for_backward(*tensors, *results)
        ctx.num_results = len(results)
        ctx.values = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]

    def autograd_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        results = saved[len(saved) - ctx.num_results :]
        tensors = iter(saved)
        values = [next(tensors) if is_tensor else value for is_tensor, value in zip(ctx.is_tensor, ctx.values)]
        arguments = dict(zip(names, values))
        wanted = [None if gradient is None else gradient.contiguous() for gradient in gradients[:num_outputs]]
        if all(gradient is None for gradient in wanted):
            return (None,) * len(values)
        # Called by name, so that the backward stays one node for torch.compile and for FLOP counters.
        found = dict(zip(differentiable(operator, arguments), backward_op(*values, results, wanted)))
        return tuple(found.get(name) for name in parameters)

    _LIBRARY.impl(operator.name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(backward_name, run_backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"subquad::{operator.name}", fake, lib=_LIBRARY)
    torch.library.register_fake(f"subquad::{backward_name}", fake_backward, lib=_LIBRARY)
    torch.library.register_autograd(
        f"subquad::{operator.name}", autograd_backward, setup_context=setup_context, lib=_LIBRARY
    )
    op = getattr(torch.ops.subquad, operator.name).default
    backward_op = getattr(torch.ops.subquad, backward_name).default

    def flops(phase: str) -> Callable[..., int]:
        def count(*values: Any, out_val: Any = None, **named: Any) -> int:
            arguments = dict(zip(parameters, values)) | named
            arguments.pop("kernel", None)
            arguments = {name: arguments.get(name, _default(op, name)) for name in names}
            return operator.work(operator.torch_half.workload_of(arguments, phase)).flops

        return count

    register_flop_formula(getattr(torch.ops.subquad, operator.name), get_raw=True)(flops("forward"))
    register_flop_formula(getattr(torch.ops.subquad, backward_name), get_raw=True)(flops("backward"))
    return op  # type: ignore[no-any-return]


def named_arguments(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every argument of an op's schema by name, defaults filled in."""
    given = {argument.name: value for argument, value in zip(op._schema.arguments, args)} | kwargs
    return {
        argument.name: given.get(argument.name, argument.default_value)
        for argument in op._schema.arguments
    }


class ReferenceKernel:
    """An operator's reference as a kernel: forward as written, gradients by torch's own differentiation."""

    def __init__(self, reference: Callable[..., Outputs]) -> None:
        self._reference = reference
        self._tensors = list(inspect.signature(reference).parameters)

    def forward(self, **arguments: Any) -> Outputs:
        """The reference itself."""
        with torch.no_grad():
            return self._reference(**arguments)

    def backward(
        self, arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]
    ) -> dict[str, Tensor | None]:
        """Compute the forward once more, and differentiate it."""
        with torch.enable_grad():
            inputs = {
                name: value.detach().requires_grad_()
                for name, value in arguments.items()
                if isinstance(value, Tensor) and value.is_floating_point()
            }
            results = self._reference(**{**arguments, **inputs})
            pairs = [
                (result, gradient)
                for result, gradient in zip(results, gradients)
                if gradient is not None and result.requires_grad
            ]
            found = torch.autograd.grad(
                [result for result, _ in pairs],
                list(inputs.values()),
                [gradient.to(result.dtype) for result, gradient in pairs],
                allow_unused=True,
            )
        return dict(zip(inputs, found))


def _gradient(found: Tensor | None, like: Any) -> Tensor:
    if found is None:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
    return found.to(like.dtype).contiguous()


def _unwrapped(results: Outputs) -> Any:
    return results if len(results) != 1 else results[0]


def _first_tensor(arguments: Arguments) -> Tensor:
    return next(value for value in arguments.values() if isinstance(value, Tensor))


def _default(op: Any, name: str) -> Any:
    return next((argument.default_value for argument in op._schema.arguments if argument.name == name), None)


def _parameter_names(signature: str) -> list[str]:
    inside = signature.strip()[1 : signature.strip().index(") ->")]
    return [part.split("=")[0].split()[-1] for part in inside.split(",") if part.strip() != "*"]
