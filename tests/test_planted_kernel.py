"""A plugin's faulty kernel is never chosen, and doctor, explain and a run's report name it and say why."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from subquad.__main__ import main
from subquad.registry import load_registry
from subquad.schema import ChannelMixerConfig, ModelConfig, RunConfig
from subquad.training.fit import train
from subquad_kernels.catalogue import CATALOGUE

PLUGIN = """
from subquad import hookimpl
from subquad_kernels.catalogue import Kernel

@hookimpl
def subquad_provide_kernels():
    return [Kernel(operator="segment_attention", name="planted", implementation="planted_fault",
                   supports=lambda workload, limits: None, devices=frozenset({"cpu", "cuda"}), origin="planted")]
"""
FAULT = """
from subquad_kernels.segment_attention import compacted

forward = compacted.forward

def backward(arguments, outputs, gradients):
    found = compacted.backward(arguments, outputs, gradients)
    return found | {"k": found["k"] * 1.01}  # an error that no loss curve shows
"""
REASON = "d_k is off by"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution is installed whose kernel has one wrong gradient."""
    site = tmp_path / "site"
    metadata = site / "planted-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "planted_plugin.py").write_text(PLUGIN)
    (site / "planted_fault.py").write_text(FAULT)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[subquad]\nplanted = planted_plugin\n")
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    load_registry.cache_clear()
    yield
    load_registry.cache_clear()
    CATALOGUE._kernels["segment_attention"].pop("planted", None)
    for name in ("planted_plugin", "planted_fault"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("planted")
def test_doctor_fails_and_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "will not be chosen: segment_attention/planted\n" in shown
    assert REASON in shown


@pytest.mark.usefixtures("planted")
def test_explain_says_why_it_is_no_candidate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "model=scout_mamba", "compiler.measure=false", "target=cpu"]) == 0
    shown = capsys.readouterr().out
    assert f"planted: failed its self-check: {REASON}" in shown
    assert "* planted" not in shown


@pytest.mark.usefixtures("planted")
def test_the_report_of_a_run_names_it(tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    load_registry()
    mixers = {"segment_attention": {"mixer": "segment_attention", "num_heads": 2, "segment_len": 4}}
    model = ModelConfig(
        name="tiny", d_model=32, num_layers=2, schedule=["segment_attention"], mixers=mixers,
        channel_mixer=ChannelMixerConfig(d_hidden=64),
    )  # fmt: skip
    train(tiny_run("run", max_steps=2, run={"model": model}))
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"not chosen: segment_attention/planted failed its self-check: {REASON}" in report
