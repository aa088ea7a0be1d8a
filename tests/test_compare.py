"""Runs side by side: what the files of their folders say, drawn and in words, and which are missing."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_html_report import Page

from subquad.__main__ import main
from subquad.commands.compare import compare_config
from subquad.compiler.report import seconds_text
from subquad.errors import ConfigError
from subquad.model.build import build_model
from subquad.schema import RunConfig
from subquad.training.compare import Comparison, compare
from subquad.training.compare_page import curves, page
from subquad.training.fit import train
from subquad.training.metrics import read_metrics


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


@pytest.fixture
def runs(folders: Path, tiny_run: Callable[..., RunConfig]) -> tuple[str, str]:
    """Two runs that differ in their learning rate and their tokens a step; trained once, copied for no test."""
    a, b = folders / "a", folders / "b"
    if not b.exists():
        train(tiny_run(str(a), max_steps=6, validate_every_n_steps=3))
        train(
            tiny_run(str(b), max_steps=6, batch_size=3, accumulate=2, run={"optimizer": {"name": "adamw", "lr": 1e-3}})
        )
    return str(a), str(b)


def row(found: Comparison, label: str) -> list[str]:
    return list(dict(found.figures)[label])


def test_figures_are_those_of_the_folders(runs: tuple[str, str]) -> None:
    found = compare(runs)
    assert [run.name for run in found.runs] == ["a", "b"]
    assert found.gaps == []
    for index, (path, batch) in enumerate(zip(runs, (2, 6))):
        rows = read_metrics(Path(path) / "metrics.csv")
        assert row(found, "steps")[index] == "6"
        assert row(found, "tokens")[index] == f"{6 * batch * 32:,}"
        assert row(found, "validation loss, last (nats per token)")[index] == f"{rows[-1]['val/loss']:.4f}"
        measured = json.loads((Path(path) / "prediction.json").read_text())["measured"]["seconds"]
        assert row(found, "a step, measured")[index] == seconds_text(measured)
        count = sum(parameter.numel() for parameter in build_model(found.runs[index].config.model).parameters())
        assert row(found, "parameters")[index] == f"{count:,}"
    assert found.runs[1].curve("train/loss")[-1][0] == 6 * 6 * 32, "over tokens, not steps"


def test_only_what_differs_is_listed_of_the_configurations(runs: tuple[str, str]) -> None:
    assert dict(compare(runs).config) == {
        "optimizer.lr": ["0.003", "0.001"],
        "trainer.batch_size": ["2", "3"],
        "trainer.accumulate": ["1", "2"],
        "trainer.validate_every_n_steps": ["3", "6"],
    }


def test_plans_are_compared_with_the_first(runs: tuple[str, str]) -> None:
    assert any("tokens_shape" in line for line in compare(runs).plans["b"])


def test_what_is_missing_is_named(runs: tuple[str, str], tmp_path: Path) -> None:
    shutil.copytree(runs[1], tmp_path / "b")
    (tmp_path / "b" / "plan.json").write_text("{")
    (tmp_path / "b" / "metrics.csv").unlink()
    (tmp_path / "b" / "prediction.json").unlink()
    found = compare([runs[0], str(tmp_path / "b")])
    assert found.gaps == [
        "b: metrics.csv is missing", "b: plan.json cannot be read", "b: prediction.json is missing",
    ]  # fmt: skip
    assert row(found, "steps") == ["6", "-"]
    assert found.plans == {}
    assert "prediction.json is missing" in page(found)


def test_a_run_that_diverged_is_drawn_up_to_there(runs: tuple[str, str], tmp_path: Path) -> None:
    shutil.copytree(runs[1], tmp_path / "b")
    metrics = tmp_path / "b" / "metrics.csv"
    head, first, *_ = metrics.read_text().splitlines()
    loss = first.split(",")[1]
    metrics.write_text("\n".join([head, first, first.replace("1,", "2,", 1).replace(loss, "nan"), ""]))
    found = compare([runs[0], str(tmp_path / "b")])
    assert found.runs[1].curve("train/loss") == [(192, float(loss))]
    assert row(found, "training loss, last (nats per token)")[1] == "nan"
    assert "nan" not in "".join(value for _, attributes in Page(page(found)).found for value in attributes.values())


def test_runs_of_one_name_are_told_apart_by_their_folders(runs: tuple[str, str], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "other" / "a")
    found = compare([runs[0], str(tmp_path / "other" / "a")])
    assert [run.name for run in found.runs] == [f"{Path(runs[0]).parent.name}/a", "other/a"]
    assert found.config == []
    assert found.plans == {"other/a": []}


def test_the_page_stands_alone_and_draws_every_curve(runs: tuple[str, str]) -> None:
    found = compare(runs)
    text = page(found)
    elements = Page(text).found
    assert {"svg", "table"} <= {name for name, _ in elements} and not {"script", "link", "img"} & {
        name for name, _ in elements
    }
    lines = [attributes for name, attributes in elements if name == "polyline"]
    drawn = [sum(bool(run.curve(column)) for run in found.runs) for column in
             ("val/loss", "val/bits_per_byte", "train/loss", "tokens_per_s", "gradient_norm")]  # fmt: skip
    assert len(lines) == sum(drawn) == 10
    assert "optimizer.lr" in text
    assert "http" not in text.replace("http://www.w3.org", "")


def test_points_are_drawn_where_they_lie() -> None:
    text = curves({"a": [(0, 1), (10, 3)], "b": [(5, 2)]}, {"a": "red", "b": "blue"}, "loss")
    circles = [attributes for name, attributes in Page(text).found if name == "circle"]
    (x0, y0), (x1, y1), (xm, ym) = ((float(c["cx"]), float(c["cy"])) for c in circles)
    assert (xm, ym) == pytest.approx(((x0 + x1) / 2, (y0 + y1) / 2), abs=0.02)
    assert x0 < x1 and y0 > y1, "larger values stand higher"
    for value in (0.0, 5.0, -2.0):  # a flat line has room around it
        flat = curves({"a": [(0, value), (1, value)]}, {"a": "red"}, "loss")
        assert all(math.isfinite(float(c["cy"])) for name, c in Page(flat).found if name == "circle")


def test_the_command_prints_tables_and_writes_the_page(
    runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", f"runs=[{runs[0]},{runs[1]}]", "html=page.html"]) == 0
    shown = capsys.readouterr().out
    assert "tokens per second, median" in shown
    assert "optimizer.lr" in shown
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "two or more"),
        (["runs=[a]"], "two or more"),
        (["runs=[{a: b}, c]"], "no list of folders"),
        (["runs=[nowhere,neither]"], "runs=nowhere"),
        (["runs=[a,a]"], "named twice"),
        (["html=x", "rnus=[a]"], "did you mean 'runs'"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *arguments]) == 2
    shown = capsys.readouterr().err
    assert expected in shown
    assert len(shown.splitlines()) == 3


def test_runs_are_a_list_with_or_without_brackets() -> None:
    assert compare_config(["runs=[a, b]", "html=null"]).runs == compare_config(["runs=a,b"]).runs == ["a", "b"]
    assert compare_config(["runs=a,b", "html=null"]).html is None
    with pytest.raises(ConfigError):
        compare_config(["runs=[a"])


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["compare", "A", "B"], "write KEY=VALUE, such as runs=A; the keys are runs, html"),
        (["compare", "html"], "write html=VALUE; the keys are"),
        (["generate", "--run"], "such as run=run; the keys are run, prompt"),
    ],
)
def test_a_word_that_is_no_key_is_answered_with_one(
    arguments: list[str], written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert written in capsys.readouterr().err
