"""A data source: a function from a split and a number to a sample, the same for ever, so that a run can resume.

    tokens: 0, 1 or the mark 2      target_t = number of ones since the last mark, token t included, mod 2

What linear recurrences with positive decays cannot keep track of (Grazzi et al. 2025, "Unlocking state-tracking").
"""

from __future__ import annotations

import dataclasses

import numpy as np

from data_and_optimizer.plugin import ParityConfig
from subquad.training.sources.source import IGNORED, DataContext, Sample, Split
from subquad.training.tokenizer import SymbolTokenizer

MARK = 2


class Parity:
    """Samples of the task, each drawn from (seed, split, index)."""

    packed = False
    unigram_bits_per_byte = None

    def __init__(self, config: ParityConfig, seq_len: int) -> None:
        self._config, self._seq_len = config, seq_len
        self.tokenizer = SymbolTokenizer(3)
        self.fingerprint: dict[str, object] = {"source": "parity", "seq_len": seq_len, **dataclasses.asdict(config)}

    def num_samples(self, split: Split) -> int:
        return self._config.train_samples if split == "train" else self._config.validation_samples

    def sample(self, split: Split, index: int) -> Sample:
        random = np.random.default_rng((self._config.seed, ("train", "validation").index(split), index))
        bits = random.integers(0, 2, self._seq_len)
        marks = random.random(self._seq_len) < self._config.mark_probability
        ones = np.cumsum(bits * ~marks)
        before = np.maximum.accumulate(np.where(marks, ones, 0))  # the ones up to the last mark
        tokens = np.where(marks, MARK, bits).astype(np.int64)
        targets = np.where(marks, IGNORED, (ones - before) % 2).astype(np.int64)
        return Sample(tokens, targets, np.zeros(0, dtype=np.int64), 0)


def build(config: ParityConfig, context: DataContext) -> Parity:
    """The task at the run's sequence length."""
    return Parity(config, context.seq_len)
