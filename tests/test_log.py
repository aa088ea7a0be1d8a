"""One setting, `log_level`, says how much a run tells; results and errors are told at any level."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from subquad.__main__ import main
from subquad.log import at_level, caution, detail, say, says
from subquad.schema import LOG_LEVELS, RunConfig
from subquad.training.fit import train

TinyRun = Callable[..., RunConfig]


@pytest.mark.parametrize(("level", "told"), [("debug", "dic"), ("info", "ic"), ("warning", "c"), ("error", "")])
def test_a_level_lets_through_what_is_of_it_or_above(level: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    lightning = logging.getLogger("lightning.pytorch")
    before = lightning.level
    with at_level(level):
        detail("d"), say("i"), caution("c")
        assert [name for name in LOG_LEVELS if says(name)] == list(LOG_LEVELS[LOG_LEVELS.index(level) :])
        assert lightning.isEnabledFor(logging.INFO) is (level == "debug")
    assert capsys.readouterr().err.split() == list(told)
    assert lightning.level == before
    say("i")
    assert capsys.readouterr().err == "i\n", "the level before is back"


def test_warnings_are_shown_up_to_the_level_warning() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for level in LOG_LEVELS:
            with at_level(level):
                warnings.warn(level, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["debug", "info", "warning"]


def test_a_run_says_as_much_as_it_was_asked_to(tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for level in ("debug", "info", "warning"):
        result = train(tiny_run(level, max_steps=4, progress_bar=True, run={"log_level": level, "calibrate": "never"}))
        shown = capsys.readouterr()
        assert shown.out == f"{result}\n", "the last line is a result"
        said[level] = shown.err
    assert "checkpoint of step 4 written" in said["debug"]
    assert "checkpoint of step" not in said["info"]
    for level in ("debug", "info"):
        assert "step      4" in said[level]
    assert said["warning"] == ""


def test_a_resumed_run_may_say_more(tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run("more", max_steps=2, run={"log_level": "error"})
    train(config)
    capsys.readouterr()
    train(tiny_run("more", max_steps=4, run={"log_level": "debug", "resume": config.run_dir}))
    assert "checkpoint of step 4 written" in capsys.readouterr().err


def test_an_unknown_level_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "log_level=debgu", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "did you mean 'debug'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
