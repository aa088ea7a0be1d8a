"""A plugin that was written for an earlier version of the contract still loads, trains and compiles."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FROZEN = Path(__file__).parent / "frozen_1_3"
DIGEST = "7eabbfb770fa8414deb43ddb46f935a0e124a45454f9f64bf0598c925a720402"

LOAD = """
import json
from subquad import load_config
from subquad.registry import load_registry
from subquad_kernels.catalogue import CATALOGUE, load_attribute
from subquad_kernels.self_check import check_kernel

registry = load_registry()
hooks = [registry.mixers, registry.operators, registry.kernels, registry.adapters, registry.passes, registry.imports,
         registry.components]
frozen = [[str(key) for key, spec in hook.items() if registry.origins[spec].name == "frozen_1_3"] for hook in hooks]
(example,) = CATALOGUE.operator("frozen_scale").examples
checked = check_kernel(CATALOGUE.kernel("frozen_scale", "scaled"), example)
layout = load_attribute(registry.imports["frozen_arch"].build)(None)
config = load_config(["model=frozen_hybrid", "data=frozen_counting", "optimizer=frozen_sgd"])
print(json.dumps({"problems": [str(problem) for problem in registry.problems], "frozen": frozen,
                  "kernel": checked.passed, "layout": layout.model.name, "schedule": config.model.schedule}))
"""
USE = """
import torch
from frozen_1_3.compiler import Attention
from subquad import compile_model, load_config, train
from subquad.compiler.options import CompileOptions

model, plan = compile_model(Attention(), (torch.randn(1, 6, 8),), target="cpu", options=CompileOptions(measure=False))
assert any("rewritten by frozen" in note for note in plan.notes), plan.notes
train(load_config(["model=frozen_hybrid", "data=frozen_counting", "optimizer=frozen_sgd", "trainer.max_steps=2",
                   "trainer.seq_len=8", "trainer.batch_size=2", "trainer.accelerator=cpu", "trainer.progress_bar=false",
                   "compiler.measure=false", "run_dir=run"]))
"""


def run(script: str, folder: Path) -> str:
    """What it prints, in a process that has the frozen plugin installed."""
    path = os.pathsep.join([str(FROZEN), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_it_is_what_it_was() -> None:
    digest = hashlib.sha256()
    for path in sorted(FROZEN.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path.relative_to(FROZEN)}\n".encode() + path.read_bytes())
    assert digest.hexdigest() == DIGEST, (
        "a frozen plugin is never edited: mend what broke it, or raise the major version"
    )


def test_everything_that_it_declares_is_taken(tmp_path: Path) -> None:
    assert json.loads(run(LOAD, tmp_path)) == {
        "problems": [],
        "frozen": [
            ["frozen_mix"], ["frozen_scale"], ["frozen_scale/reference", "frozen_scale/scaled"], ["frozen"],
            ["frozen_pass"], ["frozen_arch"], ["('data', 'frozen_counting')", "('optimizer', 'frozen_sgd')"],
        ],
        "kernel": True,
        "layout": "frozen_arch",
        "schedule": ["frozen_mix", "softmax_attention"],
    }  # fmt: skip


@pytest.mark.slow
def test_it_trains_and_compiles(tmp_path: Path) -> None:
    run(USE, tmp_path)
    assert "frozen_scale" in (tmp_path / "run" / "plan.json").read_text()
