"""The compiler as training and generation call it: for which device and shapes, and along which plan."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import torch

from subquad.compiler.choose import Chooser
from subquad.compiler.example import Example
from subquad.compiler.explain import plan_of_shapes
from subquad.compiler.options import CompileOptions
from subquad.compiler.pins import given_way, without_effect
from subquad.compiler.pipeline import compile_model, kernel_versions, plan_versions
from subquad.compiler.plan import Plan
from subquad.compiler.run_shapes import compute_dtype, part_of, training_example
from subquad.compiler.target import Target, require_local, resolve_target
from subquad.errors import ConfigError
from subquad.log import caution
from subquad.model.language_model import LanguageModel
from subquad.schema import RunConfig


def device_of(config: RunConfig) -> torch.device:
    """Where a run computes: a CUDA device if there is one and the CPU is not asked for."""
    cpu = "cpu" in (config.trainer.accelerator, config.target)
    return torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")


def target_of(config: RunConfig) -> Target:
    """The device that a run compiles for, which must be the one it computes on.  Raises: ConfigError, NotFoundError."""
    device = device_of(config)
    name = device.type if config.target == "auto" else config.target
    target = require_local(resolve_target(name), config.target)
    if target.kind != device.type:
        raise ConfigError(
            what=f"the target is a {target.kind} device, and the run computes on the {device.type}",
            where=f"target={config.target}",
            mend=f"leave target out, or set trainer.accelerator={target.kind}",
        )
    return target


def compiled(model: LanguageModel, config: RunConfig, plan: Plan | None, *, packed: bool) -> tuple[LanguageModel, Plan]:
    """Choose kernels for the shapes that the trainer makes, or take those of a plan, and let the model run them."""
    target, chosen_here = target_of(config), plan is None
    if plan is None and config.trainer.tensor_parallel > 1:
        # Kernels are chosen for the share of the heads that a rank will have; this model still has all.
        plan = plan_of_shapes(config, target, Chooser(target, CompileOptions.of_run(config)))
    elif plan is not None:
        changes = plan.staleness(target.device.name, plan_versions(), kernel_versions(plan))
        if changes is not None:
            warnings.warn(f"the plan is stale ({changes}); it is followed all the same", stacklevel=2)
    example, part = training_example(config, target, packed=packed), part_of(config, packed=packed)
    options = CompileOptions.of_run(config)
    model, plan = compile_model(model, example, target=target, options=options, plan=plan, part=part)
    for line in without_effect(plan.choices, config.kernel) if chosen_here else ():
        caution(line)
    return model, plan


def compile_for_generation(
    model: LanguageModel, config: RunConfig, batch_size: int = 1, dtype: str = "float32"
) -> Plan:
    """Choose checked kernels for prefill and decode on this device, for weights of this type; returns the choices.

    The run's plan is for training's shapes. Nothing is measured, so that the first token comes soon. What the run
    forbids stays forbidden, also where mixers decode in place, and what it pins holds wherever it can be computed:
    where it cannot, that is said, since nobody could take a finished run's pin back.
    """
    example = Example(tokens_shape=(batch_size, config.model.context_len), dtype=dtype, decoding=True)
    return compile_unmeasured(model, example, config)


def compile_unmeasured(model: LanguageModel, example: Example, config: RunConfig) -> Plan:
    """Let a trained model run checked kernels, without timing any; say which pins of the run gave way or do nothing."""
    options = replace(CompileOptions.of_run(config), measure=False, pins_give_way=True)
    _, plan = compile_model(model, example, target=target_of(config), options=options)
    called = [choice for choice in plan.choices if not example.decoding or choice.method not in ("forward", "packed")]
    for line in given_way(called, options.pins) + without_effect(plan.choices, options.pins):
        caution(line)
    return plan


def plan_of(config: RunConfig) -> Plan | None:
    """The plan that `plan=FILE` names, if it names one.  Raises: ConfigError."""
    return None if config.plan is None else Plan.load(Path(config.plan).expanduser())


def uses_bfloat16(config: RunConfig) -> bool:
    """Whether matrix products are computed in bfloat16; weights stay float32."""
    return compute_dtype(config.trainer.precision, device_of(config).type) == "bfloat16"
