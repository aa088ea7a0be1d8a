"""A device that the cost model never saw is offered a calibration, or calibrated before the run, as the run asks."""

from __future__ import annotations

import getpass
import math
import random
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from subquad.compiler import calibrate as calibrating
from subquad.compiler import know_device as knowing
from subquad.compiler.estimators import estimator_for, own_fit
from subquad.compiler.explain import explained_plan
from subquad.compiler.know_device import is_known, know_device
from subquad.compiler.options import CompileOptions
from subquad.compiler.profile import profile_path
from subquad.compiler.target import Target, resolve_target
from subquad.compiler.workload import cost_row
from subquad.errors import ConfigError
from subquad.registry import load_registry
from subquad.schema import CompilerConfig, ModelConfig, RunConfig, TrainerConfig
from subquad_cost_model import CalibratedEstimator, CostRow, TimedRow, error_factor, load_fit, lower_bound_s
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.workload import Workload

load_registry()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "cache"))
    knowing._offer.cache_clear()
    yield
    knowing._offer.cache_clear()


@pytest.fixture
def planted() -> Target:
    """A CPU that nobody has seen, but for its name this one."""
    here = resolve_target("cpu")
    return replace(here, device=replace(here.device, name="planted CPU"))


def row_of(kernel: str, phase: str, b: int, t: int) -> CostRow:
    shape = {"b": b, "t": t, "h": 4, "h_kv": 4, "k": 32}
    workload = Workload(operator="rotary", shape=shape, dtype="float32", phase=phase, options={"theta": 1e4})  # type: ignore[arg-type]
    return cost_row(CATALOGUE.operator("rotary"), CATALOGUE.kernel("rotary", kernel), workload)


def truth_s(row: CostRow, target: Target) -> float:
    return 2e-4 + 37 * lower_bound_s(row, target.device)


class PlantedRun:
    """Stands in for the run that measures: rows of a device whose truth is an overhead and a factor."""

    runs = 0

    def __init__(self, target: Target, folder: Path, plan: Any, *, budget_s: float, source: str) -> None:
        self.rows: list[TimedRow] = []
        self._target, self.budget_s = target, budget_s

    def run(self) -> Sequence[TimedRow]:
        type(self).runs += 1
        draw = random.Random(0)
        for phase in ("forward", "backward"):
            for _ in range(30):
                row = row_of("tables", phase, draw.randint(1, 8), draw.randint(16, 4096))
                seconds = truth_s(row, self._target) * math.exp(draw.gauss(0, 0.01))
                timing = {"low_s": seconds, "median_s": seconds, "high_s": seconds}
                self.rows.append(TimedRow(row=row, device=self._target.device, status="ok", **timing))
        return self.rows


def config(calibrate: str) -> RunConfig:
    return RunConfig(calibrate=calibrate, compiler=CompilerConfig(calibrate_budget_s=7.0))


def test_an_unknown_device_is_offered_a_calibration_in_one_line_once(
    planted: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    know_device(planted, config("offer"))
    know_device(planted, config("offer"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("planted CPU is new to the cost model: `python -m subquad calibrate budget_s=7` corrects it")
    know_device(planted, config("never"))
    assert capsys.readouterr().err == ""


def test_auto_calibrates_before_the_run_and_not_again(
    planted: Target, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrating, "SampleRun", PlantedRun)
    monkeypatch.setattr(PlantedRun, "runs", 0)
    know_device(planted, config("auto"))
    said = capsys.readouterr().err
    assert "planted CPU is new to the cost model: calibrating (calibrate=auto)" in said and "after" in said
    know_device(planted, config("auto"))
    assert PlantedRun.runs == 1
    assert capsys.readouterr().err == ""

    estimator = estimator_for(planted, CompileOptions(estimator="learned"))
    assert isinstance(estimator, CalibratedEstimator)
    new = [row_of("tables", "backward", 3, t) for t in (100, 1000, 3000)]
    estimates = estimator.predict(new, planted.device)
    assert error_factor([e.seconds for e in estimates], [truth_s(row, planted) for row in new]) < 1.05


def test_what_is_kept_of_a_calibration_names_no_host(planted: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "SampleRun", PlantedRun)
    know_device(planted, config("auto"))
    path = profile_path(planted.device)
    assert path is not None
    kept = path.read_text()
    assert "planted CPU" in kept
    names = {socket.gethostname(), str(Path.home()), str(path.parent)}
    for name in names - {""}:
        assert name not in kept and name not in path.name
    assert f'"{getpass.getuser()}"' not in kept


def test_a_device_of_the_shipped_fit_another_estimator_and_another_machine_are_not_asked_about(planted: Target) -> None:
    folder = own_fit("cuda")
    assert folder is not None
    (name, *_) = next(iter(load_fit(folder).heads.values())).devices
    h100 = resolve_target("h100")
    fitted = Target(replace(h100.device, name=name), h100.limits, "cuda")
    assert is_known(fitted, CompileOptions())
    assert not is_known(replace(fitted, device=replace(h100.device, name="NVIDIA New")), CompileOptions())
    assert is_known(h100, CompileOptions()), "it is not here"
    assert not is_known(planted, CompileOptions())
    assert is_known(planted, CompileOptions(estimator="roofline"))
    assert is_known(planted, CompileOptions(estimator="learned", fit="my_fit"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (RunConfig(calibrate="atuo"), "did you mean 'auto'"),
        (RunConfig(compiler=CompilerConfig(calibrate_budget_s=0)), "a number above 0"),
    ],
)
def test_mistakes_are_named(planted: Target, wrong: RunConfig, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        know_device(planted, wrong)
    assert said in str(raised.value)


def test_explain_offers_what_a_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    model = ModelConfig(
        d_model=16,
        num_layers=1,
        vocab_size=16,
        context_len=16,
        schedule=["softmax_attention"],
        mixers={"softmax_attention": {"mixer": "softmax_attention", "num_heads": 2}},
    )
    trainer, compiler = TrainerConfig(batch_size=1, seq_len=16), CompilerConfig(measure=False)
    small = RunConfig(model=model, target="cpu", trainer=trainer, compiler=compiler)
    explained_plan(small)
    assert "is new to the cost model" in capsys.readouterr().err
    explained_plan(replace(small, target="h100"))
    assert "is new to the cost model" not in capsys.readouterr().err
