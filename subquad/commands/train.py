"""train: compose a configuration and train what it describes; --multirun trains several."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from subquad.commands.hydra_verb import run_with_hydra
from subquad.schema import RunConfig

ABOUT = """Train a model; the run folder that is printed holds its configuration, plan, metrics, checkpoints and report.

  python -m subquad train model=scout_mamba trainer.max_steps=200
  python -m subquad train --multirun model=scout_mamba,transformer seed=0,1
  python -m subquad train resume=RUN_DIR trainer.max_steps=400      # goes on where the run ended or was interrupted

--cfg job prints the configuration and stops, --info what was found where, --hydra-help Hydra's own arguments;
--config-dir DIR adds a folder of your own recipes."""
GROUP = "WANDB_RUN_GROUP"
"""Read by W&B where no group is given."""


def run(arguments: list[str]) -> int:
    """Train once per configuration that Hydra composes from the arguments."""
    return run_with_hydra("train", arguments, train_job, train_in_sweep, about=ABOUT)


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
        with _group_of_runs():
            return train_job(config, overrides)
    with sweep_job(config, overrides) as job:
        if job is not None:
            train_job(*job)


@contextmanager
def _group_of_runs() -> Iterator[None]:
    """Jobs without a common folder are a group of W&B all the same, unless the caller has named one."""
    had = os.environ.get(GROUP)
    if HydraConfig.initialized():
        os.environ.setdefault(GROUP, Path(HydraConfig.get().sweep.dir).name)
    try:
        yield
    finally:
        if had is None:
            os.environ.pop(GROUP, None)
