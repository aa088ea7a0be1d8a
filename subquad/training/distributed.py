"""Several processes, one run: who is which rank, and how ranks start and end.

With `trainer.devices` above 1 the calling process becomes rank 0 and starts the others itself, each as
`python -m subquad.training.worker RUN_DIR`: they read the resolved configuration and the plan from the run folder and
never see Hydra or the caller's script. Under torchrun all ranks exist already and rank 0 tells the others the folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from subquad.errors import ConfigError, RunError
from subquad.parallel.part import SequencePart
from subquad.schema import TrainerConfig

VARIABLES = ("LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE")
STORE_PORT = "SUBQUAD_STORE_PORT"
LOCALHOST = "127.0.0.1"
SECONDS_TO_END, SECONDS_TO_FAIL = 60.0, 5.0
"""How long rank 0 waits for the others when it is done, and when it has failed and they must follow."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run."""

    rank: int
    world_size: int
    from_outside: bool  # started by torchrun, or by rank 0; not by us here


def ranks_here(config: TrainerConfig) -> Ranks:
    """What the environment says.  Raises: ConfigError when torchrun started a number that does not fit."""
    from_outside = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world_size = int(os.environ["WORLD_SIZE"]) if from_outside else config.devices
    if world_size % config.context_parallel:
        raise ConfigError(
            what=f"{config.context_parallel} devices are to share each sequence, and the run has {world_size}",
            where="trainer.context_parallel",
            mend=f"use a divisor of the number of devices, or trainer.devices={config.context_parallel}",
        )
    if not from_outside:
        return Ranks(0, world_size, from_outside=False)
    if world_size % config.devices:
        raise ConfigError(
            what=f"{world_size} processes were started, which is no multiple of {config.devices} devices per machine",
            where="trainer.devices",
            mend="give torchrun --nproc-per-node the same number",
        )
    return Ranks(int(os.environ["RANK"]), world_size, from_outside=True)


@contextmanager
def process_group(ranks: Ranks, run_dir: Path | None) -> Iterator[None]:
    """Join the ranks of the run; on leaving, this process is as it was, ready for the next job of a sweep.

    `run_dir` is given by a rank 0 that has to start the others. Raises: RunError when one of them failed.
    """
    if ranks.world_size == 1:
        yield
        return
    before = {name: os.environ.get(name) for name in VARIABLES}
    children: list[subprocess.Popen[bytes]] = []
    finished = False
    try:
        store = None
        if not ranks.from_outside:
            assert run_dir is not None
            # Port 0: the system picks a free one while we hold it, so that jobs side by side cannot collide.
            store = TCPStore(LOCALHOST, 0, ranks.world_size, is_master=True, wait_for_workers=False)
            children = _start_others(ranks.world_size, store.port, run_dir)
            _wait_for(children, store)
        elif STORE_PORT in os.environ:
            store = TCPStore(LOCALHOST, int(os.environ[STORE_PORT]), ranks.world_size, wait_for_workers=False)
            store.set(f"here-{ranks.rank}", "yes")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        # gloo carries what ranks agree on after each step, whatever carries the gradients.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if store is None:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size)
        yield
        dist.barrier()
        finished = True
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        codes = [_end(child, SECONDS_TO_END if finished else SECONDS_TO_FAIL) for child in children]
    _check(codes)


def share_sequences(part: SequencePart, ranks: Ranks) -> None:
    """Let the part exchange with those of its sequences: ranks in a row, in groups of as many as there are parts."""
    for first in range(0, ranks.world_size, part.count):
        members = list(range(first, first + part.count))
        group = dist.new_group(members)  # every rank takes part in making every group
        if ranks.rank in members:
            part.join(group)


def told_by_rank_zero(value: str | None) -> str:
    """The text that rank 0 has, on every rank; the process group must exist."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]


@contextmanager
def share_of_threads(devices: int) -> Iterator[None]:
    """Divide the processor's cores among the ranks of this machine, unless OMP_NUM_THREADS says otherwise."""
    before = torch.get_num_threads()
    if devices > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, before // devices))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start_others(world_size: int, port: int, run_dir: Path) -> list[subprocess.Popen[bytes]]:
    shared = {"WORLD_SIZE": str(world_size), "NODE_RANK": "0"}
    os.environ.update(shared, RANK="0", LOCAL_RANK="0")
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads())} | os.environ | {STORE_PORT: str(port)}
    command = [sys.executable, "-m", "subquad.training.worker", str(run_dir)]
    return [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(1, world_size)
    ]


def _wait_for(children: list[subprocess.Popen[bytes]], store: TCPStore) -> None:
    """Wait until every rank has called, or one has died.  Raises: RunError."""
    expected = [f"here-{rank}" for rank in range(1, 1 + len(children))]
    while not store.check(expected):
        _check([child.poll() or 0 for child in children])
        time.sleep(0.05)


def _check(codes: list[int]) -> None:
    failed = [(rank, code) for rank, code in enumerate(codes, start=1) if code]
    if failed:
        rank, code = failed[0]
        raise RunError(
            what=f"rank {rank} ended with exit code {code}", where="trainer.devices", mend="read its message above"
        )


def _end(child: subprocess.Popen[bytes], patience_s: float) -> int:
    try:
        return child.wait(patience_s)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()
