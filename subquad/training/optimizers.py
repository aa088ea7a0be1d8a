"""From the run's configuration to an optimizer and its learning-rate schedule."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from subquad.component_config import typed_config
from subquad.errors import ConfigError
from subquad.registry import load_registry
from subquad.schema import TrainerConfig
from subquad.training.optimizer_declarations import AdamWConfig

ParameterGroups = list[dict[str, Any]]


def build_adamw(config: AdamWConfig, parameter_groups: ParameterGroups) -> torch.optim.Optimizer:
    """AdamW over these groups; one fused update per step, which CPUs and CUDA devices have alike."""
    first, second = config.betas
    return torch.optim.AdamW(
        parameter_groups,
        lr=config.lr,
        betas=(first, second),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def build_optimizer(
    values: Mapping[str, object], parameter_groups: Callable[[float], ParameterGroups]
) -> torch.optim.Optimizer:
    """The optimizer that `optimizer` asks for: a registry key (`name`) and that component's fields.

    `parameter_groups` is called with the weight decay, 0 for an optimizer without one.
    Raises: ConfigError, NotFoundError.
    """
    spec, config = optimizer_config(values)
    module, _, attribute = spec.build.partition(":")
    build = getattr(importlib.import_module(module), attribute)
    optimizer = build(config, parameter_groups(float(dataclasses.asdict(config).get("weight_decay", 0.0))))
    assert isinstance(optimizer, torch.optim.Optimizer), f"{spec.build} returned {type(optimizer).__name__}"
    return optimizer


def optimizer_config(values: Mapping[str, object]) -> tuple[Any, Any]:
    """The declaration and the typed config of the optimizer that is asked for, before anything is built."""
    fields = dict(values)
    spec = load_registry().component("optimizer", str(fields.pop("name", "adamw")), where="optimizer.name")
    return spec, typed_config(spec.config, fields, "optimizer")


def learning_rate_factor(config: TrainerConfig) -> Callable[[int], float]:
    """The share of the peak learning rate at each step: a linear warm-up, then half a cosine down to the final share.

    factor(step) = (step + 1) / warmup                                            while step < warmup
                 = final + (1 - final) (1 + cos(pi (step - warmup) / (max_steps - warmup))) / 2   afterwards
    """
    warmup = min(config.learning_rate_warmup_steps, config.max_steps)
    final = config.final_learning_rate_fraction

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, config.max_steps - warmup))
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    return factor


def check_schedule(config: TrainerConfig) -> None:
    """Refuse numbers that make no schedule.  Raises: ConfigError."""
    for name, least in (("max_steps", 1), ("learning_rate_warmup_steps", 0), ("log_every_n_steps", 1)):
        if getattr(config, name) < least:
            raise ConfigError(
                what=f"{name} is {getattr(config, name)}", where=f"trainer.{name}", mend=f"use {least} or more"
            )
    if not 0 <= config.final_learning_rate_fraction <= 1:
        raise ConfigError(
            what=f"final_learning_rate_fraction is {config.final_learning_rate_fraction}",
            where="trainer.final_learning_rate_fraction",
            mend="use a share from 0 to 1",
        )
