"""Parity: after each bit, whether the ones so far are odd in number.

    _ _ _ b_1 b_2 b_3 ...        target at b_i:  b_1 + ... + b_i  mod 2

Source: the smallest case of state tracking (Delétang et al. 2023, parity check; Grazzi et al. 2025, on which linear
recurrences can learn it). A row counts as exact only if every prefix is right.
"""

from __future__ import annotations

import numpy as np

from subquad.training.tasks.task import Row, Task, empty_row

ZERO = 1  # token 1 is bit 0, token 2 is bit 1


def draw(random: np.random.Generator, seq_len: int, size: int, vocab_size: int) -> Row:
    """`size` bits at the end of the row. 0 is the filler, 1 and 2 are the bits and the answers even and odd."""
    bits = random.integers(2, size=size)
    tokens, targets = empty_row(seq_len)
    tokens[seq_len - size :] = ZERO + bits
    targets[seq_len - size :] = ZERO + np.cumsum(bits) % 2
    return Row(tokens, targets)


PARITY = Task(
    name="parity",
    summary="whether the ones so far are odd in number",
    paper="Delétang et al. 2023",
    counts="bits",
    sizes=(4, 8, 16, 32, 64, 128),
    vocab_size=3,
    draw=draw,
    least_len=lambda size: size,
    least_vocab=lambda size: 3,
    chance=lambda size, vocab_size: 0.5,
)
