"""Several processes, one run: who is which rank, and how ranks start and end.

With `trainer.devices` above 1 the calling process becomes rank 0 and starts the others itself, each as
`python -m subquad.training.worker RUN_DIR`: they read the resolved configuration and the plan from the run folder and
never see Hydra or the caller's script. Under torchrun and srun all ranks exist already and rank 0 tells the others the
folder, which all must see.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from subquad.errors import ConfigError, RunError
from subquad.parallel.part import SequencePart
from subquad.schema import TrainerConfig
from subquad.training.rank_watch import RankWatch

VARIABLES = ("LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE")
STORE_PORT = "SUBQUAD_STORE_PORT"
LOCALHOST = "127.0.0.1"
SECONDS_TO_END, SECONDS_TO_FAIL = 60.0, 5.0
"""How long rank 0 waits for the others when it is done, and when it has failed and they must follow."""
EXIT_LEFT = 75
"""The exit code of a rank that ends because another one has gone."""
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""How gloo says that another process has gone."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run."""

    rank: int
    world_size: int
    from_outside: bool  # started by torchrun, or by rank 0; not by us here


def ranks_here(config: TrainerConfig) -> Ranks:
    """What the environment says.  Raises: ConfigError when torchrun or srun started a number that does not fit."""
    _name_slurm_tasks()
    from_outside = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world_size = int(os.environ["WORLD_SIZE"]) if from_outside else config.devices
    if world_size % config.context_parallel:
        raise ConfigError(
            what=f"{config.context_parallel} devices are to share each sequence, and the run has {world_size}",
            where="trainer.context_parallel",
            mend=f"use a divisor of the number of devices, or trainer.devices={config.context_parallel}",
        )
    if world_size % config.tensor_parallel:
        raise ConfigError(
            what=f"{config.tensor_parallel} devices are to share projections, and the run has {world_size}",
            where="trainer.tensor_parallel",
            mend=f"use a divisor of the number of devices, or trainer.devices={config.tensor_parallel}",
        )
    if not from_outside:
        return Ranks(0, world_size, from_outside=False)
    if world_size % config.devices:
        raise ConfigError(
            what=f"{world_size} processes were started, which is no multiple of {config.devices} devices per machine",
            where="trainer.devices",
            mend="give torchrun --nproc-per-node, or srun --ntasks-per-node, the same number",
        )
    return Ranks(int(os.environ["RANK"]), world_size, from_outside=True)


def started_by_rank_zero(ranks: Ranks) -> bool:
    """Whether rank 0 starts the others, or has; else torchrun or SLURM did."""
    return not ranks.from_outside or STORE_PORT in os.environ


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
    watch = RankWatch(_gone(children, ranks), lambda: _kill(children))
    failure: BaseException | None = None
    try:
        store = None
        if not ranks.from_outside:
            assert run_dir is not None
            # Port 0: the system picks a free one while we hold it, so that jobs side by side cannot collide.
            store = TCPStore(LOCALHOST, 0, ranks.world_size, is_master=True, wait_for_workers=False)
            children += _start_others(ranks.world_size, store.port, run_dir)
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
        watch.stop()
    except BaseException as error:
        failure = error
        watch.failed(error)
    try:
        if dist.is_initialized():
            dist.destroy_process_group()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        codes = [_end(child, SECONDS_TO_FAIL if failure else SECONDS_TO_END) for child in children]
        watch.stop()
    culprit = _culprit(codes, ended_by_us_too=failure is None)
    if failure is None:
        if culprit is not None:
            raise culprit
        return
    if culprit is not None and lost_a_rank(failure):
        raise culprit from failure
    raise failure


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error says only that another rank has gone, which has told its own reason."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)
    )


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


def check_alike(facts: Mapping[str, str]) -> None:
    """Refuse to go on where a rank differs from rank 0 in what all must share; the process group must exist.

    Raises: RunError, on all ranks.
    """
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, dict(facts))
    for rank, theirs in enumerate(by_rank):
        differing = [name for name in sorted(facts.keys() | theirs.keys()) if by_rank[0].get(name) != theirs.get(name)]
        if differing:
            name = differing[0]
            raise RunError(
                what=f"rank {rank} differs from rank 0 in {', '.join(differing)}"
                f" ({name}: {theirs.get(name)}, not {by_rank[0].get(name)})",
                where="trainer.devices",
                mend="let all ranks see one run folder, and install the same versions everywhere",
            )


def first_of_ranks(found: str | None) -> str | None:
    """What the first rank that has something has; called by all ranks."""
    by_rank: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, found)
    return next((text for text in by_rank if text is not None), None)


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


def _name_slurm_tasks() -> None:
    """Where srun has started a task for each rank, name their numbers as torchrun would."""
    in_a_step = "SLURM_STEP_ID" in os.environ  # which srun sets, and a batch script that calls us without it has not
    if "RANK" in os.environ or not in_a_step or int(os.environ.get("SLURM_NTASKS", "1")) == 1:
        return
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    if not SLURMEnvironment.detect():  # an interactive job, whose tasks Lightning leaves alone
        return
    try:
        slurm = SLURMEnvironment()
    except RuntimeError as error:
        raise ConfigError(
            what=str(error).partition(" HINT")[0], where="SLURM", mend="start it with srun --ntasks-per-node=DEVICES"
        ) from None
    os.environ.update(
        RANK=str(slurm.global_rank()),
        LOCAL_RANK=str(slurm.local_rank()),
        NODE_RANK=str(slurm.node_rank()),
        WORLD_SIZE=str(slurm.world_size()),
        MASTER_ADDR=slurm.main_address,
        MASTER_PORT=str(slurm.main_port),
    )


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
        culprit = _culprit([child.poll() or 0 for child in children])
        if culprit is not None:
            raise culprit
        time.sleep(0.05)


def _gone(children: list[subprocess.Popen[bytes]], ranks: Ranks) -> Callable[[], str | None]:
    """Says which rank is missed: rank 0 knows those it has started, and each of them knows rank 0."""
    parent = os.getppid()
    started_by_rank_zero = ranks.rank > 0 and STORE_PORT in os.environ

    def gone() -> str | None:
        if started_by_rank_zero and os.getppid() != parent:
            return "rank 0 has gone"
        culprit = _culprit([child.poll() or 0 for child in children])
        return None if culprit is None else culprit.what

    return gone


def _kill(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        child.kill()


def _culprit(codes: Sequence[int | None], *, ended_by_us_too: bool = False) -> RunError | None:
    """The error of the first rank above 0 that failed by itself; None stands for one that we had to end."""
    for rank, code in enumerate(codes, start=1):
        if code in (0, EXIT_LEFT) or (code is None and not ended_by_us_too):
            continue
        how = "did not end" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        return RunError(
            what=f"rank {rank} {how}",
            where="trainer.devices",
            mend="read its message above, then go on with resume=RUN_DIR: the checkpoints stand",
        )
    return None


def _end(child: subprocess.Popen[bytes], patience_s: float) -> int | None:
    """The exit code of a process; None if it had to be killed."""
    try:
        return child.wait(patience_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return None
