"""A run that is killed again and again, at random moments, ends as the run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from compared_runs import assert_same_run
from mortal_run import KINDS, drawn, forget_tokens, live

from subquad.schema import RunConfig
from subquad.training.checkpoint import newest_checkpoint

TinyRun = Callable[..., RunConfig]

STEPS = 36


@pytest.mark.timeout(900)  # on a busy machine each of a hundred lives takes seconds
@pytest.mark.parametrize(("kills", "seed"), [(6, 1), pytest.param(50, 2, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(kills: int, seed: int, tiny_run: TinyRun, tmp_path: Path) -> None:
    """SIGKILL by the clock, while a checkpoint is written and while tokens are cached, then resume, over and over.

    A run that holds no checkpoint yet is started again in another folder, as its error says. Equal means: weights to
    the last bit, the numbers of all consumed samples, all recorded losses.
    """

    def config(name: str, resume: bool = False) -> RunConfig:
        made = tiny_run(name, max_steps=STEPS, every=3, validate_every_n_steps=12, log_every_n_steps=5)
        return replace(made, resume=made.run_dir if resume else None)

    straight = tmp_path / "straight"
    assert live(config("first"), None) == 0  # starts the server and checks kernels: longer than any after it
    begun = time.monotonic()
    assert live(config("straight"), None) == 0
    longest_s = time.monotonic() - begun

    cache, dice = Path(os.environ["SUBQUAD_CACHE"]), random.Random(seed)
    killed: Counter[str] = Counter()
    finished = attempt = 0
    while killed.total() < kills or not finished:
        name, attempt = f"killed-{attempt}", attempt + 1
        checkpoints, code = tmp_path / name / "checkpoints", -signal.SIGKILL
        while code == -signal.SIGKILL:
            whole = newest_checkpoint(checkpoints) if checkpoints.exists() else None
            if whole is None and checkpoints.exists():
                break  # killed before the first checkpoint: another folder
            death = drawn(dice, longest_s) if killed.total() < kills else None
            if death is not None and death.kind == "token cache":
                forget_tokens(cache)
            code = live(config(name, resume=whole is not None), death)
            if code == -signal.SIGKILL:
                assert death is not None
                killed[death.kind] += 1
        else:
            assert code == 0
            assert_same_run(tmp_path / name, straight)
            assert not list(checkpoints.glob(".unfinished-*"))
            finished += 1
    assert all(killed[kind] for kind in KINDS), killed
    assert [path for path in (cache / "tokens").iterdir() if path.suffix not in (".tokens", ".lock")] == []
