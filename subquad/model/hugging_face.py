"""A Hugging Face checkpoint: a folder with config.json and safetensors, on this disk or in the hub's cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from subquad.errors import ConfigError
from subquad.model.checkpoint_config import CheckpointConfig

PREFIX = "hf:"
CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (CONFIG, "*.safetensors", INDEX)


def read_config(source: str) -> CheckpointConfig:
    """The config.json that `hf:PATH_OR_ID` names; of the hub only this file is asked.  Raises: ConfigError."""
    path = _folder(source, (CONFIG,)) / CONFIG
    return CheckpointConfig(_json(path, source), f"model.init_from={source}, {path}")


class CheckpointTensors:
    """The tensors of a checkpoint by name, each read from the disk when it is asked for."""

    def __init__(self, source: str) -> None:
        self.source, self.path = source, _folder(source, WEIGHTS)
        self._files = self._file_of_each()

    def names(self) -> set[str]:
        """What the checkpoint holds."""
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU and in the type it was stored in.  Raises: ConfigError."""
        with self._opened(self._files[name]) as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, which is not read.  Raises: ConfigError."""
        with self._opened(self._files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def _file_of_each(self) -> dict[str, Path]:
        if (self.path / INDEX).is_file():
            listed = _json(self.path / INDEX, self.source).get("weight_map")
            if not isinstance(listed, Mapping):
                raise self._unreadable(self.path / INDEX, "it holds no weight_map")
            return {str(name): self._inside(str(file)) for name, file in listed.items()}
        whole = self.path / WHOLE
        if not whole.is_file():
            raise ConfigError(
                what=f"the checkpoint has neither {WHOLE} nor {INDEX}: pickled weights are not read",
                where=f"model.init_from={self.source}, {self.path}",
                mend="write it as safetensors: AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)",
            )
        with self._opened(whole) as file:
            return dict.fromkeys(file.keys(), whole)

    def _inside(self, name: str) -> Path:
        """A shard, which must lie beside its index."""
        if Path(name).name != name:
            raise self._unreadable(self.path / INDEX, f"it names '{name}', outside of its folder")
        return self.path / name

    def _opened(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise self._unreadable(path, str(error)) from None

    def _unreadable(self, path: Path, why: str) -> ConfigError:
        return ConfigError(
            what=f"{path.name} cannot be read: {why}",
            where=f"model.init_from={self.source}, {path}",
            mend="fetch the checkpoint again",
        )


def _folder(source: str, patterns: tuple[str, ...]) -> Path:
    """Where the checkpoint lies: a folder of this machine, or what the hub's client answers for an id."""
    where = f"model.init_from={source}"
    name = source.removeprefix(PREFIX)
    if name == source or not name:
        raise ConfigError(what=f"'{source}' names no source of weights", where=where, mend=f"write {PREFIX}PATH_OR_ID")
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise ConfigError(what=f"there is no {CONFIG}", where=f"{where}, {path}", mend="name a checkpoint's folder")
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise ConfigError(
            what=f"there is no folder {path}, and no client of the hub to ask for an id",
            where=where,
            mend="name a folder, or pip install 'subquad[hf]'",
        ) from None
    try:
        found = Path(snapshot_download(name, allow_patterns=list(patterns)))
    except HFValidationError:
        raise ConfigError(
            what=f"there is no folder {path}, and '{name}' is no id of the hub",
            where=where,
            mend="name a folder that holds config.json and safetensors, or an id such as state-spaces/mamba-130m-hf",
        ) from None
    except OSError as error:  # whatever the hub or the network answers
        raise ConfigError(
            what=f"there is no folder {path}, and the hub does not give '{name}': {_first_line(error)}",
            where=where,
            mend="name a folder, or an id that is in the hub's cache or can be fetched (HF_HUB_OFFLINE forbids it)",
        ) from None
    if not (found / CONFIG).is_file():
        raise ConfigError(what=f"'{name}' has no {CONFIG}", where=where, mend="name another checkpoint")
    return found


def _json(path: Path, source: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            what=f"{path.name} cannot be read: {_first_line(error)}",
            where=f"model.init_from={source}, {path}",
            mend="fetch the checkpoint again",
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            what=f"{path.name} is no mapping", where=f"model.init_from={source}, {path}", mend="fetch it again"
        )
    return values


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
