"""Faults in mid-run: what the machine, the disk or a kernel does to a run, and what is left of it afterwards."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mortal_run
import pytest
import torch
from compared_runs import assert_same_run, weights

from subquad.compiler.plan import Plan, StepPrediction
from subquad.compiler.predict_step import predict_step
from subquad.compiler.target import Target, resolve_target
from subquad.errors import RunError
from subquad.schema import RunConfig
from subquad.training import fit, run_folder
from subquad.training.checkpoint import newest_checkpoint
from subquad.training.fit import train
from subquad.training.module import TrainingModule
from subquad_kernels.catalogue import CATALOGUE

TinyRun = Callable[..., RunConfig]


pytestmark = pytest.mark.usefixtures("one_thread")


def at_step(step: int, monkeypatch: pytest.MonkeyPatch, happens: Callable[[TrainingModule], None]) -> None:
    """Something happens as this step begins."""
    original = TrainingModule.training_step

    def training_step(self: TrainingModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step + 1 == step:
            happens(self)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", training_step)


# The disk


@pytest.fixture
def full_disk() -> Iterator[Callable[[object], None]]:
    """From the call on the system lets no file grow beyond 20,000 bytes, whoever writes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_run_with_its_last_checkpoint_whole(
    tiny_run: TinyRun, full_disk: Callable[[object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(tiny_run("straight"))
    config = tiny_run("full")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(6, monkeypatch, full_disk)
    with pytest.raises(RunError, match=r"cannot be written: .*too large") as caught:
        train(config)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"resume={config.run_dir}" in caught.value.mend
    folder = run_folder.RunFolder(Path(str(config.run_dir)))
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-4"], "what was begun takes no room"
    monkeypatch.undo()
    train(replace(config, resume=config.run_dir))
    assert_same_run(folder.path, straight.run_dir)


def test_a_run_folder_that_cannot_be_written_any_more_is_said(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run("locked", max_steps=2)
    train(config)

    def locked(path: Path, text: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(run_folder, "write_text", locked)
    with pytest.raises(RunError, match="Read-only file system") as caught:
        train(tiny_run("locked", max_steps=3, run={"resume": config.run_dir}))
    assert caught.value.where == str(Path(str(config.run_dir)) / "config.yaml")


def test_a_home_that_cannot_be_written_costs_the_cache_and_not_the_run(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(tiny_run("straight", max_steps=2))
    monkeypatch.setenv("SUBQUAD_CACHE", "/proc/subquad")
    with pytest.warns(UserWarning, match="no cache: /proc/subquad cannot be written"):
        without = train(tiny_run("without", max_steps=2))
    assert without.validation_loss == straight.validation_loss


@pytest.mark.slow  # each checks its kernels anew; the token cache alone is tested in test_sources.py
def test_two_runs_that_begin_together_share_one_cache(tiny_run: TinyRun, tmp_path: Path) -> None:
    runs = [mortal_run.start(tiny_run(name, max_steps=4), cache=tmp_path / "cache") for name in ("one", "two")]
    for run in runs:
        run.join()
        assert run.exitcode == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert len(list((tmp_path / "cache" / "tokens").glob("*.tokens"))) == 2


# Numbers that are none


class NanBackward(torch.autograd.Function):
    """The identity, with gradients that are no numbers."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


def poison(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor], steps: range) -> None:
    """Within these steps the second block's channel mixer returns something else."""
    build_model, step = fit.build_model, [0]
    original = TrainingModule.training_step

    def training_step(self: TrainingModule, batch: Any, batch_idx: int) -> torch.Tensor:
        step[0] = self.trainer.global_step + 1
        return original(self, batch, batch_idx)

    def poisoned(config: Any) -> Any:
        model = build_model(config)
        model.get_submodule("blocks.1.channel_mixer").register_forward_hook(
            lambda module, arguments, output: change(output) if module.training and step[0] in steps else output
        )
        return model

    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    monkeypatch.setattr(fit, "build_model", poisoned)


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda output: output * float("inf"), "the output of blocks.1.channel_mixer (ChannelMixer)"),
        (NanBackward.apply, "the gradient of blocks.1.channel_mixer."),
    ],
    ids=["forward", "backward"],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_no_number_is_traced_to_its_layer_and_the_batch_is_kept(
    change: Callable[[torch.Tensor], torch.Tensor],
    first: str,
    accumulate: int,
    tiny_run: TinyRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_run("poisoned", max_steps=6, accumulate=accumulate)
    poison(monkeypatch, change, range(6, 7))
    with pytest.raises(RunError, match="not finite") as caught:
        train(config)
    assert f"first {first}" in caught.value.what
    folder = run_folder.RunFolder(Path(str(config.run_dir)))
    kept = torch.load(folder.nonfinite(6, 0), weights_only=True)
    assert str(folder.nonfinite(6, 0)) in caught.value.where
    monkeypatch.undo()
    resumed = train(replace(config, resume=config.run_dir))
    recorded = folder.samples(0).read_text().splitlines()[-1].split(",")
    assert recorded == ["6", " ".join(str(i) for batch in kept["batches"] for i in batch["sample_ids"].tolist())]
    assert resumed.validation_loss == train(tiny_run("straight", max_steps=6, accumulate=accumulate)).validation_loss


def test_such_a_step_is_skipped_where_that_is_asked_for(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, lambda output: output * float("nan"), range(6, 8))
    config = tiny_run("skipping", nonfinite="skip")
    result = train(config)
    assert result.step == 12
    assert all(torch.isfinite(tensor).all() for tensor in weights(result.run_dir).values())
    said = capsys.readouterr().err
    assert [f"step {step} is skipped" in said for step in range(5, 9)] == [False, True, True, False]
    found = newest_checkpoint(result.run_dir / "checkpoints")
    assert found is not None
    assert {float(state["step"]) for state in found.trainer_state()["optimizer"]["state"].values()} == {10.0}


def test_a_model_that_gives_no_number_any_more_is_not_skipped_for_ever(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda output: output * float("nan"), range(3, 100))
    with pytest.raises(RunError, match="11 steps in a row were") as caught:
        train(tiny_run("skipping", nonfinite="skip", max_steps=20))
    assert caught.value.where.startswith("step 13; ")


# Kernels


def break_kernel(monkeypatch: pytest.MonkeyPatch, name: str, phase: str, error: Exception) -> None:
    """From now on a kernel of softmax attention raises."""

    def breaks(*arguments: Any, **named: Any) -> Any:
        raise error

    monkeypatch.setattr(CATALOGUE.kernel("softmax_attention", name).torch_half, phase, breaks)


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("step", [2, 7], ids=["before any checkpoint", "after one"])
def test_a_kernel_that_fails_in_mid_run_is_denied_and_the_run_goes_back(
    phase: str, step: int, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train(tiny_run("straight"))
    plan = Plan.load(straight.run_dir / "plan.json")
    (chosen,) = {choice.chosen for choice in plan.choices if choice.used and choice.operator == "softmax_attention"}
    assert chosen != "reference"

    at_step(step, monkeypatch, lambda _: break_kernel(monkeypatch, chosen, phase, torch.OutOfMemoryError("no room")))
    capsys.readouterr()
    result = train(tiny_run("broken"))
    said = capsys.readouterr().err
    back = "back to the beginning" if step == 2 else "back to the checkpoint of step 4"
    assert f"the kernel softmax_attention/{chosen} failed (OutOfMemoryError: no room); it is denied" in said
    assert back in said
    assert result.step == 12
    assert result.validation_loss == pytest.approx(straight.validation_loss, rel=1e-4)
    config = run_folder.read_config(run_folder.RunFolder(result.run_dir), "run_dir")
    assert config.deny == [f"softmax_attention/{chosen}"]
    after_all = Plan.load(result.run_dir / "plan.json")
    assert chosen not in {choice.chosen for choice in after_all.choices if choice.operator == "softmax_attention"}
    others = [choice for choice in plan.choices if choice.operator != "softmax_attention"]
    assert [choice for choice in after_all.choices if choice.operator != "softmax_attention"] == others
    ids = [
        int(line.split(",")[0]) for line in run_folder.RunFolder(result.run_dir).samples(0).read_text().splitlines()[1:]
    ]
    assert ids == list(range(1, 13))


def test_after_a_denial_measured_steps_stand_beside_the_plan_that_runs(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run("broken")
    folder, failed = run_folder.RunFolder(Path(str(config.run_dir))), list[str]()

    def attention(plan: Plan) -> list[str]:
        return sorted({one.chosen for one in plan.choices if one.used and one.operator == "softmax_attention"})

    def predicted(config: RunConfig, target: Target, plan: Plan) -> StepPrediction:
        return replace(predict_step(config, target, plan), notes=tuple(attention(plan)))

    def fails_once(module: TrainingModule) -> None:
        if not failed:
            failed.extend(attention(Plan.load(folder.plan)))
            break_kernel(monkeypatch, failed[0], "forward", torch.OutOfMemoryError("no room"))

    monkeypatch.setattr(fit, "predict_step", predicted)
    at_step(7, monkeypatch, fails_once)
    train(config)
    plan = Plan.load(folder.plan)
    assert plan.prediction is not None
    assert failed and attention(plan) and not {*failed} & {*attention(plan)}
    assert run_folder.read_json(folder.prediction)["predicted"]["notes"] == attention(plan)
    assert list(plan.prediction.notes) == attention(plan)
    assert "denied since the run began" in folder.page.read_text(encoding="utf-8")


def test_a_pinned_kernel_that_fails_ends_the_run_and_is_named(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run("pinned", run={"kernel": {"softmax_attention": "reference"}})
    at_step(3, monkeypatch, lambda _: break_kernel(monkeypatch, "reference", "forward", ValueError("odd")))
    with pytest.raises(
        RunError, match=r"softmax_attention/reference failed \(ValueError: odd\), and the recipe pins it"
    ):
        train(config)


def test_a_resumed_run_may_deny_a_kernel(tiny_run: TinyRun) -> None:
    config = tiny_run("denying", max_steps=4)
    chosen = {choice.chosen for choice in Plan.load(train(config).run_dir / "plan.json").choices if choice.used}
    train(tiny_run("denying", max_steps=6, run={"resume": config.run_dir, "deny": sorted(chosen - {"reference"})}))
    after = Plan.load(Path(str(config.run_dir)) / "plan.json")
    assert after.prediction == predict_step(config, resolve_target("cpu"), after)
    assert not chosen & {choice.chosen for choice in after.choices if choice.used}
