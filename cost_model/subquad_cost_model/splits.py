"""Which rows a model may see and which it is judged by: frozen, by hashes of what the rows are about.

A hash, and not a drawing, so that a row keeps its side when others are added; by the shape, so that one shape never
stands on both sides (on another device, by another kernel or dtype).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from subquad_cost_model.rows import CostRow
from subquad_cost_model.timed_rows import TimedRow

HELD_OUT = 5
"""One in so many groups is held out."""
LONGEST_SEEN = 4096
CALIBRATION = (0, 16, 64)
"""Rows per kernel of the held-out family that a model may see in S6."""
LENGTHS = ("b", "t", "s", "m", "documents")
"""Axes that are free within a head layout."""
SPLITS = ("S0", "S1", "S2", "S3", "S4", "S5", "S6")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Indices of the rows to fit and to judge; `held_out` names what is missing from the first, but for the rows that
    were `given` back."""

    name: str
    held_out: str
    fit: tuple[int, ...]
    judge: tuple[int, ...]
    given: tuple[int, ...] = ()


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


def splits(rows: Sequence[TimedRow], name: str, *, salt: str = "") -> Iterator[Split]:
    """The splits of one protocol; those that would leave either side empty are left out.

    S0 shapes, S1 head layouts, S2 sequences longer than 4096, S3 each kernel, S4 each operator, S5 each family of
    devices (each device, where all are of one family), S6 the same with a few rows per kernel of it given back.
    """
    if name == "S0":
        yield from _by(rows, name, "one shape in five", lambda r: is_held_out(r.row, salt))
    elif name == "S1":
        yield from _by(rows, name, "one head layout in five", lambda r: fold(head_layout(r.row), HELD_OUT, salt) == 0)
    elif name == "S2":
        yield from _by(rows, name, f"t > {LONGEST_SEEN}", lambda r: r.row.shape.get("t", 0) > LONGEST_SEEN)
    elif name == "S3":
        yield from _each(rows, name, lambda r: f"{r.row.operator}/{r.row.kernel}")
    elif name == "S4":
        yield from _each(rows, name, lambda r: r.row.operator)
    elif name == "S5":
        yield from _each(rows, name, _unseen_device(rows))
    elif name == "S6":
        for split in _each(rows, name, _unseen_device(rows)):
            for count in CALIBRATION[1:]:
                calibrated = _given_back(rows, split, count, salt)
                if calibrated.judge:
                    yield calibrated
    else:
        raise ValueError(f"no split is called {name!r}; there are {', '.join(SPLITS)}")


def _unseen_device(rows: Sequence[TimedRow]) -> Callable[[TimedRow], str]:
    """What stands for a device that was never seen."""
    one_family = len({row.device.family for row in rows}) == 1
    return lambda row: row.device.name if one_family else row.device.family


def _by(rows: Sequence[TimedRow], name: str, held_out: str, judged: Callable[[TimedRow], bool]) -> Iterator[Split]:
    judge = [index for index, row in enumerate(rows) if judged(row)]
    fit = sorted(set(range(len(rows))) - set(judge))
    if fit and judge:
        yield Split(name=name, held_out=held_out, fit=tuple(fit), judge=tuple(judge))


def _each(rows: Sequence[TimedRow], name: str, group: Callable[[TimedRow], str]) -> Iterator[Split]:
    groups = [group(row) for row in rows]
    for held_out in sorted(set(groups)):
        judge = tuple(index for index, of_it in enumerate(groups) if of_it == held_out)
        fit = tuple(index for index, of_it in enumerate(groups) if of_it != held_out)
        if fit:
            yield Split(name=name, held_out=held_out, fit=fit, judge=judge)


def _given_back(rows: Sequence[TimedRow], split: Split, count: int, salt: str) -> Split:
    """The `count` rows per kernel whose shapes come first in the order of their hashes; their shapes are not judged."""

    def order(index: int) -> str:
        return hashlib.blake2b(f"{salt}\0{shape_group(rows[index].row)}".encode()).hexdigest()

    taken: dict[str, list[int]] = {}
    for index in sorted(split.judge, key=order):
        of_kernel = taken.setdefault(f"{rows[index].row.operator}/{rows[index].row.kernel}", [])
        if len(of_kernel) < count:
            of_kernel.append(index)
    given = {index for indices in taken.values() for index in indices}
    seen = {shape_group(rows[index].row) for index in given}
    return Split(
        name=f"{split.name}, {count} per kernel",
        held_out=split.held_out,
        fit=(*split.fit, *sorted(given)),
        judge=tuple(index for index in split.judge if shape_group(rows[index].row) not in seen),
        given=tuple(sorted(given)),
    )
