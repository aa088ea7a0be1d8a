"""What a person sees while a run goes on: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from subquad.log import say
from subquad.training.module import TrainingModule
from subquad.training.recorder import Recorder, is_fitting

SECONDS_BETWEEN_LINES = 10.0


class ProgressBar(L.Callback):
    """Steps, tokens per second, loss and validation on the terminal; where there is none, a line now and then.

    Must stand after the recorder among the callbacks, whose figures it shows.
    """

    def __init__(self, recorder: Recorder, first_step: int) -> None:
        self._recorder, self._first_step = recorder, first_step
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._line_at, self._line_step = 0.0, first_step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), console=self._console,
        )  # fmt: skip
        total = pl_module.config.trainer.max_steps
        self._task = self._bar.add_task("step", total=total, completed=self._first_step, figures="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None:
            self._update(trainer)
        elif time.monotonic() - self._line_at > SECONDS_BETWEEN_LINES and self._step() > self._line_step:
            self._line()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._bar is not None:
            self._update(trainer)
        elif is_fitting(trainer):
            self._line()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _update(self, trainer: L.Trainer) -> None:
        assert self._bar is not None
        assert self._task is not None
        self._bar.update(self._task, completed=int(trainer.global_step), figures=self._figures())

    def _figures(self) -> str:
        shown = (("loss", "train/loss", ".4f"), ("val", "val/loss", ".4f"), ("bits/byte", "val/bits_per_byte", ".3f"))
        last = self._recorder.last
        figures = [f"{last['tokens_per_s']:,.0f} tokens/s"] if "tokens_per_s" in last else []
        figures += [f"{label} {last[column]:{style}}" for label, column, style in shown if column in last]
        return "  ".join(figures)

    def _line(self) -> None:
        self._line_at, self._line_step = time.monotonic(), self._step()
        say(f"step {self._line_step:>6}  {self._figures()}")

    def _step(self) -> int:
        return int(self._recorder.last.get("step", self._first_step))

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
