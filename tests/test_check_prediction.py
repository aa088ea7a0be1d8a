"""The script that holds predictions against real steps runs, and one case that fails does not stop the others."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"


def test_it_writes_predicted_and_measured_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("check_prediction", TOOLS / "check_prediction.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(
        script, "CELLS", {"broken": ("model=transformer", "model.d_model=7"), "small": ("model=transformer",)}
    )
    script.main(
        tmp_path / "out.json",
        ["model.num_layers=1", "trainer.batch_size=2", "trainer.seq_len=32", "compiler.measure=false",
         "trainer.accelerator=cpu", "target=cpu"],
        ["broken", "small"],
    )  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert "error" in found["broken"]
    small = found["small"]
    assert small["measured"]["peak_bytes"] is None
    assert small["measured"]["steps"] == 20
    assert small["tokens_per_s"] == pytest.approx(64 / small["measured"]["seconds"], abs=1)
    dense = 6 * small["parameters"] * 64 / small["measured"]["seconds"] / script.PEAK_FLOPS_PER_S
    assert dense < small["mfu"] < 1.2 * dense, "attention of 32 tokens adds a little"
    assert small["ratio"] == {
        "seconds": pytest.approx(small["measured"]["seconds"] / small["predicted"]["seconds"], abs=1e-3)
    }
    assert set(small["kernels"]) == {"softmax_attention/sdpa_flash", "rotary/tables"}
