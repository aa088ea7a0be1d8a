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

from subquad.training.sharding import holds_shards, rows_of

FORMAT_VERSION = 1


def first_nonfinite(
    model: nn.Module, loss_of: Callable[[], Tensor], agree: Callable[[str | None], str | None] | None = None
) -> str | None:
    """The first tensor that is not finite as the loss is computed and differentiated; None if all are.

    In the order of computing: a parameter, the output of a module (of the innermost one that returned it), the loss,
    and, as gradients flow from the loss to the embedding, the gradient of the parameter that is last in the model.
    No gradient is kept, and none is exchanged between ranks that hold whole models. Ranks of a sharded one, or of
    shared sequences, need each other for every block: `agree`, called by all after each stage, gives all what one has
    found.
    """
    shared = agree or (lambda found: found)
    spoilt = (name for name, parameter in model.named_parameters() if not _is_finite(rows_of(parameter)))
    name = shared(next(spoilt, None))
    if name is not None:
        return f"the parameter {name}"
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: object, output: object) -> None:
            if not found and not all(map(_is_finite, _tensors(output))):
                found.append(f"the output of {name} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(look(name or "the model")) for name, module in model.named_modules()]
    try:
        with _as_written(model), torch.enable_grad():
            loss = loss_of()
    finally:
        for hook in hooks:
            hook.remove()
    if not found and not _is_finite(loss):
        found.append("the loss")
    first = shared(found[0] if found else None)
    if first is not None:
        return first
    with _as_written(model):
        gradients = _rows_of_gradients(loss, model) if holds_shards(model) else _gradients(loss, model)
    spoilt = (name for name, gradient in reversed(gradients) if gradient is not None and not _is_finite(gradient))
    name = shared(next(spoilt, None))
    return None if name is None else f"the gradient of {name}"


def _gradients(loss: Tensor, model: nn.Module) -> list[tuple[str, Tensor | None]]:
    learned = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in learned], allow_unused=True)
    return [(name, gradient) for (name, _), gradient in zip(learned, gradients)]


def _rows_of_gradients(loss: Tensor, model: nn.Module) -> list[tuple[str, Tensor | None]]:
    """This rank's rows of the ranks' mean gradient, which sharded parameters get although they are not in the graph."""
    loss.backward()  # type: ignore[no-untyped-call]
    rows = []
    for name, parameter in model.named_parameters():
        rows.append((name, None if parameter.grad is None else rows_of(parameter.grad)))
        parameter.grad = None
    return rows


def keep_batches(path: Path, step: int, batches: Iterable[Mapping[str, Any]]) -> None:
    """Write the micro-batches of a step; `torch.load(path, weights_only=True)["batches"]` has them again."""
    path.parent.mkdir(exist_ok=True)
    kept = [
        {key: value.cpu() if isinstance(value, Tensor) else value for key, value in batch.items()} for batch in batches
    ]
    torch.save({"format_version": FORMAT_VERSION, "step": step, "batches": kept}, path)


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


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
