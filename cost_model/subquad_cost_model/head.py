"""One learned quantity: a physical sum and what it leaves, trees for the spread, and how far to widen it.

What the sum leaves is a Gaussian process, of so many rows of an operator as it can hold, and trees learn what that
leaves where there are more; where there is no sum, trees learn all. Of a kernel with hardly any rows, or none, the sum
is mended by what kernels take that do such work.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from subquad_cost_model.conformal import grouped_quantile, worst_quantile
from subquad_cost_model.device import Device
from subquad_cost_model.features import CATEGORIES, NAMES, Floats, Vocabulary, feature_matrix, words
from subquad_cost_model.gaussian_process import MOST_ROWS, GaussianProcess, places_of
from subquad_cost_model.physics import FINEST_DOUBT, Physics, total
from subquad_cost_model.rows import CostRow
from subquad_cost_model.shape_groups import LENGTHS, fold, head_layout, shape_group
from subquad_cost_model.terms import SECONDS, Terms, heads_per_key
from subquad_cost_model.trees import USUAL, Trees, ask, grow
from subquad_cost_model.work_alone import FEW, WorkAlone

if TYPE_CHECKING:
    import lightgbm

FOLDS = 5
LEAST_ROWS, LEAST_SHAPES = 50, 10
"""With fewer shapes no finite interval holds nine in ten of the next."""
SPREAD_FLOOR = 0.01
"""Repeats of a timing differ by this much (0.3 % in the median, 2.8 % at the ninth decile of NVIDIA's tables)."""

HEADS_PER_KEY = "heads per key"
"""The name of `heads_per_key` beside the axes."""
FURTHER: Mapping[str, int] = {"b": 16, "t": 64, "s": 64, "m": 64, "documents": 16, "c": 4, "h": 4, "h_k": 4, "h_kv": 4}
WIDER = 2
"""So many times beyond the sizes that were measured a physics head is asked, along a length or a number, along a width:
`beyond_width` was found on the longest third of rows, six octaves at most beyond the others."""


class TooFewRowsError(ValueError):
    """Not enough rows or shapes for a head whose interval means anything."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """Answers z = log(quantity / its bound) for rows on devices, with the half width of an interval.

        z = log(physics / bound) + process + trees          each where there is one; without a physics head trees alone

    With `work_alone` the first is half or all of what other kernels take, where rows of this one are few or none.
    Widths are the multiples of the spread that held the share `level` of out-of-fold residuals: `seen_width` on devices
    and layouts among the rows (by operator; `""` for all; times the `devices_width` of a device, where its own rows are
    further off than all, as those of a device with few are), `layout_width` on layouts left out (widths, heads and
    options), `beyond_width` on lengths an octave beyond those that were left, `new_width` on devices of families left
    out. What an octave adds is taken to be independent of what others add: width grows with the square root of them.
    `reach` are the smallest and largest by kernel of each axis and of `HEADS_PER_KEY`, `layouts` those of each kernel
    by device: what was measured on another one alone is new to this.
    """

    trees: lightgbm.Booster | None
    spread: lightgbm.Booster
    vocabulary: Vocabulary
    level: float
    seen_width: Mapping[str, float]
    new_width: float
    lowest: float
    highest: float
    devices: tuple[str, ...]
    kinds: tuple[str, ...]
    reach: Mapping[str, Mapping[str, tuple[float, float]]]
    layout_width: float = math.inf
    beyond_width: float = math.inf
    layouts: Mapping[str, Mapping[str, frozenset[str]]] = field(default_factory=dict)
    devices_width: Mapping[str, float] = field(default_factory=dict)
    physics: Physics | None = None
    work_alone: WorkAlone | None = None
    process: GaussianProcess | None = None

    @classmethod
    def fit(
        cls,
        rows: Sequence[CostRow],
        devices: Sequence[Device],
        z: Floats,
        *,
        level: float = 0.9,
        trees: Trees = USUAL,
        doubts: Floats | None = None,
        terms: tuple[str, ...] = (),
        bounds: Floats | None = None,
        asked: Sequence[Device] | None = None,
        far: bool = True,
    ) -> Head:
        """Fit to rows, their devices and their z.

        `doubts` are relative errors of the rows' timings: a row counts the less the larger they are. With `terms` a
        physics head of these stands first, then a Gaussian process of what it leaves, and trees where an operator has
        more than the `MOST_ROWS` of one; `bounds` are what z is relative to, 1 where none are given. `asked` are the
        devices as whoever asks knows them, where `devices` know the host's pace of the very timing: residuals are of
        answers for these.

        Residuals are out of fold, and folds are of whole shapes: for the spread's trees, and for the widths. Those for
        new devices come from models that never saw the device's family, those for new layouts and for lengths beyond
        all from models that saw no such layout, or only shorter (longer) rows; without `far` there are none of these.

        Raises: TooFewRowsError with fewer than 50 rows or 10 shapes; ModuleNotFoundError without lightgbm.
        """
        groups = [shape_group(row) for row in rows]
        if len(rows) < LEAST_ROWS or len(set(groups)) < LEAST_SHAPES:
            raise TooFewRowsError(
                f"{len(rows)} rows of {len(set(groups))} shapes are too few: {LEAST_ROWS} and {LEAST_SHAPES} are needed"
            )
        vocabulary = Vocabulary.of(rows)
        doubts = np.zeros(len(rows)) if doubts is None else doubts
        bounds = np.ones(len(rows)) if bounds is None else bounds
        seen = _Asked.of(rows, devices, feature_matrix(rows, devices, vocabulary), terms)
        table = _Table(seen, seen if asked is None else _Asked.of(rows, asked, seen.features, terms), z, doubts, bounds)
        folds = np.array([fold(group, FOLDS) for group in groups])
        residual = np.abs(z - table.out_of_group(folds, trees, terms))
        spreads = replace(table, z=np.log(residual + SPREAD_FLOOR))

        def scores(held_out: NDArray[np.generic], residual: Floats) -> Floats:
            return residual / np.exp(spreads.out_of_group(held_out, trees, (), spread=True))

        def width_of(held_out: NDArray[np.generic], units: Sequence[str], further: Floats | float = 1.0) -> float:
            """Of groups left out one by one; rows of no group (-1) are never left out."""
            out = held_out != -1
            found = scores(held_out, np.abs(z - table.out_of_group(held_out, trees, terms))) / further
            return grouped_quantile(found[out], [unit for unit, one in zip(units, out, strict=True) if one], level)

        scored = scores(folds, residual)
        seen_width = {"": grouped_quantile(scored, groups, level)}
        for operator in vocabulary.words["operator"]:
            here = [index for index, row in enumerate(rows) if row.operator == operator]
            width = grouped_quantile(scored[here], [groups[index] for index in here], level)
            # Shapes too few for a quantile of their own borrow that of all.
            seen_width[operator] = width if math.isfinite(width) else seen_width[""]
        devices_width = {}
        for name in {device.name for device in devices}:
            here = [index for index, device in enumerate(devices) if device.name == name]
            width = grouped_quantile(scored[here], [groups[index] for index in here], level)
            if math.isfinite(width):
                devices_width[name] = max(1.0, width / seen_width[""])
        families = np.array([device.family for device in devices])
        new_width = layout_width = beyond_width = math.inf
        if far and len(set(families)) > 1:
            new_residual = np.abs(z - table.out_of_group(families, trees, terms))
            new_width = worst_quantile(scores(families, new_residual), list(families), level)
        if far and terms:
            layouts = [head_layout(row) for row in rows]
            layout_width = width_of(np.array([fold(layout, FOLDS) for layout in layouts]), layouts)
            ends = _ends(rows)
            beyond_width = width_of(ends, groups, _further(rows, ends))
        final = table.trained(np.ones(len(rows), dtype=bool), trees, terms)
        return cls(
            trees=final.trees,
            spread=grow(seen.features, NAMES, spreads.z, trees, spread=True),
            vocabulary=vocabulary,
            level=level,
            seen_width=seen_width,
            new_width=new_width,
            lowest=float(z.min()),
            highest=float(z.max()),
            devices=tuple(sorted({device.name for device in devices})),
            kinds=tuple(sorted({device.kind for device in devices})),
            reach=_reach(rows),
            layout_width=layout_width,
            beyond_width=beyond_width,
            layouts=_layouts(rows, devices) if terms else {},
            devices_width=dict(sorted(devices_width.items())),
            physics=final.physics,
            work_alone=final.work_alone,
            process=final.process,
        )

    def predict(self, rows: Sequence[CostRow], device: Device, bounds: Floats | None = None) -> tuple[Floats, Floats]:
        """z of each row, and the half width of its interval (infinite on a device whose family was the only one).

        `bounds` are what z is relative to, as in `fit`.
        """
        if not rows:
            return np.empty(0), np.empty(0)
        devices = [device] * len(rows)
        features = feature_matrix(rows, devices, self.vocabulary)
        asked = _Asked.of(rows, devices, features, () if self.physics is None else self.physics.terms)
        z = _Point(self.trees, self.physics, self.work_alone, self.process).answer(asked, bounds)
        z = np.clip(z, self.lowest, self.highest)
        spread = np.exp(ask(self.spread, features))
        return z, spread * np.array([self._width(row, device) for row in rows])

    def _width(self, row: CostRow, device: Device) -> float:
        if device.name not in self.devices:
            return self.new_width
        width = self.seen_width.get(row.operator, self.seen_width[""]) * self.devices_width.get(device.name, 1.0)
        if self.physics is None:
            return width
        if _layout(row) not in self.layouts.get(device.name, {}).get(words(row)[1], ()):
            width = max(width, self.layout_width)
        octaves = _octaves_beyond(row, self.reach)
        return max(width, self.beyond_width * math.sqrt(max(1, octaves))) if octaves else width

    def knows(self, row: CostRow) -> bool:
        """Whether rows like this one were among those of the fit, whatever the device: what memory needs."""
        return self._stranger(row) is None

    def refusal(self, row: CostRow, device: Device) -> str | None:
        """Why the interval of this head holds nothing for the row; None if it does."""
        if device.kind not in self.kinds:
            return f"fitted to {', '.join(self.kinds)}, not {device.kind}"
        if device.name not in self.devices and not math.isfinite(self.new_width):
            return f"fitted to one family of devices, and not to {device.name}"
        strange = self._stranger(row)
        if strange is None and self.physics is not None and not math.isfinite(self._width(row, device)):
            return "fitted to too few shapes to say how far beyond them, or on other layouts, it is off"
        return strange

    def _stranger(self, row: CostRow) -> str | None:
        for name, word in zip(CATEGORIES, words(row), strict=True):
            if word not in self.vocabulary.words[name]:
                return f"{name} {word} is not among the rows it was fitted to"
        reach = self.reach[words(row)[1]]
        for axis, size in row.shape.items():
            smallest, largest = reach.get(axis, (size, size))
            further = 1 if self.physics is None else FURTHER.get(axis, WIDER)
            if not smallest <= size * further or not size <= largest * further:
                return f"{axis}={size} is outside of the {smallest} to {largest} it was fitted to"
        return None


@dataclass(frozen=True)
class _Asked:
    """Rows on devices as a head looks at them, counted once: trees' features, a sum's terms, a process's places."""

    rows: Sequence[CostRow]
    features: Floats
    terms: Terms
    places: Floats

    @classmethod
    def of(cls, rows: Sequence[CostRow], devices: Sequence[Device], features: Floats, terms: tuple[str, ...]) -> _Asked:
        """Without terms there is no sum, and no process."""
        asked, at = (rows, devices) if terms else ((), ())
        return cls(rows, features, Terms.count(terms, asked, at), places_of(asked, at))

    def take(self, here: Sequence[int]) -> _Asked:
        """Those of some rows."""
        rows = [self.rows[index] for index in here]
        if not self.terms.names:
            return _Asked(rows, self.features[here], self.terms, self.places)
        return _Asked(rows, self.features[here], self.terms.take(here), self.places[here])


@dataclass(frozen=True)
class _Point:
    """What answers for z: a physics head, where there is one, and what it leaves."""

    trees: lightgbm.Booster | None
    physics: Physics | None
    work_alone: WorkAlone | None = None
    process: GaussianProcess | None = None

    def answer(self, asked: _Asked, bounds: Floats | None) -> Floats:
        """z of each row."""
        z, parts = np.zeros(len(asked.rows)), np.ones((len(asked.rows), 1))
        if self.physics is not None:
            parts = self.physics.parts(asked.terms)
            z = np.log(total(parts) / (1.0 if bounds is None else bounds))
            if self.work_alone is not None:
                z = self.work_alone.mixed(z, asked.features, asked.terms, self.physics)
        if self.process is not None:
            z = z + self.process.predict(asked.rows, asked.places, parts)
        return z if self.trees is None else z + ask(self.trees, asked.features)


@dataclass(frozen=True)
class _Table:
    """Rows as they were timed, the same as whoever asks knows their devices, and all else that a fit needs of them."""

    seen: _Asked
    asked: _Asked
    z: Floats
    doubts: Floats
    bounds: Floats

    def trained(
        self, inside: NDArray[np.bool_], trees: Trees, terms: tuple[str, ...], *, spread: bool = False
    ) -> _Point:
        """Physics of the rows inside, and what it leaves."""
        here: list[int] = np.flatnonzero(inside).tolist()
        seen, doubts, physics, work_alone, process = self.seen.take(here), self.doubts[here], None, None, None
        target = self.z[here]
        if terms:
            physics = Physics.fit(seen.terms, self.bounds[here] * np.exp(target), doubts)
            parts = physics.parts(seen.terms)
            by_sum = np.log(total(parts) / self.bounds[here])
            if terms == SECONDS and self._strange(inside):
                work_alone = WorkAlone.fit(seen.features, seen.terms, target)
            if work_alone is not None:
                by_sum = work_alone.mixed(by_sum, seen.features, seen.terms, physics)
            target = target - by_sum
            held = _held(seen.rows)
            rows = [seen.rows[index] for index in held]
            process = GaussianProcess.fit(rows, seen.places[held], parts[held], target[held], doubts[held])
            if len(held) == len(here):
                return _Point(None, physics, work_alone, process)
            target = target - process.predict(seen.rows, seen.places, parts)
        weights = 1 / np.maximum(doubts, FINEST_DOUBT)
        grown = grow(seen.features, NAMES, target, trees, spread=spread, weights=weights)
        return _Point(grown, physics, work_alone, process)

    def _strange(self, inside: NDArray[np.bool_]) -> bool:
        """Whether anything may be asked of kernels of which few rows or none are inside: of the whole table all may."""
        kernels = np.array([kernel for kernel, _ in self.seen.terms.keys])
        counts = Counter(kernels[inside].tolist())
        return bool(inside.all()) or any(counts[kernel] < FEW for kernel in set(kernels.tolist()))

    def out_of_group(
        self, groups: NDArray[np.generic], trees: Trees, terms: tuple[str, ...], *, spread: bool = False
    ) -> Floats:
        """For each row the answer of a model that saw no row of its group; 0 for those of no group (-1)."""
        found = np.zeros_like(self.z)
        for group in np.unique(groups):
            out = groups == group
            if group == -1 or out.all():
                continue
            point, here = self.trained(~out, trees, terms, spread=spread), np.flatnonzero(out).tolist()
            found[here] = point.answer(self.asked.take(here), self.bounds[here])
        return found


def _held(rows: Sequence[CostRow]) -> list[int]:
    """Which rows a process holds: of an operator all, or `MOST_ROWS` of them by hash, whose system is its own."""
    of_operators: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        of_operators[row.operator].append(index)
    places = [fold(row.key, 1 << 40) for row in rows]
    return sorted(
        index for here in of_operators.values() for index in sorted(here, key=places.__getitem__)[:MOST_ROWS]
    )


def _layout(row: CostRow) -> str:
    """A short name of what a kernel is compiled for: all but batch and lengths."""
    widths = tuple(sorted((axis, size) for axis, size in row.shape.items() if axis not in LENGTHS))
    return _short_name((*words(row), "documents" in row.shape, *widths))


@lru_cache(maxsize=16_384)
def _short_name(what: tuple[object, ...]) -> str:
    return format(fold(repr(what), 1 << 40), "x")


def _sizes(row: CostRow) -> dict[str, float]:
    """Each axis, and in what ratio heads share keys: one kernel reads these once, another for each of them."""
    return {**row.shape, HEADS_PER_KEY: heads_per_key(row)}


def _reach(rows: Sequence[CostRow]) -> dict[str, dict[str, tuple[float, float]]]:
    reach: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        of_kernel = reach.setdefault(words(row)[1], {})
        for axis, size in _sizes(row).items():
            smallest, largest = of_kernel.get(axis, (size, size))
            of_kernel[axis] = min(smallest, size), max(largest, size)
    return reach


def _octaves_beyond(row: CostRow, reach: Mapping[str, Mapping[str, tuple[float, float]]]) -> float:
    """How far the row lies outside of the sizes that were measured, or of the ratios in which heads shared keys."""
    of_kernel = reach.get(words(row)[1], {})
    farthest = 1.0
    for axis, size in _sizes(row).items():
        least, most = of_kernel.get(axis, (size, size))
        farthest = max(farthest, max(1, size) / max(1, most), max(1, least) / max(1, size))
    return math.log2(farthest)


def _further(rows: Sequence[CostRow], ends: NDArray[np.int64]) -> Floats:
    """By how much more the rows of either end are off than those an octave beyond the rows that are left without it."""
    found = np.ones(len(rows))
    for end in (0, 1):
        reach = _reach([row for row, its in zip(rows, ends, strict=True) if its != end])
        for index in np.flatnonzero(ends == end).tolist():
            found[index] = math.sqrt(max(1.0, _octaves_beyond(rows[index], reach)))
    return found


def _layouts(rows: Sequence[CostRow], devices: Sequence[Device]) -> dict[str, dict[str, frozenset[str]]]:
    found: dict[str, dict[str, set[str]]] = {}
    for row, device in zip(rows, devices, strict=True):
        found.setdefault(device.name, {}).setdefault(words(row)[1], set()).add(_layout(row))
    return {
        device: {kernel: frozenset(layouts) for kernel, layouts in of_device.items()}
        for device, of_device in found.items()
    }


def _ends(rows: Sequence[CostRow]) -> NDArray[np.int64]:
    """1 for the longest third of the rows, 0 for the shortest sixth, -1 for those between; of equal ones, by batch."""
    lengths = [max(row.shape.get(axis, 1) for axis in ("t", "s", "m")) for row in rows]
    sizes = np.array([length + 1e-6 * row.shape.get("b", 1) for length, row in zip(lengths, rows, strict=True)])
    short, long = np.quantile(sizes, [1 / 6, 2 / 3])
    return np.where(sizes > long, 1, np.where(sizes < short, 0, -1))
