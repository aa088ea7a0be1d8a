"""Checkpoints on disk: written whole or not at all, verified before they are used.

A checkpoint is a folder `step-N` with `weights.safetensors`, `trainer.pt` (loaded with weights_only=True) and
`manifest.json`, which names the SHA-256 of the others. It is written under another name, flushed to the disk, and
renamed: a killed process leaves either the whole folder or one whose name says that it is to be ignored. Of tensors
that are sharded each rank has written its rows (`sharded_checkpoint.py`); here they are read as if they were whole.
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from subquad.errors import ResumeError

FORMAT_VERSION, SHARDED_VERSION, GRID_VERSION = 1, 2, 3
"""Of one process; of rows that ranks hold; of ranks in a grid, where those of a row share projections."""
WEIGHTS, STATE, MANIFEST = "weights.safetensors", "trainer.pt", "manifest.json"
WEIGHT_ROWS, OPTIMIZER_ROWS = "weights/", "optimizer/"
"""How names in the files of shards begin: `weights/NAME`, `optimizer/INDEX/KEY`."""
UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, the optimizer steps done, names that share another's tensor, ranks' files.

    Ranks stand in rows of `tensor_parallel`. Of tensors in `axes` each of a row has a part along that axis; of others
    the first has all.
    """

    path: Path
    step: int
    tied: Mapping[str, str]
    shards: int = 0
    tensor_parallel: int = 1
    axes: Mapping[str, int] = field(default_factory=dict)

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict, on the CPU."""
        stored: dict[str, Tensor] = load_file(self.path / WEIGHTS) | self._joined(WEIGHT_ROWS)
        return stored | {name: stored[owner] for name, owner in self.tied.items()}

    def trainer_state(self) -> dict[str, Any]:
        """What else a run needs to go on, on the CPU.  Raises: ResumeError."""
        state = self._state(mmap=False)
        for name, tensor in self._joined(OPTIMIZER_ROWS).items():
            index, _, key = name.partition("/")
            state["optimizer"]["state"][int(index)][key] = tensor
        return state

    def trainer_outline(self) -> dict[str, Any]:
        """The trainer state but for what is sharded; tensors stay in the file until they are used.

        Raises: ResumeError.
        """
        return self._state(mmap=True)

    def _state(self, *, mmap: bool) -> dict[str, Any]:
        try:
            state = torch.load(self.path / STATE, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            raise ResumeError(
                what=f"the trainer state holds more than tensors and plain values: {str(error).splitlines()[0]}",
                where=str(self.path / STATE),
                mend="remove the callback or optimizer that stores such objects",
            ) from None
        assert isinstance(state, dict)
        return state

    def _joined(self, prefix: str) -> dict[str, Tensor]:
        """Whole tensors from the rows of all ranks, by what follows the prefix in their names."""
        with ExitStack() as stack:
            files = [
                stack.enter_context(safe_open(self.path / shard_file(rank), framework="pt"))
                for rank in range(self.shards)
            ]
            # Column by column of the grid: in each, the ranks hold rows of the same tensors.
            columns = [files[place :: self.tensor_parallel] for place in range(self.tensor_parallel)]

            def joined(name: str) -> Tensor:
                axis = self.axes.get(name)
                parts = columns if axis is not None else columns[:1]
                return torch.cat([torch.cat([file.get_tensor(name) for file in part]) for part in parts], axis or 0)

            names = [name for name in (files[0].keys() if files else ()) if name.startswith(prefix)]
            return {name.removeprefix(prefix): joined(name) for name in names}


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
        owned, tied = _without_sharing(weights)
        write_manifest(unfinished, step, write_unsharded(unfinished, owned, trainer_state), tied=tied)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    publish(unfinished, final, keep)
    return final


def shard_file(rank: int) -> str:
    """The name of the file with the rows of a rank."""
    return f"shard-{rank}.safetensors"


def write_unsharded(folder: Path, weights: Mapping[str, Tensor], trainer_state: Mapping[str, object]) -> dict[str, str]:
    """Write whole tensors and the trainer state; their digests by file."""
    digests = write_rows(folder / WEIGHTS, weights)
    with _full_disk_as_oserror(folder):
        torch.save(dict(trainer_state), folder / STATE)
    _flush(folder / STATE)
    return digests | {STATE: _digest(folder / STATE)}


def write_rows(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write tensors that share no memory; the digest by file."""
    with _full_disk_as_oserror(path.parent):
        save_file(dict(tensors), path)
    _flush(path)
    return {path.name: _digest(path)}


def write_manifest(
    folder: Path,
    step: int,
    digests: Mapping[str, str],
    *,
    tied: Mapping[str, str],
    shards: int = 0,
    tensor_parallel: int = 1,
    axes: Mapping[str, int] | None = None,
) -> None:
    """Write last what says that the rest is whole."""
    version = FORMAT_VERSION if not shards else SHARDED_VERSION if tensor_parallel == 1 else GRID_VERSION
    manifest: dict[str, object] = {"format_version": version, "step": step, "sha256": digests, "tied": tied}
    if shards:
        manifest["shards"] = shards
    if tensor_parallel > 1:
        manifest |= {"tensor_parallel": tensor_parallel, "axes": axes or {}}
    text = json.dumps(manifest, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    _flush(folder / MANIFEST)
    _flush(folder)


def publish(unfinished: Path, final: Path, keep: int) -> None:
    """Give a checkpoint its name in one step, then remove all but the `keep` newest (at least this one)."""
    folder = final.parent
    if final.exists():  # a run that resumed from an older checkpoint, because this one was damaged
        shutil.rmtree(final)
    unfinished.rename(final)
    _flush(folder)
    for _, old in _numbered(folder)[max(1, keep) :]:
        shutil.rmtree(old)


@contextmanager
def _full_disk_as_oserror(folder: Path) -> Iterator[None]:
    """What safetensors and torch raise when a disk is full becomes OSError."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(errno.EIO, str(error).splitlines()[0], str(folder)) from error


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is passed over with one warning."""
    for step, path in _numbered(folder):
        problem, found = _inspect(path, step)
        if problem is None:
            return found
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


def _inspect(path: Path, step: int) -> tuple[str | None, Checkpoint | None]:
    """What is wrong with a checkpoint (None: nothing), and itself."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, expected, tied = manifest["format_version"], manifest["sha256"], manifest["tied"]
        if manifest["step"] != step:
            return f"its manifest says step {manifest['step']}", None
        if version in (FORMAT_VERSION, SHARDED_VERSION, GRID_VERSION):
            shards = int(manifest["shards"]) if version != FORMAT_VERSION else 0
            grid = (int(manifest["tensor_parallel"]), dict(manifest["axes"])) if version == GRID_VERSION else (1, {})
            for name in (WEIGHTS, STATE, *map(shard_file, range(shards))):
                if _digest(path / name) != expected[name]:
                    return f"{name} is not what was written", None
            return None, Checkpoint(path, step, tied, shards, *grid)
    except OSError as error:
        return f"{error.filename}: {error.strerror}", None
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not what was written", None
    raise ResumeError(
        what=f"its format version is {version}, this program reads {FORMAT_VERSION} to {GRID_VERSION}",
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
