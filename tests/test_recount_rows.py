"""Rows of code that has changed are told by kernel, date and workload, disturbed ones by their repeats, those that
waited by what queueing took; the recorded ones hold none."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from subquad_cost_model import TimedRow, read_timed_rows

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recount_rows", ROOT / "tools" / "recount_rows.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recorded_rows_hold_none_of_code_that_has_changed(tool: ModuleType) -> None:
    rows = read_timed_rows(ROOT / "cost_model" / "data")
    assert not [row.row.key for row in rows if tool.is_stale(row)]


def test_an_earlier_row_of_a_changed_workload_is_stale_and_others_are_not(tool: ModuleType) -> None:
    rows = read_timed_rows(ROOT / "cost_model" / "data")
    decode = next(r for r in rows if (r.row.operator, r.row.kernel, r.row.phase) == ("causal_conv", "fused", "decode"))
    assert not tool.is_stale(decode)
    before = replace(decode, date="2026-11-29T03:00:00+00:00")
    assert tool.is_stale(before)
    assert not tool.is_stale(replace(before, row=replace(before.row, phase="forward"))), "only its decodes changed"
    assert not tool.is_stale(replace(before, row=replace(before.row, kernel="taps")))
    one = next(r for r in rows if (r.row.operator, r.row.kernel) == ("linear_attention", "fused"))
    shape = {**one.row.shape, "h": 8, "h_k": 2, "n": 32, "p": 32}
    shared = replace(one, date=before.date, row=replace(one.row, dtype="bfloat16", shape=shape))
    assert tool.is_stale(shared)
    assert not tool.is_stale(replace(shared, row=replace(shared.row, dtype="float32")))
    assert not tool.is_stale(replace(shared, row=replace(shared.row, shape={**shape, "h_k": 8})))
    widths = {**shape, "n": 256, "p": 512}
    wide = replace(shared, date="2026-11-30T01:00:00+00:00", row=replace(shared.row, shape=widths))
    assert tool.is_stale(replace(wide, row=replace(wide.row, phase="backward")))
    assert not tool.is_stale(replace(wide, row=replace(wide.row, phase="decode")))
    assert not tool.is_stale(replace(wide, date="2026-12-01T00:00:00+00:00"))
    assert not tool.is_stale(replace(wide, row=replace(wide.row, shape={**shape, "n": 128, "p": 128})))
    forward = next(
        r
        for r in rows
        if (r.row.operator, r.row.kernel, r.row.phase) == ("segment_attention", "sdpa_merge", "forward")
        and "documents" not in r.row.shape
    )
    gradient = replace(forward, date=before.date, row=replace(forward.row, phase="backward", dtype="bfloat16"))
    assert tool.is_stale(gradient)
    assert not tool.is_stale(replace(gradient, row=replace(gradient.row, dtype="float32"))), "computed as before"
    assert tool.is_stale(replace(gradient, row=replace(gradient.row, kernel="compacted", dtype="float32")))
    assert not tool.is_stale(replace(forward, row=replace(forward.row, kernel="compacted")))
    documents = replace(forward.row, shape={**forward.row.shape, "documents": 3})
    asked = replace(forward, date="2026-12-01T14:00:00+00:00", row=documents)
    assert tool.is_stale(asked), "it asked the device for lengths in every call"
    assert not tool.is_stale(replace(asked, date="2026-12-01T16:00:00+00:00"))
    assert not tool.is_stale(replace(asked, row=replace(documents, kernel="tiled"))), "it never asked"


def test_the_recorded_rows_hold_none_that_were_disturbed_and_of_no_phase_a_few(tool: ModuleType) -> None:
    rows = read_timed_rows(ROOT / "cost_model" / "data")
    assert not [row.row.key for row in rows if tool.is_disturbed(row)]
    assert tool.kept([rows]) == [rows]


def test_phases_of_which_all_tables_hold_few_rows_are_left_out(tool: ModuleType) -> None:
    rows = read_timed_rows(ROOT / "cost_model" / "data")
    one = next(row for row in rows if row.status == "ok" and row.row.kernel == "tiled")
    failed = next(row for row in rows if row.status == "unsupported")
    assert tool.kept([[one] * 3, [one] * 2, [failed]]) == [[], [], [failed]]
    assert tool.kept([[one] * 3, [one] * 3, [failed]]) == [[one] * 3, [one] * 3, [failed]]


def test_repeats_far_apart_tell_a_disturbed_row_and_widened_ones_do_not(tool: ModuleType) -> None:
    rows = read_timed_rows(ROOT / "cost_model" / "data")
    one = next(row for row in rows if row.median_s is not None and row.repeats == 3)
    assert one.median_s is not None

    def disturbed(apart: float, **others: object) -> bool:
        return bool(tool.is_disturbed(replace(one, high_s=one.low_s + apart * one.median_s, **others)))  # type: ignore

    early, late = "2026-11-29T23:00:00+00:00", "2026-11-30T01:00:00+00:00"
    one = replace(one, low_s=one.median_s * 0.99)
    assert disturbed(0.04, date=early), "timed again since"
    assert not disturbed(0.02, date=early)
    assert not disturbed(0.4, date=late)
    assert disturbed(0.6, date=late)
    assert not disturbed(0.8, date=late, repeats=1), "one call, whose range was widened"
    assert not tool.is_disturbed(replace(one, status="oom", low_s=None, median_s=None, high_s=None))


def test_a_call_that_queueing_outlasted_has_waited_for_the_host(tool: ModuleType) -> None:
    rows = read_timed_rows(ROOT / "cost_model" / "data")
    one = next(r for r in rows if r.status == "ok" and r.row.phase == "forward" and "documents" not in r.row.shape)
    head_s = tool.head_start_s(one.device)

    def timed(seconds: float, queued_s: float | None, **others: object) -> TimedRow:
        return replace(one, low_s=seconds, median_s=seconds, high_s=seconds, queued_s=queued_s, **others)  # type: ignore

    waited = timed(2 * head_s, 3 * head_s, cuda_graph=False)
    assert tool.has_waited(waited)
    assert not tool.has_waited(timed(0.5 * head_s, 0.9 * head_s)), "the host was ahead"
    assert not tool.has_waited(timed(4 * head_s, 3 * head_s)), "the device took longer"
    assert not tool.has_waited(timed(2 * head_s, None)), "nobody knows"
    packed = replace(waited.row, shape={**waited.row.shape, "documents": 2})
    assert tool.has_waited(replace(waited, row=packed)), "its layout is known before it is captured"

    captured = timed(head_s, None, cuda_graph=True)
    assert tool.kept([[waited] * 6]) == [[waited] * 6], "there is nothing in its place"
    assert tool.kept([[waited] * 6, [captured] * 6]) == [[], [captured] * 6]
    other = replace(captured, row=replace(captured.row, phase="backward"))
    assert tool.kept([[waited] * 6, [other] * 6]) == [[waited] * 6, [other] * 6], "of another phase"
