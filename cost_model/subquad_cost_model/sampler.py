"""Which rows to measure next: first those that fill the space of shapes, then those that would teach a model most.

Rivals for one shape are measured together, so what is chosen are cells: the rows of one workload, by every kernel.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from subquad_cost_model.bound import lower_bound_s
from subquad_cost_model.device import Device
from subquad_cost_model.estimator import Estimator
from subquad_cost_model.features import Floats
from subquad_cost_model.rows import CostRow
from subquad_cost_model.shape_groups import fold, is_held_out

WORD_DISTANCE = 0.5
"""How far apart two words (dtypes, options) are, where the smallest and the largest length of an axis are 1 apart."""


@dataclass(frozen=True)
class Cell:
    """Rows that are measured together: one shape in one dtype, its kernels and phases. The first stands for the rest.

    Raises: ValueError when there is none.
    """

    rows: tuple[CostRow, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a cell has one row at least")

    @property
    def group(self) -> str:
        """Cells are spread out within an operator and phase, and groups take turns."""
        return f"{self.rows[0].operator} {self.rows[0].phase}"


class Sampler:
    """Orders the cells of a pool on a device; the same pool, device and seed give the same order.

    Cells of held-out shapes (`splits`) are drawn like all others while the space is filled, so that they judge a model
    as it will be asked; no model's doubts ever choose one.
    """

    def __init__(self, cells: Sequence[Cell], device: Device, *, seed: int = 0) -> None:
        self.cells = tuple(cells)
        self._device, self._seed = device, seed
        self._bound_s = np.array([sum(lower_bound_s(row, device) for row in cell.rows) for cell in cells])
        self._groups: dict[str, list[int]] = defaultdict(list)
        for index, cell in enumerate(self.cells):
            self._groups[cell.group].append(index)

    def filling(self, done: Collection[int] = ()) -> Iterator[int]:
        """Indices of all cells that are not done, groups in turn.

        Within a group: the smallest (launch-bound) and the largest first, then always the one farthest from all taken,

            next = argmax_x  min over taken y:  ||x - y||      (Gonzalez 1985, greedy k-centre)
        """
        turns = [self._filling(indices, done) for indices in self._groups.values()]
        while turns:
            for turn in tuple(turns):
                index = next(turn, None)
                if index is None:
                    turns.remove(turn)
                else:
                    yield index

    def informative(
        self, estimator: Estimator, *, count: int, done: Collection[int] = (), weights: Sequence[float] | None = None
    ) -> list[int]:
        """The `count` cells whose measurement promises most:  sum over rows of  log(high / low) * seconds * weight.

        That is doubt in log units times what it is about; `weights` are how often a run meets each cell. An interval
        that is open (low 0) counts as a factor of `OPEN`. Held-out shapes are never among them.
        """
        known = set(done)
        open_cells = [
            index for index, cell in enumerate(self.cells) if index not in known and not is_held_out(cell.rows[0])
        ]
        rows = [row for index in open_cells for row in self.cells[index].rows]
        estimates = iter(estimator.predict(rows, self._device))
        promise = {}
        for index in open_cells:
            weight = 1.0 if weights is None else weights[index]
            of_it = [next(estimates) for _ in self.cells[index].rows]
            doubts = [math.log(min(OPEN, e.high_s / e.low_s if e.low_s > 0 else OPEN)) * e.seconds for e in of_it]
            promise[index] = weight * sum(doubts)
        return sorted(open_cells, key=lambda index: (-promise[index], index))[:count]

    def _filling(self, of_group: Sequence[int], done: Collection[int]) -> Iterator[int]:
        indices = np.array(of_group)
        points = _points([self.cells[index].rows[0] for index in indices])
        nearest = np.full(len(indices), np.inf)
        taken = np.isin(indices, list(done))
        for known in np.flatnonzero(taken):
            nearest = np.minimum(nearest, _distances(points, int(known)))
        bound_s = self._bound_s[indices]
        order = [int(bound_s.argmin()), int(bound_s.argmax())]
        # Equally far ones come in an order that the seed decides.
        ties = np.array([fold(f"{self._seed} {self.cells[index].rows[0].key}", 1 << 20) for index in indices])
        while not taken.all():
            place = order.pop(0) if order else _farthest(nearest, ties, taken)
            if taken[place]:
                continue
            taken[place] = True
            nearest = np.minimum(nearest, _distances(points, place))
            yield int(indices[place])


OPEN = 1e6


def _farthest(nearest: Floats, ties: NDArray[np.int64], taken: NDArray[np.bool_]) -> int:
    free = np.flatnonzero(~taken)
    return int(free[np.lexsort((ties[free], -nearest[free].round(9)))[0]])


def _distances(points: Floats, place: int) -> Floats:
    return np.asarray(np.linalg.norm(points - points[place], axis=1), dtype=np.float64)


def _points(rows: Sequence[CostRow]) -> Floats:
    """Rows as points: logarithms of lengths, work and intensity scaled to [0, 1], and a coordinate for each word."""
    numbers: dict[str, list[float]] = defaultdict(lambda: [math.nan] * len(rows))
    words: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(rows))
    for place, row in enumerate(rows):
        lengths = _lengths(row)
        for name, value in {**row.shape, **lengths}.items():
            numbers[name][place] = math.log2(value + 1)
        numbers["flops"][place] = math.log2(row.matmul_flops + row.vector_flops + 1)
        numbers["bytes"][place] = math.log2(row.bytes_moved + 1)
        variant = {name: value for name, value in row.options.items() if name not in lengths}
        present = sorted({**row.shape, **{name: 1 for name, value in lengths.items() if value}})
        for word in (row.dtype, json.dumps(variant, sort_keys=True), " ".join(present)):
            words[word][place] = WORD_DISTANCE / math.sqrt(2)
    columns = [_scaled(np.array(column)) for column in numbers.values()] + [np.array(word) for word in words.values()]
    return np.column_stack(columns)


def _lengths(row: CostRow) -> dict[str, int]:
    """The options that are lengths, such as a window."""
    return {
        name: value for name, value in row.options.items() if isinstance(value, int) and not isinstance(value, bool)
    }


def _scaled(column: Floats) -> Floats:
    """To [0, 1]; what a row lacks lies in the middle."""
    known = column[~np.isnan(column)]
    low, high = known.min(), known.max()
    return np.asarray(np.nan_to_num((column - low) / (high - low or 1.0), nan=0.5), dtype=np.float64)
