"""Projections that ranks share: the losses and gradients of one device, on a grid of processes on the CPU."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_runs import assert_same_run
from forked_ranks import fork_ranks
from tensor_ranks import MIXERS, MODEL, main
from test_sharded_training import assert_close_runs, stopped_after

from subquad.compiler.example import Example
from subquad.compiler.explain import explained_plan
from subquad.compiler.step_work import step_work
from subquad.errors import ConfigError
from subquad.model.build import build_model
from subquad.model.shared_projections import keep_share, kept_whole
from subquad.schema import ChannelMixerConfig, CompilerConfig, ModelConfig, RunConfig, TrainerConfig
from subquad.training.checkpoint import newest_checkpoint
from subquad.training.fit import train

TinyRun = Callable[..., RunConfig]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tensor_ranks"])
TOLERANCE = 1e-12
"""Of float64 sums in another order, relative to the largest value."""
AUTOCAST_TOLERANCE = 0.05
"""bfloat16 rounds to 2^-8, and what ranks add up was rounded once more each."""
SECONDS = 250
SCOUT = ModelConfig(
    name="scout", d_model=32, num_layers=2, schedule=["mamba", "segment_attention"], mixers=MIXERS,
    channel_mixer=ChannelMixerConfig(d_hidden=46),
)  # fmt: skip
MQAR = {"name": "synthetic", "vocab_size": 32, "sizes": [4]}


def errors(grid: tuple[int, int], folder: Path, device: str = "cpu") -> dict[str, float]:
    """The largest error of each case on any rank of a grid."""
    results = [folder / f"{rank}.json" for rank in range(grid[0] * grid[1])]
    processes = [
        FORKS.Process(target=main, args=(rank, grid, str(folder / "store"), str(result), device))
        for rank, result in enumerate(results)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * len(results), "the ranks have printed why"
    found = [json.loads(result.read_text()) for result in results]
    return {case: max(of_rank[case] for of_rank in found) for case in found[0]}


@pytest.mark.parametrize(
    "grid", [(1, 2), pytest.param((2, 2), marks=pytest.mark.slow)], ids=["two share", "two by two"]
)
def test_losses_and_gradients_are_those_of_one_device(grid: tuple[int, int], tmp_path: Path) -> None:
    """Attention of three kinds by heads, channel mixers by channels, Mamba whole; clipping takes the norm of all."""
    found = errors(grid, tmp_path)
    rounded = found.pop("autocast")
    assert {case: error for case, error in found.items() if not error < TOLERANCE} == {}
    assert 0 < rounded < AUTOCAST_TOLERANCE


@pytest.mark.gpu
def test_ranks_share_projections_over_nccl(tmp_path: Path) -> None:
    """Not yet seen on a device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    found = errors((1, 2), tmp_path, "cuda")
    rounded = found.pop("autocast")
    assert {case: error for case, error in found.items() if not error < 1e-10} == {}
    assert rounded < AUTOCAST_TOLERANCE


@pytest.fixture
def quick_ranks(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    fork_ranks(monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_ranks")
def test_a_run_on_two_ranks_is_that_of_one_and_goes_on_as_one(tiny_run: TinyRun) -> None:
    """Batches are not divided; the checkpoint is that of whole tensors, for another number of ranks."""
    settings: dict[str, Any] = {"log_every_n_steps": 1, "validate_every_n_steps": 0, "batch_size": 4}
    run = {"data": MQAR, "model": SCOUT}
    alone = train(tiny_run("alone", run=run, max_steps=8, **settings)).run_dir
    sharing = settings | {"devices": 2, "tensor_parallel": 2}
    moved = stopped_after(4, tiny_run("moved", run=run, max_steps=8, **sharing))
    found = newest_checkpoint(moved / "checkpoints")
    assert found is not None
    assert (found.shards, found.tensor_parallel) == (2, 2)
    assert found.axes["weights/blocks.0.channel_mixer.down.weight"] == 1
    whole = build_model(replace(SCOUT, vocab_size=32, context_len=32)).state_dict()
    assert {name: tensor.shape for name, tensor in found.weights().items()} == {
        name: tensor.shape for name, tensor in whole.items()
    }
    train(tiny_run("moved", run=run | {"resume": str(moved)}, max_steps=8, **settings))
    assert_close_runs(moved, alone, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_ranks")
def test_a_grid_trains_as_one_process_and_resumes_bit_for_bit(tiny_run: TinyRun) -> None:
    """Two by two, of packed text; the loss in chunks, and blocks computed again."""
    run = {"data": MQAR, "model": SCOUT}
    settings: dict[str, Any] = {"max_steps": 8, "log_every_n_steps": 1, "validate_every_n_steps": 0}
    alone = train(tiny_run("alone", run=run, batch_size=4, **settings)).run_dir
    settings |= {"devices": 4, "tensor_parallel": 2, "loss": "chunked", "activation_checkpointing": True}
    straight = train(tiny_run("straight", run=run, batch_size=2, **settings)).run_dir
    assert_close_runs(straight, alone, tolerance=1e-5)
    stopped = stopped_after(4, tiny_run("stopped", run=run, batch_size=2, **settings))
    train(tiny_run("stopped", run=run | {"resume": str(stopped)}, batch_size=2, **settings))
    assert_same_run(stopped, straight)


def test_what_cannot_be_dealt_out_is_refused(tiny_run: TinyRun) -> None:
    three = ModelConfig(
        name="odd", d_model=24, num_layers=1,
        mixers={"softmax_attention": {"mixer": "softmax_attention", "num_heads": 3}},
        channel_mixer=ChannelMixerConfig(d_hidden=46),
    )  # fmt: skip
    odd = replace(SCOUT, channel_mixer=ChannelMixerConfig(d_hidden=47))
    for model, settings, what in (
        (three, {"devices": 2}, "num_heads is 3 in the mixer 'softmax_attention' of layer 0, which 2 ranks cannot"),
        (odd, {"devices": 2}, "d_hidden is 47 in the channel mixer of layer 0"),
        (SCOUT, {"devices": 3}, "2 devices are to share projections, and the run has 3"),
        (SCOUT, {"devices": 2, "strategy": "ddp"}, "hold their parameters in shards"),
        (SCOUT, {"devices": 4, "context_parallel": 2, "batch_size": 1}, "a model in shards"),
    ):
        with pytest.raises(ConfigError, match=what):
            train(tiny_run("refused", tensor_parallel=2, run={"model": model, "data": MQAR}, **settings))
    with pytest.raises(ConfigError, match="was never tried"):
        train(tiny_run("refused", devices=2, tensor_parallel=2, run={"model": SCOUT, "compile": True}))


def test_the_plan_and_the_prediction_are_of_a_ranks_share() -> None:
    def plan(ranks: int) -> Any:
        trainer = TrainerConfig(batch_size=2, seq_len=24, devices=ranks, tensor_parallel=ranks)
        compiler = CompilerConfig(estimator="roofline", measure=False)
        return explained_plan(
            RunConfig(model=SCOUT, data={"name": "synthetic"}, trainer=trainer, compiler=compiler, target="cpu")
        )

    one, two = plan(1), plan(2)
    heads = [
        {choice.operator: choice.shape["h"] for choice in of_ranks.choices if choice.used and "h" in choice.shape}
        for of_ranks in (one, two)
    ]
    assert heads[0]["segment_attention"] == 2 * heads[1]["segment_attention"] == 2
    assert "tensor_parallel=2: every rank computes the whole of mamba (layer 0)" in two.notes
    assert "what ranks exchange of the projections that they share is not counted" in two.prediction.notes
    assert two.prediction.memory["weights and moments"] < one.prediction.memory["weights and moments"]
    work = [
        step_work(replace(MODEL, num_layers=4), Example(tokens_shape=(2, 24), training=True), kind="cpu",
                  checkpointing=False, tensor_parallel=ranks)
        for ranks in (1, 2)
    ]  # fmt: skip
    model = build_model(MODEL)
    whole = sum(parameter.numel() for parameter in model.parameters())
    keep_share(model.blocks, 2)  # type: ignore[arg-type]
    assert work[0].parameters == whole
    assert work[1].parameters == sum(parameter.numel() for parameter in model.parameters()) < whole
    attention, mlp = 24 * 24 * (1 + 1 / 2 + 1 / 2 + 1), 3 * 24 * 46
    halved = attention + 2 * 4 * 24 * 24 + 3 * mlp
    assert whole - work[1].parameters == halved / 2
    assert kept_whole(model.blocks, 1) == "tensor_parallel=1: every rank computes the whole of mamba (layer 1)"  # type: ignore[arg-type]
