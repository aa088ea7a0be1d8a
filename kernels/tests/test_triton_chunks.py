"""The table of chunks lists every token of every document once, in order, and says what is left over."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
import torch

pytest.importorskip("triton")

from subquad_kernels import triton_chunks
from subquad_kernels.triton_chunks import lay_out

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU the kernel runs in Triton's interpreter


def laid_out(lengths: list[int], chunk: int, least: int) -> tuple[list[list[int]], list[int], int]:
    """The table's rows, the starts, and how many rows are taken."""
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    slots = sum(lengths) // chunk + len(lengths)
    table, starts = lay_out(bounds, slots, chunk, least=least)
    rows = table.tolist()
    assert len(rows) == slots + 1
    return rows[:-1], starts.tolist(), rows[-1][0]


def listed(lengths: list[int], chunk: int, least: int) -> tuple[list[list[int]], list[int]]:
    """The same in Python, chunk by chunk."""
    rows, starts, first = [], [0], 0
    for document, length in enumerate(lengths):
        count = max(least, -(-length // chunk))
        for index in range(count):
            tokens = min(chunk, length - index * chunk)
            rows.append([first + index * chunk, tokens, document, 2 * (index == count - 1) + (index == 0)])
        starts.append(len(rows))
        first += length
    return rows, starts


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("chunk", [1, 16, 32])
def test_the_table_lists_the_chunks_of_all_documents(chunk: int, least: int, seed: int) -> None:
    drawn = random.Random(seed)
    lengths = [drawn.choice([0, 0, 1, chunk - 1, chunk, chunk + 1, drawn.randrange(5 * chunk + 1)]) for _ in range(12)]
    rows, starts, taken = laid_out(lengths, chunk, least)
    expected, first_slots = listed(lengths, chunk, least)
    assert rows[:taken] == expected
    assert starts == first_slots


@pytest.mark.parametrize("least", [0, 1])
def test_what_no_document_needs_has_no_tokens_and_no_neighbours(least: int) -> None:
    rows, _, taken = laid_out([0, 64, 0, 3, 0], 16, least)
    assert taken < len(rows)
    assert all(tokens == 0 and mark == 3 for _, tokens, _, mark in rows[taken:])


def test_more_documents_and_longer_ones_than_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_chunks, "_BLOCK", 4)
    lengths = [0, 75, 3, *([1, 0] * 10), 200]
    for least in (0, 1):
        rows, starts, taken = laid_out(lengths, 16, least)
        assert (rows[:taken], starts) == listed(lengths, 16, least)


def test_no_document_at_all_leaves_every_slot_empty() -> None:
    rows, starts, taken = laid_out([0, 0, 0], 16, 0)
    assert taken == 0
    assert starts == [0, 0, 0, 0]
    assert all(tokens == 0 for _, tokens, _, _ in rows)
