"""Modular arithmetic: the value modulo 5 of sums, differences and products without brackets.

    _ _ 3 + 4 * 2 - 1 =        target at the equals sign: 0        products bind closer than sums

Source: Delétang et al. 2023, modular arithmetic (simple): a regular language, so that a fixed number of states is
enough, but one whose states do not commute.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np

from subquad.training.tasks.task import Row, Task, empty_row

MODULUS = 5
NUMBER, OPERATOR, EQUALS = 1, 1 + MODULUS, 4 + MODULUS  # first token of the numbers, of + - *, and the sign
PLUS, MINUS, TIMES = range(3)


def draw(random: np.random.Generator, seq_len: int, size: int, vocab_size: int) -> Row:
    """`size` numbers at the end of the row. 0 is the filler, 1 to 5 are the numbers 0 to 4, 6 to 9 are + - * =."""
    numbers = random.integers(MODULUS, size=size)
    operators = random.integers(3, size=size - 1)
    state = (0, int(numbers[0]))
    for operator, number in zip(operators, numbers[1:]):
        state = advanced(state, int(operator), int(number))
    tokens, targets = empty_row(seq_len)
    begin = seq_len - 2 * size
    tokens[begin:-1:2] = NUMBER + numbers
    tokens[begin + 1 : -1 : 2] = OPERATOR + operators
    tokens[-1] = EQUALS
    targets[-1] = NUMBER + sum(state) % MODULUS
    return Row(tokens, targets)


def advanced(state: tuple[int, int], operator: int, number: int) -> tuple[int, int]:
    """The state (sum of the finished terms, the open term), both modulo 5, after one more operator and number."""
    finished, term = state
    if operator == TIMES:
        return finished, term * number % MODULUS
    return (finished + term) % MODULUS, (number if operator == PLUS else -number) % MODULUS


@cache
def most_frequent_share(size: int) -> float:
    """The share of the commonest value among all expressions of `size` numbers: products favour 0."""
    states = {(0, number): 1 / MODULUS for number in range(MODULUS)}
    for _ in range(size - 1):
        after: Counter[tuple[int, int]] = Counter()
        for state, share in states.items():
            for operator in (PLUS, MINUS, TIMES):
                for number in range(MODULUS):
                    after[advanced(state, operator, number)] += share / (3 * MODULUS)  # type: ignore[assignment]
        states = dict(after)
    return max(
        sum(share for state, share in states.items() if sum(state) % MODULUS == value) for value in range(MODULUS)
    )


MODULAR_ARITHMETIC = Task(
    name="modular_arithmetic",
    summary="sums, differences and products modulo 5",
    paper="Delétang et al. 2023",
    counts="numbers",
    sizes=(2, 4, 8, 16, 32),
    vocab_size=10,
    draw=draw,
    least_len=lambda size: 2 * size,
    least_vocab=lambda size: 10,
    chance=lambda size, vocab_size: most_frequent_share(size),
)
