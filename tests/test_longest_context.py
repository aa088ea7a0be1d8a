"""The script that looks for the longest sequence doubles it until a step fails, and says how."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parent.parent / "tools"
TINY = [
    "model.d_model=32", "model.num_layers=1", "compiler.estimator=constant", "trainer.accelerator=cpu", "target=cpu",
]  # fmt: skip


def test_lengths_double_until_one_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    script = importlib.import_module("longest_context")
    real = script.tried

    def tried(overrides: list[str], most_s: float) -> dict[str, object]:
        if "trainer.seq_len=128" in overrides:
            raise torch.OutOfMemoryError("no memory is left")
        return real(overrides, most_s)

    monkeypatch.setattr(script, "tried", tried)
    asked, rest = script.parsed(["from=32", "models=[transformer,absent]", *TINY])
    assert rest == TINY
    script.main(tmp_path / "out.json", asked, rest)
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert list(found["transformer"]) == ["32", "64", "128"]
    assert found["transformer"]["64"]["tokens_per_s"] == round(64 / found["transformer"]["64"]["seconds"])
    assert found["transformer"]["128"] == {"error": "OutOfMemoryError: no memory is left"}
    assert "absent" in found["absent"]["32"]["error"]
