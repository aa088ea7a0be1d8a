"""Measure a table of qualities on a trained model: every candidate in every layer, distilled there and judged."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import nn

from subquad.compiler.quality.distill import distill
from subquad.compiler.quality.gauss_newton import gauss_newton
from subquad.compiler.quality.local_error import local_error
from subquad.compiler.quality.proxy import HeldOut, QualityProxy, block_of
from subquad.compiler.quality.replace_one_kl import replace_one_kl
from subquad.compiler.quality.table import QualityTable
from subquad.errors import ConfigError
from subquad.model.block import Block
from subquad.model.build import build_model, full_schedule
from subquad.model.language_model import LanguageModel
from subquad.schema import ModelConfig

PROXIES: Mapping[str, QualityProxy] = MappingProxyType(
    {"replace_one_kl": replace_one_kl, "gauss_newton": gauss_newton, "local_error": local_error}
)
"""In the order in which they are to be trusted."""

Progress = Callable[[int, str, float, float], None]
"""Told of every figure: layer, candidate, error left after distillation, loss."""


def measure_quality(
    model: LanguageModel,
    config: ModelConfig,
    keys: Sequence[str],
    proxy: str,
    train: Sequence[HeldOut],
    held_out: Sequence[HeldOut],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    origin: str,
    progress: Progress,
) -> QualityTable:
    """The loss of every candidate in every layer of a trained model.

    The mixer that a layer was trained with loses 0. Every other is built anew, distilled on `train` and judged on
    `held_out`; each has its own seed, so that a figure does not depend on which others were asked for.
    Raises: ConfigError.
    """
    judge = PROXIES[proxy]
    model.eval().requires_grad_(True)
    schedule = full_schedule(config)
    _refuse_other_channel_mixers(config, [*keys, *schedule])
    for layer in range(len(schedule)):
        _refuse_readers(block_of(model, layer), "the run")
    loss: list[dict[str, float]] = []
    for layer, own in enumerate(schedule):
        figures = {}
        for key in keys:
            if key == own:
                figures[key] = 0.0
                continue
            student = _student(config, layer, key, _seed(seed, layer, key)).to(model.embedding.weight.device)
            error = distill(model, layer, student, train, steps=steps, learning_rate=learning_rate)
            student.eval()
            figures[key] = judge(model, layer, student, held_out)
            progress(layer, key, error, figures[key])
        loss.append(figures)
    return QualityTable(
        proxy=proxy,
        origin=origin,
        loss=tuple(loss),
        mixers={key: copy.deepcopy(dict(config.mixers[key])) for key in keys},
        d_model=config.d_model,
    )


def _student(config: ModelConfig, layer: int, key: str, seed: int) -> nn.Module:
    """A new mixer of that key for that layer; the rest of the model it comes with is dropped."""
    schedule = full_schedule(config)
    schedule[layer] = key
    with torch.random.fork_rng(()):
        torch.manual_seed(seed)
        built = build_model(replace(config, schedule=schedule, candidates=[]))
    _refuse_readers(block_of(built, layer), f"the candidate '{key}'")
    mixer: nn.Module = block_of(built, layer).mixer
    return mixer


def _seed(seed: int, layer: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{layer}/{key}".encode(), digest_size=4).digest(), "little")


def _refuse_other_channel_mixers(config: ModelConfig, keys: Sequence[str]) -> None:
    """A figure is that of the mixer alone: blocks that differ in more cannot be compared."""
    own = {key: str(config.mixers[key].get("channel_mixer", "the model's")) for key in keys}
    if len(set(own.values())) > 1:
        raise ConfigError(
            what=f"the candidates differ in their channel mixers: {own}",
            where="model.mixers",
            mend="measure candidates that share one",
        )


def _refuse_readers(block: Block, what: str) -> None:
    """A mixer that is exchanged takes what it publishes with it."""
    if block.sharing.reads:
        raise ConfigError(
            what=f"layer {block.layer_index} of {what} reads {', '.join(block.sharing.reads)} of earlier layers",
            where="model.schedule",
            mend="measure a model whose layers read nothing of each other, candidates likewise",
        )
