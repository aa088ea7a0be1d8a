"""What a step of the run really takes, beside what was predicted: prediction.json, once enough steps were timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import torch

from subquad.compiler.plan import StepPrediction
from subquad.training.run_folder import RunFolder, write_json
from subquad.training.tracking import Tracker

SKIPPED_STEPS, TIMED_STEPS = 5, 20
"""The first steps compile, tune and fill allocators; a median of twenty is steady to a few percent."""


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """The median of so many steps, with their fastest and slowest; the peak is that of allocated CUDA memory."""

    seconds: float
    low_s: float
    high_s: float
    steps: int
    skipped: int
    peak_bytes: int | None


class StepClock(L.Callback):
    """Times optimizer steps, from the first micro-batch's forward to the optimizer; what lies between does not count.

    On CUDA by the device's own events, so that the host is not held up. A run that ends earlier tells of the steps it
    made. It stands behind the recorder, whose checkpoints and rows come before a step begins.
    """

    def __init__(self, folder: RunFolder, tracker: Tracker, prediction: StepPrediction | None) -> None:
        self._folder, self._tracker, self._prediction = folder, tracker, prediction
        self._times: list[Callable[[], float]] = []
        self._peaks: list[int] = []
        self._begun: float | torch.cuda.Event | None = None
        self._told = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._told or trainer.fit_loop.total_batch_idx % trainer.accumulate_grad_batches:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._begun = torch.cuda.Event(enable_timing=True)
            self._begun.record()
        else:
            self._begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._begun is None or (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._times.append(_since(self._begun))
        if pl_module.device.type == "cuda":
            self._peaks.append(torch.cuda.max_memory_allocated())
        self._begun = None
        if len(self._times) == SKIPPED_STEPS + TIMED_STEPS:
            self._tell(int(trainer.global_step))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._times and not self._told:
            self._tell(int(trainer.global_step))

    def _tell(self, step: int) -> None:
        self._told = True
        skipped = min(SKIPPED_STEPS, len(self._times) // 2)
        if self._peaks:
            torch.cuda.synchronize()
        seconds = [elapsed() for elapsed in self._times[skipped:]]
        measured = MeasuredStep(
            seconds=statistics.median(seconds),
            low_s=min(seconds),
            high_s=max(seconds),
            steps=len(seconds),
            skipped=skipped,
            peak_bytes=max(self._peaks[skipped:]) if self._peaks else None,
        )
        write_json(self._folder.prediction, comparison(self._prediction, measured))
        self._tracker.log(step, _figures(self._prediction, measured))


def comparison(predicted: StepPrediction | None, measured: MeasuredStep) -> dict[str, object]:
    """Predicted and measured side by side; a ratio is measured over predicted."""
    pairs = {}
    if predicted is not None:
        pairs = {
            "seconds": (measured.seconds, predicted.seconds),
            "peak_bytes": (measured.peak_bytes, predicted.peak_bytes),
        }
    return {
        "predicted": None if predicted is None else asdict(predicted),
        "measured": asdict(measured),
        "ratio": {name: real / told for name, (real, told) in pairs.items() if real is not None and told},
    }


def _figures(predicted: StepPrediction | None, measured: MeasuredStep) -> dict[str, float]:
    """What a tracker shows."""
    figures: dict[str, float | None] = {
        "step/measured_s": measured.seconds,
        "step/measured_peak_bytes": measured.peak_bytes,
    }
    if predicted is not None:
        figures |= {"step/predicted_s": predicted.seconds, "step/predicted_peak_bytes": predicted.peak_bytes}
    return {name: float(value) for name, value in figures.items() if value is not None}


def _since(begun: float | torch.cuda.Event) -> Callable[[], float]:
    """How long it is since then; asked of a device only once it has got there."""
    if isinstance(begun, float):
        seconds = time.perf_counter() - begun
        return lambda: seconds
    ended = torch.cuda.Event(enable_timing=True)
    ended.record()
    return lambda: float(begun.elapsed_time(ended)) * 1e-3
