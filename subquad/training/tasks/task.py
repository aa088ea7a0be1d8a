"""What a synthetic task is: a drawer of rows whose answers follow from the tokens, and what it needs for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from subquad.errors import ConfigError
from subquad.training.sources.source import IGNORED

FILLER = 0
"""The token where a task says nothing."""


class Row(NamedTuple):
    """A question and its answers.  Shapes:  tokens, targets: t (int64); a target is -100 where nothing is asked."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task by name.

    `draw(random, seq_len, size, vocab_size)` gives a row; `size` counts what `counts` says. `least_len` and
    `least_vocab` are the smallest length and vocabulary for a size. `chance(size, vocab_size)` is the share of answers
    that the best constant guess, which knows the task and not the row, gets right.
    """

    name: str
    summary: str
    paper: str
    counts: str
    sizes: tuple[int, ...]
    vocab_size: int
    draw: Callable[[np.random.Generator, int, int, int], Row]
    least_len: Callable[[int], int]
    least_vocab: Callable[[int], int]
    chance: Callable[[int, int], float]

    def check(self, seq_len: int, size: int, vocab_size: int, *, where: str) -> None:
        """Raises: ConfigError when such a row cannot be drawn; `where` is the key that holds the sizes."""
        if size < 1:
            raise ConfigError(what=f"a size of {self.name} is {size}", where=where, mend="use 1 or more")
        if vocab_size < self.least_vocab(size):
            raise ConfigError(
                what=f"{self.name} with {size} {self.counts} needs {self.least_vocab(size)} tokens in its vocabulary, "
                f"which has {vocab_size}",
                where=where,
                mend="use a smaller size, or train with a larger data.vocab_size",
            )
        if seq_len < self.least_len(size):
            raise ConfigError(
                what=f"{self.name} with {size} {self.counts} does not fit into {seq_len} tokens",
                where=where,
                mend=f"use {self.least_len(size)} tokens or more, or a smaller size",
            )

    def fitting(self, seq_len: int, vocab_size: int) -> list[int]:
        """Those of the usual sizes for which there is room."""
        return [s for s in self.sizes if seq_len >= self.least_len(s) and vocab_size >= self.least_vocab(s)]


def empty_row(seq_len: int) -> Row:
    """Filler that asks for nothing."""
    return Row(np.full(seq_len, FILLER, dtype=np.int64), np.full(seq_len, IGNORED, dtype=np.int64))


def scattered(
    random: np.random.Generator, noise: NDArray[np.int64], pieces: list[NDArray[np.int64]]
) -> NDArray[np.int64]:
    """The pieces, each in one stretch and in their order, among the noise: every such arrangement is as likely."""
    total = len(noise) + len(pieces)
    chosen = np.sort(random.choice(total, size=len(pieces), replace=False))
    parts, taken = [], 0
    for number, (place, piece) in enumerate(zip(chosen, pieces)):
        before = int(place) - number  # noise that stands in front
        parts += [noise[taken:before], piece]
        taken = before
    return np.concatenate([*parts, noise[taken:]])
