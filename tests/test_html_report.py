"""The page of a plan: its figures are the estimator's, its crossovers are where estimates cross, and it is alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from subquad.__main__ import main
from subquad.compiler.choice_map import Cell, ChoiceMap, choice_maps, in_words, node_rows
from subquad.compiler.explain import explain, explained_plan
from subquad.compiler.html_report import html_page, roofline_points, words
from subquad.compiler.options import CompileOptions
from subquad.compiler.plan import Plan
from subquad.compiler.svg import LogPlot
from subquad.compiler.target import Target, resolve_target
from subquad.errors import ConfigError
from subquad.schema import ChannelMixerConfig, CompilerConfig, ModelConfig, RunConfig, TrainerConfig
from subquad_cost_model import CostRow, Device, Estimate, RooflineEstimator
from subquad_kernels.catalogue import CATALOGUE

VOID = {"meta"}
ATTENTION = "softmax_attention"


class Page(HTMLParser):
    """The elements of a page; a tag that is not closed in its turn is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def all(self, tag: str, *attributes: str) -> list[dict[str, str]]:
        return [values for name, values in self.found if name == tag and all(key in values for key in attributes)]


def run_config(*schedule: str, target: str = "h100", packed: bool = False, **changes: Any) -> RunConfig:
    mixers: dict[str, Any] = {
        "mamba": {"mixer": "mamba", "state_dim": 4},
        ATTENTION: {"mixer": ATTENTION, "num_heads": 2},
    }
    return RunConfig(
        model=ModelConfig(
            d_model=128, num_layers=len(schedule), vocab_size=40, context_len=1024, schedule=list(schedule),
            mixers={key: mixers[key] for key in schedule}, channel_mixer=ChannelMixerConfig(d_hidden=64),
        ),
        data={"name": "python_source" if packed else "synthetic"},
        trainer=TrainerConfig(batch_size=4, seq_len=1024),
        compiler=CompilerConfig(estimator="roofline", measure=False),
        target=target,
        **changes,
    )  # fmt: skip


@dataclass(frozen=True)
class Straight:
    """Kernels that take a fixed time and a time per token of all sequences: they cross where that says."""

    costs: Mapping[str, tuple[float, float]]
    spread: float = 1.0
    name: str = "straight"

    def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
        found = []
        for row in rows:
            fixed_s, token_s = self.costs.get(row.kernel, (1.0, 1.0))
            seconds = fixed_s + token_s * row.shape["b"] * row.shape["t"]
            found.append(
                Estimate(seconds=seconds, low_s=seconds / self.spread, high_s=seconds * self.spread, peak_bytes=1,
                         source="model")
            )  # fmt: skip
        return found


def map_of(
    estimator: Any, config: RunConfig | None = None, options: CompileOptions | None = None
) -> tuple[ChoiceMap, Plan, Target]:
    config = config or run_config(ATTENTION)
    plan, target = explained_plan(config), resolve_target(config.target)
    maps = choice_maps(plan, target, options or CompileOptions(), estimator)
    return next(found for found in maps if found.operator == ATTENTION), plan, target


# --- choice maps ----------------------------------------------------------------------

CROSSING = {"sdpa_flash": (1e-5, 2e-8), "sdpa_efficient": (9e-5, 1e-8), "sdpa_cudnn": (1e-2, 5e-9)}
# flash = efficient at b t = 8000, efficient = cudnn at b t = 1,982,000


def test_the_fastest_kernel_of_every_cell_is_the_estimators() -> None:
    choices, _, _ = map_of(Straight(CROSSING, spread=1.001))
    assert {(b, t) for b in choices.batches for t in choices.lengths} == set(choices.cells)
    assert {128, 1024, 131072} <= set(choices.lengths)
    for (b, t), cell in choices.cells.items():
        truth = {kernel: 2 * (fixed_s + token_s * b * t) for kernel, (fixed_s, token_s) in CROSSING.items()}
        seconds = {figure.kernel: figure.seconds for figure in cell.figures if figure.kernel in truth}
        assert seconds == pytest.approx(truth)
        assert cell.fastest == min(truth, key=truth.__getitem__)
        assert list(cell.figures) == sorted(cell.figures, key=lambda figure: figure.seconds)
        best, second = sorted(truth.values())[:2]
        assert cell.sure == (best * 1.001 <= second / 1.001)


def test_a_crossover_lies_where_the_estimates_cross_and_is_said_in_words() -> None:
    choices, plan, _ = map_of(Straight(CROSSING))
    (only,) = choices.crossovers(4)
    assert (only.earlier, only.later, only.t_before, only.t_after) == ("sdpa_flash", "sdpa_efficient", 1024, 2048)
    assert only.t == pytest.approx(2000, rel=0.1)
    (late,) = choices.crossovers(64)  # the other one, at 125 tokens, is before the first length
    assert (late.earlier, late.later) == ("sdpa_efficient", "sdpa_cudnn")
    assert late.t == pytest.approx(1_982_000 / 64, rel=0.1)
    sentence = in_words(only, plan.target)
    assert sentence.startswith(f"On {plan.target} sdpa_efficient overtakes sdpa_flash at about t = ")
    assert "between 1,024 and 2,048 tokens at batch 4" in sentence
    assert words(choices, plan.target) == [sentence]


def test_a_kernel_that_cannot_run_further_is_replaced_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = CATALOGUE.kernel(ATTENTION, "sdpa_flash")

    def short(workload: Any, limits: Any) -> str | None:
        return "is for short ones" if workload.shape["t"] > 4096 else None

    monkeypatch.setitem(CATALOGUE._kernels[ATTENTION], flash.name, replace(flash, supports=short))
    choices, plan, _ = map_of(Straight({"sdpa_flash": (1e-6, 1e-9), "sdpa_cudnn": (1e-5, 2e-8)}))
    (taken,) = choices.crossovers(4)
    assert (taken.earlier, taken.later, taken.t_before, taken.t_after, taken.t) == (
        "sdpa_flash", "sdpa_cudnn", 4096, 8192, None
    )  # fmt: skip
    assert "takes over between 4,096 and 8,192 tokens" in words(choices, plan.target)[0]
    assert "sdpa_flash cannot run there: is for short ones" in words(choices, plan.target)[0]


def test_where_all_estimates_are_one_bound_the_default_stands_and_that_is_said() -> None:
    # The bound tells a kernel of dozens of launches from others.
    choices, plan, _ = map_of(RooflineEstimator(), options=CompileOptions(deny=("flex_attention",)))
    assert choices.kernels == ("sdpa_flash",)
    assert not any(cell.sure for cell in choices.cells.values() if len(cell.figures) > 1)
    assert words(choices, plan.target)[0].startswith("The estimator sees no difference between sdpa_flash and ")


def test_what_does_not_fit_into_memory_or_is_forbidden_is_no_candidate() -> None:
    choices, _, target = map_of(RooflineEstimator(), options=CompileOptions(deny=("sdpa_cudnn",)))
    largest = choices.cells[max(choices.batches), max(choices.lengths)]
    small = choices.cells[1, 128]
    assert small.declined["sdpa_cudnn"] == "forbidden by the recipe"
    assert small.fastest == "sdpa_flash"
    node = replace(choices.node, shape={**choices.node.shape, "b": 64, "t": 131072, "s": 131072})
    needed = max(row.bytes_moved + row.saved_bytes for row in node_rows(node, "sdpa_flash"))
    assert (largest.fastest is None) == (needed > target.device.memory_bytes)
    tight = Target(replace(target.device, memory_bytes=needed // 2), target.limits, None)
    (cells,) = [found.cells for found in choice_maps(explained_plan(run_config(ATTENTION)), tight, CompileOptions(),
                                                     RooflineEstimator()) if found.operator == ATTENTION]  # fmt: skip
    assert cells[64, 131072].fastest is None
    assert cells[64, 131072].declined["sdpa_flash"] == "does not fit into the device's memory"
    assert cells[1, 128].fastest == "sdpa_flash"


def test_packed_rows_keep_their_documents() -> None:
    config = run_config(ATTENTION, packed=True)
    asked: list[CostRow] = []

    class Noted(Straight):
        def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
            asked.extend(rows)
            return super().predict(rows, device)

    choices, _, _ = map_of(Noted(CROSSING), config)
    assert choices.node.shape["documents"] == 4
    shapes = {(row.shape["b"], row.shape["t"], row.shape["s"], row.shape["documents"]) for row in asked
              if row.operator == ATTENTION}  # fmt: skip
    assert shapes == {(1, b * t, b * t, b) for b in choices.batches for t in choices.lengths}


def test_an_operator_that_knows_no_such_length_is_declined_there(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = CATALOGUE.operator(ATTENTION)

    def work(workload: Any) -> Any:
        if workload.shape["t"] == 256:
            raise ValueError("not 256")
        return operator.work(workload)

    plan, target = explained_plan(run_config(ATTENTION)), resolve_target("h100")
    monkeypatch.setitem(CATALOGUE._operators, ATTENTION, replace(operator, work=work))
    maps = choice_maps(plan, target, CompileOptions(), RooflineEstimator())
    cells: dict[tuple[int, int], Cell] = dict(next(found for found in maps if found.operator == ATTENTION).cells)
    assert cells[1, 256].fastest is None
    assert cells[1, 256].declined["sdpa_flash"] == "ValueError: not 256"
    assert cells[1, 512].fastest == "sdpa_flash"


# --- the page -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> tuple[Page, str, Plan, Target]:
    config = run_config("mamba", ATTENTION, "mamba", ATTENTION)
    plan, target = explained_plan(config), resolve_target("h100")
    text = html_page(plan, target, choice_maps(plan, target, CompileOptions(), Straight(CROSSING, spread=1.5)))
    return Page(text), text, plan, target


def test_the_page_needs_nothing_from_elsewhere(page: tuple[Page, str, Plan, Target]) -> None:
    parsed, text, _, _ = page
    assert "://" not in text
    assert not re.search(r"url\(|@import|<script|<link|<img|<iframe", text)
    assert not [name for name, values in parsed.found if {"src", "href", "xlink:href"} & set(values)]
    assert len(parsed.all("svg")) == 1 + len(parsed.texts["h3"])


def test_the_roofline_shows_every_kernel_at_its_intensity_and_rate(page: tuple[Page, str, Plan, Target]) -> None:
    parsed, _, plan, target = page
    points = parsed.all("circle", "data-kernel")
    expected = {}
    for choice in plan.choices:
        for figure in choice.figures if choice.used else ():
            rows = node_rows(choice, figure.kernel)
            seconds = sum(estimate.seconds for estimate in RooflineEstimator().predict(rows, target.device))
            flops = sum(row.matmul_flops + row.vector_flops for row in rows)
            expected[choice.operator, figure.kernel] = (flops / sum(row.bytes_moved for row in rows), flops / seconds)
    shown = {(point["data-operator"], point["data-kernel"]): (float(point["data-intensity"]), float(point["data-rate"]))
             for point in points}  # fmt: skip
    assert shown.keys() == expected.keys()
    for key, values in expected.items():
        assert shown[key] == pytest.approx(values)
    assert len(roofline_points(choice_maps(plan, target, CompileOptions(), RooflineEstimator()))) == len(points)


def test_every_cell_of_a_map_carries_the_estimators_choice(page: tuple[Page, str, Plan, Target]) -> None:
    parsed, _, plan, target = page
    maps = choice_maps(plan, target, CompileOptions(), Straight(CROSSING, spread=1.5))
    cells = parsed.all("rect", "data-t")
    expected = [
        (b, t, choices.cells[b, t].fastest or "", choices.cells[b, t].figures[0].seconds)
        for choices in maps for t in choices.lengths for b in choices.batches
    ]  # fmt: skip
    shown = [(int(cell["data-b"]), int(cell["data-t"]), cell["data-kernel"], float(cell["data-seconds"]))
             for cell in cells]  # fmt: skip
    assert shown == expected
    sure = [choices.cells[b, t].sure for choices in maps for t in choices.lengths for b in choices.batches]
    assert [cell["fill-opacity"] == "1.0" for cell in cells] == sure
    assert {True, False} == set(sure)


def test_the_tables_hold_the_figures_and_the_step(page: tuple[Page, str, Plan, Target]) -> None:
    parsed, text, plan, _ = page
    shown = {(cell["data-operator"], cell["data-kernel"]): float(cell["data-seconds"])
             for cell in parsed.all("td", "data-seconds")}  # fmt: skip
    assert shown == {
        (choice.operator, figure.kernel): figure.seconds
        for choice in plan.choices if choice.used for figure in choice.figures
    }  # fmt: skip
    step = plan.prediction
    assert step is not None
    values = [float(cell["data-value"]) for cell in parsed.all("td", "data-value")]
    assert values == [step.seconds, *step.parts.values(), step.host_s, step.peak_bytes, *step.memory.values()]
    sentences = [line for line in parsed.texts["li"] if "overtakes" in line]
    assert any("sdpa_efficient overtakes sdpa_flash at about t = " in line for line in sentences)
    assert "The plan as text" in text


def test_everything_is_drawn_inside_of_its_picture(page: tuple[Page, str, Plan, Target]) -> None:
    width = height = 0.0
    for name, values in page[0].found:
        if name == "svg":
            width, height = float(values["width"]), float(values["height"])
        for x, y in (("cx", "cy"), ("x", "y"), ("x1", "y1"), ("x2", "y2")):
            if x in values and y in values:
                assert 0 <= float(values[x]) <= width
                assert 0 <= float(values[y]) <= height
        for px, py in (pair.split(",") for pair in values.get("points", "").split()):
            assert 0 <= float(px) <= width
            assert 0 <= float(py) <= height


def test_a_plot_puts_decades_at_equal_distances() -> None:
    plot = LogPlot(x=(1.0, 1000.0), y=(1.0, 100.0), x_label="x", y_label="y")
    (x0, y0), (x1, y1), (x2, y2) = (plot.at(10.0**power, 10.0**power) for power in (0, 1, 2))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.02)
    assert y2 < y1 < y0


# --- explain and train ----------------------------------------------------------------


def test_explain_writes_the_page_and_the_same_text(tmp_path: Path) -> None:
    config = run_config(ATTENTION)
    path = tmp_path / "choices.html"
    assert explain(config, path) == explain(config)
    parsed = Page(path.read_text(encoding="utf-8"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["choices.html"]
    assert parsed.all("circle", "data-kernel")
    with pytest.raises(ConfigError, match="cannot be written"):
        explain(config, tmp_path / "missing" / "choices.html")


def test_the_command_takes_html_besides_the_keys_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.html"
    assert main(["explain", "model=transformer", "target=h100", "compiler=roofline", f"html={path}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"page: {path}"
    assert Page(path.read_text(encoding="utf-8")).all("svg")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["html="], "is no file"), (["html=nowhere/page.html"], "is no file"), (["html=.", "-m"], "is no file"),
     (["html=page.html", "--multirun"], "the jobs of a sweep would write one file")],
)  # fmt: skip
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_chosen(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "model=transformer", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_a_run_folder_holds_the_page(tiny_run: Any) -> None:
    from subquad.training.fit import train
    from subquad.training.run_folder import RunFolder

    folder = RunFolder(train(tiny_run("run", max_steps=2)).run_dir)
    parsed = Page(folder.page.read_text(encoding="utf-8"))
    plan = Plan.load(folder.plan)
    assert {cell["data-operator"] for cell in parsed.all("td", "data-operator")} == {
        choice.operator for choice in plan.choices if choice.used
    }
    assert "report.html" in folder.report.read_text(encoding="utf-8")
