"""A run that takes a second: what the tests of training start from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from child_process import Child, StartProcess, children
from plugin_site import Site

from subquad.schema import (
    ChannelMixerConfig,
    CheckpointConfig,
    CompilerConfig,
    ModelConfig,
    RunConfig,
    TrainerConfig,
)

TinyRun = Callable[..., RunConfig]

JOB = """
import json, sys
from subquad.component_config import typed_config
from subquad.schema import RunConfig
from subquad.training.fit import train

if __name__ == "__main__":
    train(typed_config(RunConfig, json.load(open(sys.argv[1])), "job"))
"""


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that a model of a thousand parameters learns something about in ten steps."""
    path = tmp_path_factory.mktemp("tiny-corpus") / "corpus.txt"
    words = "the quick brown fox jumps over the lazy dog and the cat sat on the mat while it rained".split()  # noqa: SIM905
    sentences = [" ".join(words[(7 * i + j * j) % len(words)] for j in range(4 + i % 9)) for i in range(600)]
    path.write_text("\n\n".join(sentences) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tiny_run(tiny_corpus: Path, tmp_path: Path) -> TinyRun:
    """Builds the configuration of a small run: `tiny_run("folder", max_steps=4, run={"seed": 1})`."""

    def config(
        run_dir: str, *, every: int = 4, keep: int = 2, run: dict[str, Any] | None = None, **trainer: Any
    ) -> RunConfig:
        settings = {
            "max_steps": 12, "batch_size": 2, "seq_len": 32, "validate_every_n_steps": 6, "validation_batches": 2,
            "log_every_n_steps": 3, "learning_rate_warmup_steps": 3, "accelerator": "cpu", "progress_bar": False,
        } | trainer  # fmt: skip
        values: dict[str, Any] = {
            "model": ModelConfig(
                name="tiny",
                d_model=32,
                num_layers=2,
                mixers={"softmax_attention": {"mixer": "softmax_attention", "num_heads": 2}},
                channel_mixer=ChannelMixerConfig(d_hidden=64),
            ),
            "data": {"name": "text_files", "files": [str(tiny_corpus)]},
            "trainer": TrainerConfig(**settings),
            "checkpoint": CheckpointConfig(every_n_steps=every, keep=keep),
            "compiler": CompilerConfig(measure=False),
            "optimizer": {"name": "adamw", "lr": 3e-3},
            "run_dir": str(tmp_path / run_dir),
        }
        return RunConfig(**values | (run or {}))

    return config


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as ranks and killed processes have: sums over threads differ in the last bit, and a plan names them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def start_process() -> Iterator[StartProcess]:
    with children() as start:
        yield start


@pytest.fixture
def start_run(tmp_path: Path, start_process: StartProcess) -> Callable[[RunConfig], Child]:
    """Starts a run in a process of its own, with one thread."""

    def start(config: RunConfig) -> Child:
        script, job = tmp_path / "job.py", tmp_path / "job.json"
        script.write_text(JOB, encoding="utf-8")
        job.write_text(json.dumps(asdict(config)), encoding="utf-8")
        return start_process([sys.executable, str(script), str(job)])

    return start


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A folder on sys.path where a test installs plugins; what they imported is forgotten afterwards."""
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(path)
    yield Site(path)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(path)):
            del sys.modules[name]
