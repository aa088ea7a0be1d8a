"""An operator becomes a torch.library op: one node for torch.fx, torch.export and torch.compile, with gradients.

`define` registers, for an operator `NAME`,

    subquad::NAME(arguments..., str kernel) -> outputs, residuals
    subquad::NAME_backward(arguments..., str kernel, Tensor[] outputs, Tensor?[] gradients) -> Tensor[]

Both look the kernel up in the catalogue when they run, so that a graph pass chooses one by editing a string.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from subquad_kernels.catalogue import CATALOGUE, Kernel, Operator
from subquad_kernels.device_limits import device_limits
from subquad_kernels.kernel_table import DEFAULT, look_up
from subquad_kernels.replay import Repeated, signature_of

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

_LIBRARY = torch.library.Library("subquad", "FRAGMENT")

_DEVICES = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
_BELOW: dict[int, tuple[torch._C.DispatchKeySet, bool]] = {}

_BLAMED = "_subquad_kernel"
"""The attribute of an exception that names the kernel which raised it."""

_MOST_SIGNATURES = 4096
"""Signatures that one direction of an operator remembers, a few kilobytes each."""


def kernel_for(operator: Operator, text: str, arguments: Arguments) -> Kernel:
    """The kernel that a call runs: by name, by table, or the operator's default on the device of its tensors."""
    name = look_up(text, *operator.torch_half.batch_and_length(arguments))
    if name == DEFAULT:
        device = _first_tensor(arguments).device
        wanted = default_kernels(operator, device.type)
        limits, workload = device_limits(str(device)), operator.torch_half.workload_of(arguments, "forward")
        refused = (CATALOGUE.kernel(operator.name, name).refusal(workload, limits) is not None for name in wanted)
        # Where all refuse, the last one says why when it runs.
        name = next((name for name, refusal in zip(wanted, refused) if not refusal), wanted[-1])
    return CATALOGUE.kernel(operator.name, name)


def default_kernels(operator: Operator, device_kind: str) -> tuple[str, ...]:
    """What runs on a kind of device when nobody chose, most wanted first; `reference` where none is named."""
    return operator.defaults.get(device_kind, ("reference",))


class _Known:
    """What was made of a signature, by `make` at its first call, for all calls of it.

    A call then costs the host what it takes to compare its arguments (benchmarks/host_time.py).
    """

    def __init__(self, make: Callable[[Sequence[Any]], Repeated]) -> None:
        self._make = make
        self._known: dict[tuple[object, ...], Repeated] = {}

    def __call__(self, values: Sequence[Any]) -> Sequence[Tensor]:
        known = self._known.get(signature := signature_of(values))
        if known is None:
            known = self._make(values)
            if len(self._known) >= _MOST_SIGNATURES:  # generation meets a new length with every token
                self._known.clear()
            self._known[signature] = known
        return known(values)


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

    tensors, options = _places(names, operator.tensors)

    def differentiable(values: Sequence[Any]) -> list[int]:
        """Where the arguments stand that are given and have gradients."""
        return [place for place in tensors if values[place] is not None and values[place].is_floating_point()]

    def chosen(call: Sequence[Any]) -> Kernel:
        arguments = dict(zip(names, call))
        operator.torch_half.check(arguments)
        return kernel_for(operator, call[-1], arguments)

    def computed(call: Sequence[Any], compute: Callable[[Arguments], list[Tensor]]) -> list[Tensor]:
        arguments = dict(zip(names, call))
        # A kernel is one operation with the types of its arguments: autocast must not reach the products inside.
        with torch._C._DisableAutocast():
            try:
                return compute(arguments)
            except Exception as error:
                _blame(error, operator, call[-1], arguments)
                raise

    def forward_of(values: Sequence[Any]) -> Repeated:
        kernel = chosen(values)
        functions = kernel.torch_half

        def work(values: Sequence[Any]) -> Sequence[Tensor]:
            def compute(arguments: Arguments) -> list[Tensor]:
                results = functions.forward(**arguments)
                return [result if result.is_contiguous() else result.contiguous() for result in results]

            return computed(values, compute)

        return Repeated(work, replayable=kernel.replayable)

    def backward_of(values: Sequence[Any]) -> Repeated:
        kernel = chosen(values[: len(parameters)])
        functions = kernel.torch_half

        def work(values: Sequence[Any]) -> Sequence[Tensor]:
            call, rest = values[: len(parameters)], values[len(parameters) :]

            def compute(arguments: Arguments) -> list[Tensor]:
                found = functions.backward(arguments, tuple(rest[:-num_outputs]), tuple(rest[-num_outputs:]))
                return [_gradient(found.get(names[place]), call[place]) for place in differentiable(call)]

            return computed(call, compute)

        return Repeated(work, replayable=kernel.replayable)

    forwards, backwards = _Known(forward_of), _Known(backward_of)

    def run(*values: Any) -> Any:
        return _unwrapped(tuple(forwards(values)))

    def fake(*values: Any) -> Any:
        arguments = dict(zip(names, values))
        definition = operator.torch_half
        definition.check(arguments)
        return _unwrapped(definition.empty_outputs(arguments))

    def run_backward(*values: Any) -> list[Tensor]:
        *call, outputs, gradients = values
        return list(backwards((*call, *outputs, *gradients)))

    def fake_backward(*values: Any) -> list[Tensor]:
        return [
            torch.empty_like(values[place], memory_format=torch.contiguous_format) for place in differentiable(values)
        ]

    def below_autograd(keyset: torch._C.DispatchKeySet, values: Sequence[Any]) -> Any:
        rest, at_device = _below(keyset)
        with torch._C._AutoDispatchBelowAutograd():
            # Where no mode, tracer or subclass stands before the device, torch need not be asked the way.
            return run(*values) if at_device else op.redispatch(rest, *values)

    class Recorded(torch.autograd.Function):
        """The op below autograd, and how its gradients come back."""

        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *values: Any) -> Any:
            output = below_autograd(keyset, values)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(
                *[values[place] for place in tensors], *(output if isinstance(output, tuple) else (output,))
            )
            ctx.options = [values[place] for place in options]
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            found: list[Tensor | None] = [None] * len(parameters)
            pulls = [_contiguous(gradient) for gradient in gradients[:num_outputs]]
            if any(pull is not None for pull in pulls):
                saved = ctx.saved_tensors
                values: list[Any] = [None] * len(parameters)
                for places, part in ((tensors, saved), (options, ctx.options)):
                    for place, value in zip(places, part):
                        values[place] = value
                # Called by name, so that the backward stays one node for torch.compile and for FLOP counters.
                computed = backward_op(*values, saved[len(tensors) :], pulls)
                for place, gradient in zip(differentiable(values), computed):
                    found[place] = gradient
            return None, *found

    def record(keyset: torch._C.DispatchKeySet, *values: Any) -> Any:
        # As torch.library.register_autograd, which in every call walks the schema to fill in defaults: half the host's
        # time of a recorded call.
        if torch.is_grad_enabled() and any(
            values[place] is not None and values[place].requires_grad for place in tensors
        ):
            return Recorded.apply(keyset, *values)
        return below_autograd(keyset, values)

    _LIBRARY.impl(operator.name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(backward_name, run_backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"subquad::{operator.name}", fake, lib=_LIBRARY)
    torch.library.register_fake(f"subquad::{backward_name}", fake_backward, lib=_LIBRARY)
    _LIBRARY.impl(operator.name, record, "Autograd", with_keyset=True)
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


def failed_kernel(error: BaseException | None) -> str | None:
    """Which kernel raised an error or what it followed from, as operator/kernel; None if no kernel did.

    What a device reports only later (an illegal address) is blamed on nobody.
    """
    while error is not None:
        if (blamed := getattr(error, _BLAMED, None)) is not None:
            return str(blamed)
        error = error.__cause__ or error.__context__
    return None


def _blame(error: Exception, operator: Operator, text: str, arguments: Arguments) -> None:
    if not hasattr(error, _BLAMED):  # a kernel may call another operator, which was the one
        setattr(error, _BLAMED, kernel_for(operator, text, arguments).key)


def named_arguments(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every argument of an op's schema by name, defaults filled in."""
    given = {argument.name: value for argument, value in zip(op._schema.arguments, args)} | kwargs
    return {argument.name: given.get(argument.name, argument.default_value) for argument in op._schema.arguments}


@contextmanager
def recording() -> Iterator[None]:
    """Let a kernel differentiate what it computes, also under a dispatch mode, which excludes autograd."""
    autograd = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(autograd, False), torch.enable_grad():
        yield


class AutogradKernel:
    """A differentiable function as a kernel: forward as written, gradients by torch's own differentiation.

    A kernel's backward is handed tensors and no graph, so that it computes the forward again.
    """

    def __init__(self, function: Callable[..., Outputs]) -> None:
        self._function = function

    def forward(self, **arguments: Any) -> Outputs:
        """The function itself."""
        with torch.no_grad():
            return self._function(**arguments)

    def backward(
        self, arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]
    ) -> dict[str, Tensor | None]:
        """Compute the forward once more, and differentiate it."""
        with recording():
            inputs = {
                name: value.detach().requires_grad_()
                for name, value in arguments.items()
                if isinstance(value, Tensor) and value.is_floating_point()
            }
            results = self._function(**{**arguments, **inputs})
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


def _places(names: list[str], tensors: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Where an op's tensors stand among its arguments, and where everything else does, the kernel's text included."""
    places = [names.index(name) for name in tensors]
    return places, [place for place in range(len(names) + 1) if place not in places]


def _below(keyset: torch._C.DispatchKeySet) -> tuple[torch._C.DispatchKeySet, bool]:
    """What stands below autograd in a call, and whether that is a device at once; calls have few sets of keys."""
    found = _BELOW.get(raw := keyset.raw_repr())
    if found is None:
        rest = keyset & torch._C._after_autograd_keyset
        found = _BELOW[raw] = rest, rest.highestPriorityTypeId() in _DEVICES
    return found


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _gradient(found: Tensor | None, like: Tensor) -> Tensor:
    if found is None:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
    if found.dtype == like.dtype and found.is_contiguous():
        return found
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
