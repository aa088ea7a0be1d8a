"""train: compose a configuration and train what it describes; --multirun trains several."""

from __future__ import annotations

from collections.abc import Sequence

from subquad.commands.hydra_verb import run_with_hydra
from subquad.schema import RunConfig


def run(arguments: list[str]) -> int:
    """Train once per configuration that Hydra composes from the arguments."""
    return run_with_hydra("train", arguments, train_job, train_in_sweep)


def train_job(config: RunConfig, overrides: Sequence[str]) -> None:
    """One job: lightning is first imported here, when the configuration is known to be sound."""
    from subquad.training.fit import train

    train(config, overrides=overrides)


def train_in_sweep(config: RunConfig, overrides: Sequence[str]) -> None:
    """A job of a sweep with `run_dir`: what has finished is skipped, what was interrupted goes on."""
    from subquad.training.distributed import ranks_here
    from subquad.training.sweep import sweep_job

    # Ranks that torchrun or srun started would each look for themselves.
    if config.run_dir is None or config.resume is not None or ranks_here(config.trainer).from_outside:
        return train_job(config, overrides)
    with sweep_job(config, overrides) as job:
        if job is not None:
            train_job(*job)
