"""A run that was killed goes on as if nothing had happened; a folder that holds another run is refused."""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from child_process import Child, wait_for
from compared_runs import assert_same_run, weights

from subquad.compiler.plan import Plan
from subquad.errors import ResumeError
from subquad.schema import ChannelMixerConfig, ModelConfig, RunConfig, TrainerConfig
from subquad.training import fit, run_folder
from subquad.training.checkpoint import newest_checkpoint
from subquad.training.fit import train
from subquad.training.metrics import read_metrics
from subquad.training.module import TrainingModule
from subquad.training.optimizers import learning_rate_factor
from subquad.training.run_folder import RunFolder

TinyRun = Callable[..., RunConfig]


pytestmark = pytest.mark.usefixtures("one_thread")


def fail_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run dies within this step."""
    original = TrainingModule.training_step

    def training_step(self: TrainingModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step + 1 == step:
            raise ArithmeticError
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", training_step)


def run_until(step: int, config: RunConfig) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        fail_at(step, monkeypatch)
        with pytest.raises(ArithmeticError):
            train(config)


def test_a_killed_process_resumes_bit_for_bit(
    tiny_run: TinyRun, start_run: Callable[[RunConfig], Child], tmp_path: Path
) -> None:
    settings = {"max_steps": 40, "accumulate": 2, "every": 5, "validate_every_n_steps": 10}
    killed = tmp_path / "killed"
    process = start_run(tiny_run("killed", **settings))
    wait_for((killed / "checkpoints" / "step-10" / "manifest.json").exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    # The kill landed in mid-run: after a checkpoint, before the end, and nothing was tidied up.
    assert process.returncode == -signal.SIGKILL
    at_kill = newest_checkpoint(killed / "checkpoints")
    assert at_kill is not None
    assert 10 <= at_kill.step < 40
    assert json.loads((at_kill.path / "manifest.json").read_text())["step"] == at_kill.step
    assert all(row["step"] < 40 for row in read_metrics(killed / "metrics.csv"))
    assert not (killed / "report.md").exists()
    plan = (killed / "plan.json").read_text()

    resumed = train(tiny_run("killed", run={"resume": str(killed)}, **settings))
    assert resumed.step == 40
    assert (killed / "plan.json").read_text() == plan
    straight = train(tiny_run("straight", run={"plan": str(killed / "plan.json")}, **settings))
    assert resumed.validation_loss == straight.validation_loss
    assert_same_run(killed, straight.run_dir)


@pytest.mark.parametrize("stopped_at", [4, 5, 7, 12])
def test_a_run_resumes_from_any_step(tiny_run: TinyRun, stopped_at: int) -> None:
    """Checkpoints at 4, 8 and 12; validation at 6 and 12."""
    straight = train(tiny_run("straight"))
    config = tiny_run("stopped")
    run_until(stopped_at, config)
    again = tiny_run("stopped", run={"resume": config.run_dir})
    if stopped_at <= 4:
        with pytest.raises(ResumeError, match="no checkpoint"):
            train(again)
        return
    train(again)
    assert_same_run(Path(str(config.run_dir)), straight.run_dir)


def test_scout_resumes_bit_for_bit(tiny_run: TinyRun) -> None:
    """Mamba and attention over segment summaries, in turn, on packed documents."""
    model = ModelConfig(
        name="scout",
        d_model=32,
        num_layers=2,
        schedule=["mamba", "segment_attention"],
        mixers={
            "mamba": {"mixer": "mamba", "state_dim": 4},
            "segment_attention": {"mixer": "segment_attention", "segment_len": 5, "num_heads": 2},
        },
        channel_mixer=ChannelMixerConfig(d_hidden=64),
    )
    straight = train(tiny_run("straight", max_steps=7, run={"model": model}))
    config = tiny_run("stopped", max_steps=7, run={"model": model})
    run_until(6, config)
    train(tiny_run("stopped", max_steps=7, run={"model": model, "resume": config.run_dir}))
    assert_same_run(Path(str(config.run_dir)), straight.run_dir)


def test_what_is_random_within_the_model_resumes_too(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout after the embedding: the masks of the resumed steps are those of the uninterrupted run."""
    build_model = fit.build_model

    def with_dropout(config: Any) -> Any:
        model = build_model(config)
        model.embedding.register_forward_hook(
            lambda module, arguments, output: torch.nn.functional.dropout(output, 0.3, module.training)
        )
        return model

    plain = train(tiny_run("plain"))
    monkeypatch.setattr(fit, "build_model", with_dropout)
    straight = train(tiny_run("straight"))
    assert straight.validation_loss != plain.validation_loss
    config = tiny_run("stopped")
    run_until(7, config)
    # Another number of validations in between must not disturb the masks either.
    train(tiny_run("stopped", run={"resume": config.run_dir}, validate_every_n_steps=2))
    for name, tensor in weights(config.run_dir).items():
        assert torch.equal(tensor, weights(straight.run_dir)[name]), name


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_used(tiny_run: TinyRun) -> None:
    straight = train(tiny_run("straight"))
    config = tiny_run("stopped")
    run_until(10, config)
    newest = Path(str(config.run_dir)) / "checkpoints" / "step-8" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tiny_run("stopped", run={"resume": config.run_dir}))
    told = [str(one.message) for one in caught if "damaged" in str(one.message)]
    assert len(told) == 1, told
    assert "step-8" in told[0]
    assert "the one before it is used" in told[0]
    assert_same_run(Path(str(config.run_dir)), straight.run_dir)


def test_half_written_checkpoints_are_removed_on_resume(tiny_run: TinyRun) -> None:
    config = tiny_run("stopped")
    run_until(6, config)
    half = Path(str(config.run_dir)) / "checkpoints" / ".unfinished-step-8-1"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    train(tiny_run("stopped", run={"resume": config.run_dir}))
    assert not half.exists()


def test_a_row_cut_off_by_the_kill_is_dropped(tiny_run: TinyRun) -> None:
    straight = train(tiny_run("straight"))
    config = tiny_run("stopped")
    run_until(7, config)
    with RunFolder(Path(str(config.run_dir))).metrics.open("a") as file:
        file.write("7,5.1,")
    train(tiny_run("stopped", run={"resume": config.run_dir}))
    assert_same_run(Path(str(config.run_dir)), straight.run_dir)


def test_a_finished_run_resumes_to_its_validation(tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run("done", max_steps=5)
    first = train(config)
    before = RunFolder(first.run_dir).metrics.read_text()
    assert "nothing is left to train" not in capsys.readouterr().err
    again = train(tiny_run("done", max_steps=5, progress_bar=True, run={"resume": config.run_dir}))
    shown = capsys.readouterr().err
    assert "nothing is left to train: the run is at step 5 of 5; trainer.max_steps=N goes on" in shown
    assert "step      0" not in shown, "a line of a step that was not taken"
    assert again.train_loss is None
    assert (again.step, again.validation_loss) == (first.step, first.validation_loss)
    assert RunFolder(first.run_dir).metrics.read_text() == before


def test_a_finished_run_can_be_made_longer(tiny_run: TinyRun) -> None:
    config = tiny_run("longer", max_steps=5)
    train(config)
    result = train(tiny_run("longer", max_steps=9, log_every_n_steps=1, run={"resume": config.run_dir}))
    assert result.step == 9
    ids = [int(line.split(",")[0]) for line in RunFolder(result.run_dir).samples(0).read_text().splitlines()[1:]]
    assert ids == list(range(1, 10))
    factor = learning_rate_factor(TrainerConfig(max_steps=9, learning_rate_warmup_steps=3))
    for row in read_metrics(result.run_dir / "metrics.csv"):
        if row["step"] > 5:
            assert row["learning_rate"] == pytest.approx(3e-3 * factor(int(row["step"]) - 1), rel=1e-6)


def test_the_plan_of_the_folder_is_followed(tiny_run: TinyRun) -> None:
    config = tiny_run("pinned", run={"kernel": {"softmax_attention": "reference"}})
    run_until(6, config)
    again = tiny_run("pinned", run={"kernel": {"softmax_attention": "reference"}, "resume": config.run_dir})
    train(again)
    plan = Plan.load(RunFolder(Path(str(config.run_dir))).plan)
    chosen = {choice.chosen for choice in plan.choices if choice.used and choice.operator == "softmax_attention"}
    assert chosen == {"reference"}


def test_a_stale_plan_is_named(tiny_run: TinyRun) -> None:
    config = tiny_run("stale")
    run_until(6, config)
    path = RunFolder(Path(str(config.run_dir))).plan
    plan = json.loads(path.read_text())
    plan["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(plan))
    with pytest.warns(UserWarning, match=r"plan is stale \(.*torch 1.0 -> "):
        train(tiny_run("stale", run={"resume": config.run_dir}))


# What is refused


def test_a_folder_of_another_model_is_refused_with_the_keys_that_differ(tiny_run: TinyRun) -> None:
    config = tiny_run("first", max_steps=1)
    train(config)
    other = tiny_run("first", max_steps=1, batch_size=4, run={"resume": config.run_dir})
    other.model.d_model = 64
    before = {path: path.stat().st_mtime_ns for path in Path(str(config.run_dir)).rglob("*")}
    with pytest.raises(ResumeError) as caught:
        train(other)
    assert "model.d_model is 32 in the run and 64 here" in caught.value.what
    assert "trainer.batch_size is 2 in the run and 4 here" in caught.value.what
    assert caught.value.where == f"resume={config.run_dir}"
    assert "trainer.max_steps" in caught.value.mend
    assert {path: path.stat().st_mtime_ns for path in Path(str(config.run_dir)).rglob("*")} == before


def test_on_the_command_line_only_what_is_named_counts(tiny_run: TinyRun) -> None:
    config = tiny_run("named", max_steps=2)
    train(config)
    # `train resume=DIR trainer.max_steps=3` composes the default recipe around it, which nobody asked for.
    defaults = RunConfig(resume=config.run_dir)
    defaults.trainer.max_steps = 3
    result = train(defaults, overrides=[f"resume={config.run_dir}", "trainer.max_steps=3"])
    assert result.step == 3
    defaults.model.d_model = 48
    for override in ("model=other", "model.d_model=48", "+model.d_model=48", "x@model=other"):
        with pytest.raises(ResumeError, match=r"model.d_model is 32 in the run and 48 here"):
            train(defaults, overrides=[f"resume={config.run_dir}", override])


def test_data_that_have_changed_are_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    corpus = tmp_path / "own.txt"
    corpus.write_text("one two three four five\n\n" * 200)
    data = {"name": "text_files", "files": [str(corpus)]}
    config = tiny_run("changed", max_steps=2, run={"data": data})
    train(config)
    corpus.write_text("six seven eight nine ten\n\n" * 200)
    with pytest.raises(ResumeError, match="data have changed"):
        train(tiny_run("changed", max_steps=3, run={"data": data, "resume": config.run_dir}))


@pytest.mark.parametrize("content", [None, "", "model: [", "format_version: 9\n", "format_version: 1\nmodle: {}\n"])
def test_what_is_no_run_folder_is_refused(tiny_run: TinyRun, tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        (folder / "config.yaml").write_text(content)
    with pytest.raises(Exception, match=r".") as caught:
        train(tiny_run("folder", run={"resume": str(folder)}))
    assert getattr(caught.value, "exit_code", None) == 2, caught.value
    assert str(folder) in str(caught.value)


def test_a_run_that_another_process_trains_is_refused(
    tiny_run: TinyRun, start_run: Callable[[RunConfig], Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run("held", max_steps=100_000, every=1, keep=1)
    path = Path(str(config.run_dir))
    process = start_run(config)
    wait_for(lambda: newest_checkpoint(path / "checkpoints"), process)
    again = tiny_run("held", max_steps=100_000, every=1, keep=1, run={"resume": config.run_dir})
    with monkeypatch.context() as impatient:
        impatient.setattr(run_folder, "HELD_WAIT_S", 0.1)
        with pytest.raises(ResumeError, match="another process trains this run"):
            train(again)
    process.kill()
    process.communicate()
    at_kill = newest_checkpoint(path / "checkpoints")
    assert at_kill is not None
    again.trainer.max_steps = at_kill.step + 1
    assert train(again).step == at_kill.step + 1
