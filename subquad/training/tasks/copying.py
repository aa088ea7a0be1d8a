"""Copying: read symbols, and after a marker give them back in order.

    s_1 _ _ s_2 _ s_3 ... s_k  |  s_1 s_2 ... s_{k-1}        targets from the marker on: s_1 s_2 ... s_k

Plain: the symbols stand together at the beginning, so that a fixed delay solves it. Selective: they are scattered
among blanks, so that only what depends on the content can.  Source: Gu and Dao 2023 (Mamba), Section 3.1.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from subquad.training.tasks.task import Row, Task, empty_row

MARKER, FIRST_SYMBOL = 1, 2


def draw(random: np.random.Generator, seq_len: int, size: int, vocab_size: int, *, selective: bool) -> Row:
    """`size` symbols and their copies. 0 is the blank, 1 the marker, the rest of the vocabulary are symbols."""
    symbols = random.integers(FIRST_SYMBOL, vocab_size, size=size)
    room = seq_len - size  # tokens before the marker
    places = np.sort(random.choice(room, size=size, replace=False)) if selective else np.arange(size)
    tokens, targets = empty_row(seq_len)
    tokens[places] = symbols
    tokens[room] = MARKER
    tokens[room + 1 :] = symbols[:-1]
    targets[room:] = symbols
    return Row(tokens, targets)


COPYING, SELECTIVE_COPYING = (
    Task(
        name=name,
        summary=summary,
        paper="Gu and Dao 2023",
        counts="symbols",
        sizes=(4, 8, 16, 32, 64),
        vocab_size=16,
        draw=partial(draw, selective=selective),
        least_len=lambda size: 2 * size,
        least_vocab=lambda size: 4,
        chance=lambda size, vocab_size: 1 / (vocab_size - FIRST_SYMBOL),
    )
    for name, summary, selective in (
        ("copying", "give back symbols in order", False),
        ("selective_copying", "give back symbols in order that are scattered among blanks", True),
    )
)
