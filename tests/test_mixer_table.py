"""The table of mixers is what the records say, and the documents hold it as the command writes it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from oracle_record import OracleRecord
from tool import own_tool

from subquad.registry import load_registry
from subquad.testing.mixer_suite import MixerSuite
from subquad.testing.verdict import promises

NOT_OF_WINDOWS = {
    "what_it_shares_is_as_declared_and_has_gradients", "float32_parameters_keep_their_bits_under_bfloat16",
    "weight_decay_spares_what_is_declared", "names_only_parameters_that_exist",
}  # fmt: skip
"""Promises about what `window` does not declare."""
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tool(tmp_path: Path) -> Any:
    """The tool, on records of its own."""
    module = own_tool("mixer_table")
    module.VERDICTS = module.BENCHMARKS = tmp_path
    module.LAYERS = tmp_path / "layers"
    module.LAYERS.mkdir()
    return module


def cells(tool: Any, mixer: str) -> dict[str, str]:
    """A row of the table by its header."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tool.table().splitlines() if "|" in line]
    row = next(line for line in lines if line[0] == f"`{mixer}`")
    return dict(zip(lines[0], row))


def test_the_documents_hold_the_table_of_the_records() -> None:
    tool = own_tool("mixer_table")
    for path in tool.DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert tool.with_table(text, tool.table()) == text, f"{path.name}: run python tools/mixer_table.py write"


def test_every_mixer_has_been_judged_and_compared() -> None:
    tool = own_tool("mixer_table")
    for mixer in load_registry().mixers:
        assert tool.promises_of(mixer, "cpu"), f"run python tools/mixer_table.py judge {mixer}"
        assert cells(tool, mixer)["oracle"] != "-", f"mark a test of {mixer} with pytest.mark.oracle, and record it"


def test_every_promise_of_a_column_is_one_of_the_suite() -> None:
    tool = own_tool("mixer_table")
    assert {name for names in (*tool.COLUMNS.values(), tool.GROWS) for name in names} <= set(promises(MixerSuite))


def test_a_broken_promise_shows_and_a_missing_record_is_no_yes(tool: Any) -> None:
    assert set(cells(tool, "window").values()) == {"`window`", "-"}
    kept = dict.fromkeys(promises(MixerSuite), True) | {"packed_documents_equal_separate_ones": False}
    del kept["compiles_without_graph_breaks"]
    verdict = {"kind": "mixer", "name": "window", "promises": [{"name": n, "kept": k} for n, k in kept.items()]}
    record = {"device": "cpu", "torch": "2", "date": "2026-11-29", "verdicts": [verdict]}
    (tool.VERDICTS / "window.cpu.json").write_text(json.dumps(record))
    found = cells(tool, "window")
    assert (found["forward"], found["packed"], found["compile"]) == ("yes", "NO", "-")
    judged = len(kept) - len(NOT_OF_WINDOWS)
    assert (found["CPU"], found["growth: work, carry"]) == (f"{judged - 1} of {judged}", "t, 1")


def test_what_does_not_apply_is_counted_in_verdicts_of_neither_age(tool: Any) -> None:
    for old in (True, False):
        verdict = {"kind": "mixer", "name": "window", "promises": [
            {"name": name, "kept": True} | ({} if old else {"applies": name not in NOT_OF_WINDOWS})
            for name in promises(MixerSuite)
        ]}  # fmt: skip
        record = {"device": "cpu", "torch": "2", "date": "2026-11-29", "verdicts": [verdict]}
        (tool.VERDICTS / "window.cpu.json").write_text(json.dumps(record))
        judged = len(promises(MixerSuite)) - len(NOT_OF_WINDOWS)
        assert cells(tool, "window")["CPU"] == f"{judged} of {judged}", f"{old=}"
    verdict["promises"] = [  # what a mixer does without is no promise kept
        {"name": name, "kept": True, "applies": name != "packed_documents_equal_separate_ones"}
        for name in promises(MixerSuite)
    ]
    (tool.VERDICTS / "window.cpu.json").write_text(json.dumps(record))
    assert cells(tool, "window")["packed"] == "no"


def test_times_are_of_one_case_and_a_record_with_a_rival_is_preferred(tool: Any) -> None:
    def row(name: str, t: int, ms: float, **more: Any) -> dict[str, Any]:
        return {"case": {"name": name, "t": t, "n": 64, "p": 64}, "both_device_ms": ms} | more

    newer = {"device": "GPU", "timings": [row("A", 8192, 9.0)]}
    rivals = [
        {"rival": "slow", "case": "A", "both_device_ms": 8.0},
        {"rival": "fast", "case": "A", "both_device_ms": 5.0},
    ]
    rivals += [
        {"rival": "other", "case": "B", "both_device_ms": 1.0},
        {"rival": "late", "case": "A", "failure": "late"},
    ]
    older = {
        "device": "GPU",
        "timings": [row("A", 2048, 1.0), row("A", 8192, 2.0, tuned=True), row("A", 8192, 4.0)],
        "rivals": rivals,
    }
    (tool.BENCHMARKS / "linear_attention_gpu_2026-12-01.json").write_text(json.dumps(newer))
    (tool.BENCHMARKS / "linear_attention_rivals_gpu_2026-11-30.json").write_text(json.dumps(older))
    assert cells(tool, "retnet")["on a GPU, beside rivals"] == "`linear_attention` 4.00 ms (n 64, p 64), fast 5.00 ms"


def test_an_operator_of_several_forms_is_shown_in_the_mixer_s_own(tool: Any) -> None:
    rows = [{"form": form, "t": 8192, "n": 64, "p": 64, "both_ms": ms} for form, ms in (("gated", 1.5), ("rwkv7", 4.5))]
    record = {"device": "GPU", "timings": rows}
    (tool.BENCHMARKS / "delta_rule_gpu_2026-12-01.json").write_text(json.dumps(record))
    for mixer, ms in (("gated_delta_net", "1.50"), ("rwkv7", "4.50")):
        assert cells(tool, mixer)["on a GPU, beside rivals"] == f"`delta_rule` {ms} ms (n 64, p 64), no rival timed"


def test_a_layer_that_was_timed_stands_for_its_operator_beside_its_fastest_rival(tool: Any) -> None:
    def row(mixer: str, package: str, what: str = "layer", t: int = 8192, **more: Any) -> dict[str, Any]:
        return {"mixer": mixer, "package": package, "what": what, "t": t, "d_model": 1024} | more

    newest = [row("gla", "subquad", both_device_ms=5.0), row("gla", "fla", failure="ModuleNotFoundError: fla")]
    older = [
        row("gla", "subquad", both_device_ms=9.0), row("retnet", "subquad", both_device_ms=3.0),
        row("retnet", "subquad", t=2048, both_device_ms=1.0), row("retnet", "fla", both_device_ms=4.0),
        row("retnet", "fla", "linear_attention/fla_chunked", both_device_ms=3.5),
        row("retnet", "fla", t=2048, both_device_ms=0.5),
    ]  # fmt: skip
    for date, rows in (("2026-12-02", newest), ("2026-12-01", older)):
        (tool.LAYERS / f"mixers_gpu_{date}.json").write_text(json.dumps({"device": "GPU", "layers": rows}))
    assert cells(tool, "gla")["on a GPU, beside rivals"] == "layer 5.00 ms (width 1024), no rival timed"
    operator = {"device": "GPU", "timings": [{"case": {"name": "D64", "t": 8192, "n": 64, "p": 64}, "both_ms": 2.0}]}
    (tool.BENCHMARKS / "gated_linear_attention_gpu_2026-12-01.json").write_text(json.dumps(operator))
    beside = "layer 5.00 ms (width 1024), no rival timed; `gated_linear_attention` 2.00 ms (n 64, p 64), no rival timed"
    assert cells(tool, "gla")["on a GPU, beside rivals"] == beside
    shown = cells(tool, "retnet")["on a GPU, beside rivals"]
    assert shown == "layer 3.00 ms (width 1024), fla `linear_attention/fla_chunked` 3.50 ms"
    assert "Layers (GPU)" in tool.table()


def test_oracles_are_counted_by_mixer_and_a_skipped_one_is_not(tmp_path: Path) -> None:
    record = OracleRecord(tmp_path / "oracles.json")
    item = SimpleNamespace(iter_markers=lambda name: [SimpleNamespace(args=("a", "b"))])
    for when, outcome in (
        ("setup", "passed"), ("call", "passed"), ("call", "failed"), ("setup", "failed"), ("call", "skipped"),
    ):  # fmt: skip
        report = SimpleNamespace(
            when=when,
            outcome=outcome,
            skipped=outcome == "skipped",
            failed=outcome == "failed",
            passed=outcome == "passed",
        )
        steps = record.pytest_runtest_makereport(item)  # type: ignore[arg-type]
        next(steps)
        with pytest.raises(StopIteration):
            steps.send(report)  # type: ignore[attr-defined]
    record.pytest_sessionfinish()
    assert json.loads(record.path.read_text())["mixers"] == {
        "a": {"passed": 1, "failed": 2}, "b": {"passed": 1, "failed": 2}
    }  # fmt: skip
