"""A run times its own steps and sets them beside what was predicted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from subquad.compiler.plan import Plan, StepPrediction
from subquad.schema import RunConfig
from subquad.training import step_clock
from subquad.training.fit import train
from subquad.training.metrics import read_metrics
from subquad.training.run_folder import RunFolder
from subquad.training.step_clock import MeasuredStep, StepClock, comparison

TinyRun = Callable[..., RunConfig]
PREDICTION = StepPrediction(
    seconds=2.0, low_s=1.0, high_s=4.0, parts={"operators": 1.5, "optimizer": 0.5}, calls=7, host_s=0.0,
    peak_bytes=1000, memory={"loss": 400}, budgets={}, notes=("a note",),
)  # fmt: skip


class _Noted:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, values: Any) -> None:
        self.logged.append((step, dict(values)))

    def finish(self, exit_code: int) -> None:
        pass


def clocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durations: list[float], accumulate: int = 1
) -> tuple[RunFolder, _Noted]:
    """A clock that sees steps of these seconds, each behind an idle second."""
    now = [0.0]
    monkeypatch.setattr(step_clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    folder, tracker = RunFolder(tmp_path), _Noted()
    clock = StepClock(folder, tracker, PREDICTION)
    loop = SimpleNamespace(total_batch_idx=0)
    trainer: Any = SimpleNamespace(fit_loop=loop, accumulate_grad_batches=accumulate, global_step=0)
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    for seconds in durations:
        now[0] += 1.0
        for micro_batch in range(accumulate):
            clock.on_train_batch_start(trainer, module, None, 0)
            now[0] += seconds / accumulate
            trainer.global_step += micro_batch == accumulate - 1
            clock.on_train_batch_end(trainer, module, None, None, 0)
            loop.total_batch_idx += 1
    clock.on_train_end(trainer, module)
    return folder, tracker


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_median_of_twenty_steps_is_told_once_without_the_first_five(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    durations = [50.0] * 5 + [3.0, 5.0] * 9 + [4.0, 4.0] + [99.0] * 4
    folder, tracker = clocked(tmp_path, monkeypatch, durations, accumulate)
    record = json.loads(folder.prediction.read_text(encoding="utf-8"))
    measured = record["measured"]
    assert (measured["steps"], measured["skipped"], measured["peak_bytes"]) == (20, 5, None)
    assert [measured[name] for name in ("low_s", "seconds", "high_s")] == pytest.approx([3.0, 4.0, 5.0])
    assert record["ratio"] == {"seconds": pytest.approx(2.0)}
    assert record["predicted"]["parts"] == PREDICTION.parts
    ((step, figures),) = tracker.logged
    assert step == 25
    assert figures == {
        "step/measured_s": pytest.approx(4.0), "step/predicted_s": 2.0, "step/predicted_peak_bytes": 1000.0
    }  # fmt: skip


@pytest.mark.parametrize(("steps", "skipped"), [(1, 0), (2, 1), (9, 4), (11, 5)])
def test_a_short_run_tells_of_the_steps_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, skipped: int
) -> None:
    folder, _ = clocked(tmp_path, monkeypatch, [2.0] * steps)
    measured = json.loads(folder.prediction.read_text(encoding="utf-8"))["measured"]
    assert (measured["steps"], measured["skipped"]) == (steps - skipped, skipped)
    assert measured["seconds"] == pytest.approx(2.0)


def test_a_ratio_needs_both_figures() -> None:
    measured = MeasuredStep(seconds=3.0, low_s=2.0, high_s=4.0, steps=3, skipped=1, peak_bytes=2000)
    assert comparison(PREDICTION, measured)["ratio"] == {"seconds": 1.5, "peak_bytes": 2.0}
    unknown = replace(PREDICTION, seconds=None, peak_bytes=None)
    assert comparison(unknown, measured)["ratio"] == {}
    assert comparison(None, measured) == {"predicted": None, "measured": comparison(unknown, measured)["measured"],
                                          "ratio": {}}  # fmt: skip


def test_a_run_writes_predicted_beside_measured_and_says_so_in_its_report(tiny_run: TinyRun) -> None:
    result = train(tiny_run("run", max_steps=8))
    folder = RunFolder(result.run_dir)
    record = json.loads(folder.prediction.read_text(encoding="utf-8"))
    plan = Plan.load(folder.plan)
    assert plan.prediction is not None
    assert plan.prediction.seconds is not None
    assert record["predicted"]["seconds"] == plan.prediction.seconds
    measured = record["measured"]
    assert measured["steps"] == 4
    assert 0 < measured["low_s"] <= measured["seconds"] <= measured["high_s"]
    assert record["ratio"]["seconds"] == pytest.approx(measured["seconds"] / plan.prediction.seconds)
    # A step cannot have taken longer than the whole run did.
    assert measured["seconds"] < max(row["seconds"] for row in read_metrics(folder.metrics))
    report = folder.report.read_text(encoding="utf-8")
    section = report.partition("## Predicted and measured")[2].partition("## Environment")[0]
    for part in plan.prediction.parts:
        assert f"| {part} |" in section
    assert f"| {record['ratio']['seconds']:.2f} |" in section
    assert "the median of 4 steps" in section
    assert math.isfinite(record["ratio"]["seconds"])


@pytest.mark.gpu
def test_on_a_gpu_steps_are_timed_by_its_events_and_the_peak_is_read(tiny_run: TinyRun) -> None:
    result = train(tiny_run("run", max_steps=12, accelerator="cuda"))
    record = json.loads(RunFolder(result.run_dir).prediction.read_text(encoding="utf-8"))
    measured = record["measured"]
    assert (measured["steps"], measured["skipped"]) == (7, 5)
    assert 0 < measured["low_s"] <= measured["seconds"] <= measured["high_s"] < 1
    assert 0 < measured["peak_bytes"] < torch.cuda.get_device_properties(0).total_memory
    assert record["ratio"]["peak_bytes"] == pytest.approx(measured["peak_bytes"] / record["predicted"]["peak_bytes"])
