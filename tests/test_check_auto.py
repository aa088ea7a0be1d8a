"""The script that confirms choices by measurement: it measures, and its verdict can be no."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
CHOSEN = {"schedule": "4 a", "loss": 4.0, "seconds": 0.9}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("check_auto", TOOLS / "check_auto.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "check_auto", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("other", "budget", "confirmed"),
    [
        ({"schedule": "4 b", "loss": 0.0, "seconds": 1.1}, 1.0, True),  # better, and over the budget
        ({"schedule": "4 b", "loss": 0.0, "seconds": 0.99}, 1.0, False),
        ({"schedule": "4 b", "loss": 8.0, "seconds": 0.1}, 1.0, True),  # faster, and loses more
        ({"schedule": "4 b", "loss": 4.0, "seconds": 0.8}, 1.0, False),
        ({"schedule": "4 b", "loss": 4.0, "error": "OutOfMemoryError"}, 1.0, True),
        ({"schedule": "4 b", "loss": 8.0, "seconds": 0.1}, 0.5, False),  # the chosen one breaks its budget
        ({"schedule": "4 b", "loss": 0.0, "seconds": 5.0}, None, False),
    ],
)
def test_a_choice_is_confirmed_only_where_nothing_within_the_budget_is_better(
    script: ModuleType, other: dict[str, object], budget: float | None, confirmed: bool
) -> None:
    assert script.verdict([CHOSEN, other], budget)["confirmed"] is confirmed


def test_every_cell_is_measured_with_the_candidates_alone(script: ModuleType, tmp_path: Path) -> None:
    script.main(
        tmp_path / "out.json",
        ["2x32:0", "1x32:60"],
        ["model.d_model=32", "model.num_layers=2", "model.channel_mixer.d_hidden=32",
         "model.candidates=[window,softmax_attention]", "compiler.measure_budget_s=0.5", "trainer.accelerator=cpu",
         "target=cpu", "model.mixers.softmax_attention.num_heads=2", "model.mixers.segment_attention.num_heads=2",
         "model.mixers.window.num_heads=2"],
    )  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())
    for cell, budget in (("2x32:0", None), ("1x32:60", 60)):
        result = found[cell]
        assert result["schedule"] == ["window"] * 2
        assert result["budget_s"] == budget
        assert [row["schedule"] for row in result["taken"]] == ["2 window", "2 softmax_attention"]
        assert [row["loss"] for row in result["taken"]] == [0, 2]
        assert all(row["seconds"] > 0 for row in result["taken"])
        assert result["confirmed"]
        assert set(result["against"]) == {"2 softmax_attention"}
