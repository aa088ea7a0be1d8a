"""In-context recall: a row of key-value pairs in which keys come back, each with the value it first had.

    k_1 v_1 k_2 v_2 k_1 v_1 k_3 v_3 k_2 v_2 ...        target at each key that has been seen: its value

Source: Poli et al. 2024 (MAD), in-context recall: keys drawn with replacement, a new map from keys to values in each
row. Unlike multi-query recall the queries are not set apart, so that the model must tell a new key from an old one.
"""

from __future__ import annotations

import numpy as np

from subquad.training.tasks.task import Row, Task, empty_row


def draw(random: np.random.Generator, seq_len: int, size: int, vocab_size: int) -> Row:
    """Pairs of `size` keys. 0 is the filler, the lower half of the vocabulary are keys, the upper half values."""
    middle = vocab_size // 2
    keys = random.choice(np.arange(1, middle), size=size, replace=False)
    values = random.integers(middle, vocab_size, size=size)
    which = random.integers(size, size=seq_len // 2)
    tokens, targets = empty_row(seq_len)
    end = 2 * len(which)
    tokens[0:end:2], tokens[1:end:2] = keys[which], values[which]
    seen_before = np.ones(len(which), dtype=bool)
    seen_before[np.unique(which, return_index=True)[1]] = False
    places = 2 * np.flatnonzero(seen_before)
    targets[places] = values[which[seen_before]]
    return Row(tokens, targets)


IN_CONTEXT_RECALL = Task(
    name="in_context_recall",
    summary="values of keys that come back",
    paper="Poli et al. 2024",
    counts="keys",
    sizes=(4, 8, 16, 32, 64),
    vocab_size=256,
    draw=draw,
    least_len=lambda size: 2 * (size + 1),  # one pair more than keys: at least one comes back
    least_vocab=lambda size: 2 * size + 2,
    chance=lambda size, vocab_size: 1 / (vocab_size - vocab_size // 2),
)
