"""measure: a pool drawn from declarations, timed for a stated time, into a table that another run goes on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from subquad.__main__ import main
from subquad.commands.measure import measure_config
from subquad.compiler import prepare_kernels, sample_kernels, time_cells
from subquad.compiler.prepare_kernels import Job, prepare
from subquad.compiler.sample_kernels import Plan, SampleRun, by_kernel
from subquad.compiler.shape_pool import RANGES, layouts, shapes
from subquad.compiler.target import Target, resolve_target
from subquad.compiler.time_cells import CellTimer, DeviceLostError, PacedClock
from subquad.compiler.workload import cost_row
from subquad.errors import ConfigError, NotFoundError
from subquad_cost_model import LearnedEstimator, TimedRow, lower_bound_s, read_timed_rows, timed
from subquad_cost_model.sampler import Sampler
from subquad_cost_model.terms import CLEARED
from subquad_kernels.builtin import CATALOGUE, OPERATORS
from subquad_kernels.catalogue import Kernel, Operator
from subquad_kernels.self_check import shape_class
from subquad_kernels.workload import Workload

ROTARY, DELTA, ATTENTION = (CATALOGUE.operator(name) for name in ("rotary", "delta_rule", "softmax_attention"))


@pytest.fixture(scope="session")
def target() -> Target:
    return resolve_target("cpu")


def small(**given: Any) -> Plan:
    return Plan(**{"operators": ("rotary", "causal_conv"), "layouts": 3, "shapes": 3, **given})


# --- the pool -----------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_shape_of_a_pool_is_one_that_the_operator_can_count_and_check(operator: Operator, kind: str) -> None:
    ranges = RANGES[kind]
    drawn = [workload for layout in layouts(operator, kind, 8) for workload in shapes(layout, kind, 16)]
    assert len({workload.key for workload in drawn}) == len(drawn) > 25
    for workload in drawn:
        assert operator.work(workload).bytes_moved > 0
        assert workload.dtype in operator.tolerances
        length = workload.shape["s"] if "s" in workload.shape else workload.shape["t"]
        assert workload.phase == "decode" or ranges.t[0] <= length <= ranges.t[1]
        assert workload.shape["b"] * workload.shape["t"] <= max(ranges.most_tokens, 2 * ranges.t[1])
        assert workload.shape["b"] == 1 or "documents" not in workload.shape
        small = shape_class(workload, kind).shape
        assert small["t"] <= 300
        assert all(small["h"] % small[axis] == 0 for axis in ("h_kv", "h_k") if axis in small)
    assert any(workload.phase == "decode" for workload in drawn)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_arguments_of_the_pool_fit_the_operator(operator: Operator) -> None:
    for layout in layouts(operator, "cpu", 24, seed=61):
        for workload in shapes(layout, "cpu", 2):
            arguments = operator.torch_half.sample_inputs(workload, seed=0, device="cpu")
            operator.torch_half.check(arguments)
            described = operator.torch_half.workload_of(arguments, workload.phase)
            assert described.key == workload.key


def test_shapes_of_a_layout_share_what_kernels_are_compiled_and_checked_for() -> None:
    for operator in OPERATORS:
        for layout in layouts(operator, "cuda", 8):
            for workload in shapes(layout, "cuda", 8):
                assert (workload.dtype, workload.options, workload.phase) == (
                    layout.dtype, layout.options, layout.phase,
                )  # fmt: skip
                assert ("documents" in workload.shape) == ("documents" in layout.shape)
                for axis in ("h", "h_kv", "h_k", "k", "v", "n", "p", "w"):
                    assert workload.shape.get(axis) == layout.shape.get(axis)
                assert workload.shape.get("c", 0) % 16 == 0


def test_a_seed_decides_the_pool() -> None:
    first, again, other = (layouts(DELTA, "cuda", 8, seed=seed) for seed in (1, 1, 2))
    assert [layout.key for layout in first] == [layout.key for layout in again] != [layout.key for layout in other]


def test_every_set_of_options_that_examples_declare_is_in_the_pool() -> None:
    drawn = {str(layout.options["decay"]) for layout in layouts(DELTA, "cuda", 8)}
    assert drawn == {"none", "scalar", "vector"}


def test_windows_that_look_ahead_are_in_the_pool_as_those_that_do_not() -> None:
    options = [layout.options for layout in layouts(ATTENTION, "cuda", 40)]
    kinds = {(layout["causal"], bool(layout["window"])) for layout in options}
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}


# --- the loop -----------------------------------------------------------------------


def test_rows_are_timed_and_read_back(target: Target, tmp_path: Path) -> None:
    run = SampleRun(target, tmp_path, small(layouts=4, shapes=2), budget_s=60)
    new = run.run()
    again = read_timed_rows(tmp_path)
    assert again == new
    rows = timed(new)
    assert {row.row.phase for row in rows} == {"forward", "backward", "decode"}
    assert {row.row.kernel for row in rows} >= {"tables", "taps", "conv1d"}
    assert "reference" not in {row.row.kernel for row in rows}
    assert len({row.row.key for row in rows}) == len(rows)
    for row in rows:
        assert row.row.kernel_version
        assert row.source == "subquad measure"
        assert row.run_id
        assert row.repeats
        assert row.cold_cache is False
        assert row.host_s is not None
        assert 1e-7 < row.host_s < 1e-3
    assert [path.name for path in tmp_path.iterdir()] == [f"run-{rows[0].run_id}.parquet"]


def test_a_second_run_measures_only_what_is_missing(target: Target, tmp_path: Path) -> None:
    def run(shapes: int) -> list[str]:
        plan = small(operators=("rotary",), layouts=2, shapes=shapes)
        return [row.row.key for row in SampleRun(target, tmp_path, plan, budget_s=60).run()]

    first, second = run(1), run(2)
    assert first and second
    assert not {*first} & {*second}
    assert run(2) == []


def test_one_kind_of_workload_is_a_part_of_the_pool_of_all(target: Target, tmp_path: Path) -> None:
    plan = small(operators=("delta_rule",), layouts=6, shapes=2)
    of_kinds = {
        kind: SampleRun(target, tmp_path / kind, replace(plan, kinds=(kind,)), budget_s=60).run()
        for kind in ("packed", "whole", "decode")
    }
    assert all("documents" in row.row.shape for row in of_kinds["packed"])
    assert not any("documents" in row.row.shape for row in of_kinds["whole"])
    assert {row.row.phase for row in of_kinds["packed"] + of_kinds["whole"]} == {"forward", "backward"}
    assert {row.row.phase for row in of_kinds["decode"]} == {"decode"}
    keys = {kind: {row.row.key for row in rows} for kind, rows in of_kinds.items()}
    assert all(keys.values())
    assert set().union(*keys.values()) == {
        row.row.key for row in SampleRun(target, tmp_path / "all", plan, budget_s=60).run()
    }


def test_a_kind_that_is_none_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "kinds=[packd]"]) == 2
    assert "measure.kinds" in (said := capsys.readouterr().err) and "packed, whole, decode" in said


def test_rows_of_other_versions_are_no_reason_to_leave_anything_out(target: Target, tmp_path: Path) -> None:
    plan = small(operators=("rotary",), layouts=1, shapes=1)
    updated = replace(target, device=replace(target.device, versions={"torch": "99"}))
    first, again = (SampleRun(there, tmp_path, plan, budget_s=60).run() for there in (target, updated))
    assert first
    assert [row.row.key for row in again] == [row.row.key for row in first]


@pytest.mark.parametrize("doubts", [True, False])
def test_a_model_of_the_rows_so_far_chooses_where_it_may(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doubts: bool
) -> None:
    monkeypatch.setattr(sample_kernels, "FIRST_DOUBT", 1)
    monkeypatch.setattr(sample_kernels, "BATCH", 4)
    monkeypatch.setattr(LearnedEstimator, "fit", lambda rows, *, trees: LearnedEstimator(heads={}))
    asked: list[int] = []

    def informative(sampler: Sampler, estimator: object, *, count: int, done: set[int]) -> list[int]:
        asked.append(count)
        return [index for index in range(len(sampler.cells)) if index not in done][:count]

    monkeypatch.setattr(Sampler, "informative", informative)
    new = SampleRun(target, tmp_path, small(operators=("rotary",), shapes=4, doubts=doubts), budget_s=60).run()
    assert len(timed(new)) > 4
    assert bool(asked) is doubts


def test_the_budget_ends_a_run(target: Target, tmp_path: Path) -> None:
    run = SampleRun(target, tmp_path, Plan(layouts=6, shapes=64), budget_s=3)
    run.run()
    assert -3 < run.left_s <= 0


@pytest.mark.parametrize(("kernels", "share"), [(("rotary/tables",), 2.0), (("taps", "conv1d"), 1.0), ((), 0.5)])
def test_few_kernels_may_take_more_of_the_budget_each(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: tuple[str, ...], share: float
) -> None:
    monkeypatch.setattr(sample_kernels, "MOST_OF_A_KERNEL", 0.5)
    run = SampleRun(target, tmp_path, Plan(kernels=kernels), budget_s=50)
    assert run.most_of_a_kernel_s == pytest.approx(50 * share)


class Planted:
    """A kernel that does what a test wants, in the place of another."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    @staticmethod
    def backward(*_: Any) -> dict[str, Any]:
        return {}


def planted(forward: Callable[..., Any]) -> Kernel:
    kernel = replace(CATALOGUE.kernel("rotary", "tables"), name="planted")
    kernel.__dict__["torch_half"] = Planted(forward)
    return kernel


def timer(target: Target) -> CellTimer:
    return CellTimer(target, run_id="test")


def decode() -> Workload:
    return next(layout for layout in layouts(ROTARY, "cpu", 8) if layout.phase == "decode")


def test_a_kernel_that_raises_is_a_row_and_its_rivals_are_timed(target: Target) -> None:
    def raising(**_: Any) -> Any:
        raise ZeroDivisionError("not today")

    rows = timer(target).rows(ROTARY, [planted(raising), CATALOGUE.kernel("rotary", "tables")], decode())
    assert [(row.row.kernel, row.status) for row in rows] == [("planted", "unsupported"), ("tables", "ok")]


def test_the_hosts_pace_is_asked_right_before_and_after_each_loop() -> None:
    events: list[str] = []
    paces = iter([1e-6, 3e-6, 5e-6, 9e-6])

    def pace() -> float:
        events.append("pace")
        return next(paces)

    def run() -> None:
        events.append("run")

    def other() -> None:
        events.append("other")

    clock = PacedClock(lambda run, calls: [run() for _ in range(calls)] and 1.0, pace)
    assert clock(run, 2) == 1.0
    clock(other, 1)
    assert events == ["pace", "run", "run", "pace", "pace", "other", "pace"]
    assert clock.host_s(run) == pytest.approx(2e-6)
    assert clock.host_s(other) == pytest.approx(7e-6)


def test_the_cost_model_knows_the_head_start_that_rows_are_timed_with() -> None:
    """A buffer that the clock clears is of twice the cache (`CudaClock`)."""
    assert CLEARED == 2 * time_cells.MOST_CLEARS


@pytest.mark.parametrize(("spread", "loops"), [(0.01, [1, 1, 1]), (0.2, [1, 1, 1, 5, 5, 5])])
def test_what_is_not_steady_is_timed_again_with_more_calls(
    target: Target, monkeypatch: pytest.MonkeyPatch, spread: float, loops: list[int]
) -> None:
    """Here every second loop of one call takes longer; medians of several calls do not."""
    made: list[int] = []

    class Jumpy:
        def __call__(self, run: Callable[[], object], calls: int) -> float:
            made.append(calls)
            late = spread if calls == 1 and len(made) % 2 else 0.0
            return 0.01 * calls * (1 + late)

        def queued_s(self, run: Callable[[], object]) -> float:
            return 1e-3 * len(made)

    monkeypatch.setattr(time_cells, "device_clock", lambda *_, **__: Jumpy())
    (row,) = timer(target).rows(ROTARY, [CATALOGUE.kernel("rotary", "tables")], decode())
    sizing = 2
    rounds = made[sizing:5] + made[5 + sizing :]
    assert rounds == loops
    assert row.repeats == 3
    assert row.queued_s == pytest.approx(1e-3 * len(made)), "of the loops that count"
    assert (row.doubt < 1e-9) == (spread == 0.2)


@pytest.mark.parametrize(
    ("queued_s", "once_s", "packed", "captured", "alone"),
    [
        (1e-3, 1e-3, False, False, False),
        (2e-3, 2e-3, False, True, False),
        (2e-3, 2e-3, True, True, False),
        (0.5, 0.5, False, True, False),
        (2.0, 2.0, False, False, True),
        (2e-3, 0.3, True, True, False),
    ],
)
def test_a_call_that_would_wait_for_the_host_is_captured(
    target: Target, monkeypatch: pytest.MonkeyPatch, queued_s: float, once_s: float, packed: bool, captured: bool,
    alone: bool,
) -> None:  # fmt: skip
    counts: list[int] = []

    def capture(self: CellTimer, rival: Any, calls: Sequence[Callable[[], object]], count: int) -> None:
        counts.append(count)
        rival.captured = True

    timing = timer(target)
    monkeypatch.setattr(timing, "_cuda", True)
    monkeypatch.setattr(CellTimer, "_once", lambda self, call: (queued_s, once_s))
    monkeypatch.setattr(CellTimer, "_wait", lambda self: None)
    monkeypatch.setattr(CellTimer, "_capture", capture)
    shape = {"b": 1, "t": 64, "h": 2, "h_kv": 2, "k": 16} | ({"documents": 2} if packed else {})
    workload = Workload(operator="rotary", shape=shape, dtype="float32", phase="forward", options={"theta": 1e4})
    rows = timing.rows(ROTARY, [CATALOGUE.kernel("rotary", "tables")], workload)
    assert [(row.status, row.cuda_graph, row.repeats == 1) for row in rows] == [("ok", captured, alone)] * len(rows)
    assert counts == [1] * len(rows) * captured


def test_cached_memory_is_handed_back_before_it_fills_the_device(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[int] = []
    timing = timer(target)
    monkeypatch.setattr(timing, "_cuda", True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    for share, times in ((0.4, 0), (0.6, 1)):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda share=share: share * target.device.memory_bytes)
        timing._make_room()
        assert len(emptied) == times


def test_a_kernel_without_memory_is_a_row(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def hungry(**_: Any) -> Any:
        raise torch.OutOfMemoryError("too much")

    (row,) = timer(target).rows(ROTARY, [planted(hungry)], decode())
    assert (row.status, row.median_s) == ("oom", None)


def test_a_kernel_that_breaks_the_device_ends_the_run_and_is_known_by_the_next(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(**_: Any) -> Any:
        monkeypatch.setattr(CellTimer, "_wait", _broken)
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(DeviceLostError, match="illegal memory") as caught:
        timer(target).rows(ROTARY, [planted(breaking)], decode())
    assert [(row.row.kernel, row.status) for row in caught.value.rows] == [("planted", "wrong")]
    assert "again" in str(caught.value)


def _broken(self: CellTimer) -> None:
    raise RuntimeError("an illegal memory access was encountered")


def test_kernels_that_would_take_too_long_are_left_out_before_memory_is_taken(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = next(layout for layout in layouts(ROTARY, "cpu", 8) if layout.phase == "forward")
    kernels = [CATALOGUE.kernel("rotary", "tables")]
    timing = timer(target)
    measured = timing.rows(ROTARY, kernels, layout)
    assert [row.status for row in measured] == ["ok", "ok"]
    larger = layout

    def expected_s() -> float:
        """Of the faster phase: both scale as their bounds."""
        parts = (larger, replace(larger, phase="backward"))
        bounds_s = [lower_bound_s(cost_row(ROTARY, kernels[0], part), target.device) for part in parts]
        return min(
            row.seconds * bound_s / lower_bound_s(row.row, target.device)
            for row, bound_s in zip(measured, bounds_s, strict=True)
        )

    monkeypatch.setattr(ROTARY.torch_half, "sample_inputs", None)
    while expected_s() < 1.01 * time_cells.LONGEST_CALL_S:
        larger = replace(larger, shape=dict(larger.shape) | {"b": 2 * larger.shape["b"]})
    assert timing.rows(ROTARY, kernels, replace(layout, shape=larger.shape)) == []
    assert timing.expected_too_slow == {"rotary/tables": 2}
    # What one type took says enough of another that was not timed yet.
    other = replace(layout, shape=dict(larger.shape) | {"b": 4 * larger.shape["b"]}, dtype="bfloat16")
    assert timing.rows(ROTARY, kernels, other) == []
    assert timing.expected_too_slow == {"rotary/tables": 4}


def test_wrong_results_are_a_row_with_their_error_and_never_timed(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = CATALOGUE.kernel("rotary", "tables")

    def wrong(**arguments: Any) -> Any:
        return tuple(1.5 * out for out in right.torch_half.forward(**arguments))

    kernel = replace(right, name="wrong", implementation="subquad_kernels.rotary.tables")
    kernel.__dict__["torch_half"] = SimpleNamespace(forward=wrong, backward=right.torch_half.backward)
    monkeypatch.setitem(CATALOGUE._kernels["rotary"], "wrong", kernel)
    new = SampleRun(target, tmp_path, small(operators=("rotary",)), budget_s=60).run()
    rows = [row for row in new if row.row.kernel == "wrong"]
    assert {row.status for row in rows} == {"wrong"}
    assert all(row.max_abs_error is not None and row.max_abs_error > 0.3 for row in rows)
    assert by_kernel(new)["rotary/tables"]["ok"] > 0


def test_a_device_that_is_lost_leaves_what_was_measured(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls = CellTimer.rows, []

    def breaking(self: CellTimer, operator: Operator, kernels: Sequence[Kernel], workload: Workload) -> list[TimedRow]:
        calls.append(workload)
        if len(calls) == 3:
            raise DeviceLostError(self.failed(operator, kernels[0], workload, 1.0), "an illegal memory access")
        return measure(self, operator, kernels, workload)

    monkeypatch.setattr(CellTimer, "rows", breaking)
    with pytest.raises(DeviceLostError):
        SampleRun(target, tmp_path, small(), budget_s=60).run()
    kept = read_timed_rows(tmp_path)
    assert "wrong" in {row.status for row in kept}
    lost = cost_row(CATALOGUE.operator(calls[2].operator), CATALOGUE.kernels(calls[2].operator)[1], calls[2]).key
    SampleRun(target, tmp_path, small(), budget_s=60).run()
    assert calls.count(calls[2]) == 1, lost


# --- preparing ----------------------------------------------------------------------


def test_processes_check_what_this_one_would(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job("rotary", "tables", layout) for layout in layouts(ROTARY, "cpu", 3)]
    here = list(prepare(jobs, "cpu", budget_s=60, processes=0))
    there = list(prepare(jobs, "cpu", budget_s=120, processes=1))
    assert [done.job for done in here] == jobs
    assert {done.job.layout.key for done in there} == {job.layout.key for job in jobs}
    assert all(done.failure is None and done.known for done in here + there)


def test_no_job_is_begun_when_the_budget_is_spent() -> None:
    jobs = [Job("rotary", "tables", layout) for layout in layouts(ROTARY, "cpu", 3)]
    assert list(prepare(jobs, "cpu", budget_s=-1, processes=0)) == []


def test_a_process_that_an_earlier_kernel_broke_finds_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_kernels, "_works", lambda device: False)
    (done,) = prepare([Job("rotary", "tables", layouts(ROTARY, "cpu", 1)[0])], "cpu", budget_s=60, processes=0)
    assert done.failure
    assert not done.known


# --- the verb -----------------------------------------------------------------------


def test_the_verb_writes_a_table_that_a_model_can_be_fitted_to(tmp_path: Path) -> None:
    environment = {**os.environ, "SUBQUAD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    arguments = ["operators=[rotary]", "layouts=6", "shapes=24", "budget_s=150", f"out={tmp_path / 'rows'}"]
    found = subprocess.run(
        [sys.executable, "-m", "subquad", "measure", *arguments],
        capture_output=True, text=True, env=environment, check=True, timeout=200,
    )  # fmt: skip
    assert "rotary/tables" in found.stdout
    assert "new timings in" in found.stdout
    fitted = subprocess.run(
        [sys.executable, "-m", "subquad_cost_model", "fit", str(tmp_path / "rows"), str(tmp_path / "fit"),
         "--rounds", "20"],
        capture_output=True, text=True, env=environment, check=True, timeout=200,
    )  # fmt: skip
    assert "heads" in fitted.stdout
    manifest = json.loads((tmp_path / "fit" / "manifest.json").read_text())
    assert "forward.point.txt" in manifest["sha256"]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("operators=[rotray]", "did you mean 'rotary'"),
        ("kernels=[tabels]", "did you mean 'tables'"),
        ("budget_s=0", "use more than 0"),
        ("bugdet_s=3", "did you mean 'budget_s'"),
        ("operators=[a", "write lists"),
    ],
)
def test_mistakes_are_said_in_the_users_words(argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", argument]) != 0
    assert said in capsys.readouterr().err


def test_one_name_needs_no_list() -> None:
    assert measure_config(["operators=rotary"]).operators == ["rotary"]
    assert issubclass(ConfigError, Exception) and issubclass(NotFoundError, Exception)
