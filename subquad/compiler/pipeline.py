"""Compile a model: capture its mixers, let plugins' passes run, choose kernels, and let the mixers run the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import fx, nn

from subquad.compiler.capture import Captured, Graphs, capture, install, installed_graphs, kernel_of, operator_nodes
from subquad.compiler.choose import Choice, Chooser
from subquad.compiler.example import IN_PLACE, METHODS, Example, Method
from subquad.compiler.layer_numbers import layer_numbers
from subquad.compiler.options import CompileOptions
from subquad.compiler.passes.select_kernels import select_kernels
from subquad.compiler.passes.split_sequence import split_sequence
from subquad.compiler.pins import given_way, without_effect
from subquad.compiler.plan import NodeChoice, Plan, Uncaptured
from subquad.compiler.seams import check_seams
from subquad.compiler.target import Target, resolve_target
from subquad.compiler.workload import node_workloads, phases
from subquad.contracts import GraphPass
from subquad.errors import ConfigError, PluginError
from subquad.model.block import Block
from subquad.model.language_model import LanguageModel
from subquad.parallel.part import NotSplitError, SequencePart
from subquad.registry import load_registry
from subquad_kernels.catalogue import CATALOGUE, Operator, load_attribute
from subquad_kernels.kernel_table import look_up
from subquad_kernels.self_check import stack_versions
from subquad_kernels.workload import Workload


def compile_model(
    model: LanguageModel,
    example: Example,
    *,
    target: str | Target = "auto",
    options: CompileOptions | None = None,
    plan: Plan | None = None,
    part: SequencePart | None = None,
) -> tuple[LanguageModel, Plan]:
    """Rewrite the model in place, so that each operator runs the kernel chosen for the target; return it and the plan.

    Parameters, state_dict keys, attributes and submodules stay. With a `plan`, its choices are followed and nothing is
    estimated or measured; a node it does not name keeps its operator's default, and the plan that is returned says so.
    With a `part` the example is that part of every sequence, and the model's methods compute on it once the part has
    joined the other ranks.
    Raises: ConfigError, NotFoundError.
    """
    where = resolve_target(target) if isinstance(target, str) else target
    captured = capture_model(model, example)
    if part is not None:
        captured = split_model(model, captured, example, part)
    if plan is None:
        plan = make_plan(model, captured, example, where, Chooser(where, options or CompileOptions()))
    elif list(plan.schedule) != [block.mixer_name for block in _blocks(model)]:
        raise ConfigError(
            what=f"the plan is for the mixers {', '.join(plan.schedule)}",
            where="plan",
            mend="use a plan of this model, or leave it out to choose anew",
        )
    else:
        plan = _with_unnamed(model, captured, example, plan)
    rewrite(model, captured, plan)
    model.part = part
    return model, plan


def capture_model(model: LanguageModel, example: Example) -> list[Captured]:
    """The graphs of every block's mixer that a use needs, after the passes that plugins add."""
    return [_with_plugin_passes(capture(block.mixer, block.sharing, example.captured)) for block in _blocks(model)]


def split_model(model: LanguageModel, captured: list[Captured], example: Example, part: SequencePart) -> list[Captured]:
    """The graphs on a part of every sequence, of the methods that the example uses.

    Raises: ConfigError that names the mixer which cannot be computed on one.
    """
    split, seen = [], set[tuple[str, ...]]()
    for block, of_block in zip(_blocks(model), captured):
        graphs, reports = dict(of_block.graphs), list(of_block.reports)
        for method in example.methods:
            try:
                if block.sharing:
                    raise NotSplitError("it shares tensors with other layers")
                if method not in graphs:
                    raise NotSplitError(f"its {method} has no graph: {of_block.declined.get(method)}")
                key = (method, graphs[method].code, *_looks(block.mixer))
                if key not in seen:  # layers repeat
                    check_seams(block.mixer, graphs[method], method, model.embedding.embedding_dim)
                    seen.add(key)
                outcome = split_sequence(part)(graphs[method])
            except NotSplitError as error:
                raise ConfigError(
                    what=f"the mixer '{block.mixer_name}' of layer {block.layer_index} cannot share a sequence with"
                    f" other ranks: {error}",
                    where="trainer.context_parallel",
                    mend="use trainer.context_parallel=1, or another mixer in that layer",
                ) from None
            graphs[method] = outcome.graph
            reports += outcome.report
        split.append(Captured(graphs, of_block.declined, tuple(reports)))
    return split


def make_plan(
    model: LanguageModel,
    captured: list[Captured],
    example: Example,
    target: Target,
    chooser: Chooser,
) -> Plan:
    """Choose a kernel for every operator node; what this run uses comes first, while the budget lasts."""
    nodes = sorted(
        _described_nodes(model, captured, example), key=lambda node: (node[1] not in example.methods, node[0])
    )
    # A layer whose operators have no kernel left to decode in place does without: `decode` is what it had anyway.
    left_out = {
        layer: reason
        for layer, method, _, operator, workload in nodes
        if method == IN_PLACE and (reason := chooser.nothing_left(operator, workload)) is not None
    }
    nodes = [node for node in nodes if node[1] != IN_PLACE or node[0] not in left_out]
    chooser.compile_ahead(
        (operator, workload, _trains(example, method))
        for _, method, _, operator, workload in nodes
        if method in example.methods
    )
    choices = []
    for layer, method, node, operator, workload in nodes:
        used, training = method in example.methods, _trains(example, method)
        choice = chooser.choose(operator, workload, training=training, used=used)
        choices.append(_node_choice(model, layer, method, node, workload, choice, training, used))
    choices.sort(key=lambda choice: (choice.layer, METHODS.index(choice.method), choice.node))  # type: ignore[arg-type]
    uncaptured = tuple(
        Uncaptured(layer=block.layer_index, mixer=block.mixer_name, method=method, reason=reason)
        for block, of_block in zip(_blocks(model), captured)
        for method, reason in of_block.declined.items()
    ) + tuple(
        Uncaptured(layer=layer, mixer=_blocks(model)[layer].mixer_name, method=IN_PLACE, reason=reason)
        for layer, reason in left_out.items()
    )
    notes = [f"measured for {chooser.measured_s:.1f} s"] if chooser.measured_s else []
    notes += given_way(choices, chooser.pins) + without_effect(choices, chooser.pins)
    done: dict[str, list[int]] = {}
    for block, of_block in zip(_blocks(model), captured):
        for line in of_block.reports:
            done.setdefault(f"{block.mixer_name}, {line}", []).append(block.layer_index)
    notes += [f"{line} (layer {layer_numbers(layers)})" for line, layers in done.items()]
    return Plan(
        target=target.device.name,
        origin=target.device.origin,
        versions=plan_versions(),
        example=asdict(example) | {"tokens_shape": list(example.tokens_shape)},
        schedule=tuple(block.mixer_name for block in _blocks(model)),
        choices=tuple(choices),
        uncaptured=uncaptured,
        notes=tuple(notes),
    )


def rewrite(model: LanguageModel, captured: list[Captured], plan: Plan) -> None:
    """Let every mixer run its graphs with the plan's kernels; what the plan leaves out does not decode in place."""
    for block, of_block in zip(_blocks(model), captured):
        graphs: Graphs = {}
        block.not_in_place = of_block.declined.get(IN_PLACE) or _why_left_out(plan, block)
        for method, graph_module in of_block.graphs.items():
            if method == IN_PLACE and block.not_in_place is not None:
                continue
            chosen = {
                choice.node: choice.kernel
                for choice in plan.choices
                if choice.layer == block.layer_index and choice.method == method
            }
            graphs[method] = select_kernels(chosen)(graph_module).graph
        install(block.mixer, graphs)


def compiled_graphs(model: LanguageModel) -> dict[tuple[int, Method], fx.GraphModule]:
    """The graphs that a compiled model's mixers run, by layer and method."""
    return {
        (block.layer_index, method): graph
        for block in _blocks(model)
        for method, graph in installed_graphs(block.mixer).items()
    }


def kernels_in_use(model: LanguageModel) -> dict[str, str]:
    """What each compiled mixer runs, by layer and method: its kernels in the order of their calls."""
    return {
        f"layer {layer}, {method}": "; ".join(f"{operator.name}: {kernel_of(node)}" for node, operator in nodes)
        for (layer, method), graph in compiled_graphs(model).items()
        if (nodes := list(operator_nodes(graph.graph)))
    }


def decoding_kernels(model: LanguageModel, b: int, *, in_place: bool) -> dict[str, str]:
    """What a decoded token of `b` sequences runs in a compiled model, by operator; all of them where layers differ.

    `in_place`: by the mixers that decode in place where they can, which is so in a graph.
    """
    found: dict[str, dict[str, None]] = {}
    for block in _blocks(model):
        graphs = installed_graphs(block.mixer)
        graph = (graphs.get(IN_PLACE) if in_place and not block.sharing else None) or graphs.get("decode")
        for node, operator in () if graph is None else operator_nodes(graph.graph):
            found.setdefault(operator.name, {})[look_up(kernel_of(node), b, 1)] = None
    return {operator: ", ".join(kernels) for operator, kernels in found.items()}


def plan_versions() -> dict[str, str]:
    """Versions on which a plan depends."""
    return dict(entry.split(" ", 1) for entry in stack_versions())  # type: ignore[misc]


def kernel_versions(plan: Plan) -> dict[str, str]:
    """The sources, as installed here, of the kernels that a plan uses; one that is not installed is left out."""
    kernels = {kernel.key: kernel for operator in CATALOGUE for kernel in CATALOGUE.kernels(operator.name)}
    return {key: kernels[key].version for key in plan.kernel_versions if key in kernels}


def _described_nodes(
    model: LanguageModel, captured: list[Captured], example: Example
) -> list[tuple[int, Method, str, Operator, Workload]]:
    described = []
    known: dict[tuple[str, ...], Mapping[str, Workload]] = {}  # layers repeat; running a graph on shapes takes long
    for block, of_block in zip(_blocks(model), captured):
        for method, graph_module in of_block.graphs.items():
            key = (method, graph_module.code, str(block.sharing), *_looks(block.mixer))
            if key not in known:
                d_model = model.embedding.embedding_dim
                known[key] = node_workloads(block.mixer, graph_module, method, example, d_model, block.sharing)
            for node, operator in operator_nodes(graph_module.graph):
                described.append((block.layer_index, method, node.name, operator, known[key][node.name]))
    return described


def _why_left_out(plan: Plan, block: Block) -> str | None:
    """Why a plan does not let a block decode in place; None if it does."""
    left_out = (entry for entry in plan.uncaptured if entry.layer == block.layer_index and not entry.runs)
    return next((entry.reason for entry in left_out), None)


def _with_unnamed(model: LanguageModel, captured: list[Captured], example: Example, plan: Plan) -> Plan:
    """The plan, with a note on the nodes of this use that it does not name: it may be older than their method."""
    named = {choice.place for choice in plan.choices}
    unnamed: dict[tuple[str, Method, str], list[int]] = {}
    for block, of_block in zip(_blocks(model), captured):
        for method, graph_module in of_block.graphs.items():
            if method not in example.methods or (method == IN_PLACE and _why_left_out(plan, block) is not None):
                continue
            for node, operator in operator_nodes(graph_module.graph):
                if (block.layer_index, method, node.name) not in named:
                    unnamed.setdefault((block.mixer_name, method, operator.name), []).append(block.layer_index)
    notes = tuple(
        f"layer {layer_numbers(layers)} {mixer}.{method}: the plan names no kernel of {operator}, its default runs"
        for (mixer, method, operator), layers in unnamed.items()
    )
    return replace(plan, notes=tuple(dict.fromkeys((*plan.notes, *notes)))) if notes else plan


def _looks(mixer: nn.Module) -> tuple[str, ...]:
    """What a mixer's graphs do to shapes depends on: its class, its submodules, and the shapes of what it holds."""
    held = (f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in mixer.state_dict(keep_vars=True).items())
    return (str(type(mixer)), repr(mixer), *held)


def _trains(example: Example, method: Method) -> bool:
    return example.training and method in ("forward", "packed")


def _node_choice(
    model: LanguageModel,
    layer: int,
    method: Method,
    node: str,
    workload: Workload,
    choice: Choice,
    training: bool,
    used: bool,
) -> NodeChoice:
    shape: Mapping[str, int] = workload.shape
    options: Mapping[str, Any] = workload.options
    return NodeChoice(
        layer=layer,
        mixer=_blocks(model)[layer].mixer_name,
        method=method,
        node=node,
        operator=workload.operator,
        kernel=choice.text,
        chosen=choice.kernel,
        shape=dict(shape),
        options=dict(options),
        dtype=workload.dtype,
        phases=tuple(part.phase for part in phases(workload, training)),
        figures=choice.figures,
        declined=dict(choice.declined),
        reason=choice.reason,
        used=used,
        kernel_version=CATALOGUE.kernel(workload.operator, choice.kernel).version,
        document_lengths=workload.document_lengths,
    )


def _with_plugin_passes(captured: Captured) -> Captured:
    graphs, reports = dict(captured.graphs), list[str]()
    for spec in load_registry().passes.values():
        run: GraphPass = load_attribute(spec.run)  # type: ignore[assignment]
        for method, graph_module in graphs.items():
            try:
                outcome = run(graph_module)
            except Exception as error:
                raise PluginError(
                    what=f"the pass '{spec.name}' failed: {type(error).__name__}: {error}".splitlines()[0],
                    where=load_registry().origin(spec),
                    mend="report it to its author, or uninstall the plugin",
                ) from error
            graphs[method] = outcome.graph
            reports += [f"pass {spec.name} in {method}: {line}" for line in outcome.report]
    return Captured(graphs, captured.declined, tuple(reports))


def _blocks(model: nn.Module) -> list[Block]:
    return list(model.blocks)  # type: ignore[arg-type, call-overload, no-any-return]
