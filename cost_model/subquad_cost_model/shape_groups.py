"""What rows have in common, and which side of a split that puts them on: by hashes of what they are about.

A hash, and not a drawing, so that a row keeps its side when others are added.
"""

from __future__ import annotations

import hashlib
import json

from subquad_cost_model.rows import CostRow

HELD_OUT = 5
"""One in so many groups is held out."""
LENGTHS = ("b", "t", "s", "m", "documents")
"""Axes that are free within a head layout."""


def shape_group(row: CostRow) -> str:
    """Rows about one shape of one operator, whatever the kernel, phase, dtype or device."""
    return json.dumps([row.operator, dict(row.shape), dict(row.options)], sort_keys=True)


def head_layout(row: CostRow) -> str:
    """All of the shape that is neither batch nor length."""
    layout = {axis: size for axis, size in row.shape.items() if axis not in LENGTHS}
    return json.dumps([row.operator, layout], sort_keys=True)


def fold(text: str, folds: int, salt: str = "") -> int:
    """A number below `folds` that depends on the text and the salt alone."""
    digest = hashlib.blake2b(f"{salt}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % folds


def is_held_out(row: CostRow, salt: str = "") -> bool:
    """Whether S0 judges by rows of this shape: a model that will be judged by them must not have chosen them."""
    return fold(shape_group(row), HELD_OUT, salt) == 0
