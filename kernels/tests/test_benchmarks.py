"""The benchmark scripts start, and those that need no GPU give a row for every operator that they claim to time."""

from __future__ import annotations

import importlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from forked_scripts import FORKS

pytest.importorskip("triton")

from subquad_kernels.builtin import OPERATORS

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.name != "timing.py")


def rows(script: str, name: str, tmp_path: Path) -> list[dict[str, Any]]:
    out = tmp_path / "out.json"
    FORKS.run(FOLDER / f"{script}.py", str(out), "--tiny")
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["device"]
    assert not [row for row in record[name] if "failure" in row], record[name]
    return record[name]  # type: ignore[no-any-return]


def test_a_record_with_a_path_is_written_at_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    record = importlib.import_module("timing").Record("none", ("torch",), path=tmp_path / "out.json")
    for case in (1, 2):
        record.add("timings", {"case": case})
        found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
        assert found["timings"] == [{"case": number} for number in range(1, case + 1)]
    assert (found["device"], found["versions"]) == ("none", ["torch"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_script_says_how_it_is_called(script: Path) -> None:
    assert f"python kernels/benchmarks/{script.name}" in FORKS.run(script, "--help")


def test_a_decode_is_timed_for_every_operator_that_has_one(tmp_path: Path) -> None:
    found = rows("decode", "decode", tmp_path)
    wanted = {operator.name for operator in OPERATORS for example in operator.examples if example.phase == "decode"}
    assert {row["operator"] for row in found} == wanted
    assert {row["b"] for row in found} == {1, 2}
    for row in found:
        assert row["us"] > row["floor_us"] > 0
        tolerance = next(operator for operator in OPERATORS if operator.name == row["operator"]).tolerances["bfloat16"]
        assert row.get("error", 0.0) <= tolerance.output


def test_growth_is_measured_for_the_linear_operators_and_for_segments(tmp_path: Path) -> None:
    found = rows("growth", "growth", tmp_path)
    operators = {row["operator"] for row in found}
    assert operators == {
        "selective_scan", "causal_conv", "gated_norm", "rotary", "linear_attention", "gated_linear_attention",
        "delta_rule", "segment_attention", "slstm_scan", "ttt_scan",
    }  # fmt: skip
    assert {row["options"]["segment_len"] for row in found if row["operator"] == "segment_attention"} == {10, 64}
    for before, row in pairwise(found):
        assert row["seconds"] > 0
        if row["t"] == 2 * before["t"]:
            assert row["growth"]["seconds"] == pytest.approx(row["seconds"] / before["seconds"])
