"""What tests of foreign models share: small models of several libraries, how they are compared, what they call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subquad import compile_model
from subquad.compiler.options import CompileOptions
from subquad.compiler.plan import Plan

QUIET = CompileOptions(measure=False)


class KernelCalls(TorchDispatchMode):
    """Counts calls of our operator, with its options, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.options: list[tuple[bool, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.subquad.softmax_attention.default:
            self.options.append((args[4], args[5]))
        return func(*args, **(kwargs or {}))


def calls_in(run: Callable[[], object]) -> list[tuple[bool, int]]:
    """(causal, window) of every call of our operator in a function."""
    with KernelCalls() as counted:
        run()
    return counted.options


def compiled(model: nn.Module, inputs: object, **arguments: Any) -> tuple[nn.Module, nn.Module, Plan]:
    """The model as it was, a compiled copy of it, and the copy's plan."""
    twin, plan = compile_model(copy.deepcopy(model), inputs, **({"target": "cpu", "options": QUIET} | arguments))
    return model, twin, plan


def tensors(output: object) -> list[Tensor]:
    """The floating-point tensors of an output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def gradients(model: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, Tensor]:
    """The gradient of every parameter, of a fixed random projection of the outputs."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(7)
    outputs = [output for output in tensors(run(model)) if output.requires_grad]
    total = sum(
        (output * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)).sum()
        for output in outputs
    )
    assert isinstance(total, Tensor)
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(
    before: nn.Module, after: nn.Module, run: Callable[[nn.Module], object], tolerance: float = 1e-5
) -> None:
    """Outputs and all gradients of two models agree, and both with the first one in float64."""
    exact = copy.deepcopy(before).double()
    with torch.no_grad():
        outputs = [tensors(run(model)) for model in (before, after, exact)]
    assert outputs[0]
    for old, new, true in zip(*outputs):
        assert (new - old).abs().max() <= tolerance * max(1.0, float(old.abs().max()))
        assert (new - true).abs().max() <= tolerance * max(1.0, float(true.abs().max()))
    old_gradients, new_gradients, true_gradients = (gradients(model, run) for model in (before, after, exact))
    assert old_gradients.keys() == new_gradients.keys() == true_gradients.keys()
    for name, old in old_gradients.items():
        scale = max(1.0, float(old.abs().max()))
        assert (new_gradients[name] - old).abs().max() <= 10 * tolerance * scale, name
        assert (new_gradients[name] - true_gradients[name]).abs().max() <= 10 * tolerance * scale, name
