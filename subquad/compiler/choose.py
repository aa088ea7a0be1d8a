"""Which kernel computes a workload on a target: candidates, checks, estimates, and a measurement where unsure."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from subquad.cache import user_cache
from subquad.compiler.compile_ahead import compile_ahead
from subquad.compiler.estimators import estimator_for
from subquad.compiler.measure_kernels import Measurer
from subquad.compiler.options import CompileOptions
from subquad.compiler.plan import Figure
from subquad.compiler.target import Target
from subquad.compiler.workload import cost_row, phases
from subquad.errors import ConfigError
from subquad_cost_model import Decision, Estimate, decide
from subquad_kernels.catalogue import CATALOGUE, Kernel, Operator
from subquad_kernels.first_calls import FirstCall
from subquad_kernels.kernel_table import Row, format_table
from subquad_kernels.self_check import VerdictStore
from subquad_kernels.torch_operator import default_kernels
from subquad_kernels.workload import Workload

REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen kernel of a workload: `text` is the node's argument, `figures` hold the choice first."""

    kernel: str
    text: str
    figures: tuple[Figure, ...]
    declined: Mapping[str, str]
    reason: str


class Chooser:
    """Chooses kernels for one target, and remembers equal workloads.

    A kernel is a candidate if it supports the workload on the target, is not denied, and, where the target is at hand,
    agrees with the reference on this machine. The default stays unless a rival is surely no slower.
    `compile_all`: kernels whose checks are known are compiled ahead as well.
    """

    def __init__(self, target: Target, options: CompileOptions, *, compile_all: bool = False) -> None:
        self._target, self._options, self._compile_all = target, options, compile_all
        self.first_calls: list[FirstCall] = []
        self.compiled_s = self.checked_s = 0.0
        folder = user_cache("verdicts")
        self._verdicts = VerdictStore(None if folder is None else folder / "verdicts.jsonl")
        self._measurer = Measurer(target, options.measure_budget_s)
        self._estimator = estimator_for(target, options, self._measurer.store)
        self._known: dict[tuple[str, bool, bool], Choice] = {}

    @property
    def pins(self) -> Mapping[str, str]:
        """The one kernel that each pinned operator must run."""
        return self._options.pins

    @property
    def measured_s(self) -> float:
        """Seconds spent on measuring so far."""
        return self._measurer.spent_s

    def compile_ahead(self, uses: Iterable[tuple[Operator, Workload, bool]]) -> None:
        """Compile the kernels that choosing for these will check, all at once; `uses` are workloads and `training`."""
        device = self._target.local
        if device is None:
            return
        started = time.perf_counter()
        jobs = [
            (kernel, phases(workload, training)[-1])
            for operator, workload, training in uses
            for kernel in self._may_run(operator, phases(workload, training))
        ]
        self.first_calls += compile_ahead(jobs, device, self._verdicts, again=self._compile_all)
        self.compiled_s += time.perf_counter() - started

    def _may_run(self, operator: Operator, workloads: tuple[Workload, ...]) -> list[Kernel]:
        candidates, _ = self._candidates(operator, workloads)
        pinned = self._options.pins.get(operator.name)
        return [candidates[pinned]] if pinned in candidates else list(candidates.values())

    def nothing_left(self, operator: Operator, workload: Workload) -> str | None:
        """Why no kernel may compute a workload; None where one may."""
        candidates, declined = self._sorted_out(operator, (workload,))
        return None if candidates else _none_left(operator, declined)

    def choose(self, operator: Operator, workload: Workload, *, training: bool, used: bool) -> Choice:
        """The choice for a node. One that this run does not use keeps its default, neither checked nor measured."""
        key = (workload.key, training, used)
        if key not in self._known:
            self._known[key] = self._choose(operator, phases(workload, training), used)
        return self._known[key]

    def _choose(self, operator: Operator, workloads: tuple[Workload, ...], used: bool) -> Choice:
        pinned = self._options.pins.get(operator.name)
        candidates, declined = self._candidates(operator, workloads)
        wanted = default_kernels(operator, self._target.kind)
        if pinned is not None:
            if pinned in candidates:
                figure = Figure.of(pinned, self._estimates(operator, candidates[pinned], workloads))
                return Choice(
                    kernel=pinned, text=pinned, figures=(figure,), declined=declined, reason="pinned by the recipe"
                )
            if used and not self._options.pins_give_way:
                raise ConfigError(
                    what=f"{operator.name}/{pinned} cannot run here: {declined[pinned]}",
                    where=f"kernel.{operator.name}",
                    mend=f"use one of {', '.join(candidates)}, or leave it out",
                )
        if REFERENCE in candidates and len(candidates) > 1 and wanted[0] != REFERENCE:
            del candidates[REFERENCE]
            declined[REFERENCE] = "defines the operator; runs only where nothing else does"
        default = _first(wanted, candidates)
        if not used:
            candidates = {default: candidates[default]}
        elif self._target.local is not None:
            self._drop_failing(operator, workloads, candidates, declined)
            default = _first(wanted, candidates)
        estimates = {name: self._total(operator, kernel, workloads) for name, kernel in candidates.items()}
        decision = decide(estimates, default)
        tried: set[str] = set()
        while untried := self._never_run(decision, estimates, used) - tried:
            self._drop_raising(operator, workloads, candidates, declined, sorted(untried))
            tried |= untried
            default = _first(wanted, candidates)
            estimates = {name: estimates[name] for name in candidates}
            decision = decide(estimates, default)
        if decision.to_measure and self._measures(used):
            rivals = [candidates[name] for name in decision.to_measure]
            if all([self._measurer.measure(operator, rivals, workload) for workload in workloads]):
                estimates = {name: self._total(operator, kernel, workloads) for name, kernel in candidates.items()}
                decision = decide(estimates, default)
        chosen = decision.choice
        order = sorted(candidates, key=lambda name: (name != chosen, estimates[name].seconds))
        return Choice(
            kernel=chosen,
            text=_text(workloads[0], chosen, default),
            figures=tuple(Figure.of(name, self._estimates(operator, candidates[name], workloads)) for name in order),
            declined=declined,
            reason=self._reason(decision, used),
        )

    def _never_run(self, decision: Decision, estimates: Mapping[str, Estimate], used: bool) -> set[str]:
        """Which of those that a choice among several may fall on were not yet seen to run at this size."""
        if not self._measures(used) or len(estimates) == 1:
            return set()
        return {name for name in decision.to_measure or (decision.choice,) if estimates[name].source != "measured"}

    def _reason(self, decision: Decision, used: bool) -> str:
        if not used:
            return "the default: this run does not call the node"
        if not decision.to_measure:
            return decision.reason
        why = "the device is not here" if self._target.local is None else "nothing was measured"
        return f"{decision.choice} stays: the estimates of {', '.join(decision.to_measure)} overlap, and {why}"

    def _measures(self, used: bool) -> bool:
        return used and self._options.measure and self._options.estimator == "measured"

    def _candidates(
        self, operator: Operator, workloads: tuple[Workload, ...]
    ) -> tuple[dict[str, Kernel], dict[str, str]]:
        candidates, declined = self._sorted_out(operator, workloads)
        if not candidates:
            raise ConfigError(what=_none_left(operator, declined), where="deny", mend="deny fewer kernels")
        return candidates, declined

    def _sorted_out(
        self, operator: Operator, workloads: tuple[Workload, ...]
    ) -> tuple[dict[str, Kernel], dict[str, str]]:
        candidates: dict[str, Kernel] = {}
        declined: dict[str, str] = {}
        for kernel in CATALOGUE.kernels(operator.name):
            refusals = [kernel.refusal(workload, self._target.limits) for workload in workloads]
            refusal = next((reason for reason in refusals if reason is not None), None)
            if self._options.denies(operator.name, kernel.name):
                refusal = "denied by the recipe"
            if refusal is None:
                candidates[kernel.name] = kernel
            else:
                declined[kernel.name] = refusal
        return candidates, declined

    def _drop_failing(
        self,
        operator: Operator,
        workloads: tuple[Workload, ...],
        candidates: dict[str, Kernel],
        declined: dict[str, str],
    ) -> None:
        device = self._target.local
        assert device is not None
        started = time.perf_counter()
        for name in list(candidates):
            verdict = self._verdicts.check(candidates[name], workloads[-1], device)
            if not verdict.passed:
                del candidates[name]
                declined[name] = f"failed its self-check: {verdict.reason}"
        self.checked_s += time.perf_counter() - started
        if not candidates:
            # The reference is the definition: it is held against itself in float64 and can only fail by rounding.
            candidates[REFERENCE] = CATALOGUE.kernel(operator.name, REFERENCE)
            declined.pop(REFERENCE, None)

    def _drop_raising(
        self,
        operator: Operator,
        workloads: tuple[Workload, ...],
        candidates: dict[str, Kernel],
        declined: dict[str, str],
        names: Iterable[str],
    ) -> None:
        """Leave out what cannot run at this size, though it could at that of its self-check; the last one stays."""
        for name in names:
            failures = (self._measurer.failure(operator, candidates[name], workload) for workload in workloads)
            reason = next((failure for failure in failures if failure is not None), None)
            if reason is not None and len(candidates) > 1:
                del candidates[name]
                declined[name] = f"failed at this size: {reason}"

    def _estimates(self, operator: Operator, kernel: Kernel, workloads: tuple[Workload, ...]) -> list[Estimate]:
        rows = [cost_row(operator, kernel, workload) for workload in workloads]
        return self._estimator.predict(rows, self._target.device)

    def _total(self, operator: Operator, kernel: Kernel, workloads: tuple[Workload, ...]) -> Estimate:
        figure = Figure.of(kernel.name, self._estimates(operator, kernel, workloads))
        return Estimate(
            seconds=figure.seconds,
            low_s=figure.low_s,
            high_s=figure.high_s,
            peak_bytes=figure.peak_bytes,
            source=figure.source,  # type: ignore[arg-type]
            note=figure.note,
        )


def _none_left(operator: Operator, declined: Mapping[str, str]) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in declined.items())
    return f"no kernel of {operator.name} is left ({reasons})"


def _first(wanted: tuple[str, ...], candidates: Mapping[str, Kernel]) -> str:
    """The most wanted default that is a candidate, else the first candidate."""
    return next((name for name in wanted if name in candidates), next(iter(candidates)))


def _text(workload: Workload, chosen: str, default: str) -> str:
    """The node's argument: another kernel than the default holds for the shapes it was chosen for, and below."""
    if chosen == default:
        return chosen
    return format_table([Row(chosen, max_b=workload.shape.get("b"), max_t=workload.shape.get("t")), Row(default)])
