"""A job of a sweep in a folder of its own: begun, gone on with after an interruption, skipped once it has finished.

The jobs of `train --multirun run_dir=PATH` lie in PATH/0, PATH/1, ... Each folder holds `sweep.json`, which says by
digests what was asked for: a sweep that is started again, or with more values, finds its jobs by that, not by their
number. The report is what a run writes last, so a folder with one has finished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from subquad.log import say
from subquad.schema import RunConfig
from subquad.training.checkpoint import checkpoint_steps
from subquad.training.resume import PLACES, leaves, set_key
from subquad.training.run_folder import RunFolder, new_run_folder, read_config, read_json, write_json

LOCK = "sweep.lock"
HORIZON = frozenset({"trainer.max_steps", "trainer.max_seconds"})
CHANGEABLE = HORIZON | {
    "trainer.validate_every_n_steps",
    "trainer.log_every_n_steps",
    "trainer.num_workers",
    "trainer.progress_bar",
    "log_level",
    "checkpoint.every_n_steps",
    "checkpoint.keep",
    "checkpoint.artifacts",
    "tracking",
    "profile",
}
"""What the job of a number may be asked for anew: fewer than a resumed run may change, since a sweep may compare the
others. A longer horizon goes on with a job that had finished."""


@contextmanager
def sweep_job(config: RunConfig, overrides: Sequence[str]) -> Iterator[tuple[RunConfig, Sequence[str]] | None]:
    """What the job with the folder `config.run_dir` has to train; None when it has finished, or runs elsewhere.

    A job that was interrupted goes on from its newest checkpoint, with the asked keys that a resumed run may change;
    without a checkpoint it is begun again. While the context lasts no other process takes the job.
    Raises: ConfigError when the folder cannot be written; ResumeError when what it holds cannot be read.
    """
    assert config.run_dir is not None
    asked = Path(config.run_dir).expanduser().absolute()
    digests = {"exact": digest_of(config), "job": digest_of(config, CHANGEABLE)}
    path = _folder_of(asked, digests)
    if path != asked:
        config = dataclasses.replace(config, run_dir=str(path))
    if not path.exists():
        new_run_folder(config)  # says whether it can be written
    path.mkdir(parents=True, exist_ok=True)
    folder, lock, shown = RunFolder(path), FileLock(path / LOCK), f"job {asked.name} ({' '.join(overrides)})"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{shown} is skipped: another process runs it in {path}")
        yield None
        return
    try:
        job = _to_do(folder, config, overrides)
        if job is None:
            say(f"{shown} is skipped: it has finished in {path}")
        elif job[0].resume is not None:
            say(f"{shown} goes on in {path}")
        elif path != asked:
            say(f"{shown} is begun in {path}: {asked} holds another job")
        if job is not None:
            record = {"sweep": path.parent.name, "overrides": list(overrides), "digests": digests}
            write_json(folder.sweep, record)
        yield job
    finally:
        if not folder.config.exists():
            _remove_unused(folder)
        lock.release()


def digest_of(config: RunConfig, but: frozenset[str] = frozenset()) -> str:
    """A hash of what is asked for, but for the place of the run and some keys."""
    kept = [pair for pair in leaves(dataclasses.asdict(config)) if pair[0] not in but | set(PLACES)]
    return hashlib.sha256(json.dumps(sorted(kept, key=lambda pair: pair[0])).encode()).hexdigest()


def _folder_of(asked: Path, digests: dict[str, str]) -> Path:
    """The folder in which the job was begun before; else the asked one, or the next that holds no other job."""
    equal = [("exact", path) for path in (asked, *sorted(asked.parent.glob("*/")))]
    for kind, path in [*equal, ("job", asked)]:
        record = RunFolder(path).sweep
        if record.is_file() and read_json(record)["digests"][kind] == digests[kind]:
            return path
    path, attempt = asked, 1
    while any(file.exists() for file in (RunFolder(path).sweep, RunFolder(path).config)):
        attempt += 1
        path = asked.with_name(f"{asked.name}-{attempt}")
    return path


def _to_do(folder: RunFolder, config: RunConfig, overrides: Sequence[str]) -> tuple[RunConfig, Sequence[str]] | None:
    has_finished = folder.report.exists()
    if not has_finished and not any(checkpoint_steps(folder.checkpoints)):
        _empty(folder)
        return config, overrides
    # The run's own configuration: what was left open is chosen there, and kernels that failed are denied.
    going_on = read_config(folder, f"run_dir={folder.path}")
    before, now = (dict(leaves(dataclasses.asdict(one))) for one in (going_on, config))
    changed = sorted(key for key in CHANGEABLE if before[key] != now[key])
    if has_finished and not HORIZON.intersection(changed):
        return None
    for key in changed:
        set_key(going_on, key, now[key])
    going_on.resume = str(folder.path)
    return going_on, [*overrides, *(f"{key}={now[key]}" for key in changed)]


def _empty(folder: RunFolder) -> None:
    """Remove what a run left that came to no checkpoint."""
    for entry in folder.path.iterdir():
        if entry.name not in (LOCK, folder.sweep.name):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _remove_unused(folder: RunFolder) -> None:
    """Remove the folder of a job that was refused before it wrote anything."""
    folder.sweep.unlink(missing_ok=True)
    (folder.path / LOCK).unlink()
    with suppress(OSError):  # something else lies there
        folder.path.rmdir()
        folder.path.parent.rmdir()
