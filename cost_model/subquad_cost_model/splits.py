"""Which rows a model may see and which it is judged by: frozen, by hashes of what the rows are about.

A hash, and not a drawing, so that a row keeps its side when others are added; by the shape, so that one shape never
stands on both sides (on another device, by another kernel or dtype).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

from subquad_cost_model.sampler import Cell, Sampler
from subquad_cost_model.shape_groups import HELD_OUT, fold, head_layout, is_held_out, shape_group
from subquad_cost_model.timed_rows import TimedRow

LONGEST_SEEN = 4096
CALIBRATION = (16, 64)
"""Rows per kernel of the held-out family that a model may see in S6."""
FEW = 30
"""Rows of the held-out operator, all its kernels and phases together, that a model may see in S4."""
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

    S0 shapes, S1 head layouts, S2 sequences longer than 4096, S3 each kernel, S4 each operator, and with `FEW` rows of
    it given back, S5 each family of devices (each device, where all are of one family), S6 the same with a few rows per
    kernel of it given back. What is given back is drawn, and chosen as a `Sampler` would.
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
        for split in _each(rows, name, lambda r: r.row.operator):
            yield split
            for how, orders in _orders(rows, split, salt):
                calibrated = _given_back(rows, split, f"{FEW}{how} rows", islice(_in_turn(orders), FEW))
                if calibrated.judge:
                    yield calibrated
    elif name == "S5":
        yield from _each(rows, name, _unseen_device(rows))
    elif name == "S6":
        for split in _each(rows, name, _unseen_device(rows)):
            for count in CALIBRATION:
                for how, orders in _orders(rows, split, salt):
                    given = chain.from_iterable(islice(order, count) for order in orders)
                    calibrated = _given_back(rows, split, f"{count}{how} per kernel", given)
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


def _orders(rows: Sequence[TimedRow], split: Split, salt: str) -> Iterator[tuple[str, list[Iterator[int]]]]:
    """The two orders in which rows of what was held out are given back, each by kernel: drawn and chosen.

    Drawn are those first whose shapes come first in the order of their hashes, chosen in the order of a `Sampler`: of
    each phase in turn the smallest, the largest, and always the one farthest from all before it.
    """
    of_kernels: dict[str, list[int]] = defaultdict(list)
    for index in split.judge:
        of_kernels[f"{rows[index].row.operator}/{rows[index].row.kernel}"].append(index)

    def chosen(of_kernel: Sequence[int]) -> Iterator[int]:
        cells = [Cell((rows[index].row,)) for index in of_kernel]
        sampler = Sampler(cells, rows[of_kernel[0]].device, seed=fold(salt, 1 << 30))
        return (of_kernel[place] for place in sampler.filling())

    yield "", [iter(sorted(those, key=lambda index: _hash(rows[index], salt))) for those in of_kernels.values()]
    yield " chosen", [chosen(those) for those in of_kernels.values()]


def _in_turn(orders: Sequence[Iterator[int]]) -> Iterator[int]:
    """The first of each, the second of each, until none has any left."""
    for places in zip_longest(*orders):
        yield from (index for index in places if index is not None)


def _given_back(rows: Sequence[TimedRow], split: Split, how: str, given: Iterable[int]) -> Split:
    """With some of the rows that were held out; their shapes are not judged."""
    back = tuple(sorted(given))
    seen = {shape_group(rows[index].row) for index in back}
    return Split(
        name=f"{split.name}, {how}",
        held_out=split.held_out,
        fit=(*split.fit, *back),
        judge=tuple(index for index in split.judge if shape_group(rows[index].row) not in seen),
        given=back,
    )


def _hash(row: TimedRow, salt: str) -> str:
    return hashlib.blake2b(f"{salt}\0{shape_group(row.row)}".encode()).hexdigest()
