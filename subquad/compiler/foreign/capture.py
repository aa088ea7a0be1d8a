"""A whole foreign model as one graph of aten operators, each with the module that called it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from subquad.compiler.foreign.torch_private import no_look_at_mask_values
from subquad.errors import ConfigError

_under_capture = False


def is_capturing() -> bool:
    """Whether a model is being captured: one that was rewritten then runs as it was written."""
    return _under_capture


@dataclass(frozen=True)
class Call:
    """How a model is called."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, example_inputs: object) -> Call:
        """From a mapping of keyword arguments, a tuple or list of positional ones, or a single tensor.

        Raises: ConfigError.
        """
        if isinstance(example_inputs, Tensor):
            return cls((example_inputs,), {})
        if isinstance(example_inputs, Mapping):  # the encodings of a tokenizer are mappings, too
            return cls((), {str(name): value for name, value in example_inputs.items()})
        if isinstance(example_inputs, tuple | list):
            return cls(tuple(example_inputs), {})
        raise ConfigError(
            what=f"the example inputs are of type {type(example_inputs).__name__}",
            where="example_inputs",
            mend="give a tensor, a tuple of positional arguments or a dictionary of keyword arguments",
        )


@dataclass(frozen=True)
class Program:
    """A captured model: `values` are those of the graph's inputs, parameters and buffers by placeholder.

    `owners` maps a node to the path of the innermost module that called it; `inputs` names placeholders that a caller
    fills, `trained` those of parameters with gradients.
    """

    graph: fx.Graph
    values: Mapping[str, Any]
    owners: Mapping[fx.Node, str]
    inputs: Mapping[str, str]
    trained: frozenset[str]

    def ancestors(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The nodes and all that they are computed from."""
        found: set[fx.Node] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += node.all_input_nodes
        return found

    def evaluate(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, Any]:
        """What these nodes are on the example, computed from no more than they need."""
        wanted = list(nodes)
        needed = self.ancestors(wanted)
        computed: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in self.graph.nodes:
                if node not in needed:
                    continue
                if node.op == "placeholder":
                    computed[node] = self.values[node.name]
                elif node.op == "call_function":
                    args, kwargs = fx.node.map_aggregate(  # type: ignore[misc]
                        (node.args, node.kwargs), lambda part: computed[part] if isinstance(part, fx.Node) else part
                    )
                    computed[node] = node.target(*args, **kwargs)
                else:
                    raise NotImplementedError(f"{node.op} {node.target}")
        return {node: computed[node] for node in wanted}


class _Tensors(nn.Module):
    """A model whose result is the tensors in its output: caches and other objects are no business of a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(self.model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def capture_program(model: nn.Module, call: Call) -> Program:
    """The graph of one call, in the mode (training or not) that the model is in. The model is not changed.

    Raises: ConfigError when the model cannot be traced, with the tracer's reason.
    """
    with _capturing(), no_autocast_cache(), no_look_at_mask_values(), torch.enable_grad():
        try:
            exported = torch.export.export(_Tensors(model), (call.args, dict(call.kwargs)), strict=False)
        except Exception as error:  # tracing runs a stranger's code on fake tensors; it may raise anything
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ConfigError(
                what=f"the model cannot be captured: {type(error).__name__}: {reason}",
                where=type(model).__name__,
                mend="compile the part of it that can be traced, or leave the model as it is",
            ) from error
    signature = exported.graph_signature
    held = {**dict(_Tensors(model).state_dict(keep_vars=True)), **exported.state_dict, **exported.constants}
    user_inputs = [name for name in signature.user_inputs if isinstance(name, str)]
    values = {name: held[target] for name, target in signature.inputs_to_parameters.items()}
    values |= {name: held[target] for name, target in signature.inputs_to_buffers.items()}
    values |= {name: held[target] for name, target in signature.inputs_to_lifted_tensor_constants.items()}
    leaves = tree_leaves((call.args, dict(call.kwargs)))
    placeholders = [node.name for node in exported.graph.nodes if node.op == "placeholder"]
    values |= dict(zip(placeholders[len(placeholders) - len(leaves) :], leaves))
    trained = frozenset(
        name for name, target in signature.inputs_to_parameters.items() if held[target].requires_grad
    )
    return Program(
        graph=exported.graph,
        values=values,
        owners={node: _owner(node) for node in exported.graph.nodes},
        inputs={name: name.removeprefix("kwargs_") for name in user_inputs},
        trained=trained,
    )


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Keep autocast from remembering weights that it cast for us: the caller's own calls want theirs with gradients."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def _capturing() -> Iterator[None]:
    global _under_capture
    before, _under_capture = _under_capture, True
    try:
        yield
    finally:
        _under_capture = before


def _owner(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next((path for path, _ in reversed(list(stack.values()))), "")
    return path.removeprefix("model").removeprefix(".")
