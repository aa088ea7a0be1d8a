"""What a block holds during a training step: it runs on shapes alone, and every storage is counted while it lives.

    passing = max over calls (bytes that live + what an operator's kernel needs beside its tensors) - kept
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subquad.compiler.example import Example
from subquad.compiler.one_block import run_block, stand_ins
from subquad.compiler.plan import Figure
from subquad.compiler.workload import autocast
from subquad.model.block import Block
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.torch_operator import named_arguments
from subquad_kernels.workload import Phase

BACKWARD = "_backward"
"""How the names of operators end that differentiate one of ours."""


@dataclass(frozen=True, kw_only=True)
class BlockMemory:
    """Bytes of a block beside its parameters, of which it has so many.

    `kept_bytes` stand between its forward and its backward, its input among them. `passing_bytes` are how much more
    there is at most while it is at work: the gradient of its output is among them, and those of its parameters as far
    as they are there by then; its output itself is the next block's.
    """

    parameters: int
    kept_bytes: int
    passing_bytes: int


def block_memory(
    block: Block, example: Example, *, checkpointing: bool, figures: Mapping[str, Figure] | None = None
) -> BlockMemory:
    """Run the block forward, and backward when training; call it under a FakeTensorMode.

    `figures` are those of the kernels that its operators run, by operator; what they hold beside their tensors counts.
    """
    b, t = example.tokens_shape
    d_model = block.norm.normalized_shape[0]
    shape = (1, b * t, d_model) if example.packed else (b, t, d_model)
    bounds = torch.empty((example.documents or b) + 1, dtype=torch.int32) if example.packed else None
    shared = stand_ins(block, torch.empty(shape, requires_grad=example.training))
    phase: Phase = "backward" if example.training else "forward"
    others = [*block.parameters(), *block.buffers(), *shared.values(), *([] if bounds is None else [bounds])]
    timeline = MemoryTimeline(others, figures or {}, phase)
    kept = 0
    with timeline:
        x = torch.empty(shape, requires_grad=example.training)
        with torch.set_grad_enabled(example.training), autocast(torch.device("cpu"), example.dtype):
            end = _End.apply(run_block(block, x, bounds, shared, checkpointing=checkpointing))
        if example.training:
            kept = timeline.live_bytes
            torch.autograd.backward(end, torch.empty_like(end))
    parameters = sum(parameter.numel() for parameter in block.parameters())
    return BlockMemory(parameters=parameters, kept_bytes=kept, passing_bytes=timeline.peak_bytes - kept)


class MemoryTimeline(TorchDispatchMode):
    """Bytes of the storages that calls make, as long as they live, and the most at once.

    `others` stood before and are not counted. An operator of ours adds what its kernel holds beside its tensors, in the
    `phase` that its figure is charged to: the one that needs more.
    """

    def __init__(self, others: Iterable[Tensor], figures: Mapping[str, Figure], phase: Phase) -> None:
        super().__init__()
        self.live_bytes = self._peak_bytes = 0
        self._figures, self._phase = figures, phase
        self._known = {tensor.untyped_storage()._cdata for tensor in others}

    @property
    def peak_bytes(self) -> int:
        """The most at once so far."""
        return max(self._peak_bytes, self.live_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._peak_bytes = self.peak_bytes  # of what the last call left
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._hold(tensor)
        scratch = self._scratch_bytes(func, args, kwargs, result) if func.namespace == "subquad" else 0
        # Autograd adds a gradient in place to one that nobody else holds, but not under a mode: what is left counts.
        if func is not torch.ops.aten.add.Tensor or torch.is_grad_enabled():
            self._peak_bytes = max(self._peak_bytes, self.live_bytes + scratch)
        return result

    def _scratch_bytes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
        """What the kernel holds beside its tensors: counted where it declares that, else what its peak leaves.

        A bound knows of nothing but tensors.
        """
        name = func.overloadpacket.__name__
        operator = name.removesuffix(BACKWARD)
        figure = self._figures.get(operator)
        if figure is None or (self._phase == "backward") != name.endswith(BACKWARD):
            return 0
        declared = CATALOGUE.kernel(operator, figure.kernel).scratch_bytes
        if declared is not None:
            functions = CATALOGUE.operator(operator).torch_half
            return declared(functions.workload_of(named_arguments(func, args, kwargs), self._phase))
        if figure.source not in ("measured", "model"):
            return 0
        return max(0, figure.peak_bytes - sum(tensor.nbytes for tensor in _tensors((args, kwargs, result))))

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self._known:
            self._known.add(address)
            self.live_bytes += size
            weakref.finalize(storage, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._known.remove(address)
        self.live_bytes -= size


class _End(torch.autograd.Function):
    """Nothing, in place of a block's output; in the backward the output's gradient, which then nobody else holds."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = y.shape, y.dtype
        return y.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return torch.empty(ctx.shape, dtype=ctx.dtype)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
