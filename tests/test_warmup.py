"""A warm-up makes the plan of the run it stands for, and compiles all kernels at once before it checks them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from subquad.__main__ import main
from subquad.commands.warmup import as_text
from subquad.compiler.plan import Plan
from subquad.errors import ConfigError, RunError
from subquad.schema import RunConfig
from subquad.training.compilation import target_of
from subquad.training.fit import train
from subquad.training.warmup import one_step_s, warm_up
from subquad_kernels.builtin import CATALOGUE
from subquad_kernels.catalogue import Kernel

TinyRun = Callable[..., RunConfig]
FLASH = CATALOGUE.kernel("softmax_attention", "sdpa_flash")


class Together:
    """Flash attention whose first two calls wait for each other, and which remembers how often it was called."""

    def __init__(self) -> None:
        self.calls = 0
        self._meeting = threading.Barrier(2, timeout=60)

    def forward(self, **arguments: Any) -> Any:
        return self._meet(FLASH.torch_half.forward, **arguments)

    def backward(self, *arguments: Any) -> Any:
        return self._meet(FLASH.torch_half.backward, *arguments)

    def _meet(self, function: Any, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        if threading.current_thread() is not threading.main_thread():
            self._meeting.wait()
        return function(*arguments, **named)


def add_rival(monkeypatch: pytest.MonkeyPatch, name: str, half: object) -> Kernel:
    """A rival that compiles when it is first called; `triton` in a requirement is what says so."""
    kernel = replace(FLASH, name=name, requires=("triton",), origin="a test")
    kernel.__dict__.update(torch_half=half, missing=lambda: None)
    monkeypatch.setitem(CATALOGUE._kernels["softmax_attention"], name, kernel)
    return kernel


def test_the_plan_is_that_of_the_run(tiny_run: TinyRun) -> None:
    warm = warm_up(tiny_run("unused"))
    result = train(tiny_run("run", max_steps=1))
    assert Plan.load(result.run_dir / "plan.json").choices == warm.plan.choices


def test_kernels_are_compiled_at_once_also_where_their_checks_are_known(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = Together()
    add_rival(monkeypatch, "meets", half)
    for _ in range(2):
        warm = warm_up(tiny_run("unused"))
        assert [(call.kernel, call.part, call.failure) for call in warm.first_calls] == [
            ("softmax_attention/meets", "forward", None),
            ("softmax_attention/meets", "backward", None),
        ]
    assert half.calls == 2 * 2 + 2, "the second warm-up checks nothing"


def test_a_run_compiles_ahead_what_it_has_not_checked_before_and_once(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_rival(monkeypatch, "first", Together())
    train(tiny_run("a", max_steps=1))
    assert "compiling softmax_attention/first on" in capsys.readouterr().err
    for name in ("second", "third"):
        add_rival(monkeypatch, name, Together())
    train(tiny_run("b", max_steps=1))
    assert "compiling softmax_attention/second, softmax_attention/third on" in capsys.readouterr().err
    train(tiny_run("c", max_steps=1))
    assert "compiling" not in capsys.readouterr().err


def test_what_fails_is_named(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def forward(**arguments: Any) -> Any:
            raise RuntimeError("no such instruction")

        backward = staticmethod(FLASH.torch_half.backward)

    add_rival(monkeypatch, "broken", Broken)
    shown = as_text(warm_up(tiny_run("unused")))
    assert "softmax_attention/broken  forward" in shown
    expected = "left out softmax_attention/broken: failed its self-check: RuntimeError: no such instruction"
    assert expected in shown.splitlines()


def test_a_step_of_the_model_runs_the_plan(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA it follows the checks; here it is asked for."""
    config = tiny_run("unused")
    plan, called = warm_up(config).plan, []
    forward = FLASH.torch_half.forward
    monkeypatch.setattr(
        FLASH.torch_half, "forward", lambda **arguments: called.append(arguments["q"].shape[1]) or forward(**arguments)
    )
    assert one_step_s(config, plan, target_of(config)) > 0
    assert called == [config.trainer.seq_len] * config.model.num_layers


@pytest.mark.gpu
def test_a_step_of_the_model_runs_where_the_kernels_do(tiny_run: TinyRun) -> None:
    """The model's parameters lie on the device, and so do its tokens."""
    warm = warm_up(tiny_run("unused", accelerator="cuda"))
    assert warm.step_s is not None
    assert warm.step_s > 0


def test_a_step_that_fails_says_how_to_go_on(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run("unused")
    plan = warm_up(config).plan

    def breaks(**arguments: Any) -> Any:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(FLASH.torch_half, "forward", breaks)
    with pytest.raises(RunError, match="a step over 32 tokens failed: RuntimeError: out of shared memory") as caught:
        one_step_s(config, plan, target_of(config))
    assert "deny=[KERNEL]" in caught.value.mend


def test_a_run_folder_is_refused(tiny_run: TinyRun) -> None:
    with pytest.raises(ConfigError, match="reads no run folders"):
        warm_up(tiny_run("unused", run={"resume": "somewhere"}))


def test_the_command_composes_as_train_does_and_writes_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model=scout_mamba", "model.num_layers=2", "trainer.seq_len=32", "compiler.measure=false"]
    assert main(["warmup", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "is ready in" in shown
    assert "causal_conv/" in shown
    assert "one step" not in shown, "nothing is compiled on the CPU"
    assert list(Path.cwd().iterdir()) == []


def test_errors_take_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "model=scout_mmba"]) == 2
    assert "did you mean 'scout_mamba'?" in capsys.readouterr().err
    assert main(["warmup", "target=h100"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
