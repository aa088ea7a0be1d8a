"""A model's configuration becomes a module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from subquad.component_config import typed_config
from subquad.contracts import MIXER_METHODS, MixerContext, MixerSpec, Sharing
from subquad.errors import ConfigError, PluginError
from subquad.model.block import Block
from subquad.model.channel_mixer import ChannelMixer
from subquad.model.language_model import LanguageModel
from subquad.registry import load_registry
from subquad.schema import AUTO, ChannelMixerConfig, ModelConfig
from subquad.sharing import sharing_by_layer
from subquad_kernels.catalogue import load_attribute


@dataclass(frozen=True)
class Entry:
    """One entry of `model.mixers`, checked: which mixer, its config, its channel mixer (None: none)."""

    spec: MixerSpec
    config: Any
    channel_mixer: ChannelMixerConfig | None
    where: str


def build_model(config: ModelConfig, *, device: torch.device | str | None = None) -> LanguageModel:
    """Build the model on a device and draw its parameters from torch's random state; on `meta` only shapes are made.

    Weights that `config.init_from` names are not read: `import_weights(model, config)` does that.
    Raises: ConfigError, NotFoundError; PluginError where a declaration names a builder that is not there.
    """
    for name in ("vocab_size", "context_len"):
        if getattr(config, name) < 1:
            raise ConfigError(
                what=f"{name} is {getattr(config, name)}", where=f"model.{name}", mend="set it to 1 or more"
            )
    schedule = full_schedule(config)
    entries = check_mixers(config)
    places = places_of(config, entries)
    with torch.device(device or "cpu"):
        blocks = [_block(config, entries[key], *place) for key, place in zip(schedule, places)]
        model = LanguageModel(
            blocks,
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            norm_eps=config.norm_eps,
            tie_embeddings=config.tie_embeddings,
            no_decay={entry.spec.name: entry.spec.no_decay for entry in entries.values()},
            logit_cap=config.logit_cap,
        )
    if torch.device(device or "cpu").type != "meta":
        model.init_parameters(config.resolved_init_std())
    return model


def full_schedule(config: ModelConfig) -> list[str]:
    """The key of `mixers` for each block: the schedule, repeated to `num_layers`."""
    if not config.schedule:
        raise ConfigError(what="the schedule is empty", where="model.schedule", mend="name a key of model.mixers")
    return [config.schedule[index % len(config.schedule)] for index in range(config.num_layers)]


def check_mixers(config: ModelConfig) -> dict[str, Entry]:
    """The entries that the schedule names, with typed configs.  Raises: ConfigError, NotFoundError."""
    registry = load_registry()
    entries = {}
    for key in dict.fromkeys(full_schedule(config)):
        where = f"model.mixers.{key}"
        if key == AUTO and key not in config.mixers:
            raise ConfigError(
                what="the schedule leaves layers to be chosen (auto)",
                where="model.schedule",
                mend="call assign_mixers(config, target) first, as train, explain and warmup do",
            )
        if key not in config.mixers:
            have = ", ".join(config.mixers) or "nothing"
            raise ConfigError(
                what=f"the schedule names '{key}', and model.mixers holds {have}",
                where="model.schedule",
                mend=f"add it: +mixer@{where}=MIXER",
            )
        values: Mapping[str, Any] = config.mixers[key]
        if not isinstance(values, Mapping) or not isinstance(values.get("mixer"), str):
            raise ConfigError(
                what=f"model.mixers.{key} does not say which mixer it is",
                where=where,
                mend=f"give it a key `mixer`: one of {', '.join(sorted(registry.mixers))}",
            )
        spec = registry.mixer(values["mixer"], where=f"{where}.mixer")
        fields = {name: value for name, value in values.items() if name not in ("mixer", "channel_mixer")}
        entries[key] = Entry(
            spec, typed_config(spec.config, fields, where), _channel_mixer(config, values, where), where
        )
    return entries


def places_of(config: ModelConfig, entries: Mapping[str, Entry]) -> list[tuple[MixerContext, Sharing]]:
    """Where each layer stands, and what it shares there.  Raises: ConfigError."""
    layers = [(key, entries[key].spec, entries[key].config) for key in full_schedule(config)]
    return sharing_by_layer(layers, d_model=config.d_model, context_len=config.context_len)


def _channel_mixer(config: ModelConfig, values: Mapping[str, Any], where: str) -> ChannelMixerConfig | None:
    if "channel_mixer" not in values:
        return config.channel_mixer
    own = values["channel_mixer"]
    return None if own is None else typed_config(ChannelMixerConfig, own, f"{where}.channel_mixer")


def _builder(entry: Entry) -> Any:
    """What the mixer's declaration names.  Raises: PluginError where it names nothing."""
    try:
        return load_attribute(entry.spec.build)
    except (ModuleNotFoundError, AttributeError) as error:
        module = entry.spec.build.partition(":")[0]
        if isinstance(error, ModuleNotFoundError) and error.name != module:
            raise  # something that the mixer imports, which says more by itself
        raise PluginError(
            what=f"mixer '{entry.spec.name}' is built by '{entry.spec.build}', which is not there ({error})",
            where=f"MixerSpec(name='{entry.spec.name}', build=...)",
            mend="let build name a class that can be imported: package.module:Class",
        ) from error


def _check_methods(mixer: object, entry: Entry) -> None:
    """Refuse what is no mixer where it is built, not where it is first called.  Raises: PluginError."""
    missing = [name for name in MIXER_METHODS if getattr(type(mixer), name, None) is getattr(nn.Module, name, None)]
    if missing:
        raise PluginError(
            what=f"mixer '{entry.spec.name}' has no {', '.join(missing)}",
            where=entry.spec.build,
            mend=f"write it: subquad.Mixer says what each of {', '.join(MIXER_METHODS)} does",
        )


def _block(config: ModelConfig, entry: Entry, context: MixerContext, sharing: Sharing) -> Block:
    build = _builder(entry)
    try:
        mixer = build(entry.config, context)
    except ConfigError as error:
        raise ConfigError(what=error.what, where=f"{entry.where}.{error.where}", mend=error.mend) from None
    _check_methods(mixer, entry)
    channel = None if entry.channel_mixer is None else ChannelMixer(config.d_model, entry.channel_mixer.d_hidden)
    return Block(
        mixer,
        channel,
        mixer_name=entry.spec.name,
        layer_index=context.layer_index,
        d_model=config.d_model,
        norm_eps=config.norm_eps,
        sharing=sharing,
    )
