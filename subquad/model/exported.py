"""A model as a folder: `config.json`, its layout; `model.safetensors`, its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from subquad.component_config import typed_config
from subquad.errors import ConfigError, NotFoundError
from subquad.model.build import build_model
from subquad.model.language_model import LanguageModel
from subquad.schema import ModelConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT_VERSION = 1
MODEL_TYPE = "subquad"
MEND = "name a folder that `python -m subquad export run=RUN_DIR out=FOLDER` wrote"


def load_model(folder: Path | str) -> LanguageModel:
    """The model that `export` wrote into a folder, on the CPU and in evaluation mode.

    Its kernels are the defaults; `compile_model` chooses them. Raises: ConfigError, NotFoundError.
    """
    folder = Path(folder).expanduser()
    config = read_model_config(folder)
    model = build_model(config)
    path = folder / WEIGHTS
    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise NotFoundError(what=f"there is no {path}", where=str(folder), mend=MEND) from None
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(what=f"{path} cannot be loaded: {reason[:300]}", where=str(folder), mend=MEND) from None
    return model.eval()


def read_model_config(folder: Path) -> ModelConfig:
    """The layout of an exported model.  Raises: ConfigError, NotFoundError."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version, model = values["format_version"], dict(values["model"])
    except OSError as error:
        raise NotFoundError(what=f"{path} cannot be read: {error.strerror}", where=str(folder), mend=MEND) from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(what=f"{path} is not what `export` writes", where=str(folder), mend=MEND) from None
    if version != FORMAT_VERSION:
        raise ConfigError(
            what=f"its format version is {version}, this program reads {FORMAT_VERSION}",
            where=str(path),
            mend="use the version of subquad that wrote it",
        )
    return typed_config(ModelConfig, model, str(path))


def model_of_values(values: Mapping[str, object]) -> LanguageModel:
    """A model of the layout that `config.json` holds under `model`; on the CPU, whatever torch's default device is.

    transformers builds modules on `meta` before it loads weights, and mixers compute constants when they are built.
    Raises: ConfigError, NotFoundError.
    """
    return build_model(typed_config(ModelConfig, values, CONFIG), device="cpu")


def model_record(config: ModelConfig) -> dict[str, object]:
    """What `config.json` says of a model; where its first weights came from is no part of it."""
    return {
        "format_version": FORMAT_VERSION,
        "model_type": MODEL_TYPE,
        "model": asdict(replace(config, init_from=None)),
    }


def write_folder(folder: Path, config: Mapping[str, object], weights: Mapping[str, Tensor]) -> None:
    """Write both files."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    # safetensors lets only their owner read what it writes; these are for others.
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)
