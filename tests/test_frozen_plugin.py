"""Plugins that were written for earlier versions of the contract still load, train and compile."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DIGESTS = {
    "frozen_1_3": "7eabbfb770fa8414deb43ddb46f935a0e124a45454f9f64bf0598c925a720402",
    "frozen_1_4": "fa311a9b241051beeed3761c734a6b3d3510ba80fef1c414b1d45742d2b91511",
}

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


LOAD_SHARING = """
import json
import torch
from subquad import build_model, load_config
from subquad.registry import load_registry
from subquad.testing.mixer_suite import MixerSuite
from subquad_kernels.catalogue import CATALOGUE

registry = load_registry()
hooks = [registry.mixers, registry.kernels, registry.imports]
frozen = [[str(key) for key, spec in hook.items() if registry.origins[spec].name == "frozen_1_4"] for hook in hooks]
config = load_config(["model=frozen_1_4_sharing"]).model
config.vocab_size, config.context_len = 32, 16
model = build_model(config).double()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    tokens = torch.arange(11)[None] * 7 % 32
    whole = model(tokens)
    y, carry = model.prefill(tokens[:, :6], model.empty_carry(1))
    outputs = [y]
    for t in range(6, 11):
        y_t, carry = model.decode(tokens[:, t], carry)
        outputs.append(y_t[:, None])
off = float((torch.cat(outputs, 1) - whole).abs().max() / whole.abs().max())
places = [[sorted(block.sharing.publishes), sorted(block.sharing.reads)] for block in model.blocks]
print(json.dumps({"problems": [str(problem) for problem in registry.problems], "frozen": frozen, "places": places,
                  "decodes": off < 1e-11}))
"""
JUDGE = """
from subquad.__main__ import main

assert main(["plugins", "check", "frozen-1-4"]) == 0
"""
USE_SHARING = """
from subquad import load_config, train

train(load_config(["model=frozen_1_4_sharing", "trainer.max_steps=2", "trainer.seq_len=64", "trainer.batch_size=2",
                   "trainer.accelerator=cpu", "trainer.progress_bar=false", "compiler.measure=false", "data=synthetic",
                   "run_dir=run"]))
"""


def run(script: str, folder: Path, plugin: str = "frozen_1_3") -> str:
    """What it prints, in a process that has a frozen plugin installed."""
    path = os.pathsep.join([str(HERE / plugin), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("plugin", DIGESTS)
def test_it_is_what_it_was(plugin: str) -> None:
    digest = hashlib.sha256()
    for path in sorted((HERE / plugin).rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path.relative_to(HERE / plugin)}\n".encode() + path.read_bytes())
    assert digest.hexdigest() == DIGESTS[plugin], (
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


def test_layers_of_contract_1_4_share_what_they_shared(tmp_path: Path) -> None:
    told = ["frozen.keys", "frozen.tokens", "frozen.values"]
    assert json.loads(run(LOAD_SHARING, tmp_path, "frozen_1_4")) == {
        "problems": [],
        "frozen": [
            ["frozen_teller", "frozen_listener", "frozen_drift"], ["softmax_attention/frozen_exact"],
            ["frozen_1_4_arch"],
        ],
        "places": [[told, []], [[], []], [[], told], [[], told]],
        "decodes": True,
    }  # fmt: skip


@pytest.mark.slow
def test_they_keep_the_promises_of_the_suite_and_train(tmp_path: Path) -> None:
    run(JUDGE, tmp_path, "frozen_1_4")
    run(USE_SHARING, tmp_path, "frozen_1_4")
    assert "frozen_listener" in (tmp_path / "run" / "plan.json").read_text()
