"""The layout that a Hugging Face checkpoint dictates: taken whole where a recipe names no mixers, else compared."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from subquad.contracts import ImportMap
from subquad.errors import ConfigError
from subquad.model.build import check_mixers, full_schedule
from subquad.model.hugging_face import read_config
from subquad.registry import load_registry
from subquad.schema import AUTO, ModelConfig
from subquad_kernels.catalogue import load_attribute

OURS_ALONE = ("name", "context_len", "candidates", "init_std", "init_from")
"""Fields of a model that no checkpoint decides."""
PER_LAYER = ("schedule", "mixers", "channel_mixer", "num_layers")
"""Fields that are compared layer by layer."""
WHY_NOT = {
    "falcon_mamba": "its mixer normalises step sizes, B and C, which our mamba does not",
    "rwkv": "transformers has RWKV-4, a weighted mean of values for each channel, which no mixer of ours computes",
}
"""Architectures that look like ours and are not, with the reason."""
SHOWN = 8


def import_map(source: str) -> ImportMap:
    """How the checkpoint `hf:PATH_OR_ID` becomes a model of ours.

    Raises: NotFoundError for an architecture of which no plugin knows; ConfigError for one that cannot be ours.
    """
    theirs = read_config(source)
    model_type = theirs.get("model_type", "")
    if model_type in WHY_NOT:
        theirs.refuse(f"checkpoints of model_type '{model_type}' cannot be ours: {WHY_NOT[model_type]}")
    spec = load_registry().checkpoint_import(model_type, theirs.where)
    build: Any = load_attribute(spec.build)
    found = build(theirs)
    assert isinstance(found, ImportMap)
    return found


def with_layout(config: ModelConfig) -> ModelConfig:
    """The configuration, agreed with the checkpoint that `init_from` names; unchanged if it names none.

    A recipe without mixers (`model=imported`) takes the checkpoint's layout whole, and may set nothing else of it; any
    other recipe must describe that layout.
    Raises: ConfigError that names every difference; NotFoundError.
    """
    if config.init_from is None:
        return config
    theirs = import_map(config.init_from).model
    if not config.mixers:
        _refuse(config, _set_otherwise(config, theirs), "take the layout as it is, or write it out in a recipe")
        return replace(theirs, **{name: getattr(config, name) for name in OURS_ALONE})
    if AUTO in config.schedule:
        raise ConfigError(
            what="the schedule leaves layers open (auto), and a checkpoint has them all",
            where="model.schedule",
            mend="use model=imported, or name the mixer of every layer",
        )
    config = replace(config, vocab_size=config.vocab_size or theirs.vocab_size)
    _refuse(config, differences(config, theirs), "use model=imported, which takes the checkpoint's layout")
    return config


def differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Every field in which two layouts differ, as `field: theirs, not ours`; layers by their number."""
    found = [
        f"{field.name}: {getattr(theirs, field.name)}, not {getattr(ours, field.name)}"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in OURS_ALONE + PER_LAYER and getattr(ours, field.name) != getattr(theirs, field.name)
    ]
    if ours.num_layers != theirs.num_layers:
        found.append(f"num_layers: {theirs.num_layers}, not {ours.num_layers}")
    entries = check_mixers(ours), check_mixers(theirs)
    seen = set()
    for number, keys in enumerate(zip(full_schedule(ours), full_schedule(theirs))):
        mine, other = (entry[key] for entry, key in zip(entries, keys))
        if keys in seen:
            continue
        seen.add(keys)
        if mine.spec.name != other.spec.name:
            found.append(f"the mixer of layer {number}: {other.spec.name}, not {mine.spec.name}")
            continue
        for name in (field.name for field in dataclasses.fields(mine.config)):
            values = getattr(other.config, name), getattr(mine.config, name)
            if not _agree(*values):
                found.append(f"{mine.spec.name}.{name}: {values[0]}, not {values[1]}")
        if mine.channel_mixer != other.channel_mixer:
            found.append(f"the channel mixer of layer {number}: {other.channel_mixer}, not {mine.channel_mixer}")
    return found


def _agree(theirs: object, mine: object) -> bool:
    """Whether two values of a mixer's config are one; an int of 0 is a size that follows from others: shapes decide."""
    follows = any(type(value) is int and value == 0 for value in (mine, theirs))
    return follows or mine == theirs


def _set_otherwise(config: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Fields of the layout that someone has set, to something else than the checkpoint's."""
    untouched = ModelConfig()
    return [
        f"{field.name}: {getattr(theirs, field.name)}, not {getattr(config, field.name)}"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in (*OURS_ALONE, "schedule", "mixers")
        and getattr(config, field.name) not in (getattr(untouched, field.name), getattr(theirs, field.name))
    ]


def _refuse(config: ModelConfig, found: list[str], mend: str) -> None:
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ConfigError(
            what=f"the checkpoint has another layout than the recipe: {'; '.join(found[:SHOWN])}{more}",
            where=f"model={config.name} model.init_from={config.init_from}",
            mend=mend,
        )
