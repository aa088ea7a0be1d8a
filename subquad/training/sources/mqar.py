"""Multi-query associative recall (`tasks/mqar.py`) with one number of pairs."""

from __future__ import annotations

import dataclasses

import numpy as np

from subquad.errors import ConfigError
from subquad.training.sources.configs import MqarConfig
from subquad.training.sources.source import DataContext, Sample, Split
from subquad.training.tasks import mqar
from subquad.training.tokenizer import SymbolTokenizer


class Mqar:
    """Samples of the recall task, each drawn from (seed, split, index)."""

    packed = False
    unigram_bits_per_byte = None

    def __init__(self, config: MqarConfig, seq_len: int) -> None:
        if seq_len < 4 * config.num_pairs:
            raise ConfigError(
                what=f"{config.num_pairs} pairs and their queries do not fit into {seq_len} tokens",
                where="trainer.seq_len",
                mend=f"use trainer.seq_len={4 * config.num_pairs} or more, or fewer data.num_pairs",
            )
        self._config = config
        self._seq_len = seq_len
        self.tokenizer = SymbolTokenizer(config.vocab_size)
        self.fingerprint: dict[str, object] = {"source": "mqar", "seq_len": seq_len, **dataclasses.asdict(config)}

    def num_samples(self, split: Split) -> int:
        return self._config.train_samples if split == "train" else self._config.validation_samples

    def sample(self, split: Split, index: int) -> Sample:
        config = self._config
        random = np.random.default_rng((config.seed, ("train", "validation").index(split), index))
        tokens, targets = mqar.draw(random, self._seq_len, config.num_pairs, config.vocab_size, config.power)
        return Sample(tokens, targets, np.zeros(0, dtype=np.int64), 0)


def build(config: MqarConfig, context: DataContext) -> Mqar:
    """The recall task at the run's sequence length.  Raises: ConfigError."""
    return Mqar(config, context.seq_len)
