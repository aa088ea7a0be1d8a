"""What a training step computes beside its operators: every aten call of a step on shapes alone, with its work.

A block of each kind is counted once, forward and backward, and so are embedding, final norm, head and loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from subquad.compiler.block_memory import BlockMemory, block_memory
from subquad.compiler.example import Example
from subquad.compiler.plan import Figure, NodeChoice
from subquad.compiler.run_shapes import model_of
from subquad.compiler.workload import autocast
from subquad.model.block import Block
from subquad.model.build import build_model, check_mixers, full_schedule, places_of
from subquad.model.language_model import LanguageModel
from subquad.model.shared_projections import keep_share
from subquad.schema import ModelConfig

ALLOCATES = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
"""Calls of aten that compute nothing; so do its views."""


@dataclass(frozen=True)
class Call:
    """One call of aten: FLOPs of a matrix product (0: none), and what it reads and writes."""

    matmul_flops: int
    bytes_moved: int


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """One micro-batch: calls inside all blocks and outside of them, how often operators run, and memory.

    `memory` is that of each block, from the first to the last.
    """

    blocks: Counter[Call]
    outside: Counter[Call]
    operator_calls: int
    parameters: int
    memory: tuple[BlockMemory, ...]

    @property
    def calls(self) -> int:
        """Calls of aten that launch something."""
        return self.blocks.total() + self.outside.total()

    @property
    def kept_bytes(self) -> int:
        """What the forward of all blocks keeps for the backward."""
        return sum(memory.kept_bytes for memory in self.memory)


def step_work(
    model: ModelConfig,
    example: Example,
    *,
    kind: str,
    checkpointing: bool,
    chunked_loss: bool = False,
    tensor_parallel: int = 1,
    choices: Sequence[NodeChoice] = (),
) -> StepWork:
    """Count a step of a model whose sizes are filled in, on a `kind` of device (`cpu` or `cuda`).

    Of projections that `tensor_parallel` ranks share it is one rank's part. `choices` say what the kernels of the
    model's operators need; without them an operator needs its tensors alone.

    Raises: whatever a mixer raises that cannot run on shapes.
    """
    shared = (str(sharing) for _, sharing in places_of(model, check_mixers(model)))
    schedule = list(zip(full_schedule(model), shared))
    first = {kind: schedule.index(kind) for kind in schedule}
    with FakeTensorMode():
        # As far as the first of the last kind: a layer that reads of earlier ones is not built without them.
        built = build_model(model_of(model, [key for key, _ in schedule[: 1 + max(first.values())]]))
        keep_share(_blocks(built), tensor_parallel)
        if kind == "cuda":
            _fuse_norms(built)
        works = {
            layer: _work_of(_blocks(built)[layer], layer, example, checkpointing, choices) for layer in first.values()
        }
        shell = built
        shell.blocks = nn.ModuleList()
        outside = _counted(lambda: _run_outside(shell, example, chunked_loss))
        parameters = sum(parameter.numel() for parameter in shell.parameters())
    layers = [works[first[kind]] for kind in schedule]
    blocks: Counter[Call] = Counter()
    for work in layers:
        blocks.update(work.calls)
    return StepWork(
        blocks=blocks,
        outside=outside.calls,
        operator_calls=sum(work.operator_calls for work in layers),
        parameters=parameters + sum(work.memory.parameters for work in layers),
        memory=tuple(work.memory for work in layers),
    )


@dataclass(frozen=True)
class BlockWork:
    """What a block computes beside its operators, how often these run, and what it holds; forward and backward."""

    calls: Counter[Call]
    operator_calls: int
    memory: BlockMemory


def work_of_blocks(
    model: ModelConfig, example: Example, *, kind: str, checkpointing: bool, choices: Sequence[NodeChoice]
) -> list[BlockWork]:
    """The work of each block of a model."""
    with FakeTensorMode():
        built = build_model(model)
        if kind == "cuda":
            _fuse_norms(built)
        return [_work_of(block, layer, example, checkpointing, choices) for layer, block in enumerate(_blocks(built))]


def _work_of(
    block: Block, layer: int, example: Example, checkpointing: bool, choices: Sequence[NodeChoice]
) -> BlockWork:
    figures: dict[str, Figure] = {}
    for choice in choices:
        if choice.layer == layer and choice.used and choice.figure:
            before = figures.get(choice.operator, choice.figure)
            figures[choice.operator] = max(before, choice.figure, key=lambda figure: figure.peak_bytes)
    with _Counter() as counter:
        memory = block_memory(block, example, checkpointing=checkpointing, figures=figures)
    return BlockWork(counter.calls, counter.operator_calls, memory)


class _Counter(TorchDispatchMode):
    """Notes every call of aten, and how often operators of ours run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()
        self.operator_calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "subquad":
            self.operator_calls += 1
        elif func.namespace == "aten" and func.overloadpacket.__name__ not in ALLOCATES and not _is_view(func):
            formula = flop_registry.get(func.overloadpacket)
            flops = 0 if formula is None else int(formula(*args, **(kwargs or {}), out_val=result))
            moved = sum(_bytes_of(leaf) for leaf in tree_leaves((args, kwargs, result)))
            self.calls[Call(flops, moved)] += 1
        return result


def _counted(run: Callable[[], None]) -> _Counter:
    counter = _Counter()
    with counter:
        run()
    return counter


def _is_view(func: Any) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _bytes_of(leaf: object) -> int:
    """What is read or written of a tensor: all of it, or what it expands."""
    return min(leaf.nbytes, leaf.untyped_storage().nbytes()) if isinstance(leaf, Tensor) else 0


def _fuse_norms(model: nn.Module) -> None:
    """CUDA computes an RMS norm in one kernel each way; on shapes it falls apart, where a layer norm does not."""
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = lambda x, of=module: F.layer_norm(x, of.normalized_shape, of.weight)  # type: ignore[method-assign, assignment, misc]


def _run_outside(shell: LanguageModel, example: Example, chunked_loss: bool) -> None:
    """Embedding, final norm, head, and the mean cross entropy of training."""
    tokens = torch.empty(example.tokens_shape, dtype=torch.int64)
    with torch.set_grad_enabled(example.training), autocast(torch.device("cpu"), example.dtype):
        if example.training and chunked_loss:
            nats = shell(tokens, None, tokens)
        else:
            logits = shell(tokens)
            if example.training:
                nats = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="sum")
    if example.training:
        (nats / tokens.numel()).backward()


def _blocks(model: nn.Module) -> list[Block]:
    return list(model.blocks)  # type: ignore[arg-type, call-overload, no-any-return]
