"""train: compose a configuration and train what it describes; --multirun trains several."""

from __future__ import annotations

from collections.abc import Sequence

from subquad.commands.hydra_verb import run_with_hydra
from subquad.schema import RunConfig


def run(arguments: list[str]) -> int:
    """Train once per configuration that Hydra composes from the arguments."""
    return run_with_hydra("train", arguments, train_job)


def train_job(config: RunConfig, overrides: Sequence[str]) -> None:
    """One job: lightning is first imported here, when the configuration is known to be sound."""
    from subquad.training.fit import train

    train(config, overrides=overrides)
