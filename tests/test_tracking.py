"""What a run tells of itself besides its loss: metrics.csv, Weights & Biases, TensorBoard and a profile."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import wandb_messages, wandb_records
from torch.utils.flop_counter import FlopCounterMode

from subquad.__main__ import main
from subquad.commands.train import GROUP, train_in_sweep
from subquad.compiler.plan import Plan
from subquad.compiler.target import resolve_target
from subquad.errors import ConfigError
from subquad.model.build import build_model
from subquad.schema import CompilerConfig, ModelConfig, RunConfig, TrainerConfig
from subquad.training import tracking
from subquad.training.compilation import compiled
from subquad.training.fit import train
from subquad.training.gradient_norms import GradientNorms, parameters_by_family
from subquad.training.metrics import COLUMNS, CsvRecord, read_metrics
from subquad.training.module import summed_cross_entropy
from subquad.training.run_folder import RunFolder, read_config
from subquad.training.utilisation import Utilisation, ceiling, flops_per_token, operator_flops, utilisation

TinyRun = Callable[..., RunConfig]
TWO_FAMILIES = {"softmax_attention": {"mixer": "softmax_attention", "num_heads": 2}, "window": {"mixer": "window"}}


@pytest.fixture
def hybrid(tiny_run: TinyRun) -> Callable[..., RunConfig]:
    """A tiny run of two families of mixers."""

    def config(run_dir: str, **settings: Any) -> RunConfig:
        found = tiny_run(run_dir, **settings)
        mixers = {**TWO_FAMILIES, "window": {"mixer": "window", "num_heads": 2, "window": 8}}
        found.model = replace(found.model, schedule=["softmax_attention", "window"], mixers=mixers)
        return found

    return config


# Gradient norms


def test_gradient_norms_of_families_stand_in_every_row_and_make_up_the_whole(hybrid: TinyRun) -> None:
    result = train(hybrid("run", max_steps=7, validate_every_n_steps=5))
    rows = read_metrics(result.run_dir / "metrics.csv")
    assert [row["step"] for row in rows] == [1, 3, 5, 6, 7]
    families = ("softmax_attention", "window", "channel_mixer", "other")
    for row in rows:
        parts = [row[f"gradient_norm/{family}"] for family in families]
        assert all(part > 0 for part in parts)
        assert math.hypot(*parts) == pytest.approx(row["gradient_norm"], rel=1e-5)


def test_families_hold_every_parameter_once(hybrid: TinyRun) -> None:
    model = build_model(replace(hybrid("run").model, vocab_size=256, context_len=32), device="meta")
    families = parameters_by_family(model)
    held = [id(parameter) for own in families.values() for parameter in own]
    assert sorted(held) == sorted(map(id, model.parameters()))
    window = {name for name, _ in model.named_parameters() if name.startswith("blocks.1.mixer.")}
    assert len(families["window"]) == len(window) > 0


def test_norms_of_another_step_are_not_given(hybrid: TinyRun) -> None:
    config = hybrid("run")
    model = build_model(replace(config.model, vocab_size=256, context_len=32), device="meta")
    assert GradientNorms(model, config.trainer).of_step(3) == {}


def test_a_run_of_older_columns_is_read_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss,seconds\n1,5.5,0.1\n2,5.0,0.2\n3,4", encoding="utf-8")
    record = CsvRecord(path, (*COLUMNS, "gradient_norm/window"), resume_at=2)
    record.append({"step": 3, "train/loss": 4.5, "gradient_norm/window": 0.25})
    record.close()
    assert read_metrics(path) == [
        {"step": 1, "train/loss": 5.5, "seconds": 0.1},
        {"step": 2, "train/loss": 5.0, "seconds": 0.2},
        {"step": 3, "train/loss": 4.5, "gradient_norm/window": 0.25},
    ]


# Model FLOPs utilisation


def test_mfu_is_the_rate_times_a_tokens_flops_over_the_ceiling(tiny_run: TinyRun) -> None:
    result = train(tiny_run("run", max_steps=3))
    folder = RunFolder(result.run_dir)
    plan, config, target = Plan.load(folder.plan), read_config(folder, "run"), resolve_target("cpu")
    used = utilisation(build_model(config.model, device="meta"), plan, target)
    assert used is not None
    assert used.flops_per_s == target.device.matmul_flops_per_s["float32"]
    for row in read_metrics(folder.metrics):
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * used.flops_per_token / used.flops_per_s, rel=1e-5)
    assert Utilisation(flops_per_token=2e9, flops_per_s=1e15).at(2.5e5) == pytest.approx(0.5)


def test_a_tokens_flops_are_what_torch_counts_in_a_step(tiny_run: TinyRun) -> None:
    result = train(tiny_run("run", max_steps=1))
    folder = RunFolder(result.run_dir)
    plan, model = Plan.load(folder.plan), build_model(read_config(folder, "run").model)
    tokens = torch.randint(256, (2, 32))
    with FlopCounterMode(display=False) as counter:
        nats, _ = summed_cross_entropy(model(tokens), tokens)
        nats.backward()
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() < 2)
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in counted.items() if name in ("aten.mm", "aten.addmm"))
    assert (flops_per_token(model, plan) - 6 * vectors) * 64 - operator_flops(plan) == products
    # Scores and sums over values, of two layers, two heads of width 16, 2 x 32 tokens; the backward takes twice that,
    # and whether the half above the diagonal is left out is the kernel's affair.
    whole = 2 * 3 * 2 * (2 * 2 * 32 * 32 * 16 * 2)
    assert whole / 2 <= operator_flops(plan) <= 1.5 * whole


ESTIMATED = CompilerConfig(estimator="roofline", measure=False)
SHARED_MIXERS: dict[str, dict[str, Any]] = {
    "softmax_attention": {"num_heads": 4},
    "window": {"num_heads": 2, "window": 5},
    "segment_attention": {"num_heads": 2, "segment_len": 4},
    "mamba2": {"state_dim": 4, "head_dim": 8},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mixer", SHARED_MIXERS)
def test_a_token_costs_the_same_on_however_many_devices_that_share_its_sequence(mixer: str, packed: bool) -> None:
    """Though the rank that is planned for holds the last part, whose tokens see all others."""
    model = ModelConfig(
        d_model=32, num_layers=2, vocab_size=64, context_len=64, schedule=[mixer],
        mixers={mixer: {"mixer": mixer, **SHARED_MIXERS[mixer]}},
    )  # fmt: skip

    def per_token(parts: int) -> float:
        trainer = TrainerConfig(batch_size=1, seq_len=64, devices=parts, context_parallel=parts)
        config = RunConfig(model=model, trainer=trainer, target="cpu", compiler=ESTIMATED)
        built, plan = compiled(build_model(model), config, None, packed=packed)
        return flops_per_token(built, plan, trainer)

    assert [per_token(parts) for parts in (2, 4)] == pytest.approx([per_token(1)] * 2, rel=1e-12)


def test_the_ceiling_is_the_data_sheets_where_there_is_one() -> None:
    h100, cpu = resolve_target("h100"), resolve_target("cpu")
    assert ceiling(h100, "bfloat16") == pytest.approx(989.4e12)
    probed = replace(h100, device=replace(h100.device, name="NVIDIA H100 PCIe", matmul_flops_per_s={"bfloat16": 1.0}))
    assert ceiling(probed, "bfloat16") == pytest.approx(989.4e12)
    assert ceiling(cpu, "no_such_dtype") is None


# Weights & Biases


def test_wandb_offline_groups_a_sweep_and_holds_the_plan_and_every_figure(tiny_run: TinyRun) -> None:
    config = tiny_run("lr/0", max_steps=2, run={"tracking": "wandb"})
    train_in_sweep(config, ["seed=0"])
    folder = RunFolder(Path(config.run_dir or ""))
    (path,) = folder.path.glob("wandb/offline-run-*/run-*.wandb")
    logged, _ = wandb_records(path)
    rows = read_metrics(folder.metrics)
    for row, figures in zip(rows, (figures for figures in logged if "train/loss" in figures), strict=True):
        assert figures["_step"] == row.pop("step")
        assert {name: figures[name] for name in row} == pytest.approx(row, rel=1e-6)
    assert {"mfu", "tokens_per_s", "gradient_norm/softmax_attention"} <= set(rows[0])
    (run, *_) = [message.run for message in wandb_messages(path) if message.HasField("run")]
    assert (run.run_group, run.job_type, run.display_name) == ("lr", "train", "0")
    (table,) = folder.path.glob("wandb/offline-run-*/files/media/table/plan_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"][:3] == ["layers", "operator", "kernel"]
    assert {"rotary", "softmax_attention"} == {row[1].split()[0] for row in content["data"]}


def wandb_file(run_dir: Path) -> Path:
    (path,) = run_dir.glob("wandb/*run-*/run-*.wandb")
    return path


def test_kept_checkpoints_are_artifacts_of_an_offline_run(tiny_run: TinyRun) -> None:
    config = tiny_run("run", every=3, max_steps=9, run={"tracking": "wandb"})
    config.checkpoint.artifacts = True
    folder = RunFolder(train(config).run_dir)
    messages = wandb_messages(wandb_file(folder.path))
    artifacts = [message.artifact for message in messages if message.artifact.type == "model"]
    losses = {int(row["step"]): row["val/loss"] for row in read_metrics(folder.metrics) if "val/loss" in row}
    assert {6, 9} <= set(losses)
    assert [json.loads(artifact.metadata)["step"] for artifact in artifacts] == [6, 9]
    for artifact, step in zip(artifacts, (6, 9)):
        best = ["best"] if losses[step] == min(losses[6], losses[9]) else []
        assert sorted(artifact.aliases) == sorted(["latest", f"step-{step}", *best])  # W&B's own is `latest`
        held = {Path(entry.path): Path(entry.local_path) for entry in artifact.manifest.contents}
        place = folder.checkpoints / f"step-{step}"
        assert held == {path.relative_to(place): path for path in place.iterdir()}


def test_artifacts_need_wandb(tiny_run: TinyRun) -> None:
    config = tiny_run("run")
    config.checkpoint.artifacts = True
    with pytest.raises(ConfigError, match="tracking=csv takes no checkpoints"):
        train(config)


def test_a_sweep_without_a_folder_is_a_group_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subquad.training.fit.train", lambda config, overrides: groups.append(os.environ.get(GROUP)))
    monkeypatch.chdir(tmp_path)
    groups: list[str | None] = []
    assert main(["train", "--multirun", "trainer=smoke", "seed=0,1"]) == 0
    assert groups[0] is not None
    assert groups[0] == groups[1]
    assert GROUP not in os.environ
    monkeypatch.setenv(GROUP, "mine")
    assert main(["train", "--multirun", "trainer=smoke", "seed=0,1"]) == 0
    assert groups[2:] == ["mine", "mine"]


def test_a_server_that_does_not_answer_leaves_an_offline_run(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MODE", "online"), ("BASE_URL", "http://127.0.0.1:9"), ("API_KEY", "0" * 40)):
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setattr(tracking, "INIT_S", 1.0)
    with pytest.warns(UserWarning, match="Weights & Biases is offline for this run"):
        result = train(tiny_run("run", max_steps=2, run={"tracking": "wandb"}))
    (path,) = result.run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert [row["_step"] for row in wandb_records(path)[0] if "train/loss" in row] == [1, 2]


def test_a_tracker_that_fails_ends_and_the_run_goes_on(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(self: object, step: int, values: object) -> None:
        calls.append(step)
        raise ConnectionError("the far end is gone")

    monkeypatch.setattr(tracking.WandbTracker, "log", fail)
    with pytest.warns(UserWarning, match="training goes on: ConnectionError: the far end is gone"):
        result = train(tiny_run("run", max_steps=6, run={"tracking": "wandb"}))
    assert calls == [1]
    assert [row["step"] for row in read_metrics(result.run_dir / "metrics.csv")] == [1, 3, 6]
    monkeypatch.undo()
    after = train(tiny_run("after", max_steps=2, run={"tracking": "wandb"}))
    assert [row["_step"] for row in wandb_records(wandb_file(after.run_dir))[0] if "train/loss" in row] == [1, 2]


# TensorBoard


def test_tensorboard_holds_the_figures_of_metrics_csv_also_after_a_resumption(tiny_run: TinyRun) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_run("run", max_steps=4, run={"tracking": "tensorboard"})
    result = train(config)
    train(replace(config, run_dir=None, resume=str(result.run_dir), trainer=replace(config.trainer, max_steps=6)))
    events = EventAccumulator(str(result.run_dir / "tensorboard"))
    events.Reload()
    rows = read_metrics(result.run_dir / "metrics.csv")
    names = {name for row in rows for name in row} - {"step"}
    assert names <= set(events.Tags()["scalars"])
    for name in names:
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected
    assert {"config/text_summary", "plan/text_summary"} <= set(events.Tags()["tensors"])


def test_a_tracker_that_is_not_installed_names_the_extra(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with pytest.raises(ConfigError, match="needs the package tensorboard") as caught:
        train(tiny_run("run", run={"tracking": "tensorboard"}))
    assert caught.value.mend == "pip install 'subquad[tensorboard]'"


# The profiler


def test_profile_writes_a_trace_of_three_steps(tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(tiny_run("run", max_steps=10, validate_every_n_steps=0, run={"profile": True}))
    path = RunFolder(result.run_dir).trace
    assert f"steps are profiled in {path}" in capsys.readouterr().err
    events = json.loads(path.read_text())["traceEvents"]
    steps = [event for event in events if str(event.get("name", "")).startswith("Optimizer.step#AdamW.step")]
    assert len(steps) == 3
    assert any("softmax_attention" in str(event.get("name")) for event in events)


def test_a_run_too_short_to_profile_says_so(tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(tiny_run("run", max_steps=2, run={"profile": True}))
    assert "no step is profiled: the run ends before step 6" in capsys.readouterr().err
    assert not RunFolder(result.run_dir).trace.exists()
