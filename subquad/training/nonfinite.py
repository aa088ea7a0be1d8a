"""A step whose loss or gradient is no number: where it began, and the batch that did it, kept for a closer look.

The step is repeated on the weights from before it, micro-batch by micro-batch: first forward, looking at what each
module returns, then backward, looking at each parameter's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT_VERSION = 1


def first_nonfinite(
    model: nn.Module, loss_of: Callable[[], Tensor], anywhere: Callable[[bool], bool] = bool
) -> str | None:
    """The first tensor that is not finite as the loss is computed and differentiated; None if all are.

    In the order of computing: a parameter, the output of a module (of the innermost one that returned it), the loss,
    and, as gradients flow from the loss to the embedding, the gradient of the parameter that is last in the model.
    No gradient is kept and none is exchanged between ranks. Ranks that share sequences ask each other by `anywhere`
    whether one of them has found something, since they can only go on together.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"the parameter {name}"
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: object, output: object) -> None:
            if not found and not all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(output)):
                found.append(f"the output of {name} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(look(name or "the model")) for name, module in model.named_modules()]
    try:
        with _as_written(model), torch.enable_grad():
            loss = loss_of()
    finally:
        for hook in hooks:
            hook.remove()
    if not found and not bool(torch.isfinite(loss)):
        found.append("the loss")
    if anywhere(bool(found)):
        return found[0] if found else None
    learned = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    with _as_written(model):
        gradients = torch.autograd.grad(loss, [parameter for _, parameter in learned], allow_unused=True)
    for (name, _), gradient in zip(reversed(learned), reversed(gradients)):
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            return f"the gradient of {name}"
    return None


def keep_batches(path: Path, step: int, batches: Iterable[Mapping[str, Any]]) -> None:
    """Write the micro-batches of a step; `torch.load(path, weights_only=True)["batches"]` has them again."""
    path.parent.mkdir(exist_ok=True)
    kept = [
        {key: value.cpu() if isinstance(value, Tensor) else value for key, value in batch.items()} for batch in batches
    ]
    torch.save({"format_version": FORMAT_VERSION, "step": step, "batches": kept}, path)


def _tensors(output: object) -> Iterator[Tensor]:
    """The floating-point tensors within what a module returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))


@contextmanager
def _as_written(model: nn.Module) -> Iterator[None]:
    """Run modules without torch.compile, which would not call hooks that it has not seen."""
    compiled = [
        (module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl is not None
    ]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
