"""proxy: how much a trained run loses with other mixers in its layers, as a table that `budget.quality` reads."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from subquad.compiler.quality.measure import PROXIES, measure_quality
from subquad.compiler.quality.proxy import HeldOut
from subquad.compiler.quality.table import QualityTable
from subquad.component_config import defaults_of
from subquad.errors import ConfigError, ResumeError, suggestion
from subquad.model.build import build_model
from subquad.registry import load_registry
from subquad.schema import ProxyConfig, RunConfig
from subquad.training.batch import Batch
from subquad.training.checkpoint import newest_checkpoint
from subquad.training.compilation import device_of
from subquad.training.data import FixedBatches, NumberedBatches, build_data
from subquad.training.run_folder import RunFolder, read_config


def measure_proxy(request: ProxyConfig) -> QualityTable:
    """Measure, write the table, and return it; one line per figure goes to stderr.

    Raises: ConfigError, NotFoundError, ResumeError.
    """
    _check(request)
    folder = RunFolder(Path(request.run).expanduser().absolute())
    config = read_config(folder, f"run={request.run}")
    checkpoint = newest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise ResumeError(
            what="the run holds no checkpoint that is whole", where=f"run={request.run}", mend="train it further first"
        )
    keys = _keys(request, config)
    device = device_of(config)
    model = build_model(config.model)
    model.load_state_dict(checkpoint.weights())
    model.to(device)
    train, held_out = _batches(config, request.batches, device)
    tokens = sum(batch.tokens.numel() for batch in held_out)
    started = time.monotonic()

    def progress(layer: int, key: str, error: float, loss: float) -> None:
        spent = time.monotonic() - started
        print(
            f"layer {layer} {key}: {error:.3f} of the output missed, loss {loss:.5g} ({spent:.0f} s)", file=sys.stderr
        )

    table = measure_quality(
        model,
        config.model,
        keys,
        request.proxy,
        train,
        held_out,
        steps=request.steps,
        learning_rate=request.learning_rate,
        seed=request.seed,
        origin=f"{folder.path.name} at step {checkpoint.step}, {request.steps} distillation steps, {tokens:,} tokens",
        progress=progress,
    )
    table.save(Path(request.out).expanduser())
    return table


def _keys(request: ProxyConfig, config: RunConfig) -> list[str]:
    """The candidates; one that the run's recipe does not hold is taken with its declared defaults."""
    registry = load_registry()
    keys = list(dict.fromkeys(request.candidates)) or list(config.model.mixers)
    for key in keys:
        if key not in config.model.mixers:
            spec = registry.mixer(key, where="proxy.candidates")
            config.model.mixers[key] = {"mixer": key, **defaults_of(spec.config)}
    return keys


def _batches(config: RunConfig, number: int, device: torch.device) -> tuple[list[HeldOut], list[HeldOut]]:
    """As many batches to distil on as to judge by; the latter from the validation split."""
    data = build_data(config)
    rows = config.trainer.batch_size
    learned = NumberedBatches(data.source, "train", batch_size=rows, seed=config.seed, rank=0, world_size=1)
    judged = FixedBatches(data.source, batch_size=rows, num_batches=number, rank=0, world_size=1)

    def moved(batch: Batch) -> HeldOut:
        bounds = batch["cu_seqlens"]
        return HeldOut(
            batch["tokens"].to(device), batch["targets"].to(device), None if bounds is None else bounds.to(device)
        )

    return [moved(learned[index]) for index in range(number)], [moved(judged[index]) for index in range(len(judged))]


def _check(request: ProxyConfig) -> None:
    if request.proxy not in PROXIES:
        raise ConfigError(
            what=f"no proxy is called '{request.proxy}'",
            where="proxy.proxy",
            mend=f"{suggestion(request.proxy, PROXIES)}there are {', '.join(PROXIES)}",
        )
    for name, least in (("steps", 0), ("batches", 1)):
        if getattr(request, name) < least:
            raise ConfigError(
                what=f"{name} is {getattr(request, name)}", where=f"proxy.{name}", mend=f"use {least} or more"
            )
    if not request.learning_rate > 0:
        raise ConfigError(
            what=f"learning_rate is {request.learning_rate}", where="proxy.learning_rate", mend="use a positive number"
        )
    folder = Path(request.out).expanduser().absolute().parent
    if not folder.is_dir():
        raise ConfigError(what=f"there is no folder {folder}", where="proxy.out", mend="name a file in one that exists")
