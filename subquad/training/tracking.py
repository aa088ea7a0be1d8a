"""Weights & Biases beside metrics.csv: offline unless somebody is logged in."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import urlsplit

from subquad.errors import ConfigError, suggestion

KINDS = ("none", "csv", "wandb")
PROJECT = "subquad"
Mode = Literal["online", "offline", "disabled", "shared"]


class Tracker(Protocol):
    """Takes the rows of metrics.csv as they are written."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step."""

    def finish(self, exit_code: int) -> None:
        """Close the record; another code than 0 marks the run as failed."""


class NoTracker:
    """metrics.csv is all there is (`tracking=none` and `tracking=csv`)."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        pass


class WandbTracker:
    """A run of Weights & Biases whose files lie in the run folder; one id for a run and all its resumptions."""

    def __init__(self, run_dir: Path, config: Mapping[str, object]) -> None:
        import wandb

        identity = run_dir / "wandb_run_id"
        resumed = identity.exists()
        run_id = identity.read_text(encoding="utf-8").strip() if resumed else secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_dir.name,
            id=run_id,
            resume="allow" if resumed else None,
            dir=run_dir,
            config=dict(config),
            mode=_mode(),
        )
        identity.write_text(f"{run_id}\n", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def check_tracking(kind: str) -> None:
    """Refuse an unknown tracker, and one that is not installed.  Raises: ConfigError."""
    if kind not in KINDS:
        raise ConfigError(
            what=f"no tracking is called '{kind}'",
            where="tracking",
            mend=f"{suggestion(kind, KINDS)}use one of {', '.join(KINDS)}",
        )
    if kind == "wandb":
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ConfigError(
                what="tracking=wandb needs the package wandb", where="tracking", mend="pip install 'subquad[train]'"
            ) from None


def build_tracker(kind: str, run_dir: Path, config: Mapping[str, object]) -> Tracker:
    """The tracker that a run asks for, writing into the run folder."""
    return WandbTracker(run_dir, config) if kind == "wandb" else NoTracker()


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
