"""How far rows that wait for the host can be predicted at all, and how far off the learned model is on them and others:
host_noise.py ROWS [--judge S0,S1]

A kernel composed of torch operations that launches the same ones at every size asks the same of the host each time:
what queueing it took in one run, over the median there, is noise to any model of work. What is left of it at the
host's pace beside each timing is noise to a model that is told this pace. Where launches are many, and as many as the
sequence is long, it is what one of them took.

With `--judge` forward and backward together, of shapes or layouts not seen, by what limits them.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from subquad_cost_model import CostRow, LearnedEstimator, TimedRow, read_timed_rows
from subquad_cost_model.splits import splits
from subquad_cost_model.terms import MOST_FUSED, head_start_s
from subquad_cost_model.timed_rows import timed
from subquad_cost_model.trees import Trees

TREES = Trees(rounds=150, leaves=7, spread_rounds=37, spread_leaves=3)
LEAST_ROWS, MANY = 6, 100
LIMITS = ("fused", "composed, the device", "composed, the host", "composed, what queueing took is not known")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean distance of what queueing a launch took from its median, as a share; and what the pace does not explain."""

    rows: int
    raw: float
    at_pace: float


def spreads(rows: Sequence[TimedRow]) -> dict[str, Spread]:
    """By kernel and phase, of rows of one run and dtype, and of the same launches and options where these are few."""
    same: dict[tuple[object, ...], list[tuple[float, float]]] = defaultdict(list)
    for one in rows:
        row = one.row
        if one.queued_s is None or one.host_s is None or row.launches <= MOST_FUSED or row.phase == "decode":
            continue
        if "documents" in row.shape:
            continue  # what is launched depends on their lengths
        options = tuple(sorted((name, str(value)) for name, value in row.options.items()))
        what = (row.launches, *options) if row.launches < MANY else ()
        launch_s = one.queued_s / row.launches
        same[f"{row.operator}/{row.kernel} {row.phase}", one.run_id, row.dtype, what].append(
            (launch_s, launch_s / one.host_s)
        )
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (name, *_), pairs in same.items():
        if len(pairs) >= LEAST_ROWS:
            found[str(name)] += zip(*map(_distances, zip(*pairs, strict=True)), strict=True)
    found["all"] = [pair for of in list(found.values()) for pair in of]
    return {
        name: Spread(
            rows=len(of), raw=statistics.mean(raw for raw, _ in of), at_pace=statistics.mean(paced for _, paced in of)
        )
        for name, of in sorted(found.items())
        if of
    }


def _distances(values: Sequence[float]) -> list[float]:
    middle = statistics.median(values)
    return [abs(value / middle - 1) for value in values]


def limit(one: TimedRow) -> str:
    """What a row takes: its device's work or, where queueing took longer than the head start, that."""
    if one.row.launches <= MOST_FUSED:
        return LIMITS[0]
    if one.queued_s is None:
        return LIMITS[3]
    # Longer than twice the row: the device was busy, and the host waited for room in its queue.
    return LIMITS[2] if head_start_s(one.device) < one.queued_s < 2 * one.seconds else LIMITS[1]


def judged(rows: Sequence[TimedRow], protocol: str) -> dict[str, list[float]]:
    """Relative errors of forward and backward together, by what limits either: of two limits, the later in `LIMITS`."""
    found: dict[str, list[float]] = defaultdict(list)
    for split in splits(rows, protocol):
        learned = replace(LearnedEstimator.fit([rows[i] for i in split.fit], trees=TREES), abstains=False)
        for forward, backward in _pairs([rows[index] for index in split.judge]):
            asked: list[CostRow] = [forward.row, backward.row]
            predicted_s = sum(estimate.seconds for estimate in learned.predict(asked, forward.device))
            error = abs(predicted_s / (forward.seconds + backward.seconds) - 1)
            found[max(limit(forward), limit(backward), key=LIMITS.index)].append(error)
    return found


def _pairs(rows: Sequence[TimedRow]) -> Iterator[tuple[TimedRow, TimedRow]]:
    halves: dict[tuple[str, str], dict[str, TimedRow]] = defaultdict(dict)
    for one in rows:
        halves[one.device.name, replace(one.row, phase="").key][one.row.phase] = one
    for of in halves.values():
        if {"forward", "backward"} <= of.keys():
            yield of["forward"], of["backward"]


def main() -> None:
    """Print both as tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="parquet file, or a folder of them")
    parser.add_argument("--judge", default="", help="splits, with commas between")
    given = parser.parse_args()
    rows = timed(read_timed_rows(given.rows))
    print("| the same launches in one run | rows | off their median % | at the host's pace % |\n|---|---|---|---|")
    for name, of in spreads(rows).items():
        print(f"| {name} | {of.rows} | {100 * of.raw:.0f} | {100 * of.at_pace:.0f} |")
    for protocol in filter(None, given.judge.split(",")):
        errors = judged(rows, protocol)
        whole = sum(map(sum, errors.values()))
        print(
            f"\n| {protocol}: limited by | pairs | error % mean / median | share of all errors % |\n|---|---|---|---|"
        )
        for name in sorted(errors, key=LIMITS.index):
            of_it = errors[name]
            mean, median = statistics.mean(of_it), statistics.median(of_it)
            print(f"| {name} | {len(of_it)} | {100 * mean:.3g} / {100 * median:.3g} | {100 * sum(of_it) / whole:.0f} |")


if __name__ == "__main__":
    main()
