"""A run from its configuration to its folder: what it computes, what it records, how it ends and what it refuses."""

from __future__ import annotations

import csv
import importlib.metadata
import itertools
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from child_process import StartProcess, wait_for

from subquad.errors import ConfigError, RunError, SubquadError
from subquad.schema import RunConfig, TrainerConfig
from subquad.training import module as training_module
from subquad.training.checkpoint import newest_checkpoint
from subquad.training.data import build_data
from subquad.training.fit import TrainResult, train
from subquad.training.metrics import read_metrics
from subquad.training.module import TrainingModule, step_seed, summed_cross_entropy
from subquad.training.optimizers import build_optimizer, learning_rate_factor
from subquad.training.room import check_room
from subquad.training.run_folder import RunFolder, read_config
from subquad.training.user_callbacks import build_callbacks

TinyRun = Callable[..., RunConfig]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    found = newest_checkpoint(run_dir / "checkpoints")
    assert found is not None
    return found.weights()


# The whole run


def test_a_run_learns_and_ends_with_its_folder_and_figure(
    tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run("run", max_steps=40, progress_bar=True)
    result = train(config)
    out, err = capsys.readouterr()
    last_line = out.splitlines()[-1]
    assert last_line == str(result)
    assert str(result.run_dir) in last_line
    assert f"{result.validation_loss:.4f}" in last_line
    assert result.validation_bits_per_byte is not None
    assert f"{result.validation_bits_per_byte:.4f} bits per byte" in last_line
    assert result.step == 40
    assert result.validation_loss < math.log(256) - 1, "an untrained model guesses among 256 bytes"
    # Bytes are the tokens here, so both figures say the same in different units.
    assert result.validation_bits_per_byte == pytest.approx(result.validation_loss / math.log(2), rel=1e-6)
    assert "tokens/s" in err
    assert "loss" in err
    assert "val" in err
    check_metrics(RunFolder(result.run_dir))
    check_folder(RunFolder(result.run_dir), result)


def check_metrics(folder: RunFolder) -> None:
    with folder.metrics.open() as file:
        header = next(csv.reader(file))
    assert {"step", "train/loss", "val/loss", "val/bits_per_byte", "tokens_per_s", "learning_rate", "seconds"} <= set(
        header
    )
    rows = read_metrics(folder.metrics)
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)), "one row a step, in order"
    assert steps == sorted({1, 40} | set(range(3, 41, 3)) | set(range(6, 41, 6)))
    assert [int(row["step"]) for row in rows if "val/loss" in row] == [6, 12, 18, 24, 30, 36, 40]
    factor = learning_rate_factor(TrainerConfig(max_steps=40, learning_rate_warmup_steps=3))
    for row in rows:
        assert row["learning_rate"] == pytest.approx(3e-3 * factor(int(row["step"]) - 1), rel=1e-6)
        assert row["tokens_per_s"] > 0
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def check_folder(folder: RunFolder, result: TrainResult) -> None:
    config = read_config(folder, "run_dir")
    assert (config.model.vocab_size, config.model.context_len) == (256, 32), "what the data decided is recorded"
    assert folder.config.read_text().startswith("format_version: 1")
    for path in (folder.plan, folder.environment, folder.data, folder.path / "tokenizer.json"):
        assert json.loads(path.read_text())["format_version"] == 1, path
    environment = json.loads(folder.environment.read_text())
    assert environment["packages"]["torch"] == importlib.metadata.version("torch")
    assert environment["device"].startswith("cpu")
    report = folder.report.read_text()
    assert f"{result.validation_bits_per_byte:.4f} bits per byte" in report
    unigram = build_data(config).unigram_bits_per_byte
    assert f"{unigram:.4f} bits per byte" in report
    assert "softmax_attention" in report
    assert "sdpa" in report or "reference" in report
    assert "(loss.png)" in report
    assert folder.loss_curve.read_bytes().startswith(b"\x89PNG")
    assert not list(folder.path.rglob(".*")), "no temporary file is left"
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-36", "step-40"]


def test_two_runs_of_one_configuration_are_equal_and_another_seed_is_not(tiny_run: TinyRun) -> None:
    first, second = train(tiny_run("first", max_steps=4)), train(tiny_run("second", max_steps=4))
    other = train(tiny_run("other", max_steps=4, run={"seed": 1}))
    assert first.validation_loss == second.validation_loss
    assert all(torch.equal(weights(first.run_dir)[name], tensor) for name, tensor in weights(second.run_dir).items())
    assert first.validation_loss != other.validation_loss


def test_accumulated_micro_batches_are_one_step(tiny_run: TinyRun) -> None:
    """Two micro-batches of 2 rows consume the rows of one of 4, and reach its weights up to rounding."""
    data = {"name": "synthetic", "vocab_size": 32, "sizes": [4]}  # every row predicts the same number of tokens
    whole = train(tiny_run("whole", max_steps=3, batch_size=4, run={"data": data}))
    parts = train(tiny_run("parts", max_steps=3, batch_size=2, accumulate=2, run={"data": data}))
    whole_ids, parts_ids = ((RunFolder(run.run_dir).samples(0)).read_text() for run in (whole, parts))
    assert whole_ids == parts_ids
    # AdamW divides by the square root of tiny second moments, so rounding is amplified: compared by loss and norm.
    for left, right in zip(read_metrics(whole.run_dir / "metrics.csv"), read_metrics(parts.run_dir / "metrics.csv")):
        assert left["train/loss"] == pytest.approx(right["train/loss"], rel=1e-4)
        assert left["gradient_norm"] == pytest.approx(right["gradient_norm"], rel=1e-3)


def test_a_synthetic_task_has_no_bits_per_byte(tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"name": "synthetic", "task": "copying", "sizes": [4]}
    result = train(tiny_run("copying", max_steps=2, run={"data": data}))
    assert result.validation_bits_per_byte is None
    assert "bits per byte" not in capsys.readouterr().out
    assert "bits per byte" not in (result.run_dir / "report.md").read_text()


def test_activation_checkpointing_changes_no_number(tiny_run: TinyRun) -> None:
    plain = train(tiny_run("plain", max_steps=3))
    checkpointed = train(tiny_run("checkpointed", max_steps=3, activation_checkpointing=True))
    assert plain.validation_loss == checkpointed.validation_loss


def test_bfloat16_trains_where_it_is_asked_for(tiny_run: TinyRun) -> None:
    exact = train(tiny_run("exact", max_steps=3))
    half = train(tiny_run("half", max_steps=3, precision="bfloat16"))
    assert half.validation_loss != exact.validation_loss
    assert half.validation_loss == pytest.approx(exact.validation_loss, abs=0.05)
    assert {tensor.dtype for tensor in weights(half.run_dir).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_reaches_the_same_loss(tiny_run: TinyRun) -> None:
    eager = train(tiny_run("eager", max_steps=6))
    compiled = train(tiny_run("compiled", max_steps=6, run={"compile": True}))
    assert compiled.validation_loss == pytest.approx(eager.validation_loss, rel=1e-3)
    assert weights(compiled.run_dir).keys() == weights(eager.run_dir).keys()


def test_a_time_limit_ends_the_run_with_a_checkpoint_and_a_validation(tiny_run: TinyRun) -> None:
    result = train(tiny_run("short", max_steps=100_000, max_seconds=0.4, every=0))
    assert 1 <= result.step < 100_000
    assert [path.name for path in (result.run_dir / "checkpoints").iterdir()] == [f"step-{result.step}"]
    assert read_metrics(result.run_dir / "metrics.csv")[-1]["val/loss"] == pytest.approx(result.validation_loss)


def test_a_lightning_callback_of_the_recipe_watches_the_validation(tiny_run: TinyRun) -> None:
    stop = {
        "_target_": "lightning.pytorch.callbacks.EarlyStopping",
        "monitor": "val/loss", "stopping_threshold": 100.0,
    }  # fmt: skip
    assert train(tiny_run("stopped", run={"callbacks": [stop]})).step == 6


# The pieces


def test_the_learning_rate_warms_up_and_comes_down_to_its_share() -> None:
    config = TrainerConfig(max_steps=100, learning_rate_warmup_steps=10, final_learning_rate_fraction=0.2)
    factor = learning_rate_factor(config)
    rates = [factor(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.6)
    assert rates[100] == factor(500) == pytest.approx(0.2)
    assert all(before >= after for before, after in itertools.pairwise(rates[10:]))
    assert learning_rate_factor(TrainerConfig(max_steps=2, learning_rate_warmup_steps=50))(0) == 0.5


def test_the_loss_counts_only_targets_that_are_predicted() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    targets = torch.tensor([[1, -100, 3, 4, -100], [-100, 0, 6, -100, 2]])
    nats, count = summed_cross_entropy(logits, targets)
    by_hand = -sum(
        math.log(float(logits[b, t].exp()[targets[b, t]] / logits[b, t].exp().sum()))
        for b in range(2) for t in range(5) if targets[b, t] >= 0
    )  # fmt: skip
    assert float(nats) == pytest.approx(by_hand, rel=1e-5)
    assert int(count) == 6


def test_the_optimizer_decays_what_the_model_says() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(
        {"name": "adamw", "weight_decay": 0.3, "lr": 1e-2},
        lambda decay: [{"params": [matrix], "weight_decay": decay}, {"params": [vector], "weight_decay": 0.0}],
    )
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((2, 2), 1 - 1e-2 * 0.3))
    assert torch.equal(vector, torch.ones(2))


def test_randomness_depends_on_position_and_rank_alone() -> None:
    seeds = {step_seed(seed, batch, rank) for seed in range(3) for batch in range(50) for rank in range(4)}
    assert len(seeds) == 600
    assert step_seed(1, 2, 3) == step_seed(1, 2, 3)


# Runs that end early


def test_a_loss_that_is_no_number_is_an_error_that_keeps_the_last_checkpoint(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        nats, count = summed_cross_entropy(logits, targets)
        return (nats * math.nan if len(calls) == 6 else nats), count

    calls: list[int] = []
    monkeypatch.setattr(training_module, "summed_cross_entropy", poisoned)
    config = tiny_run("poisoned", validate_every_n_steps=100)
    with pytest.raises(RunError, match="not finite") as caught:
        train(config)
    assert caught.value.where.startswith("step 6; ")
    assert "nothing that a repetition of the step finds" in caught.value.what
    assert "optimizer.lr" in caught.value.mend
    folder = RunFolder(Path(str(config.run_dir)))
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-4"]
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder.path).values())
    assert [int(row["step"]) for row in read_metrics(folder.metrics)] == [1, 3]


def test_an_exception_in_mid_run_leaves_metrics_and_the_last_checkpoint(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run("broken")
    fail_at(7, monkeypatch)
    with pytest.raises(ArithmeticError, match="step 7"):
        train(config)
    folder = RunFolder(Path(str(config.run_dir)))
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-4"]
    assert [int(row["step"]) for row in read_metrics(folder.metrics)] == [1, 3, 6]


def fail_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TrainingModule.training_step

    def training_step(self: TrainingModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step + 1 == step:
            raise ArithmeticError(f"at step {step}")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", training_step)


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_finishes_the_step_and_keeps_a_checkpoint(
    number: signal.Signals,
    word: str,
    tiny_run: TinyRun,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C, and what a scheduler sends before it takes the machine away."""
    original = TrainingModule.training_step

    def training_step(self: TrainingModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step + 1 == 3:
            signal.raise_signal(number)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    before = signal.getsignal(number)
    config = tiny_run("stopped")
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as caught:
        train(config)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 143
    assert signal.getsignal(number) is before
    folder = RunFolder(Path(str(config.run_dir)))
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-3"]
    assert f"{word} after step 3; go on with resume={folder.path}\n" in capsys.readouterr().err
    monkeypatch.undo()
    straight = train(tiny_run("straight"))
    resumed = train(tiny_run("stopped", run={"resume": config.run_dir}))
    assert resumed.validation_loss == straight.validation_loss


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.slow),
    ],
)
def test_a_signal_on_the_command_line_has_its_exit_code(
    number: signal.Signals, code: int, word: str, tiny_corpus: Path, tmp_path: Path, start_process: StartProcess
) -> None:
    overrides = [
        "model=transformer", "model.d_model=32", "model.num_layers=2", "data=text_files", f"data.files=[{tiny_corpus}]",
        "trainer=smoke", "trainer.max_steps=100000", "checkpoint.every_n_steps=5", "compiler.measure=false",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    process = start_process([sys.executable, "-m", "subquad", "train", *overrides])
    wait_for(lambda: list((tmp_path / "run" / "checkpoints").glob("step-*")), process)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code, err
    assert f"{word} after step" in err
    assert "Traceback" not in err
    assert newest_checkpoint(tmp_path / "run" / "checkpoints") is not None


# What is refused, before anything is written


@pytest.mark.parametrize(
    ("trainer", "run", "where"),
    [
        ({"max_steps": 0}, {}, "trainer.max_steps"),
        ({"precision": "float8"}, {}, "trainer.precision"),
        ({"strategy": "dp"}, {}, "trainer.strategy"),
        ({"accelerator": "tpu"}, {}, "trainer.accelerator"),
        ({"final_learning_rate_fraction": 2.0}, {}, "trainer.final_learning_rate_fraction"),
        ({}, {"tracking": "wanbd"}, "tracking"),
        ({}, {"optimizer": {"name": "adamv"}}, "optimizer.name"),
        ({}, {"optimizer": {"name": "adamw", "lr": -1.0}}, "optimizer"),
        ({}, {"optimizer": {"name": "adamw", "learning_rate": 1.0}}, "optimizer.learning_rate"),
        ({}, {"kernel": {"softmax_attention": "nothing"}}, "kernel.softmax_attention"),
        ({}, {"target": "h100"}, "target=h100"),
        ({}, {"plan": "missing.json"}, "plan"),
        ({}, {"callbacks": [{"_target_": "os.system", "command": "true"}]}, "callbacks[0]._target_"),
        ({"seq_len": 10**6}, {}, None),
        ({}, {"data": {"name": "text_files", "files": ["nowhere.txt"]}}, None),
    ],
)
def test_a_bad_setting_is_named_and_nothing_is_written(
    tiny_run: TinyRun, trainer: dict[str, Any], run: dict[str, Any], where: str | None
) -> None:
    config = tiny_run("refused", run=run, **trainer)
    with pytest.raises(SubquadError) as caught:
        train(config)
    assert caught.value.exit_code == 2
    assert caught.value.mend
    if where is not None:
        assert caught.value.where.startswith(where)
    assert not Path(str(config.run_dir)).exists()


def test_a_misspelt_tracker_gets_a_suggestion(tiny_run: TinyRun) -> None:
    with pytest.raises(ConfigError) as caught:
        train(tiny_run("refused", run={"tracking": "wandbb"}))
    assert "did you mean 'wandb'" in caught.value.mend


def test_a_folder_that_holds_a_run_is_not_written_over(tiny_run: TinyRun) -> None:
    config = tiny_run("once", max_steps=1)
    train(config)
    before = {path: path.stat().st_mtime_ns for path in Path(str(config.run_dir)).rglob("*")}
    with pytest.raises(ConfigError, match="already holds a run") as caught:
        train(tiny_run("once", max_steps=1))
    assert f"resume={config.run_dir}" in caught.value.mend
    assert {path: path.stat().st_mtime_ns for path in Path(str(config.run_dir)).rglob("*")} == before


@pytest.mark.parametrize("place", ["file.txt/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_refused(tiny_run: TinyRun, tmp_path: Path, place: str) -> None:
    (tmp_path / "file.txt").write_text("in the way")
    config = tiny_run("unused")
    config.run_dir = place if place.startswith("/") else str(tmp_path / place)
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        train(config)
    assert caught.value.where.startswith("run_dir=")


def test_without_a_run_dir_runs_are_sorted_by_date_and_never_collide(tiny_run: TinyRun, tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        config = tiny_run("unused", max_steps=1)
        config.run_dir = None
        results.append(train(config).run_dir)
    assert results[0] != results[1]
    for run_dir in results:
        date, name = run_dir.relative_to(tmp_path / "runs").parts
        time.strptime(date, "%Y-%m-%d")
        assert "-tiny" in name


def test_on_a_terminal_there_is_a_bar(
    tiny_run: TinyRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    train(tiny_run("run", max_steps=6, progress_bar=True))
    err = capsys.readouterr().err
    assert "6/6" in err
    for word in ("tokens/s", "loss", "val", "bits/byte"):
        assert word in err


def test_callbacks_outside_the_allow_list_are_never_imported() -> None:
    with pytest.raises(ConfigError, match="may not be"):
        build_callbacks([{"_target_": "lightning.pytorch.callbacks_of_mine.Evil"}])
    with pytest.raises(ConfigError, match="is no callback"):
        build_callbacks([{"_target_": "lightning.pytorch.callbacks.torch"}])
    with pytest.raises(ConfigError, match="unexpected keyword"):
        build_callbacks([{"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitr": "x"}])
    with pytest.raises(ConfigError, match="names no class"):
        build_callbacks(["EarlyStopping"])


# Weights & Biases


def test_wandb_offline_holds_the_rows_of_metrics_csv(tiny_run: TinyRun) -> None:
    result = train(tiny_run("tracked", max_steps=6, run={"tracking": "wandb"}))
    (path,) = result.run_dir.glob("wandb/offline-run-*/run-*.wandb")
    logged, settings = wandb_records(path)
    rows = read_metrics(result.run_dir / "metrics.csv")
    assert [row["_step"] for row in logged] == [row["step"] for row in rows] == [1, 3, 6]
    for left, right in zip(logged, rows):
        assert left["train/loss"] == pytest.approx(right["train/loss"], rel=1e-6)
    assert logged[-1]["val/bits_per_byte"] == pytest.approx(result.validation_bits_per_byte, rel=1e-6)
    assert settings["trainer"]["max_steps"] == 6


def wandb_messages(path: Path) -> list[Any]:
    """The records of an offline file: blocks of 32 KiB, frames crc32 + length + type."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, offset, block = path.read_bytes(), 7, 1 << 15
    messages, partial = [], b""
    while offset + 7 <= len(content):
        if block - offset % block < 7:
            offset += block - offset % block
            continue
        length, kind = int.from_bytes(content[offset + 4 : offset + 6], "little"), content[offset + 6]
        partial += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            messages.append(partial)
            partial = b""
    return [Record.FromString(message) for message in messages]


def wandb_records(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The history and the configuration in an offline file."""
    history, settings = [], {}
    for record in wandb_messages(path):
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            history.append(items)
        if record.HasField("run"):
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return history, settings


# The example


def test_the_example_trains_in_seconds(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parent.parent / "examples" / "01_train_on_cpu.py"
    result = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert "softmax_attention runs" in result.stdout
    last_line = result.stdout.splitlines()[-1]
    assert last_line.startswith(str(tmp_path / "runs"))
    assert "bits per byte" in last_line


def test_a_mixer_that_draws_orthogonal_matrices_is_counted_without_drawing(tiny_run: Callable[..., RunConfig]) -> None:
    config = tiny_run("run")
    mixers = {"rwkv_channel_mix": {"mixer": "rwkv_channel_mix"}}
    sizes: dict[str, Any] = {"vocab_size": 8, "context_len": 32}
    config.model = replace(config.model, mixers=mixers, schedule=["rwkv_channel_mix"], **sizes)
    check_room(config, torch.device("cpu"))
