"""Weights & Biases or TensorBoard beside metrics.csv: the same figures under the same names.

Weights & Biases is offline unless somebody is logged in; `wandb sync RUN_DIR/wandb/offline-run-*` sends a run later.
A server that does not answer, or not in time, costs no run: what it did not take lies in the run folder.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import urlsplit

from subquad.errors import ConfigError, suggestion
from subquad.log import says
from subquad.training.checkpoint import checkpoint_steps
from subquad.training.metrics import read_metrics
from subquad.training.run_folder import RunFolder, read_json

KINDS = ("none", "csv", "wandb", "tensorboard")
PACKAGES = {"wandb": "train", "tensorboard": "tensorboard"}
"""Trackers that need a package of the same name, and the extra that brings it."""
PROJECT = "subquad"
INIT_S, FINISH_S = 30.0, 600.0
"""How long a server is waited for, at the beginning and for what is left to send at the end."""
Mode = Literal["online", "offline", "disabled", "shared"]


class Tracker(Protocol):
    """Takes the rows of metrics.csv as they are written."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Record what is no figure of a step."""

    def checkpoint(self, step: int, folder: Path, aliases: Sequence[str]) -> None:
        """Record a checkpoint that stays where it is."""

    def finish(self, exit_code: int) -> None:
        """Close the record; another code than 0 marks the run as failed."""


class NoTracker:
    """metrics.csv is all there is (`tracking=none` and `tracking=csv`)."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        pass

    def checkpoint(self, step: int, folder: Path, aliases: Sequence[str]) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        pass


class WandbTracker:
    """A run of Weights & Biases whose files lie in the run folder; one id for a run and all its resumptions.

    The jobs of a sweep are a group, called as the sweep's folder.
    """

    def __init__(self, folder: RunFolder, config: Mapping[str, object], mode: Mode) -> None:
        import wandb

        run_dir = folder.path
        identity = run_dir / "wandb_run_id"
        resumed = identity.exists()
        run_id = identity.read_text(encoding="utf-8").strip() if resumed else secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_dir.name,
            group=read_json(folder.sweep)["sweep"] if folder.sweep.exists() else None,  # None: WANDB_RUN_GROUP
            job_type="train",
            id=run_id,
            resume="allow" if resumed else None,
            dir=run_dir,
            config=dict(config),
            mode=mode,
            settings=wandb.Settings(
                init_timeout=INIT_S, finish_timeout=FINISH_S, **({} if says("info") else {"silent": True})
            ),
        )
        identity.write_text(f"{run_id}\n", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        import wandb

        self._run.summary[name] = wandb.Table(columns=list(columns), data=[list(row) for row in rows])

    def checkpoint(self, step: int, folder: Path, aliases: Sequence[str]) -> None:
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata={"step": step})
        artifact.add_dir(str(folder), policy="immutable")  # read where it lies: no second copy on the disk
        self._run.log_artifact(artifact, aliases=list(aliases))

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


class TensorBoardTracker:
    """Event files in RUN_DIR/tensorboard: `tensorboard --logdir` a run, a sweep or all of `runs`.

    A resumed run takes back what came after its checkpoint. The configuration is the text `config`, in YAML.
    """

    def __init__(self, folder: RunFolder, resumed_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=purge)
        config = folder.config.read_text(encoding="utf-8")
        self._writer.add_text("config", "".join(f"    {line}\n" for line in config.splitlines()), resumed_at or 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        lines = [columns, ["---"] * len(columns), *([cell.replace("|", "/") for cell in row] for row in rows)]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), 0)

    def checkpoint(self, step: int, folder: Path, aliases: Sequence[str]) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        self._writer.close()


class Dispensable:
    """A tracker that a run does without from its first failure on, which is told once.

    It is finished all the same when the run ends: the next run of this process is one of its own.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self._failed = tracker, False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda: self._tracker.log(step, values))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._try(lambda: self._tracker.table(name, columns, rows))

    def checkpoint(self, step: int, folder: Path, aliases: Sequence[str]) -> None:
        self._try(lambda: self._tracker.checkpoint(step, folder, aliases))

    def finish(self, exit_code: int) -> None:
        if self._failed:
            with suppress(Exception):  # it has been told
                self._tracker.finish(exit_code)
        self._try(lambda: self._tracker.finish(exit_code))

    def _try(self, record: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            record()
        except Exception as error:  # whatever a client of a far server may meet
            self._failed = True
            reason = (str(error).splitlines() or [""])[0]
            warnings.warn(
                f"tracking ends here, training goes on: {type(error).__name__}: {reason}; metrics.csv has all figures",
                stacklevel=2,
            )


def check_tracking(kind: str, artifacts: bool = False) -> None:
    """Refuse an unknown tracker, one that is not installed, and one that takes no checkpoints.  Raises: ConfigError."""
    if kind not in KINDS:
        raise ConfigError(
            what=f"no tracking is called '{kind}'",
            where="tracking",
            mend=f"{suggestion(kind, KINDS)}use one of {', '.join(KINDS)}",
        )
    if kind in PACKAGES and importlib.util.find_spec(kind) is None:
        raise ConfigError(
            what=f"tracking={kind} needs the package {kind}",
            where="tracking",
            mend=f"pip install 'subquad[{PACKAGES[kind]}]'",
        )
    if artifacts and kind != "wandb":
        raise ConfigError(
            what=f"tracking={kind} takes no checkpoints",
            where="checkpoint.artifacts",
            mend="use tracking=wandb, or checkpoint.artifacts=false",
        )


def build_tracker(kind: str, folder: RunFolder, config: Mapping[str, object], resumed_at: int | None) -> Tracker:
    """The tracker that a run asks for, writing into the run folder; `resumed_at` is the step that it goes on from."""
    if kind == "wandb":
        return Dispensable(_wandb(folder, config))
    return TensorBoardTracker(folder, resumed_at) if kind == "tensorboard" else NoTracker()


def _wandb(folder: RunFolder, config: Mapping[str, object]) -> WandbTracker:
    """A run of Weights & Biases; offline if the server that was meant does not answer."""
    from wandb.errors import Error

    mode = _mode()
    try:
        return WandbTracker(folder, config, mode)
    except Error as error:
        if mode not in ("online", "shared"):
            raise
        warnings.warn(f"Weights & Biases is offline for this run: {str(error).splitlines()[0]}", stacklevel=2)
        return WandbTracker(folder, config, "offline")


def record_checkpoints(tracker: Tracker, folder: RunFolder) -> None:
    """Record the checkpoints that a run has kept, oldest first; `best` is that of the lowest validation loss."""
    steps = sorted(checkpoint_steps(folder.checkpoints))
    losses = {int(row["step"]): row["val/loss"] for row in read_metrics(folder.metrics) if "val/loss" in row}
    validated = [step for step in steps if step in losses]
    best = min(validated, key=losses.__getitem__, default=None)
    for step in steps:
        aliases = [f"step-{step}", "best"] if step == best else [f"step-{step}"]
        tracker.checkpoint(step, folder.checkpoints / f"step-{step}", aliases)


def _mode() -> Mode:
    """What WANDB_MODE says; else online if this user is logged in, and offline if not."""
    modes: dict[str, Mode] = {"online": "online", "offline": "offline", "disabled": "disabled", "shared": "shared"}
    asked = os.environ.get("WANDB_MODE")
    if asked is None:
        return "online" if _logged_in() else "offline"
    if asked not in modes:
        raise ConfigError(
            what=f"WANDB_MODE is '{asked}'", where="environment", mend=f"use one of {', '.join(modes)}, or unset it"
        )
    return modes[asked]


def _logged_in() -> bool:
    """Whether there is a key for the server where `wandb login` leaves it: wandb itself would stop and ask for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(server) is not None
    except (OSError, netrc.NetrcParseError):
        return False
