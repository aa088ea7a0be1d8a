"""When a run ends before its last step: Ctrl-C, SIGTERM, the time limit, or a loss that is no number."""

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
from subquad.log import caution
from subquad.training.module import TrainingModule
from subquad.training.nonfinite import keep_batches
from subquad.training.recorder import Recorder
from subquad.training.run_folder import RunFolder

EXIT_TERMINATED = 128 + signal.SIGTERM
MOST_SKIPPED = 10
"""Steps in a row that may be skipped; weights that give no finite loss by then will not give one later."""


class Interrupts:
    """Hears Ctrl-C and SIGTERM: the first is remembered until the step is over, a second stops the program at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self.terminated = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take both signals over; elsewhere than in the main thread Python offers no way, and nothing is changed."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.listen()
        try:
            yield
        finally:
            if _in_main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler)

    def listen(self) -> None:
        """Take both signals over, also from Lightning, which sets a handler of its own as training starts.

        Its handler of SIGTERM talks to other ranks from within the signal and loses the step.
        """
        if not _in_main_thread():
            return
        signal.signal(signal.SIGTERM, self._terminate)
        # A rank above 0 ignores Ctrl-C, which the terminal sends to every process; rank 0 tells it.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _terminate(self, signum: int, frame: FrameType | None) -> None:
        self.terminated = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class StopAfterStep(L.Callback):
    """Ends the run after a step, on all ranks at once.

    On Ctrl-C the recorder writes a checkpoint and the interrupt goes on; on SIGTERM, which schedulers send before they
    take the machine away, the checkpoint is written and the program exits with 143.

    A loss or a gradient that is not finite is an error, found before that step's checkpoint is written, which names the
    first such tensor and where the batch is kept; with `trainer.nonfinite=skip` the optimizer passes over the step, up
    to MOST_SKIPPED times in a row. On CUDA looking makes the host wait, so that without `skip` it is done only in steps
    that are logged or saved: the weights may then be spoilt already. Must stand after the recorder among the callbacks.
    """

    def __init__(self, interrupts: Interrupts, recorder: Recorder, folder: RunFolder) -> None:
        self._interrupts, self._recorder, self._folder = interrupts, recorder, folder
        self._bad: Tensor | None = None
        self._skipped = 0  # in a row

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if not (self._interrupts.interrupted or self._interrupts.terminated):
            self._interrupts.listen()
        pl_module.guard = lambda: self._may_step(trainer, pl_module)

    def _may_step(self, trainer: L.Trainer, module: TrainingModule) -> bool:
        """Whether the gradient that is complete now may be used.  Raises: RunError."""
        config, step = module.config, int(trainer.global_step) + 1
        finite = torch.isfinite(module.step_loss) & torch.isfinite(module.gradient_norm)
        self._bad = ~finite if self._bad is None else self._bad | ~finite
        # Reading a value from a CUDA device waits for it, so it is read only when somebody needs to know.
        looked_at = (
            config.trainer.nonfinite == "skip"
            or module.device.type == "cpu"
            or step % config.trainer.log_every_n_steps == 0
            or step % max(1, config.checkpoint.every_n_steps) == 0
            or step >= config.trainer.max_steps
        )
        if not looked_at:
            return True
        (is_bad,) = _any_rank([bool(self._bad)])
        if not is_bad:
            self._skipped = 0
            return True
        self._skipped += 1
        error = self._nonfinite(module, step, trainer.global_rank)
        if config.trainer.nonfinite == "stop" or self._skipped > MOST_SKIPPED:
            raise error
        if trainer.global_rank == 0:
            caution(f"step {step} is skipped: {error.what}")
        self._bad = None
        return False

    def _nonfinite(self, module: TrainingModule, step: int, rank: int) -> RunError:
        """Keep the step's batches, look for where it began, and say both."""
        for parameter in module.model.parameters():
            parameter.grad = None  # makes room for the repetition
        path = self._folder.nonfinite(step, rank)
        keep_batches(path, step, module.step_batches)
        first = module.first_nonfinite() or "nothing that a repetition of the step finds"
        many = f"; {self._skipped} steps in a row were" if self._skipped > MOST_SKIPPED else ""
        return RunError(
            what=f"the loss or its gradient is not finite (loss {float(module.step_loss):.4g},"
            f" gradient norm {float(module.gradient_norm):.4g}), first {first}{many}",
            where=f"step {step}; its batch is kept in {path}",
            mend="lower optimizer.lr or trainer.gradient_clip_norm, warm up longer"
            " (trainer.learning_rate_warmup_steps), or pass over such steps (trainer.nonfinite=skip);"
            " the last checkpoint stands from before it",
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        config = pl_module.config
        if (trainer.fit_loop.total_batch_idx + 1) % config.trainer.accumulate:
            return
        step = int(trainer.global_step)
        limit_s = config.trainer.max_seconds
        out_of_time = limit_s is not None and self._recorder.seconds > limit_s
        heard = [self._interrupts.interrupted, self._interrupts.terminated]
        interrupted, terminated, out_of_time = _any_rank([*heard, out_of_time])
        if interrupted or terminated:
            (is_bad,) = _any_rank([self._bad is not None and bool(self._bad)])
            if is_bad:  # was not looked at in its own step
                raise self._nonfinite(pl_module, step, trainer.global_rank)
            self._recorder.save_now(trainer, pl_module)
            raise KeyboardInterrupt if interrupted else SystemExit(EXIT_TERMINATED)
        if out_of_time or step >= config.trainer.max_steps:
            trainer.should_stop = True  # Lightning validates once more before it leaves the loop


def _any_rank(flags: list[bool]) -> list[bool]:
    """Which flags are up on at least one rank: ranks must leave the loop at the same step."""
    if not torch.distributed.is_initialized():
        return flags
    votes = torch.tensor([int(flag) for flag in flags])  # on the CPU: gloo carries it, no device is waited for
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    return [bool(vote) for vote in votes]
