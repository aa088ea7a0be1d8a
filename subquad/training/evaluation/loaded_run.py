"""A finished run as something that gives logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from subquad.compiler.example import Example
from subquad.compiler.run_shapes import compute_dtype, is_packed
from subquad.errors import ResumeError
from subquad.model.build import build_model
from subquad.model.language_model import LanguageModel
from subquad.schema import RunConfig
from subquad.training.checkpoint import newest_checkpoint
from subquad.training.compilation import compile_for_generation, compile_unmeasured, device_of, target_of, uses_bfloat16
from subquad.training.run_folder import RunFolder, read_config


@dataclass(frozen=True)
class LoadedRun:
    """The newest whole checkpoint of a run, on the device that the run computes on."""

    folder: RunFolder
    config: RunConfig
    step: int
    model: LanguageModel
    device: torch.device

    @torch.inference_mode()
    def logits(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """In the precision of training's validation, on the run's device.

        Shapes:  tokens: b t    cu_seqlens: documents + 1  ->  b t vocab (float32)
        """
        bounds = None if cu_seqlens is None else cu_seqlens.to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(self.config)):
            return self.model(tokens.to(self.device), bounds).float()  # type: ignore[no-any-return]

    def to_decode(self) -> LanguageModel:
        """A model on the same weights, with kernels chosen as `generate` has them: to decode one text in float32."""
        model = build_model(self.config.model, device="meta").eval()
        model.load_state_dict(self.model.state_dict(), assign=True)
        compile_for_generation(model, self.config)
        return model


def load(path: Path, where: str, batch_size: int = 0) -> LoadedRun:
    """The model of a run folder, with checked kernels for whole rows.  Raises: ConfigError, ResumeError."""
    folder = RunFolder(path.expanduser().absolute())
    config = read_config(folder, where)
    checkpoint = newest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise ResumeError(what="the run holds no checkpoint that is whole", where=where, mend="train it further first")
    if batch_size:
        config.trainer.batch_size = batch_size
    device, target = device_of(config), target_of(config)
    model = build_model(config.model)
    model.load_state_dict(checkpoint.weights())
    model.to(device).eval()
    example = Example(
        tokens_shape=(config.trainer.batch_size, config.trainer.seq_len),
        packed=is_packed(config),
        dtype=compute_dtype(config.trainer.precision, target.kind),
    )
    # Nothing is measured: an evaluation is short, and its figures do not depend on which kernel was the fastest.
    compile_unmeasured(model, example, config)
    return LoadedRun(folder, config, checkpoint.step, model, device)
