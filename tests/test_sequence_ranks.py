"""A sequence split over ranks gives the outputs and the gradients of the whole one; see `sequence_ranks.py`."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sequence_ranks import LAYOUTS, MIXERS, OPERATORS, main
from torch import Tensor, fx, nn

from subquad.compiler.example import Example
from subquad.compiler.pipeline import capture_model, split_model
from subquad.compiler.seams import check_seams
from subquad.errors import ConfigError
from subquad.model.build import build_model
from subquad.parallel.part import NotSplitError, SequencePart
from subquad.registry import load_registry
from subquad.schema import ModelConfig, RunConfig
from subquad.training.checkpoint import newest_checkpoint
from subquad.training.fit import TrainResult, train
from subquad.training.metrics import read_metrics
from subquad.training.recorder import Throughput
from subquad.training.run_folder import RunFolder
from subquad_kernels.operators import linear_attention

MQAR = {"name": "synthetic", "vocab_size": 32, "sizes": [4]}
TinyRun = Callable[..., RunConfig]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["sequence_ranks"])
TOLERANCE = 1e-12
"""Of float64 sums of some dozens of terms in another order, relative to the largest value."""
CUDA_TOLERANCE = 1e-10
"""There products of matrices and exponentials add their own."""

SECONDS = 250


def errors(ranks: int, folder: Path, device: str) -> dict[str, float]:
    """The largest error of each case on any of so many ranks."""
    results = [folder / f"{rank}.json" for rank in range(ranks)]
    processes = [
        FORKS.Process(target=main, args=(rank, ranks, str(folder / "store"), str(result), device))
        for rank, result in enumerate(results)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks, "the ranks have printed why"
    found = [json.loads(result.read_text()) for result in results]
    assert all(of_rank.keys() == found[0].keys() for of_rank in found)
    return {case: max(of_rank[case] for of_rank in found) for case in found[0]}


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_operators_and_mixers_on_parts_are_those_on_whole_sequences(ranks: int, tmp_path: Path) -> None:
    """Outputs and all gradients, with and without packed documents; one test, since ranks take seconds to start."""
    found = errors(ranks, tmp_path, "cpu")
    assert len(found) == len(LAYOUTS) * (len(OPERATORS) + len(MIXERS))
    assert {case: error for case, error in found.items() if not error < TOLERANCE} == {}


@pytest.mark.gpu
def test_ranks_share_sequences_over_nccl(tmp_path: Path) -> None:
    """Not yet seen on a device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    found = errors(2, tmp_path, "cuda")
    assert {case: error for case, error in found.items() if not error < CUDA_TOLERANCE} == {}


REFUSED = {
    "log_linear": "log_linear_attention",
    "log_linear_gated_delta_net": "log_linear_delta_rule",
    "log_linear_mamba2": "log_linear_attention",
    "mamba3": "the argument angles",
    "rwkv6": "the argument q",
    "rwkv7": "it shares tensors with other layers",
    "rwkv_channel_mix": "its output depends on other tokens",
    "slstm": "slstm_scan",
    "ttt_linear": "the argument angles",
    "ttt_linear_mamba": "the argument angles",
    "ttt_mlp": "the argument angles",
    "ttt_mlp_mamba": "the argument angles",
}
"""What is said of mixers that mix tokens, or count them, otherwise than by operators that ranks can share."""


def test_every_mixer_is_shared_or_refused() -> None:
    first_party = {name for name, spec in load_registry().mixers.items() if spec.build.startswith("subquad")}
    assert first_party == MIXERS.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_a_mixer_that_cannot_be_shared_is_refused_by_name(name: str) -> None:
    model = build_model(
        ModelConfig(
            d_model=64, num_layers=2, vocab_size=8, context_len=8, mixers={name: {"mixer": name}}, schedule=[name]
        )
    )
    for packed in (False, True):
        example = Example(tokens_shape=(1, 4), packed=packed)
        with pytest.raises(ConfigError, match=f"the mixer '{name}' of layer 0") as error:
            split_model(model, capture_model(model, example), example, SequencePart(2))
        assert packed or REFUSED[name] in error.value.what


class Toy(nn.Module):
    """A mixer of one operator and something that mixes tokens, or counts them, beside it."""

    def __init__(self, beside: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(6, 6), nn.Linear(6, 6)
        self.beside = beside

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        k = self.in_proj(self.beside(x)).unflatten(-1, (2, 3))
        y, self.state = linear_attention(k, k, k, cu_seqlens=cu_seqlens)
        return self.out_proj(y.flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "beside",
    [
        lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1),
        lambda x: x.cumsum(1),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x.flip(1),
        lambda x: x + torch.arange(x.shape[1], device=x.device)[:, None],
    ],
    ids=["shift", "sum", "mean", "flip", "position"],
)
def test_what_no_operator_shows_is_found(beside: Callable[[Tensor], Tensor]) -> None:
    def seams(mixer: nn.Module) -> None:
        graph = fx.GraphModule(mixer, fx.Tracer().trace(mixer, concrete_args={"cu_seqlens": None}))
        check_seams(mixer, graph, "forward", 6)

    seams(Toy(lambda x: x.exp()))
    with pytest.raises(NotSplitError, match="the argument q"):
        seams(Toy(beside))


def test_what_ranks_cannot_share_is_refused(tiny_run: TinyRun) -> None:
    for settings, what in (
        (
            {"devices": 2, "context_parallel": 2, "seq_len": 33, "batch_size": 1},
            "cannot share 33 tokens evenly",
        ),
        (
            {"devices": 3, "context_parallel": 2, "batch_size": 1},
            "2 devices are to share each .* run has 3",
        ),
        ({"devices": 2, "context_parallel": 2, "batch_size": 2}, "ranks share packed sequences one at a time"),
        ({"devices": 2, "context_parallel": 2, "batch_size": 1, "strategy": "fsdp"}, "a model in shards"),
    ):
        with pytest.raises(ConfigError, match=what):
            train(tiny_run("refused", **settings))
    config = tiny_run("refused", devices=2, context_parallel=2, run={"data": MQAR})
    config.model.mixers = {"segment_attention": {"mixer": "segment_attention", "num_heads": 2, "segment_len": 5}}
    config.model.schedule = ["segment_attention"]
    with pytest.raises(ConfigError, match="holds 16 tokens of a sequence, no multiple of segments of 5"):
        train(config)


def figures(result: TrainResult) -> list[dict[str, float]]:
    return [
        {name: row[name] for name in row if name not in ("seconds", "tokens_per_s", "mfu", "learning_rate")}
        for row in read_metrics(result.run_dir / "metrics.csv")
    ]


HYBRID = {
    "mamba": {"mixer": "mamba", "state_dim": 4},
    "segment_attention": {"mixer": "segment_attention", "num_heads": 2, "segment_len": 4},
}


@pytest.mark.parametrize(
    "data", [None, pytest.param(MQAR, marks=pytest.mark.slow)], ids=["packed documents", "sparse targets"]
)
def test_two_devices_that_share_sequences_train_as_one_does(
    data: dict[str, Any] | None, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, gradients and validation, bits of text among them; a part of a row of mqar may have no target."""
    run = {} if data is None else {"data": data}
    runs, consumed = [], []
    take = Throughput.take

    def counted(self: Throughput) -> float | None:
        consumed[-1] += self.tokens
        return take(self)

    monkeypatch.setattr(Throughput, "take", counted)
    for name, devices in (("shared", 2), ("alone", 1)):
        settings = {"max_steps": 6, "batch_size": 1, "devices": devices, "loss": "whole" if devices == 1 else "chunked"}
        config = tiny_run(name, context_parallel=devices, run=run, **settings)
        config.model.mixers, config.model.schedule = HYBRID, list(HYBRID)
        config.model.num_layers = len(HYBRID)
        consumed.append(0)
        runs.append(train(config))
    shared, alone = runs
    assert len(figures(alone)) >= 3
    for ours, theirs in zip(figures(shared), figures(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4), "float32 that adds in another order"
    assert sample_lines(shared, 0) == sample_lines(alone, 0)
    assert not RunFolder(shared.run_dir).samples(1).exists(), "these are the same samples"
    assert consumed[0] == consumed[1] == 6 * 32, "tokens of a throughput are counted once"
    for result in runs:
        found = newest_checkpoint(RunFolder(result.run_dir).checkpoints)
        assert found is not None
        assert found.trainer_outline()["samples_per_step"] == 1


def sample_lines(result: TrainResult, rank: int) -> list[str]:
    return RunFolder(result.run_dir).samples(rank).read_text().splitlines()
