"""Needles in a haystack: of several keys hidden in noise, give the value of the one that is asked for.

    ~ ~ ! k_1 v v v v ~ ~ ~ ! k_2 v v v v ~ ...  ? k_1 v v v        targets from the last key on: the four of its value

Source: Hsieh et al. 2024 (RULER), retrieval with several keys (MK-NIAH), in tokens instead of words: the needles are
as alike as the sentences there, values have several tokens as the numbers there, and the query stands at the end.
"""

from __future__ import annotations

import numpy as np

from subquad.training.tasks.task import Row, Task, empty_row, scattered

NEEDLE, QUERY, FIRST = 0, 1, 2
VALUE_LEN = 4
TAIL = 1 + VALUE_LEN  # the query, its key, and all of the value but its last token


def draw(random: np.random.Generator, seq_len: int, size: int, vocab_size: int) -> Row:
    """`size` needles. 0 and 1 mark needles and the query; thirds of the rest are noise, keys, and parts of values."""
    third = (vocab_size - FIRST) // 3
    noise = random.integers(FIRST, FIRST + third, size=seq_len - TAIL - size * (2 + VALUE_LEN))
    keys = FIRST + third + random.choice(third, size=size, replace=False)
    values = random.integers(FIRST + 2 * third, FIRST + 3 * third, size=(size, VALUE_LEN))
    pieces = [np.concatenate([[NEEDLE, key], value]) for key, value in zip(keys, values)]
    asked = random.integers(size)
    tokens, targets = empty_row(seq_len)
    tokens[:-TAIL] = scattered(random, noise, pieces)
    tokens[-TAIL:] = [QUERY, keys[asked], *values[asked, :-1]]
    targets[-VALUE_LEN:] = values[asked]
    return Row(tokens, targets)


NEEDLES = Task(
    name="needle",
    summary="the value of one of the keys hidden in noise",
    paper="Hsieh et al. 2024",
    counts="needles",
    sizes=(1, 2, 4, 8),
    vocab_size=64,
    draw=draw,
    least_len=lambda size: size * (2 + VALUE_LEN) + TAIL,
    least_vocab=lambda size: FIRST + 3 * max(size, 2),
    chance=lambda size, vocab_size: 1 / ((vocab_size - FIRST) // 3),
)
