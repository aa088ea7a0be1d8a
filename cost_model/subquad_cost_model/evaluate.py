"""Judge estimators on rows they did not see: what choosing by them loses first, how far off they are last."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from operator import itemgetter

from subquad_cost_model.calibration import CalibratedEstimator
from subquad_cost_model.constant import ConstantEstimator
from subquad_cost_model.device import Device
from subquad_cost_model.estimator import Estimate, Estimator
from subquad_cost_model.learned import LearnedEstimator
from subquad_cost_model.measure import Timing
from subquad_cost_model.measurements import Measurement
from subquad_cost_model.metrics import (
    Summary,
    coverage,
    error_factor,
    interval_factor,
    random_regret,
    regret,
    relative_errors,
)
from subquad_cost_model.roofline import RooflineEstimator
from subquad_cost_model.rows import CostRow
from subquad_cost_model.shape_groups import shape_group
from subquad_cost_model.splits import Split, splits
from subquad_cost_model.timed_rows import TimedRow, timed
from subquad_cost_model.trees import USUAL, Trees

Fit = Callable[[Sequence[TimedRow], Sequence[TimedRow]], Mapping[str, Estimator]]
"""The estimators to compare, fitted to rows, and to those of the held-out device that were given back."""
MOST_MEASURED = 3
"""Rivals of a cell that are measured where intervals overlap."""
STEADY = 0.015
"""Rows whose repeats lie within 3 % of each other (spec 5, rule 5)."""
Cell = Mapping[str, int]
"""The rivals for one shape, phase and dtype on one device: kernel to index of its row."""
Choose = Callable[[Cell], int]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One way to choose on the judged rows of one split.

    `regret` is over cells: a shape, phase and dtype on a device with rivals (`cells` of them); `time_regret` is the sum
    of chosen over the sum of best seconds - 1. `error`, `covered` and `width` are over rows; None for selectors that
    predict nothing. `answered` is the share of rows that the model did not leave to its fallback. `steady_error` is
    over the rows whose repeats agree, `phase_errors` over those of each phase, `training_error` over sums of a kernel's
    forward and backward, `steady_training_error` over those whose rows are steady both, `peak_error` over peak bytes;
    `noise` is half the range of a row's repeats over its median, the floor under every error. `measured` is how many
    rivals of a cell a choice measured.
    """

    split: str
    held_out: str
    fitted: int
    judged: int
    cells: int
    selector: str
    regret: Summary | None = None
    time_regret: float | None = None
    error: Summary | None = None
    error_factor: float | None = None
    covered: float | None = None
    width: float | None = None
    answered: float | None = None
    steady_error: Summary | None = None
    phase_errors: Mapping[str, Summary] = field(default_factory=dict)
    training_error: Summary | None = None
    steady_training_error: Summary | None = None
    peak_error: Summary | None = None
    noise: Summary | None = None
    measured: float | None = None


def judge(rows: Sequence[TimedRow], split: Split, fit: Fit) -> list[Verdict]:
    """The verdict on each estimator, on choosing at random, on the oracle, and on always taking one kernel.

    Always-X is judged on the cells where X was measured: it has no answer elsewhere.
    """
    seen, asked = [rows[index] for index in split.fit], [rows[index] for index in split.judge]
    cells = _cells(asked)
    blank = Verdict(
        split=split.name, held_out=split.held_out, fitted=len(seen), judged=len(asked), cells=len(cells), selector=""
    )
    verdicts = []
    given = [rows[index] for index in split.given]
    for name, estimator in fit(seen, given).items():
        estimates = estimates_of(estimator, asked)
        predicted_s, measured_s = [estimate.seconds for estimate in estimates], [row.seconds for row in asked]
        lost, time_lost = _choosing(cells, _fastest(predicted_s), asked)
        steady, training, steady_training, peaks = _errors(estimates, asked)
        verdicts.append(
            replace(
                blank,
                selector=name,
                regret=lost,
                time_regret=time_lost,
                error=Summary.of(relative_errors(predicted_s, measured_s)),
                error_factor=error_factor(predicted_s, measured_s),
                covered=coverage(estimates, measured_s),
                width=interval_factor(estimates),
                answered=sum(estimate.source == "model" for estimate in estimates) / len(estimates),
                noise=Summary.of([row.doubt for row in asked]),
                steady_error=steady,
                phase_errors=_phase_errors(predicted_s, asked),
                training_error=training,
                steady_training_error=steady_training,
                peak_error=peaks,
            )
        )
        if cells:
            lost, time_lost, measured = _measuring(cells, estimates, asked)
            selector = f"{name}, at most {MOST_MEASURED} measured"
            verdicts.append(replace(blank, selector=selector, regret=lost, time_regret=time_lost, measured=measured))
    if not cells:
        return verdicts
    lost, time_lost = _choosing(cells, _fastest([row.seconds for row in asked]), asked)
    verdicts.append(replace(blank, selector="oracle", regret=lost, time_regret=time_lost))
    for kernel in sorted({kernel for cell in cells for kernel in cell}):
        having = [cell for cell in cells if kernel in cell]
        lost, time_lost = _choosing(having, itemgetter(kernel), asked)
        verdicts.append(
            replace(blank, selector=f"always {kernel}", cells=len(having), regret=lost, time_regret=time_lost)
        )
    drawn = [random_regret({kernel: asked[index].seconds for kernel, index in cell.items()}) for cell in cells]
    return [*verdicts, replace(blank, selector="random", regret=Summary.of(drawn))]


def evaluate(
    rows: Sequence[TimedRow], protocols: Sequence[str], *, trees: Trees = USUAL, salt: str = "", given_back: str = ""
) -> Iterator[Verdict]:
    """The verdicts of the learned model, roofline and constant on every split of these protocols, as they come.

    Of S6 only splits whose names hold `given_back` are judged (`16 chosen`).

    `learned` abstains where it would in use (the roofline answers); `learned, always` says what it would have said;
    `calibrated` is fitted without the rows of a device that were given back, and corrected by them; `physics` has no
    trees, and the intervals of those that have. Where rows know the host's pace, `learned, usual host` is told none and
    `learned, own pace` that of the very timing; `learned` has what the probe found.
    """

    @lru_cache(maxsize=16)  # S5, and S6 without what it is given back, however many rows that are
    def learn(indices: frozenset[int]) -> LearnedEstimator:
        return LearnedEstimator.fit([able[index] for index in sorted(indices)], trees=trees)

    def fit(seen: Sequence[TimedRow], given: Sequence[TimedRow]) -> dict[str, Estimator]:
        learned = learn(frozenset(places[id(row)] for row in seen))
        found: dict[str, Estimator] = {
            "learned": learned,
            "learned, always": replace(learned, abstains=False),
            "physics": replace(
                learned, heads={phase: replace(h, trees=None, process=None) for phase, h in learned.heads.items()}
            ),
            "roofline": RooflineEstimator(),
            "constant": _constant(seen),
        }
        if paces_s:
            found["learned, usual host"] = _Paced(learned, {})
            found["learned, own pace"] = _Paced(learned, paces_s)
        theirs = {id(row) for row in given}
        before = [row for row in seen if id(row) not in theirs]
        if {row.device.name for row in given} - {row.device.name for row in before}:
            beside = {row.device.name: row.device for row in before}
            here, *alike = {row.device.name: row.device for row in able if row.device.name not in beside}.values()
            found["calibrated"] = CalibratedEstimator.fit(
                given,
                here,
                learn(frozenset(places[id(row)] for row in before)),
                beside=tuple(beside.values()),
                alike=alike,
            )
        return found

    able = timed(rows)
    places = {id(row): index for index, row in enumerate(able)}
    paces_s = {(row.device.name, row.row.key): row.host_s for row in able if row.host_s is not None}
    for protocol in protocols:
        for split in splits(able, protocol, salt=salt):
            if protocol != "S6" or given_back in split.name:
                yield from judge(able, split, fit)


@dataclass(frozen=True)
class _Paced:
    """An estimator that is told the host's pace of each row on a device; of others that nobody knows it.

    What was captured waits for no host whatever is known.
    """

    source: Estimator
    paces_s: Mapping[tuple[str, str], float]

    @property
    def name(self) -> str:
        return self.source.name

    def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
        if device.host_s == 0.0:
            return self.source.predict(rows, device)
        by_pace: dict[float | None, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            by_pace[self.paces_s.get((device.name, row.key))].append(index)
        found: dict[int, Estimate] = {}
        for host_s, here in by_pace.items():
            estimates = self.source.predict([rows[i] for i in here], replace(device, host_s=host_s))
            found |= dict(zip(here, estimates, strict=True))
        return [found[index] for index in range(len(rows))]


@dataclass(frozen=True, kw_only=True)
class KernelErrors:
    """How far off one kernel's phase is on the judged rows of a split; `share` is its part of the sum of all errors."""

    kernel: str
    phase: str
    rows: int
    error: Summary
    noise: Summary
    share: float


def errors_by_kernel(
    rows: Sequence[TimedRow], protocol: str, *, trees: Trees = USUAL, salt: str = ""
) -> list[KernelErrors]:
    """Of the learned model, on every split of this protocol together; those that weigh most come first."""
    able = timed(rows)
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    noise: dict[tuple[str, str], list[float]] = defaultdict(list)
    for split in splits(able, protocol, salt=salt):
        learned = replace(LearnedEstimator.fit([able[i] for i in split.fit], trees=trees), abstains=False)
        asked = [able[index] for index in split.judge]
        estimates = estimates_of(learned, asked)
        found = relative_errors([one.seconds for one in estimates], [row.seconds for row in asked])
        for row, error in zip(asked, found, strict=True):
            key = f"{row.row.operator}/{row.row.kernel}", row.row.phase
            errors[key].append(error)
            noise[key].append(row.doubt)
    whole = sum(map(sum, errors.values()))
    tables = [
        KernelErrors(
            kernel=kernel, phase=phase, rows=len(of_it), error=Summary.of(of_it),
            noise=Summary.of(noise[kernel, phase]), share=sum(of_it) / whole,
        )
        for (kernel, phase), of_it in errors.items()
    ]  # fmt: skip
    return sorted(tables, key=lambda one: -one.share)


def as_line(verdict: Verdict) -> str:
    """One JSON line."""
    return json.dumps(asdict(verdict), sort_keys=True)


HEADER = (
    "| split | held out | fitted / judged | selector | regret mean / p95 / max % (cells) "
    "| error mean / median / p90 % | of each phase | of steady rows | of forward + backward | of steady ones "
    "| of peak bytes | noise mean / median % | in 90 % interval (factor) | answered |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def as_markdown(verdict: Verdict) -> str:
    """One line of the table that `HEADER` opens."""
    lost, noise = verdict.regret, verdict.noise

    def errors(of: Summary | None) -> str:
        return _percent(of.mean, of.median, of.p90) if of else ""

    cells = (
        verdict.split,
        verdict.held_out,
        f"{verdict.fitted} / {verdict.judged}",
        verdict.selector + (f" ({verdict.measured:.1f})" if verdict.measured is not None else ""),
        f"{_percent(lost.mean, lost.p95, lost.largest)} ({verdict.cells})" if lost else "",
        errors(verdict.error),
        "; ".join(f"{phase} {errors(of)}" for phase, of in verdict.phase_errors.items()),
        errors(verdict.steady_error),
        errors(verdict.training_error),
        errors(verdict.steady_training_error),
        errors(verdict.peak_error),
        _percent(noise.mean, noise.median) if noise else "",
        f"{verdict.covered:.1%} ({verdict.width:.2f})" if verdict.covered is not None else "",
        f"{verdict.answered:.0%}" if verdict.answered is not None else "",
    )
    return f"| {' | '.join(cells)} |"


KERNEL_HEADER = (
    "| kernel | phase | rows | error mean / median / p90 % | noise mean / median % | share of all errors % |\n"
    "|---|---|---|---|---|---|"
)


def kernel_as_markdown(of: KernelErrors) -> str:
    """One line of the table that `KERNEL_HEADER` opens."""
    error, noise = _percent(of.error.mean, of.error.median, of.error.p90), _percent(of.noise.mean, of.noise.median)
    return f"| {of.kernel} | {of.phase} | {of.rows} | {error} | {noise} | {_percent(of.share)} |"


def _percent(*values: float) -> str:
    return " / ".join(f"{100 * value:.3g}" for value in values)


def _cells(rows: Sequence[TimedRow]) -> list[dict[str, int]]:
    found: dict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    for index, row in enumerate(rows):
        key = row.device.name, shape_group(row.row), row.row.phase, row.row.dtype
        found[key].setdefault(row.row.kernel, index)
    return [cell for cell in found.values() if len(cell) > 1]


def _choosing(cells: Sequence[Cell], choose: Choose, rows: Sequence[TimedRow]) -> tuple[Summary | None, float | None]:
    """Regret over cells, and of all seconds together."""
    if not cells:
        return None, None
    lost, chosen_s, best_s = [], 0.0, 0.0
    for cell in cells:
        measured_s = {kernel: rows[index].seconds for kernel, index in cell.items()}
        chosen = rows[choose(cell)]
        lost.append(regret(chosen.row.kernel, measured_s))
        chosen_s += chosen.seconds
        best_s += min(measured_s.values())
    return Summary.of(lost), chosen_s / best_s - 1


def _measuring(
    cells: Sequence[Cell], estimates: Sequence[Estimate], rows: Sequence[TimedRow]
) -> tuple[Summary | None, float | None, float]:
    """Regret where the rivals that may be the fastest are measured, the most promising ones first."""
    counts: list[int] = []

    def choose(cell: Cell) -> int:
        best_high_s = min(estimates[index].high_s for index in cell.values())
        still_open = [index for index in cell.values() if estimates[index].low_s <= best_high_s]
        promising = sorted(still_open, key=lambda index: estimates[index].seconds)
        measured = promising[:MOST_MEASURED] if len(promising) > 1 else []
        counts.append(len(measured))
        return min(measured, key=lambda index: rows[index].seconds) if measured else promising[0]

    lost, time_lost = _choosing(cells, choose, rows)
    return lost, time_lost, sum(counts) / len(counts)


def _errors(
    estimates: Sequence[Estimate], rows: Sequence[TimedRow]
) -> tuple[Summary | None, Summary | None, Summary | None, Summary | None]:
    """Errors of the steady rows, of sums of forward and backward, of those of steady rows, and of peak bytes."""
    pairs = [(estimate.seconds, row.seconds) for estimate, row in zip(estimates, rows, strict=True)]
    steady = [row.doubt <= STEADY for row in rows]
    peaks = [(e.peak_bytes, r.peak_bytes) for e, r in zip(estimates, rows, strict=True) if r.peak_bytes]
    halves: dict[tuple[str, ...], dict[str, tuple[float, float, bool]]] = defaultdict(dict)
    for pair, row, is_steady in zip(pairs, rows, steady, strict=True):
        halves[row.device.name, replace(row.row, phase="").key][row.row.phase] = *pair, is_steady
    wholes: list[tuple[float, float]] = []
    steady_wholes: list[tuple[float, float]] = []
    for of in halves.values():
        if {"forward", "backward"} <= set(of):
            (said_s, took_s, one), (more_s, longer_s, other) = of["forward"], of["backward"]
            wholes.append((said_s + more_s, took_s + longer_s))
            steady_wholes += wholes[-1:] if one and other else []

    def summary(of: Sequence[tuple[float, float]]) -> Summary | None:
        return Summary.of(relative_errors(*zip(*of, strict=True))) if of else None

    return (
        summary([pair for pair, is_steady in zip(pairs, steady, strict=True) if is_steady]),
        summary(wholes),
        summary(steady_wholes),
        summary(peaks),
    )


def _phase_errors(predicted_s: Sequence[float], rows: Sequence[TimedRow]) -> dict[str, Summary]:
    errors: dict[str, list[float]] = defaultdict(list)
    for row, error in zip(rows, relative_errors(predicted_s, [row.seconds for row in rows]), strict=True):
        errors[row.row.phase].append(error)
    return {phase: Summary.of(errors[phase]) for phase in sorted(errors)}


def _fastest(seconds: Sequence[float]) -> Choose:
    return lambda cell: min(cell.values(), key=lambda index: seconds[index])


def estimates_of(estimator: Estimator, rows: Sequence[TimedRow]) -> list[Estimate]:
    """What an estimator says of each row on its device, as it was probed."""
    by_device: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_device[row.device.name, bool(row.cuda_graph)].append(index)
    found: dict[int, Estimate] = {}
    for indices in by_device.values():
        first = rows[indices[0]]
        device = first.on(first.device)
        found |= dict(zip(indices, estimator.predict([rows[i].row for i in indices], device), strict=True))
    return [found[index] for index in range(len(rows))]


def _constant(rows: Sequence[TimedRow]) -> ConstantEstimator:
    def measurement(row: TimedRow) -> Measurement:
        low_s, high_s = row.low_s or math.nan, row.high_s or math.nan
        timing = Timing(low_s=low_s, median_s=row.seconds, high_s=high_s, repeats=row.repeats or 1)
        return Measurement.of(row.row, row.device, timing)

    return ConstantEstimator.fit(measurement(row) for row in rows)
