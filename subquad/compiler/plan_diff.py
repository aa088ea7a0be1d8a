"""What two plans do differently: where they were made, which mixers they chose, and which kernels run."""

from __future__ import annotations

from subquad.compiler.plan import NodeChoice, Plan


def plan_diff(old: Plan, new: Plan) -> list[str]:
    """A line per difference; none for plans that do the same. Figures alone are no difference, and shown beside it.

    Nodes that neither run calls keep their defaults and are not compared.
    """
    lines = []
    if old.target != new.target:
        lines.append(f"target  {old.target} -> {new.target}")
    for name in sorted(old.versions.keys() | new.versions.keys()):
        if old.versions.get(name) != new.versions.get(name):
            lines.append(f"version {name} {old.versions.get(name, 'none')} -> {new.versions.get(name, 'none')}")
    for name in sorted(old.example.keys() | new.example.keys()):
        if old.example.get(name) != new.example.get(name):
            lines.append(f"example {name} {old.example.get(name)} -> {new.example.get(name)}")
    exchanged = set()
    for layer in range(max(len(old.schedule), len(new.schedule))):
        before, after = (plan.schedule[layer] if layer < len(plan.schedule) else "none" for plan in (old, new))
        if before != after:
            exchanged.add(layer)
            lines.append(f"layer   {layer} {before} -> {after}{_losses(old, new, layer)}")
    first, second = _used(old), _used(new)
    for place in sorted(first.keys() | second.keys()):
        one, other = first.get(place), second.get(place)
        if place[0] in exchanged:
            continue
        if (one and one.chosen, one and one.kernel_version) != (other and other.chosen, other and other.kernel_version):
            known = one or other
            assert known is not None
            where = f"layer {place[0]} {known.mixer}.{place[1]} {known.operator}"
            lines.append(f"kernel  {where}: {_kernel(one)} -> {_kernel(other)}")
    if lines:
        lines.append(f"seconds {old.seconds:.6g} -> {new.seconds:.6g} for all operators")
    return lines


def _used(plan: Plan) -> dict[tuple[int, str, str], NodeChoice]:
    return {choice.place: choice for choice in plan.choices if choice.used}


def _kernel(choice: NodeChoice | None) -> str:
    if choice is None:
        return "not called"
    seconds = "" if choice.figure is None else f" ({choice.figure.seconds * 1e3:.4g} ms, {choice.figure.source})"
    return f"{choice.chosen}{f' of {choice.kernel_version}' if choice.kernel_version else ''}{seconds}"


def _losses(old: Plan, new: Plan, layer: int) -> str:
    losses = [
        f"{plan.assignment.loss[layer][key]:.4g}"
        for plan in (old, new)
        if plan.assignment is not None
        and layer < len(plan.assignment.schedule)
        and (key := plan.assignment.schedule[layer]) in plan.assignment.loss[layer]
    ]
    return f" (loss {' -> '.join(losses)})" if len(losses) == 2 else ""
