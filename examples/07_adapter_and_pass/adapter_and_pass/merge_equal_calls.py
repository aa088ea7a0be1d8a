"""A pass: where a mixer calls one operator twice with equal arguments, the second call takes the first one's results.

Operators are functions of their arguments, so that this changes no bit: two branches of a mixer that rotate the same
queries and keys, say. A graph that writes in place is left as it is: one result in two hands must not be written to.
"""

from __future__ import annotations

import operator

from torch import fx
from torch._ops import OpOverload

from subquad import PassOutcome, copy_graph


def merge_equal_calls(graph_module: fx.GraphModule) -> PassOutcome:
    """Merge; the graph handed in is not changed, and parameters are shared with the new one."""
    if any(_writes_in_place(graph_module, node) for node in graph_module.graph.nodes):
        return PassOutcome(graph_module, ("left as it is: it writes in place",))
    merged = copy_graph(graph_module)
    first: dict[tuple[object, str, str], fx.Node] = {}
    report = []
    for node in list(merged.graph.nodes):
        if not _is_pure(node):
            continue
        # As text, in which a node stands by its name: slices have no hash before Python 3.12, and 1 equals True.
        known = first.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if known is not node:
            node.replace_all_uses_with(known)  # so that what reads equal results has equal arguments, too
            merged.graph.erase_node(node)
            report.append(f"{node.name}: the same as {known.name}")
    merged.recompile()
    return PassOutcome(merged, tuple(report))


def _is_pure(node: fx.Node) -> bool:
    is_operator = isinstance(node.target, OpOverload) and node.target.namespace == "subquad"
    return node.op == "call_function" and (is_operator or node.target is operator.getitem)


def _writes_in_place(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(graph_module.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    called = node.op in ("call_function", "call_method")
    return called and (name.endswith("_") or name == "setitem" or bool(node.kwargs.keys() & {"inplace", "out"}))
