"""Which kernel would be the fastest at other lengths and batches, as the estimator sees it; nothing is measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from typing import Any

from subquad.compiler.options import CompileOptions
from subquad.compiler.plan import Figure, NodeChoice, Plan
from subquad.compiler.target import Target
from subquad.compiler.workload import cost_row
from subquad_cost_model import CostRow, Estimator
from subquad_kernels.catalogue import CATALOGUE, Kernel
from subquad_kernels.torch_operator import default_kernels
from subquad_kernels.workload import Workload

LENGTHS = tuple(2**power for power in range(7, 18))
BATCHES = tuple(2**power for power in range(7))
"""128 to 131,072 tokens, 1 to 64 sequences; the run's own join them."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The candidates at one length and batch, fastest first, and why others are none.

    Equal estimates stand in the order of the operator's defaults. `sure`: the first one's slowest is no slower than any
    other's fastest.
    """

    b: int
    t: int
    figures: tuple[Figure, ...]
    declined: Mapping[str, str]

    @property
    def fastest(self) -> str | None:
        """None where no kernel can run."""
        return self.figures[0].kernel if self.figures else None

    @property
    def sure(self) -> bool:
        """Whether the intervals leave no other kernel a chance."""
        return bool(self.figures) and all(self.figures[0].high_s <= other.low_s for other in self.figures[1:])

    def seconds(self, kernel: str) -> float | None:
        """What is expected of a kernel here; None where it cannot run."""
        return next((figure.seconds for figure in self.figures if figure.kernel == kernel), None)


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """Along one batch, `later` takes over from `earlier` after `t_before` and no later than `t_after` tokens.

    `t` is where the straight lines between these two, on logarithmic axes, cross; None where `earlier` cannot run any
    more, or `later` not yet, and `reason` says why.
    """

    b: int
    earlier: str
    later: str
    t_before: int
    t_after: int
    t: int | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class ChoiceMap:
    """Cells over lengths and batches for the nodes of one operator that differ in nothing else."""

    operator: str
    mixer: str
    layers: tuple[int, ...]
    node: NodeChoice
    run: tuple[int, int]
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    cells: Mapping[tuple[int, int], Cell]

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels that are the fastest somewhere, in the order of their first length."""
        found = (self.cells[b, t].fastest for t in self.lengths for b in self.batches)
        return tuple(dict.fromkeys(kernel for kernel in found if kernel is not None))

    def crossovers(self, b: int) -> tuple[Crossover, ...]:
        """Where the fastest kernel changes along the lengths, at one batch."""
        found = []
        for before, after in pairwise(self.cells[b, t] for t in self.lengths):
            if before.fastest is None or after.fastest is None or before.fastest == after.fastest:
                continue
            found.append(_crossover(before, after))
        return tuple(found)


def choice_maps(plan: Plan, target: Target, options: CompileOptions, estimator: Estimator) -> tuple[ChoiceMap, ...]:
    """A map for every operator that the plan's run calls; equal nodes of several layers share one."""
    b, t = plan.example["tokens_shape"]
    groups: dict[object, list[NodeChoice]] = {}
    for choice in plan.choices:
        if choice.used:
            key = (choice.operator, choice.mixer, choice.dtype, choice.phases, tuple(choice.shape.items()),
                   tuple(choice.options.items()))  # fmt: skip
            groups.setdefault(key, []).append(choice)
    lengths, batches = tuple(sorted({*LENGTHS, t})), tuple(sorted({*BATCHES, b}))
    return tuple(
        ChoiceMap(
            operator=nodes[0].operator,
            mixer=nodes[0].mixer,
            layers=tuple(dict.fromkeys(node.layer for node in nodes)),
            node=nodes[0],
            run=(b, t),
            lengths=lengths,
            batches=batches,
            cells={
                (cell.b, cell.t): cell
                for cell in _cells(nodes[0], (b, t), lengths, batches, target, options, estimator)
            },
        )
        for nodes in groups.values()
    )


def node_rows(choice: NodeChoice, kernel: str) -> list[CostRow]:
    """The rows that ask how long a kernel takes for a node of a plan, one a phase."""
    operator = CATALOGUE.operator(choice.operator)
    return [
        cost_row(operator, CATALOGUE.kernel(choice.operator, kernel), workload)
        for workload in _workloads(choice, choice.shape, choice.document_lengths)
    ]


def _workloads(choice: NodeChoice, shape: Mapping[str, int], document_lengths: tuple[int, ...]) -> list[Workload]:
    known: dict[str, Any] = {"operator": choice.operator, "dtype": choice.dtype, "options": choice.options}
    return [
        Workload(shape=shape, document_lengths=document_lengths, phase=phase, **known)  # type: ignore[arg-type]
        for phase in choice.phases
    ]


def _cells(
    choice: NodeChoice,
    run: tuple[int, int],
    lengths: Sequence[int],
    batches: Sequence[int],
    target: Target,
    options: CompileOptions,
    estimator: Estimator,
) -> Iterable[Cell]:
    """All cells of a map; the estimator is asked once."""
    operator = CATALOGUE.operator(choice.operator)
    kernels, never = _runnable(choice, target, options)
    declined: dict[tuple[int, int], dict[str, str]] = {}
    rows: list[CostRow] = []
    asked: list[tuple[int, int, str, int]] = []  # b, t, kernel, how many rows
    for b in batches:
        for t in lengths:
            shape = _scaled(choice.shape, run, (b, t))
            longer = (length * t // run[1] for length in cycle(choice.document_lengths))
            workloads = _workloads(choice, shape, tuple(islice(longer, shape.get("documents", 0))))
            declined[b, t] = dict(never)
            for kernel in kernels:
                try:
                    refusals = [kernel.supports(workload, target.limits) for workload in workloads]
                    of_kernel = [cost_row(operator, kernel, workload) for workload in workloads]
                except Exception as error:  # a stranger's operator need not know every length
                    refusals = [f"{type(error).__name__}: {error}".splitlines()[0]]
                refusal = next((reason for reason in refusals if reason is not None), None)
                if refusal is not None:
                    declined[b, t][kernel.name] = refusal
                    continue
                asked.append((b, t, kernel.name, len(of_kernel)))
                rows += of_kernel
    estimates = iter(estimator.predict(rows, target.device) if rows else [])
    figures: dict[tuple[int, int], list[Figure]] = {place: [] for place in declined}
    for b, t, name, count in asked:
        figure = Figure.of(name, [next(estimates) for _ in range(count)])
        if figure.peak_bytes > target.device.memory_bytes:
            declined[b, t][name] = "does not fit into the device's memory"
        else:
            figures[b, t].append(figure)
    for (b, t), found in figures.items():
        ordered = tuple(sorted(found, key=lambda figure: figure.seconds))  # stable: equals stay in order
        yield Cell(b=b, t=t, figures=ordered, declined=declined[b, t])


def _runnable(choice: NodeChoice, target: Target, options: CompileOptions) -> tuple[list[Kernel], dict[str, str]]:
    """Kernels that may run for a node at some shape, the defaults first, and why others never do."""
    operator = CATALOGUE.operator(choice.operator)
    wanted = default_kernels(operator, target.kind)
    never: dict[str, str] = {}
    found = []
    for kernel in CATALOGUE.kernels(choice.operator):
        reason = choice.declined.get(kernel.name, "")
        pinned = options.pins.get(choice.operator, kernel.name)
        if options.denies(choice.operator, kernel.name) or pinned != kernel.name:
            never[kernel.name] = "forbidden by the recipe"
        elif target.limits.kind not in kernel.devices:
            never[kernel.name] = f"runs on {', '.join(sorted(kernel.devices))} only"
        elif (missing := kernel.missing()) is not None:
            never[kernel.name] = missing
        elif reason.startswith("failed "):
            never[kernel.name] = reason
        elif kernel.name == "reference" and wanted[0] != "reference" and choice.chosen != "reference":
            never[kernel.name] = "defines the operator; runs only where nothing else does"
        else:
            found.append(kernel)
    return sorted(found, key=lambda kernel: wanted.index(kernel.name) if kernel.name in wanted else len(wanted)), never


def _scaled(shape: Mapping[str, int], run: tuple[int, int], asked: tuple[int, int]) -> dict[str, int]:
    """The shape of a node in another batch and length; packed rows stay as many documents each.

    Axes that hold the run's batch or tokens follow; all other ones stay.
    """
    (b, t), (to_b, to_t) = run, asked
    if "documents" in shape:
        follow = {b * t: to_b * to_t}
        changed = {axis: follow.get(size, size) if axis in ("t", "s") else size for axis, size in shape.items()}
        return changed | {"documents": max(1, shape["documents"] * to_b // b)}
    changed = {axis: to_t if axis in ("t", "s") and size == t else size for axis, size in shape.items()}
    return changed | ({"b": to_b} if shape.get("b") == b else {})


def _crossover(before: Cell, after: Cell) -> Crossover:
    earlier, later = str(before.fastest), str(after.fastest)
    first = before.seconds(earlier), before.seconds(later)
    last = after.seconds(earlier), after.seconds(later)
    reason = None
    if last[0] is None:
        reason = f"{earlier} cannot run there: {after.declined.get(earlier, 'it is no candidate')}"
    elif first[1] is None:
        reason = f"{later} cannot run before: {before.declined.get(later, 'it is no candidate')}"
    t = None
    if reason is None:
        assert first[0] is not None and first[1] is not None and last[0] is not None and last[1] is not None
        ahead, behind = math.log(first[1] / first[0]), math.log(last[0] / last[1])
        share = ahead / (ahead + behind) if ahead + behind > 0 else 1.0
        t = round(before.t * (after.t / before.t) ** share)
    return Crossover(b=before.b, earlier=earlier, later=later, t_before=before.t, t_after=after.t, t=t, reason=reason)


def in_words(crossover: Crossover, device: str) -> str:
    """A crossover as a sentence."""
    where = f"between {crossover.t_before:,} and {crossover.t_after:,} tokens at batch {crossover.b}"
    if crossover.reason is not None:
        return f"On {device} {crossover.later} takes over {where}: {crossover.reason}."
    return f"On {device} {crossover.later} overtakes {crossover.earlier} at about t = {crossover.t:,} ({where})."


def without_crossover(choices: ChoiceMap, b: int, device: str) -> str:
    """What there is to say where the fastest kernel stays the same along all lengths of a batch."""
    cells = [choices.cells[b, t] for t in choices.lengths if choices.cells[b, t].figures]
    if not cells:
        return f"On {device} no kernel of {choices.operator} can run at batch {b}."
    first, rivals = cells[0].fastest, {figure.kernel for cell in cells for figure in cell.figures[1:]}
    if not rivals:
        return f"On {device} {first} is the only candidate at batch {b}."
    if all(len({figure.seconds for figure in cell.figures}) == 1 for cell in cells):
        return f"The estimator sees no difference between {first} and {', '.join(sorted(rivals))}: one bound."
    return f"On {device} {first} stays the fastest of {1 + len(rivals)} at batch {b}, as far as lengths were asked."
