"""The physics head recovers planted sums, goes on beyond the sizes it saw, and heeds what rows are worth."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import planted
import pytest

from subquad_cost_model import CostRow, Device
from subquad_cost_model.bound import bound_terms
from subquad_cost_model.head import Head
from subquad_cost_model.physics import Physics
from subquad_cost_model.terms import BYTES, CLEARED, HOST, SECONDS, Terms, _seconds
from subquad_cost_model.trees import Trees

DEVICE = planted.DEVICES[1]
LAUNCH_S, SHARE = 4e-6, 0.25
"""What a launch of the planted kernels costs, and which part of the bandwidth they reach."""


def composed(kernel: str, t: int, b: int = 1, h: int = 8, k: int = 64) -> CostRow:
    """A row whose kernel starts two launches for every 64 tokens."""
    return replace(planted.row(kernel, b, t, h, k=k), launches=1 + 2 * -(-t // 64), options={"causal": True})


def truth_s(row: CostRow, level: float = 1.0) -> float:
    return LAUNCH_S * row.launches + level * bound_terms(row, DEVICE).memory_s / SHARE


def drawn(seed: int, kernel: str = "wide", most_t: int = 2048, count: int = 40) -> list[CostRow]:
    draw = random.Random(seed)
    return [composed(kernel, draw.randint(64, most_t), b=draw.randint(1, 64)) for _ in range(count)]


def fitted(rows: list[CostRow], seconds: list[float], doubts: list[float] | None = None) -> Physics:
    return Physics.fit(asked(rows), np.array(seconds), np.array(doubts or [0.01] * len(rows)))


def asked(rows: list[CostRow], device: Device = DEVICE) -> Terms:
    return Terms.count(SECONDS, rows, [device] * len(rows))


def errors(physics: Physics, rows: list[CostRow], seconds: list[float]) -> list[float]:
    found = physics.predict(asked(rows))
    return [abs(one / truth - 1) for one, truth in zip(found, seconds, strict=True)]


def test_a_planted_sum_is_recovered_and_goes_on_sixteen_times_beyond() -> None:
    rows = drawn(0)
    physics = fitted(rows, [truth_s(row) for row in rows])
    inside, beyond = drawn(1), [composed("wide", t, b=4) for t in (8192, 16_384, 32_768)]
    assert max(errors(physics, inside, [truth_s(row) for row in inside])) < 0.05
    assert max(errors(physics, beyond, [truth_s(row) for row in beyond])) < 0.1


def test_launches_tell_kernels_of_equal_work_apart() -> None:
    rows = [*drawn(2, count=30), *(replace(row, kernel="narrow", launches=1) for row in drawn(2, count=30))]
    physics = fitted(rows, [truth_s(row) for row in rows])
    few, many = (replace(composed(name, 4096), launches=count) for name, count in (("narrow", 1), ("wide", 129)))
    one_s, other_s = physics.predict(asked([few, many]))
    assert other_s - one_s == pytest.approx(128 * LAUNCH_S, rel=0.1)


def test_the_host_matters_where_it_needs_longer_than_the_device_and_its_head_start() -> None:
    head_s, host_s = CLEARED * DEVICE.cache_bytes / DEVICE.bytes_per_s, 30e-6

    def slow(row: CostRow) -> float:
        return max(truth_s(row), host_s * row.launches - head_s)

    rows = drawn(16, most_t=8192, count=80)
    waiting = [slow(row) > truth_s(row) for row in rows]
    assert 0.2 < np.mean(waiting) < 0.9
    physics = fitted(rows, [*map(slow, rows)])
    new = [*drawn(17, most_t=8192), *(composed("wide", t, b=1) for t in (16_384, 32_768))]
    assert max(errors(physics, new, [*map(slow, new)])) < 0.1


def test_a_hosts_pace_is_recovered_where_rows_know_it_and_is_the_usual_one_elsewhere() -> None:
    rows, new = planted.hosted(seed=20, shapes=120), planted.hosted(seed=21, shapes=60)

    def fit(paced: bool) -> Physics:
        devices = [row.paced_device if paced else row.device for row in rows]
        seconds = np.array([row.seconds for row in rows])
        terms = Terms.count(SECONDS, [row.row for row in rows], devices)
        return Physics.fit(terms, seconds, np.full(len(rows), 0.01))

    def off(physics: Physics, paced: bool) -> float:
        devices = [row.paced_device if paced else row.device for row in new]
        found = physics.predict(Terms.count(SECONDS, [row.row for row in new], devices))
        return float(np.mean([abs(one / row.seconds - 1) for one, row in zip(found, new, strict=True)]))

    told = fit(paced=True)
    assert off(told, paced=True) < 0.05
    assert off(fit(paced=False), paced=True) > 0.2, "no row knew a pace: that of the device says nothing"
    assert off(told, paced=False) > 0.2
    assert told.host_s == pytest.approx(np.median([row.host_s for row in rows]))
    one = [new[0].row]
    usual = replace(DEVICE, host_s=told.host_s)
    assert told.predict(asked(one)) == pytest.approx(told.predict(asked(one, usual)))


def test_what_is_captured_waits_for_no_host() -> None:
    """Rows of one kernel, every other one captured: the device's side is learned from all, the host's from the rest."""
    rows = []
    for number, row in enumerate(planted.hosted(seed=20, shapes=160)):
        work = 4e-6 * row.row.launches + 4 * bound_terms(row.row, row.device).memory_s
        rows.append(replace(row, median_s=work, low_s=work, high_s=work, cuda_graph=True) if number % 2 else row)
    terms = Terms.count(SECONDS, [row.row for row in rows], [row.paced_device for row in rows])
    physics = Physics.fit(terms, np.array([row.seconds for row in rows]), np.full(len(rows), 0.01))
    assert physics.host_s == pytest.approx(np.median([row.host_s for row in rows if not row.cuda_graph]))
    for captured in (False, True):
        those = [row for row in rows if bool(row.cuda_graph) is captured]
        found = physics.predict(Terms.count(SECONDS, [r.row for r in those], [r.paced_device for r in those]))
        assert np.mean([abs(one / row.seconds - 1) for one, row in zip(found, those, strict=True)]) < 0.05
    eager, captured_s = (
        physics.predict(Terms.count(SECONDS, [row.row for row in rows], [replace(DEVICE, host_s=pace)] * len(rows)))
        for pace in (1e-5, 0.0)
    )
    assert (eager >= captured_s).all() and (eager > 1.5 * captured_s).any()


def test_a_fused_kernel_pays_for_whole_tiles() -> None:
    def tiled_s(row: CostRow) -> float:
        t = row.shape["t"]
        return LAUNCH_S + 3 * bound_terms(row, DEVICE).matmul_s * -(-t // 64) * 64 / t

    rows, new = ([replace(row, launches=1) for row in drawn(seed, count=60, most_t=320)] for seed in (18, 19))
    physics = fitted(rows, [*map(tiled_s, rows)])
    assert np.mean(errors(physics, new, [*map(tiled_s, new)])) < 0.05


def test_parts_are_of_the_side_that_takes_longer_and_add_up_to_the_answer() -> None:
    rows = drawn(16, most_t=8192, count=80)
    ahead_s = CLEARED * DEVICE.cache_bytes / DEVICE.bytes_per_s
    physics = fitted(rows, [max(truth_s(row), 30e-6 * row.launches - ahead_s) for row in rows])
    parts = physics.parts(asked(rows))
    of_host, of_device = parts[:, -len(HOST) :].any(axis=1), parts[:, : -len(HOST)].any(axis=1)
    assert (of_host != of_device).all() and of_host.any() and of_device.any()
    assert physics.predict(asked(rows)) == pytest.approx(parts.sum(axis=1))


def test_a_program_walks_both_sides_of_a_window_that_looks_ahead() -> None:
    causal = replace(planted.row("wide", 1, 8192, 8), shape={"b": 1, "t": 8192, "s": 8192, "h": 8, "k": 64})
    behind = replace(causal, options={"causal": True, "window": 512})
    around = replace(causal, options={"causal": False, "window": 512})
    tiles = [_seconds(row, DEVICE)[SECONDS.index("keys")] for row in (behind, around)]
    assert tiles[1] == pytest.approx(2 * tiles[0])


def test_rows_in_doubt_and_outliers_count_less() -> None:
    rows = drawn(3)
    seconds = [truth_s(row) * (3 if place % 4 == 0 else 1) for place, row in enumerate(rows)]
    new = drawn(4)
    truths = [truth_s(row) for row in new]
    doubted = fitted(rows, seconds, [1.0 if place % 4 == 0 else 0.01 for place in range(len(rows))])
    believed = fitted(rows, seconds)
    assert np.mean(errors(doubted, new, truths)) < 0.5 * np.mean(errors(believed, new, truths))
    assert np.mean(errors(believed, new, truths)) < 0.3, "a quarter of rows thrice as slow moves it by less"


def test_known_documents_take_the_place_of_expected_ones() -> None:
    shape = {"b": 1, "t": 4096, "s": 4096, "h": 8, "documents": 4}
    unknown = replace(composed("wide", 4096), shape=shape, launches=1)

    def known(*lengths: int) -> CostRow:
        pairs = sum(length**2 for length in lengths)
        counted = {name: pairs * getattr(unknown, name) // (4 * 1024**2)
                   for name in ("matmul_flops", "vector_flops", "transcendental_ops")}  # fmt: skip
        return replace(unknown, document_lengths=lengths, **counted)

    equal, uneven = known(1024, 1024, 1024, 1024), known(4000, 32, 32, 32)
    rows = drawn(5)
    physics = fitted([replace(row, shape={**row.shape, "s": row.shape["t"]}, launches=1) for row in rows],
                     [20 * bound_terms(row, DEVICE).matmul_s for row in rows])  # fmt: skip
    short_s, expected_s, long_s = physics.predict(asked([equal, unknown, uneven]))
    assert expected_s / short_s == pytest.approx(2 * 4 / 5, rel=0.1), "parts of a broken stick"
    assert long_s / short_s == pytest.approx(4 * (4000 / 4096) ** 2, rel=0.1), "work was counted in pairs"


def test_float32_may_cost_a_kernel_more_than_its_work_says() -> None:
    def slow(row: CostRow) -> float:
        return truth_s(row, level=6.0)

    half, new = drawn(12), drawn(13)
    wide, others = ([replace(row, dtype="float32") for row in drawn(seed)] for seed in (14, 15))
    physics = fitted([*half, *wide], [*map(truth_s, half), *map(slow, wide)])
    assert max(errors(physics, new, [truth_s(row) for row in new])) < 0.1
    assert max(errors(physics, others, [slow(row) for row in others])) < 0.2


def test_bytes_at_the_peak_are_a_sum_as_well() -> None:
    rows = drawn(10)
    peaks = np.array([1.5 * row.bytes_moved + row.saved_bytes for row in rows])
    physics = Physics.fit(Terms.count(BYTES, rows, [DEVICE] * len(rows)), peaks, np.zeros(len(rows)))
    new = drawn(11)
    found = physics.predict(Terms.count(BYTES, new, [DEVICE] * len(new)))
    assert found == pytest.approx([1.5 * row.bytes_moved + row.saved_bytes for row in new], rel=0.02)


def test_a_kernel_that_computes_float16_as_float32_is_asked_for_it_as_such() -> None:
    def dtyped(seed: int, kernel: str, dtype: str) -> list[CostRow]:
        return [replace(row, launches=1, dtype=dtype) for row in drawn(seed, kernel, count=12)]

    def seconds(row: CostRow) -> float:
        slow = row.dtype == "float32" or (row.dtype == "float16" and row.kernel == "exact")
        return LAUNCH_S + row.matmul_flops / (2e13 if slow else 3e14)

    kernels, dtypes = ("exact", "half"), ("bfloat16", "float16", "float32")
    rows = [row for kernel in kernels for dtype in dtypes for row in dtyped(30, kernel, dtype)]
    physics = fitted(rows, [*map(seconds, rows)])
    assert physics.exact == (f"{rows[0].operator}/exact",)
    new = [row for kernel in kernels for row in dtyped(31, kernel, "float16")]
    assert np.mean(errors(physics, new, [*map(seconds, new)])) < 0.1, "with bfloat16 the one is off fifteenfold"


def test_a_few_long_rows_do_not_have_short_ones_begin_with_their_milliseconds() -> None:
    def fused(row: CostRow, kernel: str) -> CostRow:
        return replace(row, launches=1, kernel=kernel)

    def seconds(row: CostRow) -> float:
        return LAUNCH_S + (40 if row.kernel == "new" else 4) * bound_terms(row, DEVICE).memory_s

    known = [fused(row, "wide") for row in drawn(32)]
    long = [fused(composed("wide", t, b=32, h=16), "new") for t in (16_384, 24_576, 32_768, 49_152, 65_536)]
    physics = fitted([*known, *long], [*map(seconds, known), *map(seconds, long)])
    short = [fused(composed("wide", t), "new") for t in (64, 128)]
    assert min(map(seconds, long)) > 500 * max(map(seconds, short))
    for one_s, truth in zip(physics.predict(asked(short)), map(seconds, short), strict=True):
        assert truth / 3 < one_s < 3 * truth


def test_a_fit_counts_the_terms_of_each_row_once_and_of_float16_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[CostRow] = []

    def counting(row: CostRow, device: Device) -> list[float]:
        counted.append(row)
        return _seconds(row, device)

    monkeypatch.setattr("subquad_cost_model.terms._seconds", counting)
    rows = [replace(row, dtype="float16" if place % 3 else "bfloat16") for place, row in enumerate(drawn(40, count=60))]
    z = np.log([truth_s(row) for row in rows])
    Head.fit(rows, [DEVICE] * len(rows), z, trees=Trees(rounds=5, leaves=3), terms=SECONDS)
    assert len(counted) == 60 + 40
