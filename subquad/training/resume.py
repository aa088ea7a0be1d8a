"""Going on with a run: its own configuration and plan, its newest whole checkpoint, and little that may differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from subquad.errors import ResumeError
from subquad.schema import AUTO, RunConfig
from subquad.training.checkpoint import Checkpoint
from subquad.training.run_folder import RunFolder, read_config

FREE_KEYS = frozenset(
    {
        "trainer.max_steps",  # a longer run; the learning rate follows the new horizon from the checkpoint on
        "trainer.max_seconds",
        "trainer.validate_every_n_steps",
        "trainer.log_every_n_steps",
        "trainer.num_workers",
        "trainer.nonfinite",
        "trainer.progress_bar",
        "log_level",
        "trainer.strategy",
        "trainer.devices",  # these three as long as a step takes the same samples, which is checked
        "trainer.accumulate",
        "trainer.tensor_parallel",
        "trainer.loss",
        "checkpoint.every_n_steps",
        "checkpoint.keep",
        "checkpoint.artifacts",
        "tracking",
        "profile",
        "deny",  # nodes whose kernel is denied get another; the rest of the plan stays
    }
)
"""Keys that a resumed run may change: none of them touches weights that are already computed or data order.

On another number of devices sums are taken in another order, so what follows agrees up to rounding.
"""
PLACES = ("resume", "run_dir")
"""They say where the run lies, not what it is."""


def resumed_config(asked: RunConfig, overrides: Sequence[str] | None) -> tuple[RunFolder, RunConfig]:
    """The folder that `asked.resume` names and the configuration to go on with: the folder's, with the free keys asked.

    `overrides` are the command line's (`key=value`, `group=choice`): only what they name counts as asked for. None
    means that the caller gave a whole configuration and every key counts. Raises: ResumeError that names the keys.
    """
    assert asked.resume is not None
    folder = RunFolder(Path(asked.resume).expanduser().absolute())
    config = read_config(folder, f"resume={asked.resume}")
    stored, wanted = dict(leaves(dataclasses.asdict(config))), dict(leaves(dataclasses.asdict(asked)))
    names = None if overrides is None else [_key(override) for override in overrides]
    differing = []
    for key in sorted(stored.keys() | wanted.keys()):
        is_asked = names is None or any(key == name or key.startswith(f"{name}.") for name in names)
        if key in PLACES or not is_asked or stored.get(key) == wanted.get(key):
            continue
        if key == "model.schedule" and AUTO in (wanted.get(key) or ()):
            continue  # the run holds what was chosen
        if key in FREE_KEYS:
            set_key(config, key, wanted.get(key))
        elif key not in ("model.vocab_size", "model.context_len") or wanted.get(key) != 0:  # 0: filled from the data
            differing.append(f"{key} is {stored.get(key)!r} in the run and {wanted.get(key)!r} here")
    if differing:
        shown = "; ".join(differing[:8]) + (f"; and {len(differing) - 8} more" if len(differing) > 8 else "")
        raise ResumeError(
            what=f"the folder holds another run: {shown}",
            where=f"resume={asked.resume}",
            mend=f"leave these keys out, or start a new run; a resumed run may change {', '.join(sorted(FREE_KEYS))}",
        )
    return folder, config


def check_same_samples(checkpoint: Checkpoint, folder: RunFolder, config: RunConfig, world_size: int) -> None:
    """Refuse to go on with steps of another size, which would pass over data or repeat it.  Raises: ResumeError."""
    stored = read_config(folder, "resume")
    settings = config.trainer
    before = checkpoint.trainer_outline().get(
        "samples_per_step", stored.trainer.samples_per_step(stored.trainer.devices)
    )
    now = settings.samples_per_step(world_size)
    if before != now:
        sharing = settings.ranks_per_group
        shown = f"{world_size} devices" if sharing == 1 else f"{world_size // sharing} groups of {sharing} devices"
        raise ResumeError(
            what=f"a step took {before} samples so far and would take {now}: batch_size {settings.batch_size}"
            f" x accumulate {settings.accumulate} x {shown}",
            where=str(checkpoint.path),
            mend="choose trainer.devices and trainer.accumulate so that their product stays",
        )


def check_same_data(recorded: Mapping[str, Any], fingerprint: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with other data than the run has seen so far.  Raises: ResumeError."""
    before, now = dict(leaves(recorded)), dict(leaves(fingerprint))
    differing = [key for key in sorted(before.keys() | now.keys()) if str(before.get(key)) != str(now.get(key))]
    if differing:
        raise ResumeError(
            what=f"the data have changed since the run began: {', '.join(differing[:8])}",
            where=where,
            mend="restore the files as they were, or start a new run",
        )


def leaves(values: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their plain values; lists count as one value."""
    if isinstance(values, Mapping) and (values or not prefix):
        for key, value in values.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def _key(override: str) -> str:
    """The configuration key of an override: `+mixer@model.mixers.x=y` speaks of `model.mixers.x`."""
    name = override.partition("=")[0].lstrip("+~")
    return name.partition("@")[2] or name


def set_key(config: RunConfig, key: str, value: object) -> None:
    """Set the field of a dotted key."""
    section, _, name = key.rpartition(".")
    setattr(getattr(config, section) if section else config, name, value)
