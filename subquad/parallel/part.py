"""Which part of every sequence a process holds, and how it learns what the parts before it hand on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import handle_torch_function, has_torch_function


class NotSplitError(Exception):
    """Why something cannot be computed on a part of a sequence; one line."""


@dataclass(eq=False)
class SequencePart:
    """Part `index` of `count` parts of t tokens each: tokens index t to (index + 1) t - 1 of every sequence.

    Until `join` it stands for the last part, the one that sees most, and serves for shapes alone: kernels are chosen
    before there are processes to talk to.
    """

    count: int
    index: int = -1
    _group: dist.ProcessGroup | None = field(default=None, repr=False)
    _nodes: dict[Callable[..., Any], Callable[..., Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.index < 0:
            self.index = self.count - 1

    def __deepcopy__(self, memo: object) -> SequencePart:
        return self  # graphs of a copied model go on exchanging with the same ranks

    def join(self, group: dist.ProcessGroup) -> None:
        """Exchange with these ranks, of which this one holds the part of its place in the group."""
        if dist.get_world_size(group) != self.count:
            raise ValueError(f"{dist.get_world_size(group)} ranks are in the group, for {self.count} parts")
        self._group, self.index = group, dist.get_rank(group)

    def total(self, count: Tensor) -> Tensor:
        """The sum over all parts, without a gradient."""
        total = count.clone()
        dist.all_reduce(total, group=self._joined())
        return total

    def before(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the parts before this one gave for these tensors, which have one type.  Shapes:  ...  ->  index ... each

        The gradient is an exchange too: every part must compute with the results, the first one also, whose are empty.
        """
        sizes = [tensor.numel() for tensor in tensors]
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        if not flat.numel():
            pieces = flat.new_empty(self.index, 0)
        elif isinstance(flat, FakeTensor):
            pieces = flat.new_empty(self.index, flat.numel())
        else:
            pieces = _Gathered.apply(flat, self._joined())[: self.index]
        return tuple(
            piece.reshape(self.index, *tensor.shape) for piece, tensor in zip(pieces.split(sizes, dim=1), tensors)
        )

    def _joined(self) -> dist.ProcessGroup:
        if self._group is None:
            raise RuntimeError("the part of a sequence has not joined the ranks that hold the others")
        return self._group

    def node(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(self, ...)`, which is one node in a graph that is being traced."""
        if function not in self._nodes:

            @wraps(function)
            def bound(*values: Any) -> Any:
                if has_torch_function(values):
                    return handle_torch_function(bound, values, *values)
                return function(self, *values)

            self._nodes[function] = bound
        return self._nodes[function]


class _Gathered(torch.autograd.Function):
    """All ranks' tensors on every rank; a rank's gradient is the sum of what all ranks have for its tensor.

    Shapes:  x: n  ->  ranks n
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = x.new_empty(dist.get_world_size(group), x.numel())
        dist.all_gather(list(gathered.unbind()), x, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        found = gradient.new_empty(gradient.shape[1])
        dist.reduce_scatter(found, list(gradient.contiguous().unbind()), group=ctx.group)
        return found, None
