"""A training process that is made to die: forked from a server that has imported everything, so that a life is short.

A death is drawn at random: after so many milliseconds, or at the k-th line that is executed within `checkpoint.py`
while a checkpoint is written, or within the sources' files while tokens are cached. The latter land where a clock
hardly ever would.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any

from subquad.schema import RunConfig

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["subquad.training.fit", "subquad.mixers.plugin", "matplotlib.figure"])
KINDS = ("clock", "checkpoint", "token cache")


@dataclass(frozen=True)
class Death:
    """When a process dies: of kind `clock` after so many seconds, else at that line of the file's, counted from 1."""

    kind: str
    after: float


def drawn(dice: random.Random, longest_s: float) -> Death:
    """A random death: kinds equally often."""
    kind = dice.choice(KINDS)
    if kind == "clock":
        return Death(kind, dice.uniform(0, longest_s))
    return Death(kind, dice.randint(1, 400 if kind == "checkpoint" else 120))


def start(config: RunConfig, death: Death | None = None, cache: Path | None = None) -> ForkServerProcess:
    """Begin to train in another process, with a user cache of its own if one is given."""
    process = FORKS.Process(target=_life, args=(config, death, cache))
    process.start()
    return process


def live(config: RunConfig, death: Death | None) -> int | None:
    """Train in another process until it ends or dies; its exit code."""
    process = start(config, death)
    if death is not None and death.kind == "clock":
        process.join(death.after)
        process.kill()
    process.join()
    return process.exitcode


def _life(config: RunConfig, death: Death | None, cache: Path | None) -> None:
    import torch

    from subquad.training import fit, recorder
    from subquad.training.sources import packed_text

    torch.set_num_threads(1)
    if cache is not None:
        os.environ["SUBQUAD_CACHE"] = str(cache)
    # What a run prints is not the test's; a failure shows in the exit code.
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if death is not None and death.kind == "checkpoint":
        recorder.write_checkpoint = _mortal(recorder.write_checkpoint, int(death.after))
    elif death is not None and death.kind == "token cache":
        packed_text.cached_tokens = _mortal(packed_text.cached_tokens, int(death.after))
    fit.train(config)


def _mortal(function: Callable[..., Any], lines: int) -> Callable[..., Any]:
    """The function, in which the process dies before the `lines`-th line of its file, counted over all calls."""
    file, left = function.__code__.co_filename, [lines]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != file:
            return None
        if event == "line":
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced(*arguments: Any, **named: Any) -> Any:
        sys.settrace(trace)
        try:
            return function(*arguments, **named)
        finally:
            sys.settrace(None)

    return traced


def forget_tokens(cache: Path) -> None:
    """Have the next run build its token cache again; what a killed builder left stays."""
    for path in (cache / "tokens").glob("*.tokens"):
        path.unlink()
