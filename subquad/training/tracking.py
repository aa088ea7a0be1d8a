"""Weights & Biases or TensorBoard beside metrics.csv: the same figures under the same names.

Weights & Biases is offline unless somebody is logged in; `wandb sync RUN_DIR/wandb/offline-run-*` sends a run later.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol
from urllib.parse import urlsplit

from subquad.errors import ConfigError, suggestion
from subquad.training.run_folder import RunFolder, read_json

KINDS = ("none", "csv", "wandb", "tensorboard")
PACKAGES = {"wandb": "train", "tensorboard": "tensorboard"}
"""Trackers that need a package of the same name, and the extra that brings it."""
PROJECT = "subquad"
Mode = Literal["online", "offline", "disabled", "shared"]


class Tracker(Protocol):
    """Takes the rows of metrics.csv as they are written."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Record what is no figure of a step."""

    def finish(self, exit_code: int) -> None:
        """Close the record; another code than 0 marks the run as failed."""


class NoTracker:
    """metrics.csv is all there is (`tracking=none` and `tracking=csv`)."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        pass


class WandbTracker:
    """A run of Weights & Biases whose files lie in the run folder; one id for a run and all its resumptions.

    The jobs of a sweep are a group, called as the sweep's folder.
    """

    def __init__(self, folder: RunFolder, config: Mapping[str, object]) -> None:
        import wandb

        run_dir = folder.path
        identity = run_dir / "wandb_run_id"
        resumed = identity.exists()
        run_id = identity.read_text(encoding="utf-8").strip() if resumed else secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_dir.name,
            group=read_json(folder.sweep)["sweep"] if folder.sweep.exists() else None,
            id=run_id,
            resume="allow" if resumed else None,
            dir=run_dir,
            config=dict(config),
            mode=_mode(),
        )
        identity.write_text(f"{run_id}\n", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        import wandb

        self._run.summary[name] = wandb.Table(columns=list(columns), data=[list(row) for row in rows])

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

    def finish(self, exit_code: int) -> None:
        self._writer.close()


def check_tracking(kind: str) -> None:
    """Refuse an unknown tracker, and one that is not installed.  Raises: ConfigError."""
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


def build_tracker(kind: str, folder: RunFolder, config: Mapping[str, object], resumed_at: int | None) -> Tracker:
    """The tracker that a run asks for, writing into the run folder; `resumed_at` is the step that it goes on from."""
    if kind == "wandb":
        return WandbTracker(folder, config)
    return TensorBoardTracker(folder, resumed_at) if kind == "tensorboard" else NoTracker()


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
