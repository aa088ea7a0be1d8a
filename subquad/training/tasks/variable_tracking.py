"""Variable tracking: follow a value through assignments from variable to variable, beside another chain and noise.

    ~ set x_1 v ~ ~ set y_1 w ~ let x_2 x_1 ~ let y_2 y_1 ...  ? v x_1 x_2        targets from v on: x_1 x_2 x_3

Source: Hsieh et al. 2024 (RULER), variable tracking: all variables that hold the value, in the order of the chain.
There a row has one chain by default; here it has two, so that naming every variable seen is no answer.
"""

from __future__ import annotations

import numpy as np

from subquad.training.tasks.task import Row, Task, empty_row, scattered

SET, LET, QUERY, FIRST = 0, 1, 2, 3
CHAINS = 2
STATEMENT = 3  # tokens


def draw(random: np.random.Generator, seq_len: int, size: int, vocab_size: int) -> Row:
    """Chains of `size` hops. 0, 1, 2 are set, let and the query; thirds of the rest are noise, variables and values."""
    third = (vocab_size - FIRST) // 3
    tail = 2 + size  # the query, its value, and all variables but the last
    noise = random.integers(FIRST, FIRST + third, size=seq_len - tail - CHAINS * STATEMENT * (size + 1))
    variables = FIRST + third + random.choice(third, size=(CHAINS, size + 1), replace=False)
    values = FIRST + 2 * third + random.choice(third, size=CHAINS, replace=False)
    turns = random.permutation(np.repeat(np.arange(CHAINS), size + 1))  # whose statement comes next
    hop = [0] * CHAINS
    pieces = []
    for chain in turns:
        number, names = hop[chain], variables[chain]
        statement = [LET, names[number], names[number - 1]] if number else [SET, names[0], values[chain]]
        pieces.append(np.array(statement, dtype=np.int64))
        hop[chain] += 1
    tokens, targets = empty_row(seq_len)
    tokens[:-tail] = scattered(random, noise, pieces)
    tokens[-tail:] = [QUERY, values[0], *variables[0, :-1]]
    targets[-size - 1 :] = variables[0]
    return Row(tokens, targets)


VARIABLE_TRACKING = Task(
    name="variable_tracking",
    summary="all variables that a value was passed on to",
    paper="Hsieh et al. 2024",
    counts="hops",
    sizes=(1, 2, 4, 8),
    vocab_size=64,
    draw=draw,
    least_len=lambda size: CHAINS * STATEMENT * (size + 1) + 2 + size,
    least_vocab=lambda size: FIRST + 3 * CHAINS * (size + 1),
    chance=lambda size, vocab_size: 1 / ((vocab_size - FIRST) // 3),
)
