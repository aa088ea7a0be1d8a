"""The `kernel` argument of an operator node: one name, or a small table over length and batch.

    "sdpa_flash"                                    one kernel, always
    "b<=8,t<=512: chunked; t<=2048: flex; reference"  first row whose bounds hold; the last row has none

The text is what a printed graph shows, and what plan.json stores.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

DEFAULT = "default"
"""The name that stands for the operator's default kernel on the device at hand."""

_BOUND = re.compile(r"(b|t)<=(\d+)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Row:
    """Use `kernel` for at most `max_b` sequences of at most `max_t` tokens; None is no bound."""

    kernel: str
    max_b: int | None = None
    max_t: int | None = None

    def holds(self, b: int, t: int) -> bool:
        """Whether a call of this batch and length falls under the row."""
        return (self.max_b is None or b <= self.max_b) and (self.max_t is None or t <= self.max_t)

    def __str__(self) -> str:
        bounds = [f"{axis}<={bound}" for axis, bound in (("b", self.max_b), ("t", self.max_t)) if bound is not None]
        return f"{','.join(bounds)}: {self.kernel}" if bounds else self.kernel


def format_table(rows: list[Row]) -> str:
    """Write rows as the `kernel` argument; the last row must have no bounds."""
    if not rows or rows[-1].max_b is not None or rows[-1].max_t is not None:
        raise ValueError("the last row of a kernel table has no bounds")
    return "; ".join(str(row) for row in rows)


@lru_cache(maxsize=1024)
def parse_table(text: str) -> tuple[Row, ...]:
    """Read a `kernel` argument. Raises ValueError when the text is neither a name nor a table."""
    rows = []
    for part in text.split(";"):
        bounds, colon, name = part.rpartition(":")
        found = [_BOUND.fullmatch(bound.strip()) for bound in bounds.split(",")] if colon else []
        if not _NAME.fullmatch(name.strip()) or not all(found):
            raise ValueError(f"'{text}' is neither a kernel's name nor a table such as 't<=512: chunked; reference'")
        limits = {match[1]: int(match[2]) for match in found if match}
        rows.append(Row(name.strip(), limits.get("b"), limits.get("t")))
    if rows[-1].max_b is not None or rows[-1].max_t is not None:
        raise ValueError(f"the last row of '{text}' must be a bare kernel name")
    return tuple(rows)


def look_up(text: str, b: int, t: int) -> str:
    """The kernel that a call of `b` sequences and `t` tokens runs."""
    return next(row.kernel for row in parse_table(text) if row.holds(b, t))
