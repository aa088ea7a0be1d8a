"""How large the gradients of each family of mixers are, so that one which learns nothing shows beside the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import nn

from subquad.model.language_model import LanguageModel
from subquad.schema import TrainerConfig
from subquad.training.sharding import total_norm

CHANNEL_MIXER, OTHER = "channel_mixer", "other"
"""The channel mixers of all blocks; embedding, head and norms."""
FAMILY_PREFIX = "gradient_norm/"


class GradientNorms(L.Callback):
    """gradient_norm/F = sqrt(sum over the parameters of F of |gradient|^2), before clipping, of steps with a row.

    F is a mixer's registry name, `channel_mixer` or `other`; the squares add up to that of `gradient_norm`.
    """

    def __init__(self, model: LanguageModel, settings: TrainerConfig) -> None:
        self._model, self._settings = model, settings
        self.columns = tuple(f"{FAMILY_PREFIX}{family}" for family in parameters_by_family(model))
        self._step, self._norms = 0, [torch.zeros(()) for _ in self.columns]

    def of_step(self, step: int) -> Mapping[str, float]:
        """The figures of a step; none if they were not taken."""
        return dict(zip(self.columns, map(float, self._norms), strict=True)) if step == self._step else {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        step, settings = int(trainer.global_step) + 1, self._settings
        intervals = (settings.log_every_n_steps, settings.validate_every_n_steps)
        if step in (1, settings.max_steps) or any(every and step % every == 0 for every in intervals):
            # Of all ranks alike. A sharded model has other parameters than those it was built with.
            self._step, self._norms = step, [total_norm(own) for own in parameters_by_family(self._model).values()]


def parameters_by_family(model: LanguageModel) -> dict[str, list[nn.Parameter]]:
    """Every parameter of the model once: by mixer, then channel mixers, then the rest."""
    families: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()

    def add(family: str, module: nn.Module) -> None:
        own = [parameter for parameter in module.parameters() if id(parameter) not in seen]
        seen.update(map(id, own))
        if own:
            families.setdefault(family, []).extend(own)

    for block in model.blocks:
        add(str(block.mixer_name), block.mixer)  # type: ignore[arg-type]
    for block in model.blocks:
        if block.channel_mixer is not None:
            add(CHANNEL_MIXER, block.channel_mixer)  # type: ignore[arg-type]
    add(OTHER, model)
    return families
