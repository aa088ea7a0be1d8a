"""The folder of a run: what lies where, and what may be started in it."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from subquad.component_config import typed_config
from subquad.errors import ConfigError, ResumeError, RunError
from subquad.log import say
from subquad.schema import RunConfig

FORMAT_VERSION = 1
DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO))
"""A disk that is full, limited, write-protected or broken."""
HELD_WAIT_S = 20.0
"""How long another process is waited for: workers of a loader outlive a killed run by up to 5 s, and hold its lock."""


@dataclass(frozen=True)
class RunFolder:
    """The paths inside a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def prediction(self) -> Path:
        return self.path / "prediction.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def lock(self) -> Path:
        """Held by the process that trains the run."""
        return self.path / "run.lock"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def trace(self) -> Path:
        """What `profile=true` records."""
        return self.path / "trace.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def loss_curve(self) -> Path:
        return self.path / "loss.png"

    def nonfinite(self, step: int, rank: int) -> Path:
        """The batches of a step whose loss or gradient was no number."""
        return self.path / "nonfinite" / f"step-{step}-rank-{rank}.pt"

    @property
    def sweep(self) -> Path:
        """Which job of a sweep the run is (`sweep.py`)."""
        return self.path / "sweep.json"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def evaluation_report(self) -> Path:
        return self.path / "evaluation.md"

    def samples(self, rank: int) -> Path:
        """Which samples a rank consumed, step by step; of ranks that share them the first has a record."""
        return self.path / "samples" / f"rank-{rank}.csv"


def new_run_folder(config: RunConfig) -> RunFolder:
    """The folder of a new run, which is checked but not yet created.  Raises: ConfigError."""
    if config.run_dir is None:
        now = datetime.now()
        model = re.sub(r"[^A-Za-z0-9_.-]+", "_", config.model.name)
        path = Path("runs") / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}-{model}"
        # Jobs of a sweep may start within one second.
        attempt = 1
        while path.exists():
            attempt += 1
            path = path.with_name(f"{now:%H-%M-%S}-{model}-{attempt}")
    else:
        path = Path(config.run_dir).expanduser()
    folder = RunFolder(path.absolute())
    try:
        folder.path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        raise _unwritable(path, getattr(error, "strerror", None) or str(error)) from None
    if any(file.exists() for file in (folder.config, folder.metrics, folder.checkpoints)):
        raise ConfigError(
            what="the run folder already holds a run",
            where=f"run_dir={path}",
            mend=f"go on with it (resume={path}), or name another folder",
        )
    parent = folder.path
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise _unwritable(path, f"{parent} is no folder" if not parent.is_dir() else f"{parent} is not writable")
    return folder


def create(folder: RunFolder) -> None:
    """Create the folder of a new run.  Raises: ConfigError."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.checkpoints.mkdir()
    except FileExistsError:
        raise ConfigError(
            what="another run has just been started in this folder",
            where=f"run_dir={folder.path}",
            mend="name another folder",
        ) from None
    except OSError as error:
        raise _unwritable(folder.path, str(error.strerror)) from None


@contextmanager
def held(folder: RunFolder, where: str) -> Iterator[None]:
    """Keep other processes from training this run meanwhile: two would write each other's checkpoints and figures.

    `where` is the option that named the folder. Raises: ResumeError when another process does not let go of it.
    """
    lock = FileLock(folder.lock)
    try:
        with suppress(Timeout):
            lock.acquire(timeout=0)
        if not lock.is_locked:
            say(f"another process holds {folder.lock}: waiting for it")
            lock.acquire(timeout=HELD_WAIT_S)
    except Timeout:
        raise ResumeError(
            what="another process trains this run",
            where=where,
            mend="let it end, or end it: on SIGTERM it leaves a checkpoint to go on from",
        ) from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_errors(folder: RunFolder) -> Iterator[None]:
    """Say of a disk that takes no more what can be done about it.  Raises: RunError in place of such an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise RunError(
            what=f"the run folder cannot be written: {error.strerror}",
            where=str(error.filename or folder.path),
            mend=f"make room or allow writing, then go on with resume={folder.path}: its checkpoints stand",
        ) from error


def write_config(folder: RunFolder, config: RunConfig) -> None:
    """Write the resolved configuration, with the version of the format."""
    values = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    assert isinstance(values, dict)
    write_text(folder.config, OmegaConf.to_yaml(OmegaConf.create({"format_version": FORMAT_VERSION, **values})))


def read_config(folder: RunFolder, where: str) -> RunConfig:
    """The configuration of a run; `where` is the option that named the folder.  Raises: ResumeError."""
    try:
        is_there = folder.config.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        is_there = False
    if not is_there:
        raise ResumeError(
            what=f"{folder.path} is not a run folder: it holds no config.yaml" if os.path.isdir(folder.path)
            else f"there is no folder {folder.path}",
            where=where,
            mend="name the folder that `train` printed in its last line",
        )  # fmt: skip
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(folder.config))
        version = values.pop("format_version", None)
    except (OSError, ValueError, AttributeError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise _unreadable_config(folder, str(error).splitlines()[0]) from None
    if version != FORMAT_VERSION:
        raise ResumeError(
            what=f"its format version is {version}, this program reads {FORMAT_VERSION}",
            where=str(folder.config),
            mend="use the version of subquad that wrote the run",
        )
    return typed_config(RunConfig, values, str(folder.config))


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write a record with the version of the format, replacing the file in one step."""
    write_text(path, json.dumps({"format_version": FORMAT_VERSION, **values}, indent=2, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A record that `write_json` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(record, dict)
    return record


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _unwritable(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        what=f"the run folder cannot be written: {reason}",
        where=f"run_dir={path}",
        mend="name a folder that you may write to: run_dir=PATH",
    )


def _unreadable_config(folder: RunFolder, reason: str) -> ResumeError:
    return ResumeError(
        what=f"the run's configuration cannot be read: {reason}",
        where=str(folder.config),
        mend="take the run folder from a backup",
    )
