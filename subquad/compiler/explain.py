"""What would be chosen for a recipe, on this machine or another, without building its parameters."""

from __future__ import annotations

from dataclasses import replace

from torch._subclasses.fake_tensor import FakeTensorMode

from subquad.compiler.choose import Chooser
from subquad.compiler.example import Example
from subquad.compiler.options import CompileOptions
from subquad.compiler.pipeline import capture_model, make_plan
from subquad.compiler.plan import Plan
from subquad.compiler.report import format_plan
from subquad.compiler.target import Target, resolve_target
from subquad.model.build import build_model
from subquad.schema import ModelConfig, RunConfig


def explain(config: RunConfig) -> str:
    """The report of the plan that training with this configuration would follow."""
    return format_plan(explained_plan(config))


def explained_plan(config: RunConfig) -> Plan:
    """The plan itself."""
    target = resolve_target(config.target)
    return plan_of_shapes(config, target, Chooser(target, CompileOptions.of_run(config)))


def plan_of_shapes(config: RunConfig, target: Target, chooser: Chooser) -> Plan:
    """The plan of training on a target. The model is built of shapes alone: a billion parameters cost nothing."""
    with FakeTensorMode():
        model = build_model(sized_model(config))
    example = training_example(config, target, packed=is_packed(config))
    return make_plan(model, capture_model(model), example, target, chooser)


def sized_model(config: RunConfig) -> ModelConfig:
    """The model's configuration with the sizes that it leaves to the data; a vocabulary is no operator's concern."""
    return replace(
        config.model,
        vocab_size=config.model.vocab_size or 256,
        context_len=config.model.context_len or config.trainer.seq_len,
    )


def is_packed(config: RunConfig) -> bool:
    """Whether the run's batches carry the boundaries of documents."""
    return config.data.get("name") not in UNPACKED_SOURCES


UNPACKED_SOURCES = ("mqar", "copying")
"""Data sources whose rows are one document each."""


def training_example(config: RunConfig, target: Target, *, packed: bool) -> Example:
    """The shapes of a training step on one device."""
    return Example(
        tokens_shape=(config.trainer.batch_size, config.trainer.seq_len),
        packed=packed,
        dtype=compute_dtype(config.trainer.precision, target.kind),
        training=True,
    )


def compute_dtype(precision: str, device_kind: str) -> str:
    """What matrix products compute in: `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if precision == "auto":
        return "bfloat16" if device_kind == "cuda" else "float32"
    return precision
