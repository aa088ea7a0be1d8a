"""Which rows a model may see and which it is judged by: frozen, by hashes of what the rows are about.

A hash, and not a drawing, so that a row keeps its side when others are added; by the shape, so that one shape never
stands on both sides (on another device, by another kernel or dtype).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from subquad_cost_model.sampler import Cell, Sampler
from subquad_cost_model.shape_groups import HELD_OUT, fold, head_layout, is_held_out, shape_group
from subquad_cost_model.timed_rows import TimedRow

LONGEST_SEEN = 4096
CALIBRATION = (16, 64)
"""Rows per kernel of the held-out family that a model may see in S6."""
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


def splits(rows: Sequence[TimedRow], name: str, *, salt: str = "") -> Iterator[Split]:
    """The splits of one protocol; those that would leave either side empty are left out.

    S0 shapes, S1 head layouts, S2 sequences longer than 4096, S3 each kernel, S4 each operator, S5 each family of
    devices (each device, where all are of one family), S6 the same with a few rows per kernel of it given back: drawn,
    and chosen as a `Sampler` would.
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
            for count in CALIBRATION:
                for drawn in (True, False):
                    calibrated = _given_back(rows, split, count, salt, drawn=drawn)
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


def _given_back(rows: Sequence[TimedRow], split: Split, count: int, salt: str, *, drawn: bool) -> Split:
    """With `count` rows per kernel of what was held out; their shapes are not judged.

    Drawn are those whose shapes come first in the order of their hashes, chosen those that come first in the order of
    a `Sampler`: of each phase in turn the smallest, the largest, and always the one farthest from all before it.
    """
    of_kernels: dict[str, list[int]] = defaultdict(list)
    for index in split.judge:
        of_kernels[f"{rows[index].row.operator}/{rows[index].row.kernel}"].append(index)
    given: set[int] = set()
    for of_kernel in of_kernels.values():
        if drawn:
            order = iter(sorted(of_kernel, key=lambda index: _hash(rows[index], salt)))
        else:
            cells = [Cell((rows[index].row,)) for index in of_kernel]
            sampler = Sampler(cells, rows[of_kernel[0]].device, seed=fold(salt, 1 << 30))
            order = (of_kernel[place] for place in sampler.filling())
        given.update(islice(order, count))
    seen = {shape_group(rows[index].row) for index in given}
    return Split(
        name=f"{split.name}, {count} {'' if drawn else 'chosen '}per kernel",
        held_out=split.held_out,
        fit=(*split.fit, *sorted(given)),
        judge=tuple(index for index in split.judge if shape_group(rows[index].row) not in seen),
        given=tuple(sorted(given)),
    )


def _hash(row: TimedRow, salt: str) -> str:
    return hashlib.blake2b(f"{salt}\0{shape_group(row.row)}".encode()).hexdigest()
