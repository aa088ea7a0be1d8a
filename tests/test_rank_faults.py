"""One rank dies: the run ends in bounded time, says which rank and why, and its checkpoints stand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import Fault, fork_ranks

from subquad.errors import RunError
from subquad.model.channel_mixer import ChannelMixer
from subquad.schema import RunConfig
from subquad.training import fit
from subquad.training.checkpoint import newest_checkpoint
from subquad.training.fit import train
from subquad.training.module import TrainingModule

TinyRun = Callable[..., RunConfig]

BOUND_S = 240.0
"""Below the timeout of a test, so that a process that hangs does not outlive it; alone it takes a second."""


def at_step_six(happens: Callable[[], None]) -> None:
    original = TrainingModule.training_step

    def training_step(self: TrainingModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == 5:
            happens()
        return original(self, batch, batch_idx)

    TrainingModule.training_step = training_step  # type: ignore[method-assign]


def fail() -> None:
    raise ValueError("planted in one rank")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fails_at_step_six() -> None:
    at_step_six(fail)


def dies_at_step_six() -> None:
    at_step_six(die)


FAILS = (fails_at_step_six, "rank 1 ended with exit code 1", "ValueError: planted in one rank")
DIES = (dies_at_step_six, "rank 1 was killed by SIGKILL", "")


@pytest.mark.parametrize(
    ("fault", "says", "told", "strategy"),
    [
        pytest.param(*FAILS, "ddp", id="fails, ddp"),
        pytest.param(*DIES, "fsdp", id="dies, fsdp"),
        pytest.param(*FAILS, "fsdp", id="fails, fsdp", marks=pytest.mark.slow),
        pytest.param(*DIES, "ddp", id="dies, ddp", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_ends_the_run(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, fault: Fault, says: str, told: str, strategy: str
) -> None:
    fork_ranks(monkeypatch, fault)
    config = tiny_run("run", max_steps=100_000, devices=2, strategy=strategy)
    with pytest.raises(RunError, match=says):
        train(config)  # one that waits for the rank that has gone is ended by the timeout of every test
    assert not torch.distributed.is_initialized()
    found = newest_checkpoint(Path(str(config.run_dir)) / "checkpoints")
    assert found is not None
    assert found.step == 4
    text = Path(f"{config.run_dir}.rank-1.txt").read_text()
    assert told in text
    assert not told or "in training_step" in text, "the traceback shows where"


def runs_other_kernels() -> None:
    original = fit.kernels_in_use
    fit.kernels_in_use = lambda model: original(model) | {"layer 0, forward": "softmax_attention: another"}


def test_ranks_that_would_run_other_kernels_are_refused(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_ranks(monkeypatch, runs_other_kernels)
    with pytest.raises(RunError, match=r"rank 1 differs from rank 0 in layer 0, forward \(.*another, not"):
        train(tiny_run("run", devices=2))


def spoil(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """In step six all channel mixers of this rank return something else."""
    original, spoilt = ChannelMixer.forward, [False]

    def forward(self: ChannelMixer, x: torch.Tensor) -> torch.Tensor:
        return change(original(self, x)) if spoilt[0] else original(self, x)

    ChannelMixer.forward = forward  # type: ignore[method-assign]
    at_step_six(lambda: spoilt.__setitem__(0, True))


class NanBackward(torch.autograd.Function):
    """The identity, with gradients that are no numbers."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


def spoils_forward() -> None:
    spoil(lambda x: x * float("inf"))


def spoils_backward() -> None:
    spoil(NanBackward.apply)


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        pytest.param(
            spoils_forward,
            r"the output of blocks.0.channel_mixer \(ChannelMixer\), micro-batch 1",
            marks=pytest.mark.slow,
        ),
        (spoils_backward, "the gradient of blocks.1.channel_mixer"),
    ],
)
def test_sharded_ranks_trace_together_what_is_no_number_on_one(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, fault: Fault, first: str
) -> None:
    fork_ranks(monkeypatch, fault)
    with pytest.raises(RunError, match=f"not finite .* first {first}"):
        train(tiny_run("run", devices=2, strategy="fsdp", accumulate=2))


STUCK = """
import subprocess
import sys
import time
from subquad.training.rank_watch import RankWatch
watch = RankWatch({gone}, lambda: print("the others are ended", flush=True), patience_s=0.2)
{then}
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("gone", "then", "says"),
    [
        ('lambda: "rank 1 was killed by SIGKILL"', "", "this rank is ended: rank 1 was killed by SIGKILL"),
        ("lambda: None", 'watch.failed(ValueError("own"))', "ValueError: own\nthis rank is ended: it could not leave"),
    ],
)
def test_a_rank_that_is_stuck_is_ended(gone: str, then: str, says: str) -> None:
    """As in an exchange on a device that waits for a rank that has gone."""
    command = [sys.executable, "-c", STUCK.format(gone=gone, then=then)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False)
    assert result.returncode == 1
    assert says in result.stderr
    assert result.stdout == "the others are ended\n"


def test_a_rank_that_leaves_in_time_is_let_go() -> None:
    left = 'watch.failed(ValueError("own")); watch.stop(); time.sleep(0.6); print("left", flush=True); exit()'
    command = [sys.executable, "-c", STUCK.format(gone="lambda: None", then=left)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=True).stdout == "left\n"
