"""The methods of a mixer as torch.fx graphs that share its parameters; operators are single nodes.

The module tree stays: only what a mixer computes in its own methods is traced, its submodules are leaves. A carry, and
what a mixer reads of other layers, is flattened by pytree, so that a graph's inputs are tensors and integers.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import PH, _assert_is_none
from torch.utils._pytree import tree_map

from subquad.compiler.example import IN_PLACE, METHODS, Method
from subquad.compiler.shapes_only import shapes_only
from subquad.compiler.tracer import MixerTracer
from subquad.contracts import NOTHING_SHARED, DecodesInPlace, Sharing
from subquad_kernels.catalogue import CATALOGUE, Operator
from subquad_kernels.torch_operator import named_arguments

Graphs = dict[Method, fx.GraphModule]
_GRAPHS = "_subquad_graphs"
_INSTALLED = ("forward", "prefill", "decode", "decode_in_place")


@dataclass(frozen=True)
class Captured:
    """The graphs of one mixer, why a method has none, and what plugins' passes say that they did to them."""

    graphs: Graphs
    declined: Mapping[str, str] = field(default_factory=dict)
    reports: tuple[str, ...] = ()


def capture(mixer: nn.Module, sharing: Sharing = NOTHING_SHARED, methods: Sequence[Method] = METHODS) -> Captured:
    """Trace methods of a mixer. A method whose Python depends on values is declined, and runs as it is.

    Of one that shares tensors with other layers, what is traced reads and publishes them. Of one that was compiled
    before, what is traced is the mixer as it is written. What decodes in place is traced where a mixer offers it and
    shares nothing; its graph writes to the carry it is given, in the order in which the mixer does.
    """
    graphs: Graphs = {}
    declined: dict[str, str] = {}
    with _as_written(mixer):
        for method in methods:
            if method == IN_PLACE and (sharing or not isinstance(mixer, DecodesInPlace)):
                continue
            try:
                graphs[method] = _trace(mixer, method, sharing)
            except Exception as error:  # tracing runs a stranger's code on proxies; whatever it raises is a reason
                declined[method] = _reason(error, mixer)
    return Captured(graphs, declined)


@contextmanager
def _as_written(mixer: nn.Module) -> Iterator[None]:
    """Without the graphs that `install` let its methods run: their signatures are flat, and their kernels chosen."""
    held = {name: mixer.__dict__.pop(name) for name in _INSTALLED if installed_graphs(mixer) and name in mixer.__dict__}
    try:
        yield
    finally:
        mixer.__dict__.update(held)


def _reason(error: Exception, mixer: nn.Module) -> str:
    """What was raised, in a sentence, and the line of the mixer's file that raised it."""
    said = f"{type(error).__name__}: {error}".splitlines()[0].partition(". ")[0]
    try:
        written = inspect.getsourcefile(type(mixer))
    except TypeError:  # a class of an interactive session
        return said
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == written]
    return f"{said} ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})" if own else said


def _trace(mixer: nn.Module, method: Method, sharing: Sharing) -> fx.GraphModule:
    tracer = MixerTracer("forward" if method == "packed" else method, shares=bool(sharing))
    concrete: dict[str, Any] = {}
    if method == "forward":
        concrete["cu_seqlens"] = None
    elif method in ("prefill", "decode"):
        carry: Any = mixer.empty_carry(1)  # type: ignore[operator]
        concrete["carry"] = tree_map(lambda leaf: PH, carry)
    elif method == IN_PLACE:
        with shapes_only(next(mixer.parameters(), None)):
            roomy: Any = mixer.with_room(mixer.empty_carry(1), 1)  # type: ignore[operator]
        concrete["carry"] = tree_map(lambda leaf: PH, roomy)
    if sharing:
        concrete["shared"] = dict.fromkeys(sharing.reads, PH)
    graph = tracer.trace(mixer, concrete_args=concrete or None)
    for node in graph.nodes:
        # The check that boundaries are None: the dispatch between the two graphs of `forward` has made it.
        if node.op == "call_function" and node.target is _assert_is_none:
            graph.erase_node(node)
    return holding(mixer, graph, f"{type(mixer).__name__}_{method}")


def holding(owner: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A GraphModule whose parameters, buffers and submodules are the owner's own, whatever replaces them later."""
    module = fx.GraphModule(owner, graph, class_name=name)
    for kind in ("_parameters", "_buffers", "_modules"):
        # The very dictionaries: `load_state_dict(assign=True)`, `.to()` and FSDP replace their entries.
        module.__dict__[kind] = owner.__dict__[kind]
    return module


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A graph for a pass to edit (then `recompile()` it): new nodes, the very same parameters, buffers, submodules."""
    graph = fx.Graph(tracer_cls=getattr(graph_module.graph, "_tracer_cls", None))
    graph.output(graph.graph_copy(graph_module.graph, val_map={}))
    graph._codegen = graph_module.graph._codegen
    return holding(graph_module, graph, type(graph_module).__name__)


def install(mixer: nn.Module, graphs: Graphs) -> None:
    """Let the mixer's methods run these graphs. The instance, its state_dict and its attributes stay as they are."""
    # Plain attributes, not submodules: the graphs must not appear in state_dict, nor be visited by `apply`.
    original: Callable[..., Tensor] = type(mixer).forward.__get__(mixer)
    mixer.__dict__["forward"] = _Forward(graphs.get("forward"), graphs.get("packed"), original)
    for method in _INSTALLED[1:]:
        if method in graphs:
            mixer.__dict__[method] = graphs[method]
        else:
            mixer.__dict__.pop(method, None)
    mixer.__dict__[_GRAPHS] = graphs


@dataclass(frozen=True)
class _Forward:
    """`forward` of a mixer, by its two graphs; an object, so that a deep copy has graphs of its own.

    The graphs of a mixer that shares tensors take one input more, in place of which nothing can stand.
    """

    whole: fx.GraphModule | None
    packed: fx.GraphModule | None
    original: Callable[..., Any]

    def __call__(self, x: Tensor, cu_seqlens: Tensor | None = None, *shared: Mapping[str, Tensor]) -> Any:
        graph = self.whole if cu_seqlens is None else self.packed
        return (self.original if graph is None else graph)(x, cu_seqlens, *shared)


def installed_graphs(mixer: nn.Module) -> Graphs:
    """The graphs that a mixer runs; empty if it was never compiled."""
    return mixer.__dict__.get(_GRAPHS, {})  # type: ignore[no-any-return]


def operator_of(node: fx.Node) -> Operator | None:
    """The operator that a node calls, None for any other node."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    namespace, _, name = node.target.name().partition("::")
    return CATALOGUE.operator(name.partition(".")[0]) if namespace == "subquad" else None


def operator_nodes(graph: fx.Graph) -> Iterator[tuple[fx.Node, Operator]]:
    """The operator nodes of a graph, in order."""
    for node in graph.nodes:
        operator = operator_of(node)
        if operator is not None:
            yield node, operator


def kernel_of(node: fx.Node) -> str:
    """The `kernel` argument of an operator node."""
    return str(named_arguments(node.target, node.args, dict(node.kwargs))["kernel"])


def set_kernel(node: fx.Node, text: str) -> None:
    """Give an operator node another `kernel` argument."""
    arguments = named_arguments(node.target, node.args, dict(node.kwargs))
    node.args = tuple((arguments | {"kernel": text}).values())
    node.kwargs = {}
