"""What a run's configuration says about shapes: sizes of the model, batches, and what they are computed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from subquad.compiler.example import Example
from subquad.compiler.target import Target
from subquad.errors import ConfigError
from subquad.parallel.part import SequencePart
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


def part_of(config: RunConfig, *, packed: bool) -> SequencePart | None:
    """The part of every sequence that a rank computes on; None where it holds whole ones.  Raises: ConfigError."""
    trainer = config.trainer
    if trainer.context_parallel == 1:
        return None
    if trainer.seq_len % trainer.context_parallel:
        raise ConfigError(
            what=f"{trainer.context_parallel} ranks cannot share {trainer.seq_len} tokens evenly",
            where="trainer.context_parallel",
            mend="use a divisor of trainer.seq_len",
        )
    if packed and trainer.batch_size > 1:
        raise ConfigError(
            what=f"ranks share packed sequences one at a time, and a batch has {trainer.batch_size}",
            where="trainer.context_parallel",
            mend="use trainer.batch_size=1, with trainer.accumulate in its place",
        )
    return SequencePart(trainer.context_parallel)


def is_packed(config: RunConfig) -> bool:
    """Whether the run's batches carry the boundaries of documents."""
    return config.data.get("name") != "synthetic"  # each of its rows is one document


def local_tokens(config: RunConfig) -> tuple[int, int]:
    """Sequences, and tokens of each, that a device holds of a micro-batch."""
    return config.trainer.batch_size, config.trainer.seq_len // config.trainer.context_parallel


def training_example(config: RunConfig, target: Target, *, packed: bool) -> Example:
    """The shapes of a training step on one device."""
    return Example(
        tokens_shape=local_tokens(config),
        packed=packed,
        dtype=compute_dtype(config.trainer.precision, target.kind),
        training=True,
    )


def compute_dtype(precision: str, device_kind: str) -> str:
    """What matrix products compute in: `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if precision == "auto":
        return "bfloat16" if device_kind == "cuda" else "float32"
    return precision
