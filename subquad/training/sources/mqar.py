"""Multi-query associative recall: read key-value pairs, later give the value of each key that appears.

    k_1 v_1 k_2 v_2 ... k_p v_p   0 k_3 0 0 k_1 0 ...        target at each later key: its value

Source: Arora et al. 2023 (Zoology), Appendix E: distinct keys, values drawn with replacement, and the place of a
query drawn with probability proportional to (1 + gap)^(power - 1), so that most are near and some are far.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from subquad.errors import ConfigError
from subquad.training.sources.configs import MqarConfig
from subquad.training.sources.source import IGNORED, DataContext, Sample, Split
from subquad.training.tokenizer import SymbolTokenizer

FILLER = 0


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
        middle = config.vocab_size // 2
        keys = random.choice(np.arange(1, middle), size=config.num_pairs, replace=False)
        values = random.integers(middle, config.vocab_size, size=config.num_pairs)
        tokens = np.full(self._seq_len, FILLER, dtype=np.int64)
        targets = np.full(self._seq_len, IGNORED, dtype=np.int64)
        prefix = 2 * config.num_pairs
        tokens[0:prefix:2], tokens[1:prefix:2] = keys, values
        # Queries stand at even distances behind the pairs, as in the paper's code.
        slots = (self._seq_len - prefix) // 2
        weights = (1.0 + np.arange(slots)) ** (config.power - 1)
        places = prefix + 2 * random.choice(slots, size=config.num_pairs, replace=False, p=weights / weights.sum())
        tokens[places], targets[places] = keys, values
        return Sample(tokens, targets, np.zeros(0, dtype=np.int64), 0)


def build(config: MqarConfig, context: DataContext) -> Mqar:
    """The recall task at the run's sequence length.  Raises: ConfigError."""
    return Mqar(config, context.seq_len)
