"""The script that holds budgets against real steps runs, and one candidate that fails does not stop the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tool import own_tool


def test_it_writes_predicted_and_measured_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = own_tool("check_budgets")
    real = script.checked

    def failing_once(config: object) -> object:
        if config.model.candidates == ["window"]:  # type: ignore[attr-defined]
            raise RuntimeError("planted")
        return real(config)

    monkeypatch.setattr(script, "checked", failing_once)
    script.main(
        tmp_path / "out.json",
        ["model=transformer", "model.schedule=[auto]", "model.candidates=[window,softmax_attention]",
         "model.d_model=32", "model.num_layers=2", "trainer.batch_size=2", "trainer.seq_len=32",
         "compiler.measure_budget_s=0.5",
         "trainer.accelerator=cpu", "target=cpu"],
    )  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["window"] == {"error": "RuntimeError: planted"}
    assert found["chosen"]["schedule"] == ["window"] * 2
    result = found["softmax_attention"]
    assert result["sources"] == ["measured"]
    assert result["schedule"] == ["softmax_attention"] * 2
    assert result["ratio"]["latency_s"] == pytest.approx(
        result["measured"]["latency_s"] / result["predicted"]["latency_s"], abs=1e-3
    )
