"""A synthetic task: how many of its answers a run gets right, by size and by length.

Rows are drawn from (seed, 2, size, length, number); training draws from (seed, 0, number) and validation while
training from (seed, 1, number), so that none of these draws is one that was trained on. Where a task has few rows at
all (four bits of parity: sixteen), equal rows come up again whatever the seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from subquad.component_config import typed_config
from subquad.errors import ConfigError
from subquad.schema import EvaluateConfig, RunConfig
from subquad.training.evaluation.loaded_run import LoadedRun
from subquad.training.evaluation.text import Record
from subquad.training.sources.configs import SyntheticConfig
from subquad.training.sources.source import IGNORED
from subquad.training.sources.synthetic import STREAMS
from subquad.training.tasks.catalogue import task_named
from subquad.training.tasks.task import Row, Task

STREAM = len(STREAMS)
SAMPLES = 256


@dataclass(frozen=True)
class TrainedOn:
    """The task that a run was trained on; `sizes` is empty where the task's usual ones were meant."""

    task: str
    vocab_size: int
    sizes: list[int]


def trained_on(config: RunConfig) -> TrainedOn | None:
    """What the data of a run are, if they are a task of ours."""
    values = dict(config.data)
    if values.pop("name", None) != "synthetic":
        return None
    synthetic = typed_config(SyntheticConfig, values, "data")
    return TrainedOn(synthetic.task, synthetic.vocab_size, synthetic.sizes)


def evaluate_task(run: LoadedRun, request: EvaluateConfig, name: str) -> Record:
    """Judge a run by a task, whether it was trained on it or not.  Raises: ConfigError, NotFoundError."""
    task = task_named(name, where="evaluate.suite")
    trained = trained_on(run.config)
    known = trained if trained is not None and trained.task == name else None
    vocab_size = (known.vocab_size if known else 0) or task.vocab_size
    model_vocab = run.model.embedding.num_embeddings
    if vocab_size > model_vocab:
        raise ConfigError(
            what=f"{name} has a vocabulary of {vocab_size}, the run's model one of {model_vocab}",
            where="evaluate.suite",
            mend=f"train a run on it: data=synthetic data.task={name}",
        )
    lengths = sorted(set(request.lengths)) or [run.config.trainer.seq_len]
    levels = []
    for length in lengths:
        sizes = request.sizes or (known.sizes if known else []) or task.fitting(length, vocab_size)
        for size in sorted(set(sizes)):
            task.check(length, size, vocab_size, where="evaluate.sizes")
            levels.append((length, size))
    if not levels:
        raise ConfigError(
            what=f"no usual size of {name} fits {lengths[-1]} tokens",
            where="evaluate.lengths",
            mend=f"use lengths=[{task.least_len(task.sizes[0])}] or more",
        )
    return {
        "task": name,
        "paper": task.paper,
        "counts": task.counts,
        "vocab_size": vocab_size,
        "seed": request.seed,
        "trained_on": "this task" if known else str(run.config.data.get("name")),
        "trained_length": run.config.trainer.seq_len,
        "levels": [_level(run, request, task, vocab_size, length, size) for length, size in levels],
    }


def rows(task: Task, seed: int, length: int, size: int, vocab_size: int, count: int) -> list[Row]:
    """The first `count` rows that a level is judged by."""
    return [
        task.draw(np.random.default_rng((seed, STREAM, size, length, number)), length, size, vocab_size)
        for number in range(count)
    ]


def _level(
    run: LoadedRun, request: EvaluateConfig, task: Task, vocab_size: int, length: int, size: int
) -> dict[str, object]:
    count = request.samples or SAMPLES
    drawn = rows(task, request.seed, length, size, vocab_size, count)
    trainer = run.config.trainer
    at_once = max(1, trainer.batch_size * trainer.seq_len // length)
    answers = right = exact = 0
    for start in range(0, count, at_once):
        part = drawn[start : start + at_once]
        targets = np.stack([row.targets for row in part])
        given = run.logits(torch.from_numpy(np.stack([row.tokens for row in part]))).argmax(-1).cpu().numpy()
        asked = targets != IGNORED
        answers += int(asked.sum())
        right += int((asked & (given == targets)).sum())
        exact += int((~asked | (given == targets)).all(axis=1).sum())
    return {
        "length": length,
        "size": size,
        "rows": count,
        "answers": answers,
        "accuracy": right / answers,
        "exact": exact / count,
        "chance": task.chance(size, vocab_size),
        "row_guess": task.row_guess(size, vocab_size),
    }
