"""The tables of quality: which cells there are, how a record is gone on with, and what the tables say of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from subquad import build_model, load_config
from subquad.model.model_carry import carry_bytes
from subquad.registry import load_registry

TOOLS = Path(__file__).resolve().parent.parent / "tools"
MODELS = ("softmax_attention", "slstm")


@pytest.fixture(scope="module", autouse=True)
def _tools() -> Iterator[None]:
    """The scripts import each other by name, as scripts of one folder do."""
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


@pytest.fixture
def tools() -> tuple[ModuleType, ModuleType, ModuleType]:
    import quality_cells
    import quality_run
    import quality_table

    return quality_cells, quality_run, quality_table


class Answering:
    """In place of a process: answers at once, and remembers what it was asked."""

    asked: list[Any]

    def __init__(self, answers: dict[str, Any]) -> None:
        self.asked, self._answers = [], answers

    def __call__(self, log: Path) -> Answering:
        return self

    def ask(self, request: Any, limit_s: float) -> Any:
        cell = request["cell"]
        self.asked.append((cell["task"], cell["model"], cell["learning_rate"], cell["seed"], cell["steps"]))
        return whole(cell) | self._answers.get(cell["model"], {})

    def close(self) -> None: ...


def whole(cell: Any) -> dict[str, Any]:
    """What a run gives that made all its steps; the larger rate is the better one."""
    return {
        "made_steps": cell["steps"], "validation_loss": 1 - cell["learning_rate"], "bits_per_byte": 2.0 + cell["seed"],
        "row_guess": {"4": 0.25},
        "accuracy": {"4": 1.0, "16": 0.75, "64": 0.5 - cell["learning_rate"]}, "parameters": 1000, "carry_bytes": 64,
        "device": "cpu", "torch": "2", "date": "2026-11-29", "command": "python -m subquad train",
    }  # fmt: skip


@pytest.fixture
def run(tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the tool with processes that answer at once; returns what they were asked."""

    def go(*words: str, **answers: Any) -> list[Any]:
        fake = Answering(answers)
        monkeypatch.setattr(tools[1], "Worker", fake)
        words = (str(tmp_path / "record.jsonl"), f"models=[{','.join(MODELS)}]", "workers=1", "budget_s=100", *words)
        go.code = tools[1].main(words)  # type: ignore[attr-defined]
        return fake.asked

    return go


def test_a_prefix_of_the_cells_is_a_table_and_slow_mixers_start_first(tools: Any) -> None:
    names = tuple(load_registry().mixers)
    found = tools[0].cells("mixers", names)
    first = found[: 2 * len(names)]
    assert {(cell.task, cell.model) for cell in first} == {(task, name) for task in ("mqar", "text") for name in names}
    assert len({(cell.learning_rate, cell.seed) for cell in first}) == 1
    assert tuple(cell.model for cell in first[: len(tools[0].SERIAL)]) == tools[0].SERIAL
    assert len({cell.key for cell in found}) == len(found) == len(names) * 2 * 3 * 2


def test_cells_are_configurations_and_models_are_of_one_size(tools: Any) -> None:
    import quality_cell

    for study, task, model in (
        ("mixers", "mqar", "rwkv6"), ("mixers", "text", "rwkv_channel_mix"), ("scout", "mqar", "mamba"),
        ("scout_30m", "text", "scout_swa"), ("scout_30m", "mqar", "scout_mamba_segment4"),
        ("scout_30m_long", "text", "transformer_window"), ("scout_recall", "mqar", "scout_mamba_segment32"),
    ):  # fmt: skip
        cell = tools[0].Cell(study=study, task=task, model=model, learning_rate=1e-3, seed=1, steps=7)
        config = load_config(tools[0].overrides(cell, quality_cell.fitting_width(cell)))
        off = quality_cell.parameters(config) / cell.setting.parameters - 1
        assert abs(off) < 0.01, f"{cell.key}: {off:+.1%}"
        assert (config.seed, config.trainer.max_steps, config.optimizer["lr"]) == (1, 7, 1e-3)


def test_the_large_study_begins_with_speed_and_text_and_tries_segment_lengths_last(tools: Any) -> None:
    cells = tools[0]
    found = cells.cells("scout_30m", cells.models_of("scout_30m"))
    models, sweep = tuple(cells.SCHEDULES), tuple(cells.SWEEP)
    passes = [("speed", models), ("text", models), ("mqar", models), ("text", sweep), ("mqar", sweep)]
    wanted = [(task, name) for task, names in passes for name in names]
    assert [(cell.task, cell.model) for cell in found[: len(wanted)]] == wanted
    assert len({cell.key for cell in found}) == len(found)
    lengths = [
        load_config(cells.overrides(cell, 8)).model.mixers["segment_attention"]["segment_len"]
        for cell in found[: len(wanted)]
        if cell.task == "text" and "scout" in cell.model
    ]
    assert lengths == [10, 10, 4, 32, 128]


def test_the_long_study_begins_with_each_models_own_rate(tools: Any) -> None:
    cells = tools[0]
    found = [cell for cell in cells.cells("scout_30m_long", cells.models_of("scout_30m_long")) if cell.seed == 0]
    text = [(cell.model, cell.learning_rate) for cell in found if cell.task == "text"]
    assert dict(text[: len(cells.SCHEDULES)]) == cells.LONG_RATES
    attention = {(name, 3e-4) for name in ("scout_swa", "transformer", "transformer_window")}
    recurrence = {(name, 1e-2) for name in ("mamba", "scout_mamba")}
    assert set(text) == set(product(cells.SCHEDULES, cells.LARGE_RATES)) | attention | recurrence
    assert len(text) == 3 * len(cells.SCHEDULES)
    recall = [(cell.model, cell.learning_rate) for cell in found if cell.task == "mqar"]
    assert recall == [(name, rate) for rate in cells.LARGE_RATES for name in cells.SCHEDULES]
    config = load_config(cells.overrides(next(cell for cell in found if cell.model == "scout_swa"), 8))
    assert config.model.mixers["window"]["window"] == 512
    assert config.model.mixers["segment_attention"]["segment_len"] == 10


@pytest.mark.parametrize(
    ("model", "own"),
    [("scout_mamba_segment32", ("mamba", "segment_attention")), ("transformer", ("softmax_attention",) * 2)],
)
def test_recall_is_asked_of_two_blocks_behind_a_token_shift(tools: Any, model: str, own: tuple[str, ...]) -> None:
    cells = tools[0]
    cell = next(cell for cell in cells.cells("scout_recall", cells.models_of("scout_recall")) if cell.model == model)
    config = load_config(cells.overrides(cell, 8)).model
    assert (tuple(config.schedule), config.num_layers, config.channel_mixer) == (("shift", *own), 6, None)
    assert config.mixers.get("segment_attention", {"segment_len": 32})["segment_len"] == 32


def test_a_carry_is_told_by_shapes_alone(tools: Any) -> None:
    import quality_cell

    cell = tools[0].Cell(study="scout_30m", task="mqar", model="scout_swa", learning_rate=1e-3, seed=0, steps=1)
    config = load_config(tools[0].overrides(cell, 8))
    model = build_model(quality_cell.sized(config).model)
    _, carry = model.prefill(torch.zeros(1, 64, dtype=torch.int64), model.empty_carry(1))
    assert quality_cell.carry_after(config, 64) == sum(carry_bytes(model, carry).values())


def test_a_carry_of_a_mixer_that_sets_out_from_values_is_told_as_well(tools: Any) -> None:
    import quality_cell

    cell = tools[0].Cell(study="mixers", task="text", model="rwkv_channel_mix", learning_rate=1e-3, seed=0, steps=1)
    assert quality_cell.carry_after(load_config(tools[0].overrides(cell, 8)), 4) > 0


def test_what_is_recorded_is_not_made_again(run: Any, tmp_path: Path) -> None:
    asked = run()
    assert [entry[4] for entry in asked[:2]] == [1, 1], "one step of each task warms the caches"
    assert len(asked) - 2 == len(set(asked[2:])) == len(MODELS) * 2 * 3 * 2
    assert run() == []
    record = tmp_path / "record.jsonl"
    lines = record.read_text().splitlines()
    record.write_text("\n".join([*lines[:5], lines[5][:40]]))  # killed while it wrote the sixth
    assert set(run()[2:]) == set(asked[7:])


def test_a_task_can_be_asked_for_alone(run: Any) -> None:
    assert {entry[0] for entry in run("tasks=[text]")} == {"text"}
    assert {entry[0] for entry in run()} == {"mqar"}


def test_a_cell_that_was_cut_short_is_made_again_and_a_failed_one_if_asked(run: Any) -> None:
    made = run("steps=5", slstm={"made_steps": 3})
    assert run.code == 0
    again = run("steps=5", slstm={"failed": "RunError: the loss is not finite"})
    assert run.code == 1
    assert set(again[2:]) == {entry for entry in made[2:] if entry[1] == "slstm"}
    assert run("steps=5") == []
    assert set(run("steps=5", "failed=again")[2:]) == set(again[2:])


def test_no_cell_is_begun_that_would_not_end_in_time(run: Any) -> None:
    assert {entry[4] for entry in run("budget_s=20")} == {1}, "a first cell is taken to need 45 s"


def test_the_table_shows_best_rates_and_names_what_is_left_out(
    run: Any, tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(slstm={"made_steps": 3})
    path = tmp_path / "record.jsonl"
    stale = json.loads(path.read_text().splitlines()[0]) | {"key": "mixers/mqar/gla/of another setting"}
    path.write_text(path.read_text() + json.dumps(stale) + "\n")
    capsys.readouterr()
    assert tools[2].main([str(path)]) == 0
    shown = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in shown.splitlines()
            if line.startswith("| `")}  # fmt: skip
    results, recall_by_rate, bits_by_rate = (part for part in shown.split("\n\n") if part.startswith("| "))
    assert "| `softmax_attention` | 1.000 | 0.750 | 0.490 | 1,000 | 64 | 0.01 | 2.500 (2.000 to 3.000) |" in results
    assert "| 0.499 | 0.497 | 0.490 |" in recall_by_rate
    assert "bits per byte by learning rate | 0.001 | 0.003 | 0.01" in bits_by_rate
    assert set(rows) == {"`softmax_attention`"}
    assert "stopped after 3 of 1,000 steps" in shown
    assert "at random, which takes no memory of keys, gets 0.250 (4 pairs)" in shown
    assert "gla" not in shown


def test_a_study_of_one_task_has_a_table(
    tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tools[1], "Worker", Answering({}))
    record = tmp_path / "record.jsonl"
    assert tools[1].main([str(record), "study=scout_recall", "workers=1", "budget_s=100"]) == 0
    capsys.readouterr()
    assert tools[2].main([str(record)]) == 0
    printed = capsys.readouterr().out
    assert "| `scout_mamba_segment32` | 1.000 | 0.750 | 0.490 |" in printed, printed
    assert "text:" not in printed


def test_a_whole_run_is_not_replaced_by_a_later_one_that_failed(tools: Any) -> None:
    cell = tools[0].cells("mixers", ("gla",))[0]
    good = {"key": cell.key, **asdict(cell), **whole(asdict(cell))}
    failed = {"key": cell.key, **asdict(cell), "failed": "x"}
    assert tools[2].newest([good, failed]) == [good]
    assert tools[2].newest([failed, good]) == [good]


def test_a_process_that_ends_after_a_failure_is_not_asked_again(
    tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "quality_cell.py"
    script.write_text("import json, time\ninput()\nprint(json.dumps({'failed': 'x'}), flush=True)\ntime.sleep(0.3)")
    monkeypatch.setattr(tools[1], "__file__", str(tmp_path / "quality_run.py"))
    worker = tools[1].Worker(tmp_path / "log")
    assert [worker.ask({}, 60.0) for _ in range(2)] == [{"failed": "x"}] * 2
    worker.close()


def test_a_process_that_dies_is_named_and_replaced(tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "quality_cell.py"
    script.write_text("import os, sys\nprint('no memory', file=sys.stderr, flush=True)\ninput()\nos._exit(9)")
    monkeypatch.setattr(tools[1], "__file__", str(tmp_path / "quality_run.py"))
    worker = tools[1].Worker(tmp_path / "log")
    for _ in range(2):
        assert worker.ask({}, 60.0) == {"failed": "the process ended with code 9: no memory"}
    script.write_text("import time\ntime.sleep(60)")
    monkeypatch.setattr(tools[1], "LEAST_S", 0.2)
    monkeypatch.setattr(tools[1], "LAST_S", 0.0)
    assert "ended with code -9" in worker.ask({}, 0.0)["failed"]  # left alone it would end with code 0
    worker.close()


@pytest.fixture
def tiny_cell(tools: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Asks for a cell of some steps that takes a second on a CPU, for at most `max_seconds`, in one folder."""
    import quality_cell

    tiny = replace(
        tools[0].SETTINGS["mixers", "mqar"], d_model=32, seq_len=16, batch_size=2, parameters=30_000,
        data=("data=synthetic", "data.task=mqar", "data.sizes=[1,2]", "data.vocab_size=16"),
    )  # fmt: skip
    for module in (tools[0], quality_cell):
        monkeypatch.setattr(module, "SETTINGS", {("mixers", "mqar"): tiny, ("mixers", "text"): tiny})
    monkeypatch.setattr(quality_cell, "SIZES", (1, 2))
    monkeypatch.setattr(quality_cell, "SAMPLES", 4)

    def ask(run_dir: Path, steps: int, max_seconds: float = 60.0) -> dict[str, Any]:
        cell = tools[0].cells("mixers", ("window",), steps=steps)[0]
        request = {"cell": asdict(cell), "run_dir": str(run_dir), "max_seconds": max_seconds, "accelerator": "cpu"}
        return quality_cell.answered(request)

    return ask


def test_a_cell_trains_and_is_judged(tiny_cell: Any, tmp_path: Path) -> None:
    found = tiny_cell(tmp_path / "run", steps=2)
    assert found["made_steps"] == 2
    assert found["kernels"]["called"]["softmax_attention"] in ("sdpa_flash", "sdpa_efficient", "windowed")
    assert found["kernels"]["failed"] == {}
    assert set(found["accuracy"]) == set(found["row_guess"]) == {"1", "2"}
    assert found["carry_bytes"] > 0
    assert found["command"].startswith("python -m subquad train ")


def test_a_cell_that_was_cut_short_goes_on_in_its_folder(tiny_cell: Any, tmp_path: Path) -> None:
    cut = tiny_cell(tmp_path / "run", steps=4, max_seconds=0.001)
    assert 0 < cut["made_steps"] < 4
    found = tiny_cell(tmp_path / "run", steps=4)
    whole = tiny_cell(tmp_path / "whole", steps=4)
    assert found["made_steps"] == 4
    assert found["validation_loss"] == whole["validation_loss"] != cut["validation_loss"]
