"""Write the chosen kernel into every operator node."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from subquad.compiler.capture import copy_graph, kernel_of, operator_nodes, set_kernel
from subquad.contracts import GraphPass, PassOutcome


def select_kernels(choices: Mapping[str, str]) -> GraphPass:
    """A pass that gives each named operator node its kernel, and leaves the others to their defaults.

    `choices` maps node names to `kernel` arguments. The graph handed in is not changed; the new one shares its
    parameters.
    """

    def run(graph_module: fx.GraphModule) -> PassOutcome:
        selected = copy_graph(graph_module)
        report = []
        for node, operator in operator_nodes(selected.graph):
            if node.name in choices:
                before = kernel_of(node)
                set_kernel(node, choices[node.name])
                report.append(f"{node.name}: {operator.name} {before} -> {choices[node.name]}")
            else:
                report.append(f"{node.name}: {operator.name} keeps {kernel_of(node)}: nothing was chosen for it")
        selected.recompile()
        return PassOutcome(selected, tuple(report))

    return run
