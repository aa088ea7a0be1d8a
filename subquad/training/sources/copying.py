"""Copying, plain or selective (`tasks/copying.py`), with one number of symbols."""

from __future__ import annotations

import dataclasses

import numpy as np

from subquad.errors import ConfigError
from subquad.training.sources.configs import CopyingConfig
from subquad.training.sources.source import DataContext, Sample, Split
from subquad.training.tasks import copying
from subquad.training.tokenizer import SymbolTokenizer


class Copying:
    """Samples of the copying task, each drawn from (seed, split, index)."""

    packed = False
    unigram_bits_per_byte = None

    def __init__(self, config: CopyingConfig, seq_len: int) -> None:
        if seq_len < 2 * config.num_symbols:
            raise ConfigError(
                what=f"{config.num_symbols} symbols and their copies do not fit into {seq_len} tokens",
                where="trainer.seq_len",
                mend=f"use trainer.seq_len={2 * config.num_symbols} or more, or fewer data.num_symbols",
            )
        self._config = config
        self._seq_len = seq_len
        self.tokenizer = SymbolTokenizer(config.vocab_size)
        self.fingerprint: dict[str, object] = {"source": "copying", "seq_len": seq_len, **dataclasses.asdict(config)}

    def num_samples(self, split: Split) -> int:
        return self._config.train_samples if split == "train" else self._config.validation_samples

    def sample(self, split: Split, index: int) -> Sample:
        config = self._config
        random = np.random.default_rng((config.seed, ("train", "validation").index(split), index))
        tokens, targets = copying.draw(
            random, self._seq_len, config.num_symbols, config.vocab_size, selective=config.selective
        )
        return Sample(tokens, targets, np.zeros(0, dtype=np.int64), 0)


def build(config: CopyingConfig, context: DataContext) -> Copying:
    """The copying task at the run's sequence length.  Raises: ConfigError."""
    return Copying(config, context.seq_len)
