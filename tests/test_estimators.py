"""Which estimator answers: a fit decides kernels where it knows them, abstains aloud elsewhere, and is never missed."""

from __future__ import annotations

import math
import random
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from subquad.compiler import estimators
from subquad.compiler.choose import Chooser
from subquad.compiler.estimators import estimator_for
from subquad.compiler.explain import explain, explained_plan
from subquad.compiler.options import CompileOptions
from subquad.compiler.plan import Figure
from subquad.compiler.profile import profile_path
from subquad.compiler.target import resolve_target
from subquad.compiler.workload import cost_row, halved_rows
from subquad.registry import load_registry
from subquad.schema import CompilerConfig, ModelConfig, RunConfig, TrainerConfig
from subquad_cost_model import (
    CalibratedEstimator,
    CostRow,
    Estimate,
    LearnedEstimator,
    Measurement,
    MeasurementStore,
    RooflineEstimator,
    TimedRow,
    Trees,
    lower_bound_s,
    newest_fit,
    save_fit,
    save_profile,
)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.workload import Workload

load_registry()
A100, H100 = (resolve_target(name) for name in ("a100", "h100"))
EFFICIENCIES = {"sdpa_flash": 0.2, "sdpa_efficient": 0.1, "sdpa_cudnn": 0.7}
SMALL = Trees(rounds=60, spread_rounds=20)


def attention_workload(phase: str, b: int, t: int, h: int) -> Workload:
    return Workload(
        operator="softmax_attention",
        shape={"b": b, "t": t, "s": t, "h": h, "h_kv": h, "k": 64, "v": 64},
        dtype="bfloat16",
        phase=phase,  # type: ignore[arg-type]
        options={"causal": True, "window": 0},
    )


def attention_row(kernel: str, phase: str, b: int, t: int, h: int) -> CostRow:
    operator = CATALOGUE.operator("softmax_attention")
    return cost_row(operator, CATALOGUE.kernel("softmax_attention", kernel), attention_workload(phase, b, t, h))


def planted(efficiencies: dict[str, float], *, seed: int) -> list[TimedRow]:
    """Timings of attention on two devices, each kernel at its efficiency, with a hundredth of noise."""
    draw = random.Random(seed)
    rows = []
    for _ in range(40):
        b, t, h = 2 ** draw.randrange(5), 2 ** draw.randrange(7, 13), 2 ** draw.randrange(1, 5)
        for target in (A100, H100):
            for phase in ("forward", "backward"):
                for kernel in efficiencies:
                    row = attention_row(kernel, phase, b, t, h)
                    seconds = lower_bound_s(row, target.device) / efficiencies[kernel] * math.exp(draw.gauss(0, 0.01))
                    rows.append(
                        TimedRow(row=row, device=target.device, status="ok", low_s=seconds * 0.99, median_s=seconds,
                                 high_s=seconds * 1.01)
                    )  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit in which cuDNN's attention is several times as fast as its rivals."""
    folder = tmp_path_factory.mktemp("fit")
    save_fit(LearnedEstimator.fit(planted(EFFICIENCIES, seed=11), trees=SMALL), folder, card="planted")
    return folder


@pytest.fixture(autouse=True)
def _forget_fits() -> None:
    estimators._read.cache_clear()


def attention_run(
    fit: Path | None, *, seq_len: int = 1024, estimator: str = "learned", target: str = "h100"
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            d_model=256,
            num_layers=2,
            schedule=["softmax_attention"],
            mixers={"softmax_attention": {"mixer": "softmax_attention", "num_heads": 4}},
        ),
        data={"name": "synthetic"},
        trainer=TrainerConfig(batch_size=4, seq_len=seq_len),
        compiler=CompilerConfig(estimator=estimator, fit=None if fit is None else str(fit), measure=False),
        target=target,
    )


@pytest.mark.parametrize("estimator", ["learned", "measured"])
def test_the_chosen_kernel_follows_the_fit(fit: Path, estimator: str) -> None:
    # Its rivals are those that the fit knows.
    config = attention_run(fit, estimator=estimator)
    config.deny = ["flex_attention", "flash_attn"]
    choices = [
        choice for choice in explained_plan(config).choices if choice.used and choice.operator == "softmax_attention"
    ]
    assert {choice.chosen for choice in choices} == {"sdpa_cudnn"}
    for choice in choices:
        assert choice.kernel.startswith("b<=4,t<=1024: sdpa_cudnn; ")
        figures = {figure.kernel: figure for figure in choice.figures}
        assert {figure.source for figure in figures.values()} == {"model"}
        shape = choice.shape
        for kernel, efficiency in EFFICIENCIES.items():
            rows = [attention_row(kernel, phase, shape["b"], shape["t"], shape["h"]) for phase in choice.phases]
            truth_s = sum(lower_bound_s(row, H100.device) for row in rows) / efficiency
            assert figures[kernel].low_s <= figures[kernel].seconds <= figures[kernel].high_s
            assert figures[kernel].seconds == pytest.approx(truth_s, rel=0.2)


def test_another_fit_chooses_another_kernel(fit: Path, tmp_path: Path) -> None:
    other = {"sdpa_flash": 0.2, "sdpa_efficient": 0.8, "sdpa_cudnn": 0.1}
    save_fit(LearnedEstimator.fit(planted(other, seed=12), trees=SMALL), tmp_path, card="planted")
    config = attention_run(tmp_path)
    config.deny = ["flex_attention", "flash_attn"]
    plan = explained_plan(config)
    assert {choice.chosen for choice in plan.choices if choice.used and choice.operator == "softmax_attention"} == {
        "sdpa_efficient"
    }


def test_forward_and_backward_are_weighed_together_when_training(tmp_path: Path) -> None:
    # The fastest forward has the slowest backward: it wins where there is no gradient, and loses where there is one.
    truth = {
        "forward": {"sdpa_flash": 0.3, "sdpa_efficient": 0.1, "sdpa_cudnn": 0.9},
        "backward": {"sdpa_flash": 0.1, "sdpa_efficient": 0.8, "sdpa_cudnn": 0.05},
    }
    rows = [row for phase, efficiencies in truth.items() for row in planted(efficiencies, seed=13)
            if row.row.phase == phase]  # fmt: skip
    save_fit(LearnedEstimator.fit(rows, trees=SMALL), tmp_path, card="planted")
    operator = CATALOGUE.operator("softmax_attention")
    workload = attention_workload("forward", 4, 1024, 4)
    chooser = Chooser(
        H100, CompileOptions(estimator="learned", fit=str(tmp_path), deny=("flex_attention", "flash_attn"))
    )
    trained, asked = (chooser.choose(operator, workload, training=training, used=True) for training in (True, False))
    assert (asked.kernel, trained.kernel) == ("sdpa_cudnn", "sdpa_efficient")


def test_where_the_fit_abstains_the_bound_answers_and_explain_says_why(fit: Path) -> None:
    wider = attention_run(fit)
    wider.model.d_model = 1024
    wider.deny = ["flex_attention", "flash_attn"]
    text = explain(wider)
    assert "sdpa_flash stays" in text
    assert "the learned model abstains: k=256 is outside of the 64 to 64 it was fitted to" in text
    assert "operator rotary is not among the rows it was fitted to" in text
    attention = [choice for choice in explained_plan(wider).choices if choice.used and choice.operator != "rotary"]
    assert {figure.source for choice in attention for figure in choice.figures} == {"bound"}


def test_a_fit_answers_for_sequences_four_times_as_long_as_it_saw(fit: Path) -> None:
    longer = attention_run(fit, seq_len=16384)
    longer.deny = ["flex_attention", "flash_attn"]
    attention = [choice for choice in explained_plan(longer).choices if choice.used and choice.operator != "rotary"]
    assert {figure.source for choice in attention for figure in choice.figures} == {"model"}


@pytest.mark.parametrize("estimator", ["learned", "measured"])
@pytest.mark.parametrize("damage", ["missing", "corrupt", "a file"])
def test_a_fit_that_cannot_be_used_costs_one_warning_and_leaves_the_roofline(
    fit: Path, tmp_path: Path, estimator: str, damage: str
) -> None:
    folder = tmp_path / "damaged"
    if damage == "corrupt":
        shutil.copytree(fit, folder)
        point = folder / "forward.point.txt"
        point.write_text(point.read_text(encoding="utf-8").replace("0.1", "0.2"), encoding="utf-8")
    elif damage == "a file":
        folder.write_text("no folder", encoding="utf-8")
    config = attention_run(folder, estimator=estimator)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        text = explain(config)
        again = explained_plan(config)
    assert len(told) == 1
    assert "the learned model is not used" in str(told[0].message)
    assert str(folder) in str(told[0].message)
    assert "the learned model is not used" in text
    without = explained_plan(replace(config, compiler=CompilerConfig(estimator="roofline", measure=False)))
    assert [choice.kernel for choice in again.choices] == [choice.kernel for choice in without.choices]
    bounds = [[replace(figure, note="") for figure in choice.figures] for choice in again.choices]
    assert bounds == [list(choice.figures) for choice in without.choices]


def test_no_shipped_fit_is_told_to_whom_asks_for_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(estimators, "OWN_FIT", "nobody ships this")
    with pytest.warns(UserWarning, match=r"no fit of these kernels is shipped, and compiler\.fit names none"):
        estimator = estimator_for(H100, CompileOptions(estimator="learned"))
    row = attention_row("sdpa_flash", "forward", 2, 256, 4)
    assert "no fit" in estimator.predict([row], H100.device)[0].note
    record = MeasurementStore()
    assert estimator_for(H100, CompileOptions(), record).fallback == RooflineEstimator()  # type: ignore[attr-defined]


def test_the_newest_fit_of_a_name_is_taken(fit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subquad_cost_model.fit_files.FITS", tmp_path)
    assert newest_fit("operators") is None
    for name, date in (("operators", "2026-01-05"), ("operators-wide", "2026-03-01"), ("operators-old", "2025-12-31")):
        shutil.copytree(fit, tmp_path / name)
        manifest = tmp_path / name / "manifest.json"
        text = manifest.read_text(encoding="utf-8")
        manifest.write_text(
            text[: text.index('"date": "') + 9] + date + text[text.index('"date": "') + 19 :], encoding="utf-8"
        )
    assert newest_fit("operators") == tmp_path / "operators-wide"
    estimator = estimator_for(H100, CompileOptions(estimator="learned"))
    assert isinstance(estimator, LearnedEstimator)
    assert estimator.smaller is halved_rows


def test_what_was_measured_stands_before_the_fit(fit: Path) -> None:
    row = attention_row("sdpa_flash", "forward", 4, 512, 4)
    other = attention_row("sdpa_flash", "forward", 4, 256, 4)
    record = MeasurementStore()
    record.add(
        Measurement(
            device_name=H100.device.name,
            versions=H100.device.versions,
            row_key=row.key,
            low_s=0.9,
            median_s=1.0,
            high_s=1.1,
            peak_bytes=7,
            date="2026-11-24",
        )
    )
    estimator = estimator_for(H100, CompileOptions(fit=str(fit)), record)
    sources = [estimate.source for estimate in estimator.predict([row, other], H100.device)]
    assert sources == ["measured", "model"]


def test_a_doubled_shape_never_takes_less_by_the_fit(fit: Path) -> None:
    estimator = estimator_for(H100, CompileOptions(estimator="learned", fit=str(fit)))

    def seconds(b: int, t: int, h: int) -> float:
        return estimator.predict([attention_row("sdpa_flash", "forward", b, t, h)], H100.device)[0].seconds

    draw = random.Random(5)
    for _ in range(12):
        b, t, h = 2 ** draw.randrange(4), 2 ** draw.randrange(7, 12), 2 ** draw.randrange(1, 4)
        least = seconds(b, t, h)
        assert least <= min(seconds(2 * b, t, h), seconds(b, 2 * t, h), seconds(b, t, 2 * h))


def _examples() -> list[CostRow]:
    return [
        cost_row(operator, kernel, workload)
        for operator in CATALOGUE
        for kernel in CATALOGUE.kernels(operator.name)[:1]
        for workload in operator.examples
    ]


@pytest.mark.parametrize("row", _examples(), ids=lambda row: f"{row.operator}-{row.phase}-{row.dtype}")
def test_a_halved_row_is_that_of_the_halved_workload_and_no_more_work(row: CostRow) -> None:
    operator, kernel = CATALOGUE.operator(row.operator), CATALOGUE.kernel(row.operator, row.kernel)
    factor = 4
    shape = {axis: size * factor if axis in ("b", "t", "s", "m", "h", "h_k", "h_kv", "c") and size > 1 else size
             for axis, size in row.shape.items()}  # fmt: skip
    workload: Workload = Workload(
        operator=row.operator,
        shape=shape,
        dtype=row.dtype,
        phase=row.phase,
        options=row.options,  # type: ignore[arg-type]
    )
    large = cost_row(operator, kernel, workload)
    halves: Sequence[CostRow] = halved_rows(large)
    assert halves
    for half in halves:
        changed = {axis for axis in shape if half.shape[axis] != shape[axis]}
        assert changed
        assert all(2 * half.shape[axis] == shape[axis] for axis in changed)
        assert half.kernel_version == large.kernel_version
        recounted = cost_row(operator, kernel, replace(workload, shape=half.shape))
        assert half == recounted
        for name in ("matmul_flops", "vector_flops", "transcendental_ops", "bytes_moved", "serial_steps"):
            assert getattr(half, name) <= getattr(large, name)
        assert half.bytes_moved < large.bytes_moved


def test_odd_axes_lengths_of_one_and_crowded_documents_are_not_halved() -> None:
    operator, kernel = CATALOGUE.operator("softmax_attention"), CATALOGUE.kernel("softmax_attention", "sdpa_flash")

    def halved(**shape: int) -> list[dict[str, int]]:
        axes = {"b": 1, "t": 8, "s": 8, "h": 4, "h_kv": 1, "k": 64, "v": 64} | shape
        workload: Workload = Workload(operator="softmax_attention", shape=axes, dtype="bfloat16",
                                      options={"causal": True, "window": 0})  # fmt: skip
        return [
            {axis: size for axis, size in half.shape.items() if size != axes[axis]}
            for half in halved_rows(cost_row(operator, kernel, workload))
        ]

    assert halved() == [{"t": 4, "s": 4}, {"h": 2}]
    assert halved(t=1, s=6, b=3) == [{"s": 3}, {"h": 2}]
    assert halved(t=7, s=7, h=3) == []
    assert halved(documents=5) == [{"h": 2}]
    assert halved(documents=4) == [{"t": 4, "s": 4}, {"h": 2}]


def test_a_figure_is_no_better_than_the_weakest_of_its_phases() -> None:
    def part(source: str, note: str = "") -> Estimate:
        return Estimate(seconds=2.0, low_s=1.0, high_s=3.0, peak_bytes=4, source=source, note=note)  # type: ignore[arg-type]

    both = Figure.of("kernel", [part("measured"), part("model", "why")])
    assert (both.source, both.note) == ("model", "why")
    assert (both.low_s, both.seconds, both.high_s, both.peak_bytes) == (2.0, 4.0, 6.0, 4)
    assert Figure.of("kernel", [part("model"), part("bound", "a"), part("bound", "a")]).source == "bound"
    assert Figure.of("kernel", [part("bound", "a"), part("bound", "a")]).note == "a"


def test_a_profile_of_this_device_stands_before_the_model_it_corrects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path))
    here = resolve_target("cpu")
    plain = estimator_for(here, CompileOptions(), MeasurementStore())
    assert plain.fallback == RooflineEstimator()  # type: ignore[attr-defined]
    operator = CATALOGUE.operator("softmax_attention")
    kernel = CATALOGUE.kernel("softmax_attention", "sdpa_flash")
    rows = [cost_row(operator, kernel, attention_workload("forward", 1, t, 4)) for t in (64, 128, 256, 512, 1024)]
    slow = [
        TimedRow(row=row, device=here.device, status="ok", low_s=s, median_s=s, high_s=s)
        for row in rows
        for s in [50 * lower_bound_s(row, here.device)]
    ]
    calibrated = CalibratedEstimator.fit(slow, here.device, RooflineEstimator())
    path = profile_path(here.device)
    assert path is not None
    save_profile(path, calibrated, rows, {})
    found = estimator_for(here, CompileOptions(), MeasurementStore())
    for row in rows:
        seconds = found.predict([row], here.device)[0].seconds
        assert seconds == pytest.approx(50 * lower_bound_s(row, here.device), rel=0.1)
    path.write_text("{}", encoding="utf-8")
    with pytest.warns(UserWarning, match="calibrate again"):
        spoiled = estimator_for(here, CompileOptions(), MeasurementStore())
    assert spoiled.fallback == RooflineEstimator()  # type: ignore[attr-defined]
