"""A larger shape never takes less time: the running maximum over all halvings of a shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from subquad_cost_model.rows import CostRow

Smaller = Callable[[CostRow], Sequence[CostRow]]
"""The rows with one axis halved, for each even axis along which work grows, with their work counted anew."""


def with_smaller(rows: Sequence[CostRow], smaller: Smaller) -> dict[str, tuple[CostRow, tuple[str, ...]]]:
    """All rows that repeated halving leads to, the given among them, by key; each with the keys of its own halvings."""
    found: dict[str, tuple[CostRow, tuple[str, ...]]] = {}
    waiting = list(rows)
    while waiting:
        row = waiting.pop()
        if row.key not in found:
            halved = smaller(row)
            found[row.key] = row, tuple(half.key for half in halved)
            waiting += halved
    return found


def largest_below(values: dict[str, float], halvings: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """For each key the largest value among itself and everything that halving leads to.

        envelope(x) = max( value(x), max over halvings y of x: envelope(y) )

    As the halvings of a doubled shape include the shape, doubling never lowers the envelope.
    """
    done: dict[str, float] = {}
    stack = list(values)
    while stack:
        key = stack[-1]
        open_keys = [half for half in halvings[key] if half not in done]
        if open_keys and key not in done:
            stack += open_keys
            continue
        stack.pop()
        if key not in done:
            done[key] = max([values[key], *(done[half] for half in halvings[key])])
    return done
