"""How a method of a mixer is traced: submodules are leaves, and sizes may be unpacked where their number is known."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn


class MixerTracer(fx.Tracer):
    """Traces a method of a mixer; `shares`: it takes tensors of other layers, last."""

    def __init__(self, method: str, *, shares: bool) -> None:
        super().__init__()
        self.traced_func_name = method
        self._shares = shares
        self._input_dims = 2 if method in ("decode", "decode_in_place") else 3  # x_t: b d, else x: b t d

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        if "shared" in inspect.signature(root_fn).parameters:
            # An argument with a default makes a graph with a default, which fx cannot write beside flattened ones.
            root_fn = _without_defaults(root_fn, self._shares)
        return super().create_args_for_root(root_fn, is_module, concrete_args)

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """`*x.shape[:2]`, a size after the other; fx knows no number of dimensions and would refuse."""
        sizes = self.sizes(obj.node)
        return super().iter(obj) if sizes is None else iter([obj[size] for size in range(sizes)])  # type: ignore[index]

    def sizes(self, node: fx.Node) -> int | None:
        """How many sizes a node holds: the input's shape, by contract, or a slice of any shape; None if unknown."""
        if not _is_shape(node):
            return None
        if node.target is not operator.getitem:
            return self._input_dims if _is_input(node.args[0]) else None
        shape, part = node.args
        if not isinstance(part, slice) or any(isinstance(end, fx.Node) for end in (part.start, part.stop, part.step)):
            return None
        known = self.sizes(shape)  # type: ignore[arg-type]
        if known is not None:
            return len(range(known)[part])
        start, stop = part.start or 0, part.stop
        # A slice that counts from the front holds as many as it says, whatever comes behind.
        counts_from_the_front = stop is not None and start >= 0 <= stop and part.step in (None, 1)
        return max(0, stop - start) if counts_from_the_front else None


class _Proxy(fx.Proxy):
    tracer: MixerTracer

    @property
    def shape(self) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr, (self, "shape"), {})

    def __len__(self) -> int:
        sizes = self.tracer.sizes(self.node)
        return int(super().__len__()) if sizes is None else sizes


def _is_shape(node: fx.Node) -> bool:
    """`x.shape`, `x.size()`, or a part of one."""
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_shape(node.args[0])
    return node.target is getattr and node.args[1] == "shape"


def _is_input(node: object) -> bool:
    """The tokens are the first input of a graph."""
    return isinstance(node, fx.Node) and node.op == "placeholder" and node.prev.op == "root"


def _without_defaults(method: Callable[..., Any], shares: bool) -> Callable[..., Any]:
    """A method of a mixer that can share: of two arguments where it does not, of three where it does."""
    if method.__name__ == "forward":
        if shares:
            return lambda self, x, cu_seqlens, shared: method(self, x, cu_seqlens, shared)
        return lambda self, x, cu_seqlens: method(self, x, cu_seqlens)
    if shares:
        return lambda self, x, carry, shared: method(self, x, carry, shared)
    return lambda self, x, carry: method(self, x, carry)
