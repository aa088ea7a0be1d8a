"""Ranks above 0 forked from a server that has imported everything, so that a run of two takes a second to start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import pytest
import torch
from mortal_run import FORKS

from subquad.training import distributed

Fault = Callable[[], None]
"""A function of a test module, called in the process of another rank."""


class ForkedRank:
    """What `distributed` asks of a process."""

    def __init__(self, rank: int, run_dir: Path, fault: Fault | None) -> None:
        environment = dict(os.environ) | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        self._process = FORKS.Process(target=_live, args=(environment, run_dir, fault))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def fork_ranks(monkeypatch: pytest.MonkeyPatch, fault: Fault | None = None) -> None:
    """Have runs start their other ranks this way, with something that happens to each before it takes part.

    What they print on stderr is in `RUN_DIR.rank-N.txt`.
    """
    ensure_running()  # before there are ranks: processes that are forked later would take themselves for one

    def start_others(world_size: int, port: int, run_dir: Path) -> list[ForkedRank]:
        os.environ.update(WORLD_SIZE=str(world_size), NODE_RANK="0", RANK="0", LOCAL_RANK="0")
        monkeypatch.setenv(distributed.STORE_PORT, str(port))
        ranks = [ForkedRank(rank, run_dir, fault) for rank in range(1, world_size)]
        monkeypatch.delenv(distributed.STORE_PORT)
        return ranks

    monkeypatch.setattr(distributed, "_start_others", start_others)


def _live(environment: dict[str, str], run_dir: Path, fault: Fault | None) -> None:
    from subquad.training.worker import main

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    sys.stderr = open(f"{run_dir}.rank-{environment['RANK']}.txt", "w", buffering=1, encoding="utf-8")  # noqa: SIM115
    if fault is not None:
        fault()
    sys.argv = ["worker", str(run_dir)]
    sys.exit(main())
