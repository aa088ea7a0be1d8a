"""When a run ends before its last step: Ctrl-C, the time limit, or a loss that is no number."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning as L
import torch
from torch import Tensor

from subquad.errors import RunError
from subquad.training.module import TrainingModule
from subquad.training.recorder import Recorder


class Interrupts:
    """Counts Ctrl-C: the first is remembered until the step is over, a second one stops the program where it is."""

    def __init__(self) -> None:
        self.received = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT over; elsewhere than in the main thread Python offers no way, and nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(signum: int, frame: FrameType | None) -> None:
            self.received = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = signal.signal(signal.SIGINT, remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class StopAfterStep(L.Callback):
    """Ends the run after a step, on all ranks at once.

    On Ctrl-C the recorder writes a checkpoint and the interrupt goes on. A loss or a gradient that is not finite is an
    error, found before that step's checkpoint is written. Must stand after the recorder among the callbacks.
    """

    def __init__(self, interrupts: Interrupts, recorder: Recorder) -> None:
        self._interrupts, self._recorder = interrupts, recorder
        self._bad: Tensor | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        config = pl_module.config
        if (trainer.fit_loop.total_batch_idx + 1) % config.trainer.accumulate:
            return
        step = int(trainer.global_step)
        finite = torch.isfinite(pl_module.step_loss) & torch.isfinite(pl_module.gradient_norm)
        self._bad = ~finite if self._bad is None else self._bad | ~finite
        # Reading a value from a CUDA device waits for it, so it is read only when somebody needs to know.
        looked_at = (
            pl_module.device.type == "cpu"
            or step % config.trainer.log_every_n_steps == 0
            or step % max(1, config.checkpoint.every_n_steps) == 0
            or step >= config.trainer.max_steps
        )
        is_bad = looked_at and bool(self._bad)
        limit_s = config.trainer.max_seconds
        out_of_time = limit_s is not None and self._recorder.seconds > limit_s
        is_bad, interrupted, out_of_time = _any_rank([is_bad, self._interrupts.received, out_of_time])
        if is_bad or (interrupted and bool(self._bad)):
            raise RunError(
                what=f"the loss or its gradient is not finite (loss {float(pl_module.step_loss):.4g},"
                f" gradient norm {float(pl_module.gradient_norm):.4g})",
                where=f"step {step}",
                mend="lower optimizer.lr or trainer.gradient_clip_norm, or warm up longer"
                " (trainer.learning_rate_warmup_steps); the last checkpoint stands from before it",
            )
        if interrupted:
            self._recorder.save_now(trainer, pl_module)
            raise KeyboardInterrupt
        if out_of_time or step >= config.trainer.max_steps:
            trainer.should_stop = True  # Lightning validates once more before it leaves the loop


def _any_rank(flags: list[bool]) -> list[bool]:
    """Which flags are up on at least one rank: ranks must leave the loop at the same step."""
    if not torch.distributed.is_initialized():
        return flags
    votes = torch.tensor([int(flag) for flag in flags])  # on the CPU: gloo carries it, no device is waited for
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    return [bool(vote) for vote in votes]
