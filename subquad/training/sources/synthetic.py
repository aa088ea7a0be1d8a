"""Any task of `tasks/` as training data: each row draws its size, then itself, from (seed, split, index)."""

from __future__ import annotations

import numpy as np

from subquad.errors import ConfigError
from subquad.training.sources.configs import SyntheticConfig
from subquad.training.sources.source import DataContext, Sample, Split
from subquad.training.tasks.catalogue import task_named
from subquad.training.tokenizer import SymbolTokenizer

STREAMS: tuple[Split, ...] = ("train", "validation")
"""What the second number of a seed means; `evaluate` draws from one more (`evaluation/synthetic.py`)."""


class Synthetic:
    """Rows of a task in several sizes, as many of each."""

    packed = False
    unigram_bits_per_byte = None

    def __init__(self, config: SyntheticConfig, seq_len: int) -> None:
        task = task_named(config.task, where="data.task")
        vocab_size = config.vocab_size or task.vocab_size
        sizes = list(config.sizes) or task.fitting(seq_len, vocab_size)
        if not sizes:
            raise ConfigError(
                what=f"no usual size of {task.name} fits {seq_len} tokens and a vocabulary of {vocab_size}",
                where="trainer.seq_len",
                mend=f"use trainer.seq_len={task.least_len(task.sizes[0])} or more, and data.vocab_size="
                f"{task.least_vocab(task.sizes[0])} or more",
            )
        for size in sizes:
            task.check(seq_len, size, vocab_size, where="data.sizes")
        self._config, self._task, self._sizes, self._seq_len = config, task, sizes, seq_len
        self.tokenizer = SymbolTokenizer(vocab_size)
        self.fingerprint: dict[str, object] = {
            "source": "synthetic",
            "task": task.name,
            "seq_len": seq_len,
            "sizes": sizes,
            "vocab_size": vocab_size,
            "train_samples": config.train_samples,
            "validation_samples": config.validation_samples,
            "seed": config.seed,
        }

    def num_samples(self, split: Split) -> int:
        return self._config.train_samples if split == "train" else self._config.validation_samples

    def sample(self, split: Split, index: int) -> Sample:
        random = np.random.default_rng((self._config.seed, STREAMS.index(split), index))
        size = self._sizes[random.integers(len(self._sizes))]
        tokens, targets = self._task.draw(random, self._seq_len, size, self.tokenizer.vocab_size)
        return Sample(tokens, targets, np.zeros(0, dtype=np.int64), 0)


def build(config: SyntheticConfig, context: DataContext) -> Synthetic:
    """The task at the run's sequence length.  Raises: ConfigError, NotFoundError."""
    return Synthetic(config, context.seq_len)
