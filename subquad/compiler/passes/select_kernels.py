"""Write the chosen kernel into every operator node."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from subquad.compiler.capture import kernel_of, operator_nodes, set_kernel, sharing
from subquad.contracts import GraphPass, PassOutcome


def select_kernels(choices: Mapping[str, str]) -> GraphPass:
    """A pass that gives each named operator node its kernel, and leaves the others to their defaults.

    `choices` maps node names to `kernel` arguments. The graph handed in is not changed; the new one shares its
    parameters.
    """

    def run(graph_module: fx.GraphModule) -> PassOutcome:
        graph = fx.Graph(tracer_cls=getattr(graph_module.graph, "_tracer_cls", None))
        output = graph.graph_copy(graph_module.graph, val_map={})
        graph.output(output)
        graph._codegen = graph_module.graph._codegen
        report = []
        for node, operator in operator_nodes(graph):
            if node.name in choices:
                before = kernel_of(node)
                set_kernel(node, choices[node.name])
                report.append(f"{node.name}: {operator.name} {before} -> {choices[node.name]}")
            else:
                report.append(f"{node.name}: {operator.name} keeps {kernel_of(node)}: nothing was chosen for it")
        return PassOutcome(sharing(graph_module, graph, type(graph_module).__name__), tuple(report))

    return run
