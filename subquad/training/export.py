"""export: a trained run's newest weights as a folder that others load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path

from torch import Tensor

from subquad.errors import ConfigError, NotFoundError, ResumeError, suggestion
from subquad.model.exported import model_record, write_folder
from subquad.model.native_export import native_checkpoint
from subquad.schema import ExportConfig, ModelConfig
from subquad.training.checkpoint import Checkpoint, newest_checkpoint
from subquad.training.hugging_face_tokenizer import write_hugging_face_tokenizer
from subquad.training.run_folder import RunFolder, read_config
from subquad.training.tokenizer import Tokenizer, load_tokenizer, save_tokenizer

MODELING = "modeling_subquad.py"


def export(config: ExportConfig) -> str:
    """Write the folder, all of it or nothing; returns how it is loaded.

    safetensors   `config.json`, `model.safetensors`, `tokenizer.json`: for `subquad.load_model`, and `generate run=`
    hf            for `AutoModelForCausalLM`: transformers' own class where it computes the same (`native_checkpoint`),
                  else a modeling file that imports subquad (`trust_remote_code=True`), with the reason

    Raises: ConfigError, DataError, NotFoundError, ResumeError.
    """
    writers = {"safetensors": _write_safetensors, "hf": _write_hugging_face}
    if config.format not in writers:
        raise ConfigError(
            what=f"there is no format '{config.format}'",
            where="export.format",
            mend=f"{suggestion(config.format, writers)}use {' or '.join(writers)}",
        )
    out = Path(config.out).expanduser().absolute()
    if out.exists():
        raise ConfigError(what=f"{out} exists", where="export.out", mend="remove it, or name a new folder")
    folder = RunFolder(Path(config.run).expanduser().absolute())
    model = read_config(folder, f"run={config.run}").model
    checkpoint = newest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise ResumeError(
            what="the run holds no checkpoint that is whole", where=f"run={config.run}", mend="train it further first"
        )
    return _whole(out, lambda place: writers[config.format](model, checkpoint, load_tokenizer(folder.path), place))


def _write_safetensors(model: ModelConfig, checkpoint: Checkpoint, tokenizer: Tokenizer, folder: Path) -> str:
    write_folder(folder, model_record(model), checkpoint.weights())
    save_tokenizer(tokenizer, folder)
    return "load it with subquad.load_model(FOLDER)"


def _write_hugging_face(model: ModelConfig, checkpoint: Checkpoint, tokenizer: Tokenizer, folder: Path) -> str:
    weights = checkpoint.weights()
    write_hugging_face_tokenizer(tokenizer, folder)
    try:
        values, tensors = native_checkpoint(model, weights)
        write_folder(folder, values | {"dtype": "float32"}, tensors)
        return f"{values['model_type']} of transformers: AutoModelForCausalLM.from_pretrained(FOLDER)"
    except NotFoundError as error:
        _write_remote_code(model, weights, folder)
        return (
            f"{error.what}\nload it with AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True), "
            "and its tokenizer by AutoTokenizer with the same argument"
        )


def _write_remote_code(model: ModelConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    module = Path(MODELING).stem
    record = model_record(model) | {
        "architectures": ["SubquadForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.SubquadConfig",
            "AutoModelForCausalLM": f"{module}.SubquadForCausalLM",
        },
        "dtype": "float32",
        # Their carry of keys and values does not fit: a call is handed whole sequences.
        "use_cache": False,
        "tie_word_embeddings": False,  # our state dict holds a tied head once
    }
    write_folder(folder, record, {f"model.{name}": tensor for name, tensor in weights.items()})
    code = files("subquad") / "templates" / "hugging_face" / f"{MODELING}.tmpl"
    (folder / MODELING).write_text(code.read_text(encoding="utf-8"), encoding="utf-8")


def _whole(out: Path, write: Callable[[Path], str]) -> str:
    """Let `write` fill a folder beside the final one, and rename it.  Raises: ConfigError."""
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        told = write(unfinished)
        unfinished.rename(out)
    except OSError as error:
        raise ConfigError(
            what=f"{out} cannot be written: {error.strerror}", where="export.out", mend="name a folder you may write to"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return told
