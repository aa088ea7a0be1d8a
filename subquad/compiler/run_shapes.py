"""What a run's configuration says about shapes: sizes of the model, batches, and what they are computed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from subquad.compiler.example import Example
from subquad.compiler.target import Target
from subquad.schema import ModelConfig, RunConfig


def sized_model(config: RunConfig) -> ModelConfig:
    """The model's configuration with the sizes that it leaves to the data; a vocabulary is no operator's concern."""
    return replace(
        config.model,
        vocab_size=config.model.vocab_size or 256,
        context_len=config.model.context_len or config.trainer.seq_len,
    )


def model_of(model: ModelConfig, keys: Sequence[str]) -> ModelConfig:
    """The model with one block per key."""
    values: dict[str, Any] = {name: getattr(model, name) for name in ModelConfig.__dataclass_fields__}
    return ModelConfig(**values | {"schedule": list(keys), "num_layers": len(keys)})


def is_packed(config: RunConfig) -> bool:
    """Whether the run's batches carry the boundaries of documents."""
    return config.data.get("name") != "synthetic"  # each of its rows is one document


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
