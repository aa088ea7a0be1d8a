"""Multi-query associative recall: read key-value pairs, later give the value of each key that appears.

    k_1 v_1 k_2 v_2 ... k_p v_p   0 k_3 0 0 k_1 0 ...        target at each later key: its value

Source: Arora et al. 2023 (Zoology), Appendix E: distinct keys, values drawn with replacement, and the place of a
query drawn with probability proportional to (1 + gap)^(power - 1), so that most are near and some are far.
"""

from __future__ import annotations

import numpy as np

from subquad.training.tasks.task import Row, Task, empty_row

POWER = 0.01
"""The paper's exponent."""


def draw(random: np.random.Generator, seq_len: int, size: int, vocab_size: int, power: float = POWER) -> Row:
    """`size` pairs and a query for each. 0 is the filler, the lower half of the tokens are keys, the upper values."""
    middle = vocab_size // 2
    keys = random.choice(np.arange(1, middle), size=size, replace=False)
    values = random.integers(middle, vocab_size, size=size)
    tokens, targets = empty_row(seq_len)
    prefix = 2 * size
    tokens[0:prefix:2], tokens[1:prefix:2] = keys, values
    # Queries stand at even distances behind the pairs, as in the paper's code.
    slots = (seq_len - prefix) // 2
    weights = (1.0 + np.arange(slots)) ** (power - 1)
    places = prefix + 2 * random.choice(slots, size=size, replace=False, p=weights / weights.sum())
    tokens[places], targets[places] = keys, values
    return Row(tokens, targets)


MQAR = Task(
    name="mqar",
    summary="multi-query associative recall",
    paper="Arora et al. 2023",
    counts="key-value pairs",
    sizes=(4, 8, 16, 32, 64),
    vocab_size=256,
    draw=draw,
    least_len=lambda size: 4 * size,
    least_vocab=lambda size: 2 * size + 2,
    chance=lambda size, vocab_size: 1 / (vocab_size - vocab_size // 2),
)
