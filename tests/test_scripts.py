"""Every script beside the packages says what it is for when it is asked, and refuses what it does not take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_scripts import Forks
from tool import tool

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    path
    for folder in ("tools", "kernels/benchmarks", "plugins/benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8") or path.name == "check_python.py"
]

IMPORTED = ("subquad.training.fit", "subquad.training.optimizers", "subquad.training.evaluation.evaluate")
"""What most of them import, Lightning among it, which takes seconds."""


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that all of them run in."""
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def forks(empty: Path) -> Iterator[Forks]:
    forks = Forks(*IMPORTED)
    yield forks
    forks.close()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_help_is_the_docstring_and_nothing_else_happens(script: Path, forks: Forks, empty: Path) -> None:
    printed = forks.run(script, "--help")
    first = script.read_text(encoding="utf-8").removeprefix('"""').splitlines()[0].removesuffix('"""')
    assert first in printed
    assert not list(empty.iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_unknown_words_are_refused_by_a_sentence(script: Path, forks: Forks, empty: Path) -> None:
    with pytest.raises(AssertionError, match=r"exit code [12]: ") as refused:
        forks.run(script, "OUT.json", "--nonsense")
    assert "--nonsense" in str(refused.value) or "OUT.json" in str(refused.value)
    assert "Traceback" not in str(refused.value)
    assert not list(empty.iterdir())


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("quality_run", ["OUT.json", "nonsense=1"], "there is no key 'nonsense'; there are study"),
        ("quality_run", ["OUT.json", "study=nonsense"], "no study is called 'nonsense'"),
        ("quality_run", [], "RECORD.jsonl is missing"),
        ("quality_table", [], "RECORD.jsonl is missing"),
        ("mixer_table", ["judge", "mambo"], "no mixer is called 'mambo'"),
        ("mixer_table", ["wriet"], "'wriet' is not understood"),
        ("docs_pages", ["nonsense"], "there is no page 'nonsense'"),
        ("licences", ["nonsense"], "'nonsense' is not understood"),
        ("check_foreign", ["OUT.json", "d=1"], "there is no key 'd'; there are b, t, width"),
        ("check_prediction", ["OUT.json", "cells=nonsense"], "no cell is called 'nonsense'"),
        ("check_prediction", ["OUT.json", "trainer.nonsense=1"], "trainer.nonsense"),
        ("check_ranks", ["OUT.json", "nonsense"], "no part is called 'nonsense'"),
        ("check_ranks", ["OUT.json", "faults", "trainer.nonsense=1"], "trainer.nonsense"),
        ("check_budgets", ["OUT.json", "trainer.nonsense=1"], "trainer.nonsense"),
        ("check_auto", ["OUT.json", "trainer.nonsense=1"], "trainer.nonsense"),
        ("longest_context", ["OUT.json", "trainer.nonsense=1"], "trainer.nonsense"),
        ("profile_step", ["OUT.json", "trainer.nonsense=1"], "trainer.nonsense"),
        ("measure_token_cache", ["megabyte=1"], "there is no key 'megabyte'; there are megabytes"),
    ],
)
def test_keys_and_names_that_do_not_exist_are_named(
    name: str, arguments: list[str], said: str, forks: Forks, empty: Path
) -> None:
    with pytest.raises(AssertionError, match="exit code 2: ") as refused:
        forks.run(ROOT / "tools" / f"{name}.py", *arguments)
    assert said in str(refused.value)
    assert "Traceback" not in str(refused.value)
    assert not list(empty.iterdir())


def test_plain_words_and_keys_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    script = tool("command_line")
    with pytest.raises(SystemExit) as done:
        script.words_of("What it does.", ["OUT.json", "-h"], "OUT")
    assert (done.value.code, capsys.readouterr().out) == (0, "What it does.\n")
    words = ["OUT.json", "a=1", "more", "~b"]
    assert script.words_of("", words, "OUT", more="MORE", keys=script.OF_TRAIN) == (["OUT.json", "more"], ["a=1", "~b"])
