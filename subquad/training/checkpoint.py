"""Checkpoints on disk: written whole or not at all, verified before they are used.

A checkpoint is a folder `step-N` with `weights.safetensors`, `trainer.pt` (loaded with weights_only=True) and
`manifest.json`, which names the SHA-256 of the other two. It is written under another name, flushed to the disk, and
renamed: a killed process leaves either the whole folder or one whose name says that it is to be ignored.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from subquad.errors import ResumeError

FORMAT_VERSION = 1
WEIGHTS, STATE, MANIFEST = "weights.safetensors", "trainer.pt", "manifest.json"
UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, the optimizer steps done, and names that share another's tensor."""

    path: Path
    step: int
    tied: Mapping[str, str]

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict, on the CPU."""
        stored: dict[str, Tensor] = load_file(self.path / WEIGHTS)
        return stored | {name: stored[owner] for name, owner in self.tied.items()}

    def trainer_state(self) -> dict[str, Any]:
        """What else a run needs to go on, on the CPU.  Raises: ResumeError."""
        try:
            state = torch.load(self.path / STATE, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ResumeError(
                what=f"the trainer state holds more than tensors and plain values: {str(error).splitlines()[0]}",
                where=str(self.path / STATE),
                mend="remove the callback or optimizer that stores such objects",
            ) from None
        assert isinstance(state, dict)
        return state


def write_checkpoint(
    folder: Path, step: int, weights: Mapping[str, Tensor], trainer_state: Mapping[str, object], *, keep: int
) -> Path:
    """Write `step-N` into the folder in one step, then remove all but the `keep` newest (at least this one).

    Raises: OSError where the disk takes no more; what was begun is removed, so that it takes no room.
    """
    final = folder / f"step-{step}"
    unfinished = folder / f"{UNFINISHED}{final.name}-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _write(unfinished, step, weights, trainer_state)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if final.exists():  # a run that resumed from an older checkpoint, because this one was damaged
        shutil.rmtree(final)
    unfinished.rename(final)
    _flush(folder)
    for _, old in _numbered(folder)[max(1, keep) :]:
        shutil.rmtree(old)
    return final


def _write(folder: Path, step: int, weights: Mapping[str, Tensor], trainer_state: Mapping[str, object]) -> None:
    """The files of a checkpoint, flushed to the disk."""
    owned, tied = _without_sharing(weights)
    try:
        save_file(owned, folder / WEIGHTS)
        torch.save(dict(trainer_state), folder / STATE)
    except (SafetensorError, RuntimeError) as error:  # their names for a disk that is full
        raise OSError(errno.EIO, str(error).splitlines()[0], str(folder)) from error
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "sha256": {name: _digest(folder / name) for name in (WEIGHTS, STATE)},
        "tied": tied,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for name in (WEIGHTS, STATE, MANIFEST):
        _flush(folder / name)
    _flush(folder)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is passed over with one warning."""
    for step, path in _numbered(folder):
        problem, tied = _inspect(path, step)
        if problem is None:
            return Checkpoint(path, step, tied)
        warnings.warn(f"checkpoint {path} is damaged ({problem}); the one before it is used", stacklevel=2)
    return None


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have left half-written; only for a process that owns the run folder."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints by step, newest first."""
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*"))
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _inspect(path: Path, step: int) -> tuple[str | None, Mapping[str, str]]:
    """What is wrong with a checkpoint (None: nothing), and its tied names."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, expected, tied = manifest["format_version"], manifest["sha256"], manifest["tied"]
        if manifest["step"] != step:
            return f"its manifest says step {manifest['step']}", {}
        if version == FORMAT_VERSION:
            for name in (WEIGHTS, STATE):
                if _digest(path / name) != expected[name]:
                    return f"{name} is not what was written", {}
            return None, tied
    except OSError as error:
        return f"{error.filename}: {error.strerror}", {}
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not what was written", {}
    raise ResumeError(
        what=f"its format version is {version}, this program reads {FORMAT_VERSION}",
        where=str(path / MANIFEST),
        mend="use the version of subquad that wrote the run",
    )


def _without_sharing(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under the first of their names, and the other names (tied embeddings): safetensors stores no sharing."""
    owned: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    owners: dict[tuple[object, ...], str] = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and place in owners:
            tied[name] = owners[place]
        else:
            owners[place] = name
            # A copy of its own, so that views of one storage (fused projections) are stored apart.
            owned[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return owned, tied


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_steps(folder: Path) -> Iterator[int]:
    """The steps of which checkpoints exist, newest first, verified or not."""
    return (step for step, _ in _numbered(folder))
