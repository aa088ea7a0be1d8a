"""Our models as checkpoints of Hugging Face's own classes: the import maps, read backwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from subquad.contracts import ImportMap, ImportSpec
from subquad.errors import ConfigError, NotFoundError
from subquad.model.build import check_mixers, full_schedule
from subquad.model.checkpoint_config import CheckpointConfig
from subquad.model.import_layout import differences
from subquad.model.import_weights import sources, unchanged
from subquad.registry import load_registry
from subquad.schema import ModelConfig
from subquad_kernels.catalogue import load_attribute


def native_checkpoint(
    config: ModelConfig, weights: Mapping[str, Tensor]
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The config.json and the tensors of a checkpoint that transformers' own class loads.

    An architecture is taken only if its import map reads that config.json as the very layout of `config`, and no tensor
    is computed from others. Raises: NotFoundError that says why none is.
    """
    reasons = []
    entries = check_mixers(config)
    for spec in load_registry().imports.values():
        if not spec.export or any(entry.spec.name != spec.mixer for entry in entries.values()):
            continue
        try:
            values = _their_config(spec, config)
            mapped = _import_map(spec, values)
            wanted = sources(mapped, full_schedule(config), full_schedule(mapped.model))
            computed = [name for name, one in wanted.items() if one.transform is not unchanged]
            found = differences(config, mapped.model) + [f"{name} is computed from others" for name in computed]
        except ConfigError as error:
            found = [error.what]
        if not found:
            assert wanted.keys() == weights.keys(), "the import map covers the model"
            return values, {one.names[0]: weights[name] for name, one in wanted.items()}
        reasons.append(f"{spec.model_type}: {'; '.join(found)}")
    raise NotFoundError(
        what="transformers has no class for this model"
        + (f" ({' | '.join(reasons)})" if reasons else f": its mixers are {', '.join(_names(config))}"),
        where="model.schedule",
        mend="load it with trust_remote_code=True",
    )


def _their_config(spec: ImportSpec, config: ModelConfig) -> dict[str, object]:
    entries = check_mixers(config)
    first = entries[full_schedule(config)[0]]
    if any((entry.config, entry.channel_mixer) != (first.config, first.channel_mixer) for entry in entries.values()):
        raise ConfigError(what="its blocks differ", where="model.mixers", mend="load it with trust_remote_code=True")
    export: Any = load_attribute(spec.export)
    return {
        "model_type": spec.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.resolved_init_std(),
        # Their defaults are numbers of their own tokenizers: a text would end at whatever stands there in ours.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **export(config, first.config, first.channel_mixer),
    }


def _import_map(spec: ImportSpec, values: Mapping[str, object]) -> ImportMap:
    build: Any = load_attribute(spec.build)
    mapped = build(CheckpointConfig(values, "the exported config.json"))
    assert isinstance(mapped, ImportMap)
    return mapped


def _names(config: ModelConfig) -> list[str]:
    return list(dict.fromkeys(entry.spec.name for entry in check_mixers(config).values()))
