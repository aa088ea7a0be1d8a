"""What Lightning trains: the language model, its loss, and its optimizer."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from subquad.model.language_model import LanguageModel
from subquad.parallel.part import SequencePart
from subquad.schema import CHUNKED, RunConfig
from subquad.training.batch import Batch
from subquad.training.distributed import first_of_ranks
from subquad.training.nonfinite import first_nonfinite
from subquad.training.optimizers import build_optimizer, learning_rate_factor
from subquad.training.positions import by_bucket, mean_by_bucket, position_columns, tokens_seen
from subquad.training.sharding import average_over_row, clip_to_norm, shard_model, spread_optimizer_state
from subquad.training.sources.source import IGNORED


@dataclass(frozen=True)
class Validation:
    """The held-out loss after a step: nats per predicted token, and bits per byte of text if it is text."""

    step: int
    loss: float
    bits_per_byte: float | None
    by_position: Mapping[str, float] = field(default_factory=dict)  # nats per target, by column of metrics.csv


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of  -log softmax(logits)[target]  in nats over the targets that are not -100, and their number.

    Shapes:  logits: b t v    targets: b t   ->  scalars; computed in float32
    """
    nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return nats, (targets != IGNORED).sum()


def summed_loss(
    model: torch.nn.Module, tokens: Tensor, cu_seqlens: Tensor | None, targets: Tensor, *, how: str
) -> tuple[Tensor, Tensor]:
    """What `summed_cross_entropy` says of the model's logits; `how` is `trainer.loss`."""
    if how == CHUNKED:
        return model(tokens, cu_seqlens, targets), (targets != IGNORED).sum()
    return summed_cross_entropy(model(tokens, cu_seqlens), targets)


def target_nats(
    model: torch.nn.Module, tokens: Tensor, cu_seqlens: Tensor | None, targets: Tensor, *, how: str
) -> Tensor:
    """What `summed_loss` sums, target by target and without a gradient; 0 where there is none.  Shapes:  b t"""
    if how == CHUNKED:
        return model(tokens, cu_seqlens, targets, each=True)  # type: ignore[no-any-return]
    logits = model(tokens, cu_seqlens).flatten(0, 1).float()
    nats = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return nats.view(targets.shape)


def step_seed(seed: int, micro_batch: int, rank: int) -> int:
    """The seed of everything random within one micro-batch.

    Randomness is a function of the position, as the data are: a resumed run has no generator state to restore, and
    what happens between steps (validation, a checkpoint) cannot disturb it.
    """
    digest = hashlib.blake2b(f"{seed}/{micro_batch}/{rank}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


class TrainingModule(L.LightningModule):
    """A language model with mean token cross entropy, gradient clipping and a warm-up + cosine schedule.

    `restored` is the trainer state of a checkpoint whose weights the model already holds. `part` is that of every
    sequence which the model computes on, if ranks share them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: RunConfig,
        restored: dict[str, Any] | None = None,
        part: SequencePart | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self._part = part
        self.validation: Validation | None = None
        self._restored = restored
        # Sums over the micro-batches of the current step; read by the recorder when the step is over.
        self.step_loss = torch.zeros((), dtype=torch.float32)
        self.gradient_norm = torch.zeros((), dtype=torch.float32)
        self.learning_rate = 0.0  # of that step: when it is over, the optimizer holds the next one
        self.step_batches: list[Batch] = []
        self.guard: Callable[[], bool] | None = None
        """Asked when a step's gradient is complete and its norm known: whether the optimizer may use it."""
        self.is_sharded = False
        self._mesh: DeviceMesh | None = None

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and not self.is_sharded:
            self.is_sharded = True
            assert isinstance(self.model, LanguageModel)
            self._mesh = strategy.device_mesh
            shard_model(self.model, self._mesh, compiles=self.config.compile)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        micro_batch = self.trainer.fit_loop.total_batch_idx
        self._seed(micro_batch)
        if micro_batch % self.config.trainer.accumulate == 0:
            self.step_loss = torch.zeros((), dtype=torch.float32, device=self.device)
            self.step_batches = []
        self.step_batches.append(batch)

    def _seed(self, micro_batch: int) -> None:
        # Ranks that share projections compute the same.
        seed = step_seed(self.config.seed, micro_batch, self.trainer.global_rank // self.config.trainer.tensor_parallel)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.step_loss += loss.detach() / self.config.trainer.accumulate
        return loss

    def _loss(self, batch: Batch) -> Tensor:
        """The mean over the targets; of a part of sequences such that the mean over ranks is that of whole ones."""
        nats, count = self._summed_loss(batch)
        if self._part is not None:
            nats, count = self._part.count * nats, self._part.total(count)
        return nats / count.clamp(min=1)

    def _summed_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens, boundaries, targets = batch["tokens"], batch["cu_seqlens"], batch["targets"]
        return summed_loss(self.model, tokens, boundaries, targets, how=self.config.trainer.loss)

    def first_nonfinite(self) -> str | None:
        """Repeat the step that has just been differentiated, to find the first tensor in it that is not finite."""
        first = self.trainer.fit_loop.total_batch_idx + 1 - len(self.step_batches)
        for place, batch in enumerate(self.step_batches):
            self._seed(first + place)
            with self.trainer.strategy.precision_plugin.forward_context():
                found = first_nonfinite(
                    self.model,
                    lambda batch=batch: self._loss(batch),  # type: ignore[misc]
                    first_of_ranks if self.is_sharded or self._part is not None else None,
                )
            if found is not None:
                return found if len(self.step_batches) == 1 else f"{found}, micro-batch {place + 1} of the step"
        return None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning declines to clip for fused optimizers under mixed precision; bf16 has no loss scale to undo.
        limit = self.config.trainer.gradient_clip_norm
        self.learning_rate = float(optimizer.param_groups[0]["lr"])
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._mesh is not None and self.config.trainer.tensor_parallel > 1:
            average_over_row(parameters, self._mesh)
        self.gradient_norm = clip_to_norm(parameters, limit if limit > 0 else math.inf)
        if self.guard is not None and not self.guard():
            for parameter in parameters:
                parameter.grad = None  # an optimizer passes over what has no gradient

    def on_validation_epoch_start(self) -> None:
        buckets = len(position_columns(self.config.trainer.seq_len))
        self._sums = torch.zeros(2, buckets, dtype=torch.float64, device=self.device)  # nats, targets by position
        self._bytes = torch.zeros((), dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        tokens, boundaries, targets = batch["tokens"], batch["cu_seqlens"], batch["targets"]
        nats = target_nats(self.model, tokens, boundaries, targets, how=self.config.trainer.loss)
        index, count = (0, 1) if self._part is None else (self._part.index, self._part.count)
        rows, length = tokens.shape
        seen = tokens_seen(rows, length, boundaries, index=index, count=count)
        self._sums += by_bucket(nats, targets, seen, self._sums.shape[1])
        self._bytes += batch["target_bytes"]

    def on_validation_epoch_end(self) -> None:
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        text_bytes = float(self.trainer.strategy.reduce(self._bytes, reduce_op="sum"))
        nats, count = (float(value) for value in sums.sum(dim=1))
        self.validation = Validation(
            step=int(self.trainer.global_step),
            loss=nats / max(1.0, count),
            bits_per_byte=nats / text_bytes / math.log(2) if text_bytes else None,
            by_position=mean_by_bucket(sums, self.config.trainer.seq_len),
        )
        # For callbacks that watch it, such as early stopping. All ranks hold one value already: any is the largest.
        self.log("val/loss", self.validation.loss, sync_dist=self.trainer.world_size > 1, reduce_fx="max")

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.config.optimizer, self.model.parameter_groups)  # type: ignore[arg-type]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(self.config.trainer))
        if self._restored is not None:
            stored = self._restored["optimizer"]
            if self.is_sharded:
                stored = spread_optimizer_state(optimizer, stored if self.trainer.global_rank == 0 else None)
            optimizer.load_state_dict(stored)
            schedule.load_state_dict(self._restored["schedule"])
            factor = learning_rate_factor(self.config.trainer)(schedule.last_epoch)
            for group, peak in zip(optimizer.param_groups, schedule.base_lrs):
                group["lr"] = peak * factor  # what was stored, unless the run has been made longer
            self._restored = None  # its memory is the optimizer's now
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
