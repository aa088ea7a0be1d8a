"""Let operator nodes go on from the tokens before the part of a sequence that a rank holds."""

from __future__ import annotations

from torch import fx

from subquad.compiler.capture import copy_graph, operator_nodes
from subquad.contracts import GraphPass, PassOutcome
from subquad.parallel.operators import on_part
from subquad.parallel.part import NotSplitError, SequencePart
from subquad_kernels.torch_operator import named_arguments


def split_sequence(part: SequencePart) -> GraphPass:
    """A pass that puts nodes before and after each operator node which fetch what it needs of the parts before.

    The operator stays a node, and a scan of the part that sums it up is one too: both get kernels, which are chosen
    for the shapes of a part. It stands before `select_kernels` for that reason. The pass raises NotSplitError for an
    operator that cannot be computed on a part.
    """

    def run(graph_module: fx.GraphModule) -> PassOutcome:
        split = copy_graph(graph_module)
        tracer = fx.proxy.GraphAppendingTracer(split.graph)
        report = []
        for node, operator in list(operator_nodes(split.graph)):
            arguments = {
                name: fx.Proxy(value, tracer) if isinstance(value, fx.Node) else value
                for name, value in named_arguments(node.target, node.args, dict(node.kwargs)).items()
            }
            with split.graph.inserting_before(node):
                try:
                    results = on_part(part, operator.name, arguments)
                except NotSplitError as error:
                    raise NotSplitError(f"it calls {operator.name}: {error}") from None
            node.replace_all_uses_with(results.node)
            split.graph.erase_node(node)
            report.append(f"{node.name}: {operator.name} goes on from one of {part.count} ranks to the next")
        split.recompile()
        return PassOutcome(split, tuple(report))

    return run
