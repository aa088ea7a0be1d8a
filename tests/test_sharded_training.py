"""FSDP over two processes on the CPU: the run of one process, whose checkpoints any number of processes reads."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from child_process import Child
from compared_runs import assert_same_run, weights
from forked_ranks import fork_ranks
from safetensors.torch import load_file

from subquad.errors import ResumeError, RunError
from subquad.schema import (
    ChannelMixerConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    ModelConfig,
    RunConfig,
)
from subquad.training import sharded_checkpoint
from subquad.training.checkpoint import newest_checkpoint
from subquad.training.evaluation.evaluate import evaluate
from subquad.training.export import export
from subquad.training.fit import train
from subquad.training.generate import generate
from subquad.training.metrics import read_metrics
from subquad.training.run_folder import RunFolder

TinyRun = Callable[..., RunConfig]

MQAR = {"name": "synthetic", "vocab_size": 32, "sizes": [4]}
"""Every row predicts equally many tokens, so a mean of two ranks' means is the mean of all."""
SCOUT = ModelConfig(
    name="scout",
    d_model=32,
    num_layers=2,
    schedule=["mamba", "segment_attention"],
    mixers={
        "mamba": {"mixer": "mamba", "state_dim": 4},
        "segment_attention": {"mixer": "segment_attention", "num_heads": 2, "segment_len": 4},
    },
    channel_mixer=ChannelMixerConfig(d_hidden=47),  # rows that two ranks cannot halve
)
CHUNKED = {"loss": "chunked"}
TOLERANCE = 1e-6
"""Of weights in float32: two ranks add gradients in another order than one process does."""


@pytest.fixture(autouse=True)
def _quick_ranks(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    fork_ranks(monkeypatch)


def files(run_dir: Path, step: int) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints" / f"step-{step}").iterdir()}


def assert_close_runs(left: Path, right: Path, tolerance: float = TOLERANCE) -> None:
    """Losses and norms to 1e-5 of themselves, weights to the tolerance."""
    for one, other in zip(read_metrics(left / "metrics.csv"), read_metrics(right / "metrics.csv"), strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
        norms = {name for name in other if name.startswith("gradient_norm")}
        assert len(norms) > 2, "of all, of the mixers, of the rest"
        assert {name: one[name] for name in norms} == pytest.approx({name: other[name] for name in norms}, rel=1e-5)
    mine, theirs = weights(left), weights(right)
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < tolerance


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        pytest.param(None, {}, id="transformer", marks=pytest.mark.slow),
        pytest.param(
            SCOUT, {"accumulate": 2, "activation_checkpointing": True}, id="scout, accumulated and checkpointed"
        ),
        pytest.param(
            SCOUT,
            {"gradient_clip_norm": 0.01, "activation_checkpointing": True, "recompute": "cheap"} | CHUNKED,
            id="scout, clipped, checkpointed in part, chunked loss",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_ranks_of_shards_train_as_one_process(
    tiny_run: TinyRun, model: ModelConfig | None, settings: dict[str, Any]
) -> None:
    settings = {"max_steps": 4, "log_every_n_steps": 1, "validate_every_n_steps": 0} | settings
    run: dict[str, Any] = {"data": MQAR} | ({} if model is None else {"model": model})
    sharded = train(tiny_run("sharded", devices=2, strategy="fsdp", run=run, **settings)).run_dir
    alone = train(tiny_run("alone", run=run, batch_size=4, **settings)).run_dir
    assert_close_runs(sharded, alone)
    assert files(sharded, 4) == {
        "manifest.json", "trainer.pt", "weights.safetensors", "shard-0.safetensors", "shard-1.safetensors",
    }  # fmt: skip


@pytest.mark.slow  # twelve mixers; two stand above
def test_mixers_with_buffers_and_odd_shapes_are_sharded_too(tiny_run: TinyRun) -> None:
    names = [
        "retnet", "rwkv7", "rwkv_channel_mix", "slstm", "mlstm", "ttt_linear", "mamba2", "mamba3", "gated_delta_net",
        "lightning", "log_linear", "gla",
    ]  # fmt: skip
    mixers: dict[str, Any] = {name: {"mixer": name} for name in names}
    model = ModelConfig(
        name="many", d_model=64, num_layers=len(names), schedule=names, mixers=mixers, channel_mixer=None
    )
    settings = {"max_steps": 2, "log_every_n_steps": 1, "run": {"data": MQAR, "model": model}}
    sharded = train(tiny_run("sharded", devices=2, strategy="fsdp", **settings)).run_dir
    assert_close_runs(sharded, train(tiny_run("alone", batch_size=4, **settings)).run_dir, tolerance=1e-4)


@pytest.mark.slow  # inductor compiles each block in each process
def test_blocks_of_shards_are_compiled_one_by_one(
    tiny_run: TinyRun, start_run: Callable[[RunConfig], Child]
) -> None:
    settings = {"max_steps": 2, "log_every_n_steps": 1, "validate_every_n_steps": 0, "run": {"data": MQAR}}
    alone = train(tiny_run("alone", batch_size=4, **settings)).run_dir
    compiled = tiny_run("compiled", devices=2, strategy="fsdp", **settings)
    compiled.compile = True
    process = start_run(compiled)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert_close_runs(Path(str(compiled.run_dir)), alone, tolerance=1e-5)


def test_a_disk_that_one_rank_cannot_write_ends_all_with_the_last_checkpoint_whole(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_ranks(monkeypatch, cannot_write_step_eight)
    config = tiny_run("full", devices=2, strategy="fsdp", run={"data": MQAR})
    with pytest.raises(RunError, match="cannot be written: No space left"):
        train(config)
    checkpoints = Path(str(config.run_dir)) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-4"], "what was begun takes no room"


def cannot_write_step_eight() -> None:
    """In the process of rank 1."""
    write_rows = sharded_checkpoint.write_rows

    def failing(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        if "step-8" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_rows(path, tensors)

    sharded_checkpoint.write_rows = failing


def stopped_after(step: int, config: RunConfig) -> Path:
    """The folder of a run that was as if killed: what came after that step's checkpoint is lost, records aside."""
    folder = train(config).run_dir
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return folder


def consumed(run_dir: Path, steps: range, ranks: int, accumulate: int) -> list[list[int]]:
    """The samples of these steps in the order of one process: micro-batch by micro-batch, rank by rank."""
    by_rank = []
    for rank in range(ranks):
        rows = (line.split(",") for line in RunFolder(run_dir).samples(rank).read_text().splitlines()[1:])
        by_rank.append({int(step): ids.split() for step, ids in rows})
    share = len(by_rank[0][steps[-1]]) // accumulate
    return [
        [int(number) for part in range(accumulate) for rank in by_rank for number in rank[step][part * share :][:share]]
        for step in steps
    ]


def test_sharded_ranks_resume_bit_for_bit(tiny_run: TinyRun) -> None:
    settings = {"max_steps": 8, "devices": 2, "strategy": "fsdp", "run": {"data": MQAR, "model": SCOUT}}
    straight = train(tiny_run("straight", **settings)).run_dir
    stopped = stopped_after(4, tiny_run("stopped", **settings))
    train(tiny_run("stopped", **settings | {"run": settings["run"] | {"resume": str(stopped)}}))  # type: ignore[operator]
    assert_same_run(stopped, straight)
    assert RunFolder(stopped).samples(1).read_text() == RunFolder(straight).samples(1).read_text()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({"devices": 2, "strategy": "fsdp"}, {"accumulate": 2}, id="two shards -> one process"),
        pytest.param(
            {"accumulate": 2},
            {"devices": 2, "strategy": "fsdp"},
            id="one process -> two shards",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"devices": 2, "strategy": "fsdp"}, {"devices": 2}, id="two shards -> two copies", marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(
    tiny_run: TinyRun, before: dict[str, Any], after: dict[str, Any]
) -> None:
    settings = {"max_steps": 8, "log_every_n_steps": 1, "validate_every_n_steps": 0}
    straight = train(tiny_run("straight", accumulate=2, run={"data": MQAR}, **settings)).run_dir
    moved = stopped_after(4, tiny_run("moved", run={"data": MQAR}, **settings, **before))
    train(tiny_run("moved", run={"data": MQAR, "resume": str(moved)}, **settings, **after))
    assert_close_runs(moved, straight, tolerance=1e-5)
    steps = range(5, 9)
    assert consumed(moved, steps, after.get("devices", 1), after.get("accumulate", 1)) == consumed(
        straight, steps, 1, 2
    )
    recorded = [RunFolder(moved).samples(rank).read_text() for rank in range(before.get("devices", 1))]
    assert after.get("devices", 1) > 1 or not any("\n5," in text for text in recorded[1:]), "no step is recorded twice"


def test_steps_of_another_size_are_refused(tiny_run: TinyRun) -> None:
    run_dir = str(train(tiny_run("run", max_steps=4, accumulate=2, run={"data": MQAR})).run_dir)
    with pytest.raises(ResumeError, match="took 4 samples so far and would take 2"):
        train(tiny_run("run", max_steps=8, run={"data": MQAR, "resume": run_dir}))


def test_every_verb_reads_shards(tiny_run: TinyRun, tmp_path: Path) -> None:
    sharded = train(tiny_run("sharded", max_steps=4, devices=2, strategy="fsdp")).run_dir
    found = newest_checkpoint(sharded / "checkpoints")
    assert found is not None
    assert found.shards == 2
    export(ExportConfig(run=str(sharded), out=str(tmp_path / "exported")))
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in found.weights().items())
    texts = [
        generate(GenerateConfig(run=run, prompt="the", max_tokens=4, temperature=0.0))
        for run in (str(sharded), str(tmp_path / "exported"))
    ]
    assert texts[0] == texts[1]
    evaluate(EvaluateConfig(run=str(sharded), samples=2))
    assert RunFolder(sharded).evaluation.is_file()
