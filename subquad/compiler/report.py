"""A plan as text: per operator node the chosen kernel, its rivals, where each figure comes from, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from subquad.compiler.assignment import Assignment
from subquad.compiler.layer_numbers import layer_numbers
from subquad.compiler.plan import Figure, NodeChoice, Plan, StepPrediction, Uncaptured


def format_plan(plan: Plan) -> str:
    """The report of a plan; equal nodes of several layers share a row."""
    example = plan.example
    b, t = example["tokens_shape"]
    use = "training" if example["training"] else "inference"
    lines = [
        f"target {plan.target} ({plan.origin}), {use}, batch {b}, {t} tokens, {example['dtype']}"
        + (", packed documents" if example["packed"] else ""),
        "",
    ]
    if plan.assignment is not None:
        lines += [*assignment_lines(plan.assignment), ""]
    for equal in _groups(plan):
        lines += _node_lines(equal)
    lines.append(_total(plan))
    if plan.prediction is not None:
        lines += prediction_lines(plan.prediction)
    if plan.origin == "data sheet":
        lines.append(
            "nothing was measured here: figures marked bound come from a data sheet, and no kernel can be faster"
        )
    idle = sum(not choice.used for choice in plan.choices)
    if idle:
        lines.append(f"{idle} nodes of methods that this run does not call keep their defaults (plan.json lists them)")
    lines += uncaptured_lines(plan)
    lines += plan.notes
    return "\n".join(lines)


def uncaptured_lines(plan: Plan) -> list[str]:
    """What runs as written or is left out, and why: one line for equal layers and methods."""
    equal: dict[tuple[str, str, bool], list[Uncaptured]] = {}
    for entry in plan.uncaptured:
        equal.setdefault((entry.mixer, entry.reason, entry.runs), []).append(entry)
    return [
        f"layer {layer_numbers(entry.layer for entry in entries)} {mixer}."
        f"{', '.join(dict.fromkeys(entry.method for entry in entries))}"
        f" {'runs as written' if runs else 'is left out'}: {reason}"
        for (mixer, reason, runs), entries in equal.items()
    ]


def decoded_by(kernels: Mapping[str, str]) -> str:
    """Which kernels a decoded token runs, by operator."""
    return f"decoded by {'; '.join(f'{operator} {names}' for operator, names in kernels.items()) or 'no kernel'}"


def assignment_lines(assignment: Assignment) -> list[str]:
    """Which mixers were chosen, from what, under which budgets, and what came next."""
    b, t = assignment.tokens_shape
    lines = [f"mixers of {len(assignment.auto)} auto layers, budgets at batch {b}, {t} tokens"]
    lines.append(f"  quality  {assignment.quality}")
    for key, cost in assignment.candidates.items():
        layers = [layer for layer, chosen in enumerate(assignment.schedule) if chosen == key]
        figures = f"{seconds_text(cost.charged_s):>10} {cost.source:<9} {bytes_text(cost.memory_bytes):>11} memory"
        lines.append(
            f"         {'*' if layers else ' '} {key:<18} {figures} {bytes_text(cost.carry_bytes):>11} carry"
            + (f"   layer {layer_numbers(layers)}" if layers else "")
        )
    for name, total in assignment.totals.items():
        shown = seconds_text if name.endswith("_s") else bytes_text
        limit = assignment.budgets.get(name)
        lines.append(f"  {name:<13} {shown(total)}" + ("" if limit is None else f" of {shown(limit)}"))
    proof = "no schedule within the budgets has less" if assignment.proven else "the search ran out of time"
    lines.append(f"  loss     {assignment.total_loss:.6g} ({proof})")
    reasons: dict[str, list[int]] = {}
    for layer in assignment.auto:
        reasons.setdefault(f"{assignment.schedule[layer]}: {assignment.reasons[layer]}", []).append(layer)
    lines += [f"  why      layer {layer_numbers(layers)} {reason}" for reason, layers in reasons.items()]
    for other in assignment.alternatives:
        changes = [
            f"{layer} {key}" for layer, (key, chosen) in enumerate(zip(other.schedule, assignment.schedule))
            if key != chosen
        ]  # fmt: skip
        lines.append(f"  next     loss {other.loss:.6g} with layer {', '.join(changes)}")
    if assignment.declined:
        lines.append("  not      " + "; ".join(f"{key}: {reason}" for key, reason in assignment.declined.items()))
    return lines


def prediction_lines(step: StepPrediction) -> list[str]:
    """A training step's predicted seconds and memory, part by part, against the budgets."""
    lines = []
    if step.seconds is not None and step.low_s is not None and step.high_s is not None:
        parts = ", ".join(f"{name} {seconds_text(part_s)}" for name, part_s in step.parts.items())
        interval = f"[{seconds_text(step.low_s)} .. {seconds_text(step.high_s)}]"
        lines.append(f"step  {seconds_text(step.seconds)} predicted {interval}: {parts}")
        if step.host_s > sum(step.parts.values()):
            lines.append(f"      the host is the slower: {step.calls} calls need about {seconds_text(step.host_s)}")
        if (limit := step.budgets.get("latency_s")) is not None:
            blocks_s = sum(step.parts[name] for name in ("operators", "matrix products", "elementwise"))
            lines.append(f"      of all blocks {_against(blocks_s, limit, seconds_text)} (budget.latency_s)")
    if step.peak_bytes is not None:
        parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in step.memory.items())
        lines.append(f"peak  {bytes_text(step.peak_bytes)} predicted: {parts}")
        if (limit := step.budgets.get("memory_bytes")) is not None:
            lines.append(f"      {_against(step.peak_bytes, limit, bytes_text)} (budget.memory_bytes)")
    return [*lines, *(f"      {note}" for note in step.notes)]


def _against(value: float, limit: float, shown: Callable[[float], str]) -> str:
    return f"{shown(value)} of {shown(limit)}{', over it' if value > limit else ''}"


PLAN_COLUMNS = ("layers", "operator", "kernel", "one call, forward and backward", "why")
"""Of `choice_table`."""


def choice_table(plan: Plan) -> list[tuple[str, str, str, str, str]]:
    """Rows for a report: layers, operator, kernel, seconds with their source, why."""
    rows = []
    for equal in _groups(plan):
        first = equal[0]
        figure = first.figure
        seconds = "" if figure is None else f"{seconds_text(figure.seconds)} ({figure.source})"
        rows.append((_layers(equal), f"{first.operator} in {first.mixer}", first.chosen, seconds, first.reason))
    return rows


def failures(plan: Plan) -> list[str]:
    """A line for each kernel that was left out because it failed, in its self-check or at the size of the run."""
    found = [
        f"{choice.operator}/{name} {reason}"
        for choice in plan.choices
        for name, reason in choice.declined.items()
        if reason.startswith("failed ")
    ]
    return list(dict.fromkeys(found))


def _groups(plan: Plan) -> list[list[NodeChoice]]:
    groups: dict[object, list[NodeChoice]] = {}
    for choice in plan.choices:
        if choice.used:
            key = (choice.method, choice.node, choice.mixer, choice.operator, choice.kernel, choice.dtype,
                   _pairs(choice.shape), _pairs(choice.options))  # fmt: skip
            groups.setdefault(key, []).append(choice)
    return list(groups.values())


def _node_lines(equal: list[NodeChoice]) -> list[str]:
    first = equal[0]
    phases = " + ".join(first.phases)
    count = "" if len(equal) == 1 else f"   x {len(equal)}"
    lines = [
        f"{first.operator}  in {first.mixer}.{first.method}, layer {_layers(equal)}",
        f"  shape    {_pairs(first.shape)}   {_pairs(first.options)}   {first.dtype}   {phases}",
        f"  kernel   {first.chosen}{count}"
        + ("" if first.kernel == first.chosen else f"   (node argument: {first.kernel})"),
    ]
    for figure in first.figures:
        mark = "*" if figure.kernel == first.chosen else " "
        lines.append(f"         {mark} {figure.kernel:<16} {_figure(figure)}")
    lines.append(f"  why      {first.reason}")
    lines += _regret(first)
    lines += [f"  note     {', '.join(kernels)}: {note}" for note, kernels in _notes(first).items()]
    if first.declined:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in first.declined.items())
        lines.append(f"  not      {reasons}")
    return [*lines, ""]


def _regret(choice: NodeChoice) -> list[str]:
    """How much longer the choice takes than the fastest, where rivals were measured beside it."""
    measured = [figure for figure in choice.figures if figure.source == "measured"]
    chosen = choice.figure
    if len(measured) < 2 or chosen is None or chosen.source != "measured":
        return []
    best = min(measured, key=lambda figure: figure.seconds)
    lost = chosen.seconds / best.seconds - 1
    return [f"  regret   {lost:.1%}, {best.kernel} is the fastest of {len(measured)} measured"]


def _notes(choice: NodeChoice) -> dict[str, list[str]]:
    """Why a better source did not answer, and of which kernels."""
    notes: dict[str, list[str]] = {}
    for figure in choice.figures:
        if figure.note:
            notes.setdefault(figure.note, []).append(figure.kernel)
    return notes


def _figure(figure: Figure) -> str:
    interval = f"[{seconds_text(figure.low_s)} .. {seconds_text(figure.high_s)}]"
    return f"{seconds_text(figure.seconds):>10}  {interval:<26} {figure.source}"


def seconds_text(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def bytes_text(size: float) -> str:
    """Bytes in the largest unit that leaves a whole number before the point."""
    for unit, width in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= width:
            return f"{size / width:.2f} {unit}"
    return f"{size:.0f} B"


def _layers(equal: Iterable[NodeChoice]) -> str:
    return layer_numbers(choice.layer for choice in equal)


def _pairs(values: Mapping[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def _total(plan: Plan) -> str:
    sources = {choice.figure.source for choice in plan.choices if choice.used and choice.figure}
    if not sources:
        return "no operator was estimated"
    left_out = ", without what runs as written" if any(entry.runs for entry in plan.uncaptured) else ""
    return f"total {seconds_text(plan.seconds)} for all operators ({', '.join(sorted(sources))}){left_out}"
