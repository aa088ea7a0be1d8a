"""`profile=true`: a few steps as torch's profiler sees them, for a viewer of traces such as ui.perfetto.dev."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile

from subquad.log import caution, say
from subquad.training.run_folder import RunFolder

FIRST_STEP, STEPS = 6, 3
"""The first steps compile, tune and fill allocators; three show what repeats."""


class Profile(L.Callback):
    """Writes `trace.json` with the sixth to eighth step of a start; a run that ends among them writes what it saw."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._step = 0
        self._profiler: profile | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.total_batch_idx % trainer.accumulate_grad_batches == 0:
            self._step += 1
            if self._step == FIRST_STEP:
                cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
                self._profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
                self._profiler.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_over = (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_over and self._step == FIRST_STEP + STEPS - 1:
            self._write()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write()
        if self._step < FIRST_STEP:
            caution(f"no step is profiled: the run ends before step {FIRST_STEP}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._write()

    def _write(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._folder.trace))
            self._profiler = None
            say(f"steps are profiled in {self._folder.trace}")
