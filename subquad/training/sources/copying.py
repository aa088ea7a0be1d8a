"""Copying: read symbols, and after a marker give them back in order.

    s_1 _ _ s_2 _ s_3 ... s_k  |  s_1 s_2 ... s_{k-1}        targets from the marker on: s_1 s_2 ... s_k

Plain: the symbols stand together at the beginning, so that a fixed delay solves it. Selective: they are scattered
among blanks, so that only what depends on the content can.  Source: Gu and Dao 2023 (Mamba), Section 3.1.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from subquad.errors import ConfigError
from subquad.training.sources.configs import CopyingConfig
from subquad.training.sources.source import IGNORED, DataContext, Sample, Split
from subquad.training.tokenizer import SymbolTokenizer

BLANK, MARKER, FIRST_SYMBOL = 0, 1, 2


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
        count = config.num_symbols
        symbols = random.integers(FIRST_SYMBOL, config.vocab_size, size=count)
        room = self._seq_len - count  # tokens before the marker
        places = np.sort(random.choice(room, size=count, replace=False)) if config.selective else np.arange(count)
        tokens = np.full(self._seq_len, BLANK, dtype=np.int64)
        targets = np.full(self._seq_len, IGNORED, dtype=np.int64)
        tokens[places] = symbols
        tokens[room] = MARKER
        tokens[room + 1 :] = symbols[:-1]
        targets[room:] = symbols
        return Sample(tokens, targets, np.zeros(0, dtype=np.int64), 0)


def build(config: CopyingConfig, context: DataContext) -> Copying:
    """The copying task at the run's sequence length.  Raises: ConfigError."""
    return Copying(config, context.seq_len)
