"""What a step leaves behind: a row of metrics, the samples it consumed, and now and then a checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from subquad.log import detail
from subquad.training.batch import Batch
from subquad.training.checkpoint import remove_unfinished, write_checkpoint
from subquad.training.gradient_norms import GradientNorms
from subquad.training.metrics import COLUMNS, CsvRecord, SampleRecord
from subquad.training.module import TrainingModule
from subquad.training.positions import position_columns
from subquad.training.run_folder import RunFolder
from subquad.training.sharded_checkpoint import write_sharded_checkpoint
from subquad.training.tracking import Tracker
from subquad.training.utilisation import Utilisation

STATE_VERSION = 1


@dataclass
class Throughput:
    """Tokens and the seconds spent on them, since the last row; validation and checkpoints do not count."""

    tokens: int = 0
    seconds: float = 0.0
    _since: float | None = field(default=None, repr=False)

    def start(self) -> None:
        self._since = time.monotonic()

    def pause(self) -> None:
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
            self._since = None

    def take(self) -> float | None:
        """Tokens per second since the last call; None before any."""
        rate = self.tokens / self.seconds if self.seconds else None
        self.tokens, self.seconds = 0, 0.0
        return rate


def is_fitting(trainer: L.Trainer) -> bool:
    """Whether steps are taken; a run with none left is only validated."""
    return trainer.state.fn is TrainerFn.FITTING


class Recorder(L.Callback):
    """Writes a step's row and checkpoint after its validation, just before the next step begins.

    So a checkpoint never stands without the figures of its own step, and `metrics.csv` is whole up to every one of
    them. Rank 0 writes; each rank records its own samples, of ranks that share them the first.
    """

    def __init__(
        self,
        folder: RunFolder,
        tracker: Tracker,
        gradient_norms: GradientNorms,
        utilisation: Utilisation | None,
        *,
        rank: int,
        records_samples: bool,
        seq_len: int,
        resumed_at: int | None,
        spent_s: float,
    ) -> None:
        self._folder, self._tracker, self._writes = folder, tracker, rank == 0
        self._gradient_norms, self._utilisation = gradient_norms, utilisation
        self._samples = SampleRecord(folder.samples(rank), resumed_at) if records_samples else None
        self._metrics: CsvRecord | None = None
        if self._writes:
            columns = (*COLUMNS, *gradient_norms.columns, *position_columns(seq_len))
            self._metrics = CsvRecord(folder.metrics, columns, resumed_at)
            remove_unfinished(folder.checkpoints)
        self._started = time.monotonic() - spent_s
        self._throughput = Throughput()
        self._sample_ids: list[int] = []
        self._row: dict[str, float] = {}
        self._written = resumed_at or 0
        self.last: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Wall time of training, over all resumptions."""
        return time.monotonic() - self._started

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._throughput.start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._settle(trainer, pl_module)
        self._throughput.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        trainer.datamodule.consumed(batch)  # type: ignore[attr-defined]
        self._sample_ids += batch["sample_ids"].tolist()
        config = pl_module.config.trainer
        self._throughput.tokens += batch["tokens"].numel() * (trainer.world_size // config.tensor_parallel)
        self._throughput.pause()
        if (trainer.fit_loop.total_batch_idx + 1) % config.accumulate:
            return
        step = int(trainer.global_step)
        if self._samples is not None:
            self._samples.append(step, self._sample_ids)
        self._sample_ids = []
        if step == 1 or step % config.log_every_n_steps == 0 or step >= config.max_steps:
            self._measure(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if not is_fitting(trainer):
            return  # no step was taken, and the row of the last one has its validation
        found = pl_module.validation
        assert found is not None
        if self._row.get("step") != found.step:
            self._measure(trainer, pl_module)
        self._row |= {"val/loss": found.loss}
        if found.bits_per_byte is not None:
            self._row |= {"val/bits_per_byte": found.bits_per_byte}
        self._row |= found.by_position
        self.last = self.last | self._row

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._settle(trainer, pl_module, last=True)

    def close(self) -> None:
        """Write what is buffered."""
        if self._samples is not None:
            self._samples.close()
        if self._metrics is not None:
            self._metrics.close()

    def save_now(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the row and a checkpoint of the step that is just over."""
        self._settle(trainer, pl_module, last=True)

    def _measure(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        """Begin the row of this step."""
        mean_loss = trainer.strategy.reduce(pl_module.step_loss.clone(), reduce_op="mean")
        self._row = {
            "step": int(trainer.global_step),
            "train/loss": float(mean_loss),
            "learning_rate": pl_module.learning_rate,
            "gradient_norm": float(pl_module.gradient_norm),
            "seconds": self.seconds,
            **self._gradient_norms.of_step(int(trainer.global_step)),
        }
        rate = self._throughput.take()
        if rate is not None:
            self._row["tokens_per_s"] = rate
            if self._utilisation is not None:
                self._row["mfu"] = self._utilisation.at(rate / trainer.world_size)
        self.last = self.last | self._row

    def _settle(self, trainer: L.Trainer, pl_module: L.LightningModule, last: bool = False) -> None:
        """Write what the step that is over has to leave behind, once."""
        assert isinstance(pl_module, TrainingModule)
        step = int(trainer.global_step)
        if self._row and self._metrics is not None:
            self._metrics.append(self._row)
            self._metrics.flush()
            self._tracker.log(step, {name: value for name, value in self._row.items() if name != "step"})
        self._row = {}
        every = pl_module.config.checkpoint.every_n_steps
        if step > self._written and (last or (every > 0 and step % every == 0)):
            self._written = step
            if self._samples is not None:
                self._samples.flush()
            data = trainer.datamodule.state_dict()  # type: ignore[attr-defined]  # of a stream from all ranks
            begun = time.monotonic()
            if self._writes or pl_module.is_sharded:
                self._save(trainer, pl_module, step, data)
            trainer.strategy.barrier("checkpoint")
            if self._writes:
                detail(f"checkpoint of step {step} written in {time.monotonic() - begun:.2f} s")

    def _save(self, trainer: L.Trainer, pl_module: TrainingModule, step: int, data: dict[str, Any]) -> None:
        schedule: Any = trainer.lr_scheduler_configs[0].scheduler
        state = {
            "version": STATE_VERSION,
            "step": step,
            "seconds": self.seconds,
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedule": schedule.state_dict(),
            "data": data,
            "samples_per_step": pl_module.config.trainer.samples_per_step(trainer.world_size),
        }
        keep = pl_module.config.checkpoint.keep
        weights, folder = pl_module.model.state_dict(), self._folder.checkpoints
        if pl_module.is_sharded:
            sharing = pl_module.config.trainer.tensor_parallel
            write_sharded_checkpoint(folder, step, weights, state, keep=keep, tensor_parallel=sharing)
        else:
            write_checkpoint(folder, step, weights, state, keep=keep)
