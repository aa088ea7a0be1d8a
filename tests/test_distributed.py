"""Two processes on the CPU: one run, the same figures as one process, and nothing left behind for the next job."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from child_process import Child, StartProcess, wait_for

from subquad.errors import ConfigError, RunError
from subquad.schema import RunConfig, TrainerConfig
from subquad.training import distributed
from subquad.training.checkpoint import newest_checkpoint
from subquad.training.distributed import VARIABLES, Ranks, process_group, ranks_here, share_of_threads
from subquad.training.fit import TrainResult, train
from subquad.training.metrics import read_metrics
from subquad.training.run_folder import RunFolder

TinyRun = Callable[..., RunConfig]

MQAR = {"name": "synthetic", "vocab_size": 32, "sizes": [4]}
"""Every row predicts equally many tokens, so a mean of two ranks' means is the mean of all."""


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    found = newest_checkpoint(run_dir / "checkpoints")
    assert found is not None
    return found.weights()


def sample_ids(run_dir: Path, rank: int) -> list[list[int]]:
    lines = RunFolder(run_dir).samples(rank).read_text().splitlines()[1:]
    return [[int(number) for number in line.split(",")[1].split()] for line in lines]


def in_two_processes(config: RunConfig) -> TrainResult:
    """The run; nothing of its processes is left behind."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    result = train(config)
    assert {name: os.environ.get(name) for name in VARIABLES} == before
    assert not dist.is_initialized()
    return result


def test_two_processes_of_two_rows_do_what_one_does_with_four(tiny_run: TinyRun) -> None:
    shared = in_two_processes(tiny_run("shared", max_steps=4, devices=2, run={"data": MQAR})).run_dir
    alone = train(tiny_run("alone", max_steps=4, batch_size=4, run={"data": MQAR})).run_dir
    both = [one + two for one, two in zip(sample_ids(shared, 0), sample_ids(shared, 1))]
    assert both == sample_ids(alone, 0)
    for left, right in zip(read_metrics(shared / "metrics.csv"), read_metrics(alone / "metrics.csv")):
        assert left["train/loss"] == pytest.approx(right["train/loss"], rel=1e-4)
        assert left["gradient_norm"] == pytest.approx(right["gradient_norm"], rel=1e-3)


@pytest.mark.slow
def test_two_jobs_of_two_processes_run_one_after_the_other(tiny_run: TinyRun) -> None:
    """As a sweep does."""
    configs = [tiny_run(f"job{job}", max_steps=4, devices=2, run={"data": MQAR}) for job in range(2)]
    first, second = (in_two_processes(config) for config in configs)
    assert first.validation_loss == second.validation_loss
    assert all(torch.equal(weights(second.run_dir)[name], value) for name, value in weights(first.run_dir).items())


def test_a_rank_that_dies_before_it_joins_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start_one_that_dies(world_size: int, port: int, run_dir: Path) -> list[subprocess.Popen[bytes]]:
        return [subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(3)"])]

    monkeypatch.setattr(distributed, "_start_others", start_one_that_dies)
    with pytest.raises(RunError, match="rank 1 ended with exit code 3"):
        with process_group(Ranks(0, 2, from_outside=False), tmp_path):
            raise AssertionError("rank 0 must not go on alone")
    assert not dist.is_initialized()


def test_ranks_are_those_that_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert ranks_here(TrainerConfig(devices=2)) == Ranks(0, 2, from_outside=False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks_here(TrainerConfig(devices=2)) == Ranks(3, 4, from_outside=True)
    with pytest.raises(ConfigError, match="4 processes"):
        ranks_here(TrainerConfig(devices=3))


SLURM = {
    "SLURM_JOB_ID": "4321", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_NODELIST": "node[07-08]", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_ID": "0",
}  # fmt: skip


def test_ranks_are_the_tasks_that_srun_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
    monkeypatch.setattr(os, "environ", {name: others[name] for name in others.keys() - set(VARIABLES)} | SLURM)
    assert ranks_here(TrainerConfig(devices=2)) == Ranks(3, 4, from_outside=True)
    named = {name: os.environ[name] for name in (*VARIABLES, "MASTER_ADDR", "MASTER_PORT")}
    assert named == {
        "LOCAL_RANK": "1", "RANK": "3", "NODE_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node07",
        "MASTER_PORT": "19321",
    }  # fmt: skip


def test_a_batch_script_that_calls_us_without_srun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {name: value for name, value in (os.environ | SLURM).items() if name not in (*VARIABLES, "SLURM_STEP_ID")}
    monkeypatch.setattr(os, "environ", here)
    assert ranks_here(TrainerConfig(devices=2)) == Ranks(0, 2, from_outside=False)


@pytest.mark.slow
def test_srun_starts_ranks_that_agree_on_the_folder(
    tiny_run: TinyRun, tmp_path: Path, start_process: StartProcess
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script, job = tmp_path / "script.py", tiny_run("unused", max_steps=3, devices=2, strategy="fsdp")
    script.write_text(
        "from subquad.schema import *\nfrom subquad.training.fit import train\n"
        f"train({job!r})\n".replace(repr(job.run_dir), "None"), encoding="utf-8"
    )  # fmt: skip
    tasks = [
        start_process([sys.executable, str(script)], tmp_path, **SLURM | {
            "SLURM_NTASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
            "SLURM_NODELIST": "localhost", "MASTER_PORT": port,
        })
        for rank in range(2)
    ]
    for task in tasks:
        _, err = task.communicate()
        assert task.returncode == 0, err
    (folder,) = (tmp_path / "runs").glob("*/*")
    assert {path.name for path in (folder / "samples").iterdir()} == {"rank-0.csv", "rank-1.csv"}


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        with share_of_threads(3):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 4
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        with share_of_threads(2):
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_resume_together(
    strategy: str, tiny_run: TinyRun, start_run: Callable[[RunConfig], Child], tmp_path: Path, one_thread: None
) -> None:
    settings = {"max_steps": 30, "devices": 2, "every": 5, "strategy": strategy}
    killed = tmp_path / "killed"
    process = start_run(tiny_run("killed", **settings))
    wait_for((killed / "checkpoints" / "step-10" / "manifest.json").exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # ends only when rank 1 has closed its end of the pipes as well
    assert process.returncode == -signal.SIGKILL
    train(tiny_run("killed", run={"resume": str(killed)}, **settings))
    straight = train(tiny_run("straight", run={"plan": str(killed / "plan.json")}, **settings))
    for name, tensor in weights(killed).items():
        assert torch.equal(tensor, weights(straight.run_dir)[name]), name
    for rank in range(2):
        assert sample_ids(killed, rank) == sample_ids(straight.run_dir, rank)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "word", "code"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
def test_a_signal_to_rank_zero_ends_all_ranks_after_one_step(
    number: signal.Signals,
    word: str,
    code: int,
    tiny_run: TinyRun,
    start_run: Callable[[RunConfig], Child],
    tmp_path: Path,
) -> None:
    process = start_run(tiny_run("run", max_steps=100_000, devices=2, every=5))
    wait_for((tmp_path / "run" / "checkpoints" / "step-5" / "manifest.json").exists, process)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode in (code, -number), err
    assert f"{word} after step" in err
    assert newest_checkpoint(tmp_path / "run" / "checkpoints") is not None


@pytest.mark.slow
def test_torchrun_starts_ranks_that_agree_on_the_folder(tiny_run: TinyRun, tmp_path: Path) -> None:
    config = tiny_run("unused", max_steps=3, devices=2)
    script = tmp_path / "script.py"
    script.write_text(
        "from subquad.schema import *\nfrom subquad.training.fit import train\n"
        f"train({config!r})\n".replace(repr(config.run_dir), "None"), encoding="utf-8"
    )  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    result = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").glob("*/*")
    assert {path.name for path in (folder / "samples").iterdir()} == {"rank-0.csv", "rank-1.csv"}
    assert result.stdout.splitlines()[-1].startswith(str(folder))


@pytest.mark.slow
def test_a_sweep_of_two_process_jobs_runs_from_the_command_line(tiny_corpus: Path, tmp_path: Path) -> None:
    overrides = [
        "model=transformer", "model.d_model=32", "model.num_layers=2", "data=text_files", f"data.files=[{tiny_corpus}]",
        "trainer=smoke", "trainer.seq_len=32", "trainer.devices=2", "trainer.accelerator=cpu", "compiler.measure=false",
        f"run_dir={tmp_path / 'sweep'}", "seed=0,1",
    ]  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-m", "subquad", "train", "--multirun", *overrides],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for job in range(2):
        folder = RunFolder(tmp_path / "sweep" / str(job))
        assert {path.name for path in (folder.path / "samples").iterdir()} == {"rank-0.csv", "rank-1.csv"}
        assert read_metrics(folder.metrics)[-1]["step"] == 5
        assert "python -m subquad train model=transformer" in folder.report.read_text()
    assert sample_ids(tmp_path / "sweep" / "0", 0) != sample_ids(tmp_path / "sweep" / "1", 0), "their seeds differ"
