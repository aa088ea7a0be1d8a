"""A sweep that is started again: finished jobs are skipped, others go on; launchers of Hydra run them elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock

from subquad.__main__ import main
from subquad.commands import train as train_verb
from subquad.errors import RunError
from subquad.schema import RunConfig
from subquad.training import fit
from subquad.training.metrics import read_metrics
from subquad.training.resume import FREE_KEYS
from subquad.training.run_folder import RunFolder, read_json
from subquad.training.sweep import CHANGEABLE, LOCK, digest_of, sweep_job

TinyRun = Callable[..., RunConfig]
LAUNCHERS = {
    "joblib": "hydra_joblib_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
}


def run_job(config: RunConfig, *overrides: str) -> None:
    train_verb.train_in_sweep(config, list(overrides))


def test_a_finished_job_is_skipped_with_one_line(tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    run_job(tiny_run("sweep/0", max_steps=2), "seed=0")
    folder = RunFolder(Path(tiny_run("sweep/0").run_dir or ""))
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.name != LOCK}
    capsys.readouterr()
    run_job(tiny_run("sweep/0", max_steps=2, run={"tracking": "none"}), "seed=0")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"job 0 (seed=0) is skipped: it has finished in {folder.path}\n"
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.name != LOCK} == before


def test_a_finished_job_goes_on_when_more_steps_are_asked_for(tiny_run: TinyRun) -> None:
    run_job(tiny_run("sweep/0", max_steps=2))
    run_job(tiny_run("sweep/0", max_steps=4))
    folder = RunFolder(Path(tiny_run("sweep/0").run_dir or ""))
    assert [int(row["step"]) for row in read_metrics(folder.metrics)] == [1, 2, 3, 4]
    assert folder.report.exists()


def test_an_interrupted_job_goes_on_and_ends_as_if_nothing_had_happened(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_job(tiny_run("whole/0", every=2, max_steps=6))
    fail_after(monkeypatch, step=5)
    with pytest.raises(RunError):
        run_job(tiny_run("sweep/0", every=2, max_steps=6))
    monkeypatch.undo()
    run_job(tiny_run("sweep/0", every=2, max_steps=6))
    assert "job 0 () goes on in" in capsys.readouterr().err
    whole, sweep = (read_metrics(Path(tiny_run(name).run_dir or "") / "metrics.csv") for name in ("whole/0", "sweep/0"))
    assert [(row["step"], row["train/loss"]) for row in sweep] == [(row["step"], row["train/loss"]) for row in whole]
    assert sweep[-1]["val/loss"] == whole[-1]["val/loss"]


def test_a_job_that_came_to_no_checkpoint_is_begun_again(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_after(monkeypatch, step=1)
    with pytest.raises(RunError):
        run_job(tiny_run("sweep/0", every=2, max_steps=3))
    monkeypatch.undo()
    folder = RunFolder(Path(tiny_run("sweep/0").run_dir or ""))
    assert folder.config.exists()
    run_job(tiny_run("sweep/0", every=2, max_steps=3))
    assert read_metrics(folder.metrics)[-1]["step"] == 3
    assert folder.report.exists()


def fail_after(monkeypatch: pytest.MonkeyPatch, *, step: int) -> None:
    """Training raises when this step is over."""
    whole = fit.Recorder.on_train_batch_end

    def failing(self: fit.Recorder, trainer: object, *rest: object) -> None:
        whole(self, trainer, *rest)  # type: ignore[arg-type]
        if int(trainer.global_step) == step:  # type: ignore[attr-defined]
            raise RunError(what="the power is cut", where=f"step {step}", mend="wait")

    monkeypatch.setattr(fit.Recorder, "on_train_batch_end", failing)


def test_jobs_are_found_by_what_was_asked_not_by_their_number(
    tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run_job(tiny_run("sweep/0", max_steps=1))
    run_job(tiny_run("sweep/1", max_steps=1, run={"seed": 1}), "seed=1")
    capsys.readouterr()
    run_job(tiny_run("sweep/0", max_steps=1, run={"seed": 1}), "seed=1")  # seed=0 has left the list, seed=2 joined it
    run_job(tiny_run("sweep/1", max_steps=1, run={"seed": 2}), "seed=2")
    sweep = Path(tiny_run("sweep").run_dir or "")
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"job 0 (seed=1) is skipped: it has finished in {sweep / '1'}"
    assert second == f"job 1 (seed=2) is begun in {sweep / '1-2'}: {sweep / '1'} holds another job"
    assert read_json(sweep / "1-2" / "sweep.json")["overrides"] == ["seed=2"]
    assert {path.name for path in sweep.iterdir()} == {"0", "1", "1-2"}


def test_a_job_that_another_process_runs_is_left_alone(tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run("sweep/0", max_steps=1)
    with sweep_job(config, []):
        run_job(config)
        assert "job 0 () is skipped: another process runs it" in capsys.readouterr().err
    assert not Path(config.run_dir or "").exists(), "nothing was written"
    run_job(config)
    with FileLock(Path(config.run_dir or "") / LOCK, timeout=0):
        pass


def test_a_job_that_is_refused_leaves_no_folder(tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no tracking is called"):
        run_job(tiny_run("sweep/0", run={"tracking": "wandbb"}))
    assert not (tmp_path / "sweep").exists()


def test_a_run_of_another_origin_is_never_touched(tiny_run: TinyRun) -> None:
    train_verb.train_job(tiny_run("sweep/0", max_steps=1), [])
    before = sorted(Path(tiny_run("sweep/0").run_dir or "").rglob("*"))
    run_job(tiny_run("sweep/0", max_steps=1))
    assert sorted(Path(tiny_run("sweep/0").run_dir or "").rglob("*")) == before
    assert RunFolder(Path(tiny_run("sweep/0-2").run_dir or "")).report.exists()


def test_jobs_that_differ_in_length_alone_are_two(tiny_run: TinyRun) -> None:
    for _ in range(2):
        run_job(tiny_run("sweep/0", max_steps=1))
        run_job(tiny_run("sweep/1", max_steps=2))
    sweep = Path(tiny_run("sweep").run_dir or "")
    assert [len(read_metrics(sweep / job / "metrics.csv")) for job in ("0", "1")] == [1, 2]
    assert {path.name for path in sweep.iterdir()} == {"0", "1"}


def test_digests_tell_jobs_apart_and_one_overlooks_what_a_job_may_be_asked_anew(tiny_run: TinyRun) -> None:
    assert CHANGEABLE <= FREE_KEYS
    one, longer = tiny_run("a", max_steps=1), tiny_run("b", max_steps=9, run={"tracking": "none"})
    assert digest_of(one, CHANGEABLE) == digest_of(longer, CHANGEABLE)
    assert digest_of(one) != digest_of(longer)
    assert digest_of(one) == digest_of(tiny_run("c", max_steps=1))
    for other in ({"run": {"seed": 1}}, {"batch_size": 3}, {"accumulate": 2}, {"run": {"deny": ["sdpa_flash"]}}):
        assert digest_of(one, CHANGEABLE) != digest_of(tiny_run("a", max_steps=1, **other), CHANGEABLE)  # type: ignore[arg-type]


# Launchers


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_that_is_not_installed_is_named_with_its_extra(
    launcher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_spec("hydra_plugins") and find_spec(f"hydra_plugins.{LAUNCHERS[launcher]}"):
        pytest.skip("it is installed")
    assert main(["train", "--multirun", f"hydra/launcher={launcher}", "seed=0,1", "run_dir=out"]) == 2
    extra = launcher.removesuffix("_local")
    assert f"the launcher {launcher} is not installed" in (shown := capsys.readouterr().err)
    assert f"pip install 'subquad[{extra}]'" in shown


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_composes_beside_ours(launcher: str, capsys: pytest.CaptureFixture[str]) -> None:
    package = LAUNCHERS[launcher]
    pytest.importorskip(f"hydra_plugins.{package}")
    arguments = [f"hydra/launcher={launcher}", "hydra.sweep.dir=sweeps", "run_dir=out"]
    assert main(["train", *arguments, "--cfg", "hydra", "--package", "hydra.launcher"]) == 0
    assert f"_target_: hydra_plugins.{package}." in capsys.readouterr().out


@pytest.mark.slow
def test_joblib_runs_the_jobs_of_a_sweep_and_skips_them_the_second_time(tiny_corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    overrides = [
        "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=record", "model=transformer",
        "model.d_model=32", "model.num_layers=2", "data=text_files", f"data.files=[{tiny_corpus}]", "trainer=smoke",
        "trainer.seq_len=32", "trainer.accelerator=cpu", "trainer.progress_bar=false", "compiler.measure=false",
        "run_dir=sweep", "seed=0,1",
    ]  # fmt: skip

    def sweep() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "subquad", "train", "--multirun", *overrides], cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    first, second = sweep(), sweep()
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    for job in ("0", "1"):
        folder = RunFolder(tmp_path / "sweep" / job)
        assert read_metrics(folder.metrics)[-1]["step"] == 5
        assert f"{folder.path}: validation loss" in first.stdout
        assert f"is skipped: it has finished in {folder.path}" in second.stderr
