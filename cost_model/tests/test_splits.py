"""Splits keep what they hold out apart, and keep their sides when rows are added."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import planted
import pytest

from subquad_cost_model import TimedRow
from subquad_cost_model.bound import lower_bound_s
from subquad_cost_model.shape_groups import fold, head_layout, shape_group
from subquad_cost_model.splits import SPLITS, Split, splits

ROWS = planted.table(seed=0, shapes=80)


@pytest.mark.parametrize("name", SPLITS)
def test_no_row_is_on_both_sides_and_none_is_invented(name: str) -> None:
    found = list(splits(ROWS, name)) if name != "S4" else list(splits([*ROWS, *others()], name))
    assert found
    for split in found:
        assert split.name.startswith(name)
        assert set(split.fit).isdisjoint(split.judge)
        assert split.fit and split.judge
        assert max(split.fit + split.judge) < len(ROWS) + len(others())


def others() -> list[TimedRow]:
    return [planted.timed_row(planted.row("wide", 1, 64, 2, operator="other"), planted.DEVICES[0])]


HELD_OUT: dict[str, Callable[[TimedRow], object]] = {
    "S0": lambda r: shape_group(r.row),
    "S1": lambda r: head_layout(r.row),
    "S2": lambda r: r.row.shape["t"] > 4096,
    "S3": lambda r: r.row.kernel,
    "S5": lambda r: r.device.family,
}


@pytest.mark.parametrize("name", HELD_OUT)
def test_what_is_held_out_is_not_fitted_in_any_other_row(name: str) -> None:
    of = HELD_OUT[name]
    for split in splits(ROWS, name):
        assert {of(ROWS[i]) for i in split.fit}.isdisjoint({of(ROWS[i]) for i in split.judge})
        assert len(split.fit) + len(split.judge) == len(ROWS)


def test_a_row_keeps_its_side_when_others_are_added_in_another_order() -> None:
    more = [*reversed(ROWS), *planted.table(seed=1, shapes=40)]
    (before,), (after,) = splits(ROWS, "S0"), splits(more, "S0")
    judged = {shape_group(ROWS[i].row) for i in before.judge}
    assert judged <= {shape_group(more[i].row) for i in after.judge}
    assert judged.isdisjoint({shape_group(more[i].row) for i in after.fit})


def test_one_shape_in_five_is_held_out_and_which_depends_on_the_salt() -> None:
    names = [f"shape {n}" for n in range(5000)]
    shares = [sum(fold(name, 5, salt) == 0 for name in names) / len(names) for salt in ("", "1")]
    assert shares == pytest.approx([0.2, 0.2], abs=0.02)
    assert [fold(name, 5, "") for name in names] != [fold(name, 5, "1") for name in names]


def test_s6_gives_back_so_many_rows_per_kernel_and_judges_none_of_their_shapes() -> None:
    without = {split.held_out: split for split in splits(ROWS, "S5")}
    for split in splits(ROWS, "S6"):
        count = int(split.name.split()[1])
        given = set(split.fit) - set(without[split.held_out].fit)
        per_kernel = {kernel: sum(ROWS[i].row.kernel == kernel for i in given) for kernel in planted.KERNELS}
        assert set(per_kernel.values()) == {count}
        seen = {shape_group(ROWS[i].row) for i in given}
        assert seen.isdisjoint({shape_group(ROWS[i].row) for i in split.judge})


def test_s4_gives_back_thirty_rows_of_an_operator_kernels_in_turn_and_judges_none_of_their_shapes() -> None:
    rows = planted.table(seed=3, shapes=60, devices=planted.DEVICES[:1], phases=("forward", "backward"))
    rows += [replace(one, row=replace(one.row, operator="other")) for one in rows]
    found = [split for split in splits(rows, "S4") if split.held_out == "other"]
    assert [split.name for split in found] == ["S4", "S4, 30 rows", "S4, 30 chosen rows"]
    for split in found[1:]:
        assert set(split.fit) == {*found[0].fit, *split.given}
        counts = Counter(rows[i].row.kernel for i in split.given)
        assert counts == {"wide": 15, "narrow": 15}
        seen = {shape_group(rows[i].row) for i in split.given}
        assert set(split.judge) == {i for i in found[0].judge if shape_group(rows[i].row) not in seen}
    for kernel, phase in itertools.product(planted.KERNELS, ("forward", "backward")):
        bounds_s = [
            (lower_bound_s(rows[i].row, rows[i].device), i in found[2].given)
            for i in found[0].judge
            if (rows[i].row.kernel, rows[i].row.phase) == (kernel, phase)
        ]
        assert any(given for bound_s, given in bounds_s if bound_s == min(bounds_s)[0])
        assert any(given for bound_s, given in bounds_s if bound_s == max(bounds_s)[0])


def test_s6_chooses_the_smallest_and_the_largest_row_of_each_phase_and_takes_phases_in_turn() -> None:
    rows = planted.table(seed=3, shapes=60, devices=planted.DEVICES[:2], phases=("forward", "backward"))
    chosen = [split for split in splits(rows, "S6") if split.name == "S6, 16 chosen per kernel"]
    assert len(chosen) == 2
    for split in chosen:
        held_out = {(rows[i].row.kernel, rows[i].row.phase): rows[i].device for i in split.given}
        for (kernel, phase), device in held_out.items():
            bounds_s = {
                index: lower_bound_s(one.row, device)
                for index, one in enumerate(rows)
                if (one.row.kernel, one.row.phase) == (kernel, phase) and one.device == device
            }
            given_s = [bounds_s[index] for index in split.given if index in bounds_s]
            assert len(given_s) == 8
            assert (min(given_s), max(given_s)) == (min(bounds_s.values()), max(bounds_s.values()))


def test_a_side_that_would_be_empty_is_no_split_and_an_unknown_name_is_refused() -> None:
    one_device = planted.table(seed=2, shapes=5, devices=planted.DEVICES[:1])
    found: list[Split] = list(splits(one_device, "S5"))
    assert found == []
    # Sixteen shapes given back of ten are all of them.
    assert list(splits(planted.table(seed=2, shapes=10), "S6")) == []
    with pytest.raises(ValueError, match="no split is called 'S9'; there are S0, S1"):
        list(splits(ROWS, "S9"))
