"""report.html is the one report of a run: what it reached, drawn, beside its plan, with what evaluation found later."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_html_report import Page

from subquad.__main__ import main
from subquad.schema import RunConfig
from subquad.training import fit
from subquad.training.compare_page import MOST_DOTS, MOST_POINTS, curves, thinned
from subquad.training.fit import train
from subquad.training.metrics import read_metrics
from subquad.training.run_folder import RunFolder
from subquad.training.run_page import write_run_section

TinyRun = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def folder(trained: Path, tmp_path: Path, tiny_run: TinyRun) -> RunFolder:
    """A copy of a run of six steps, validated twice."""
    if not trained.exists():
        train(tiny_run(str(trained), max_steps=6, validate_every_n_steps=3, log_every_n_steps=1))
    return RunFolder(shutil.copytree(trained, tmp_path / "run"))


def headings(page: str) -> list[str]:
    return re.findall(r"<h[12]>(.*?)</h[12]>", page)


def test_the_page_shows_what_the_run_reached_and_its_plan(folder: RunFolder) -> None:
    page, rows = folder.page.read_text(encoding="utf-8"), read_metrics(folder.metrics)
    for heading in (
        "run", "loss, nats per token", "validation, bits per byte", "tokens per second", "learning rate",
        "gradient norm, before clipping", "Environment", "Roofline", "The plan as text",
    ):  # fmt: skip
        assert heading in headings(page)
    assert f"<td>{rows[-1]['val/loss']:.4f}</td>" in page
    for column in ("train/loss", "val/loss", "gradient_norm/softmax_attention"):
        for row in rows:
            if column in row:
                assert f"{row[column]:.6g} after {row['step']:,.0f} steps" in page, column
    elements = Page(page).found
    assert not {"script", "link", "img"} & {name for name, _ in elements}
    assert "http" not in page.replace("http://www.w3.org", "")


def test_what_evaluate_found_joins_the_page_once(folder: RunFolder) -> None:
    for _ in range(2):
        assert main(["evaluate", f"run={folder.path}", "samples=2", "lengths=[8,16]"]) == 0
    page = folder.page.read_text(encoding="utf-8")
    assert headings(page).count("Evaluation") == headings(page).count("run") == page.count('id="run"') == 1
    for picture in ("evaluation-length.svg", "evaluation-position.svg"):
        assert (folder.path / picture).read_text(encoding="utf-8") in page
    assert "Roofline" in headings(page)


def test_an_interrupted_run_has_its_figures_on_the_page_and_so_while_it_goes_on(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run("stopped", max_steps=6, log_every_n_steps=1)
    fitted = fit._fit_without_failing_kernels

    def interrupted(*arguments: object) -> object:
        fitted(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "_fit_without_failing_kernels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    folder = RunFolder(Path(config.run_dir or "").absolute())
    assert "loss, nats per token" in headings(folder.page.read_text(encoding="utf-8"))

    shown: list[str] = []

    def looking(*arguments: object) -> object:
        shown.extend(headings(folder.page.read_text(encoding="utf-8")))
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "_fit_without_failing_kernels", looking)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run("stopped", max_steps=6, log_every_n_steps=1, run={"resume": str(folder.path)}))
    assert "loss, nats per token" in shown


def test_a_folder_without_the_page_is_left_alone(folder: RunFolder) -> None:
    folder.page.unlink()
    write_run_section(folder)
    assert not folder.page.exists()


def test_names_and_configurations_cannot_break_out_of_the_page(folder: RunFolder) -> None:
    odd = RunFolder(folder.path.rename(folder.path.with_name(r"<b>\1<section>")))
    write_run_section(odd)
    write_run_section(odd)
    page = odd.page.read_text(encoding="utf-8")
    assert headings(page)[0] == r"&lt;b&gt;\1&lt;section&gt;"
    assert page.count("</section>") == 1


def test_a_run_of_many_steps_makes_a_page_that_opens() -> None:
    line = [(float(step), 1.0 / (1 + step)) for step in range(100_000)]
    assert thinned(line, 3) == [line[0], line[50_000], line[-1]]
    assert thinned(line[:3], 3) == line[:3]
    text = curves({"a": line}, {"a": "red"}, "loss", over="steps")
    elements = Page(text).found
    assert sum(name == "circle" for name, _ in elements) == MOST_DOTS
    (points,) = [attributes["points"] for name, attributes in elements if name == "polyline"]
    assert len(points.split()) == MOST_POINTS
    assert len(text) < 200_000
