"""Weights of a Hugging Face checkpoint, loaded into a model of ours by the import map of its architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from subquad.contracts import Computed, ImportMap
from subquad.errors import ConfigError
from subquad.model.build import full_schedule
from subquad.model.hugging_face import CheckpointTensors
from subquad.model.import_layout import import_map
from subquad.schema import ModelConfig

SHOWN = 6
"""Names in an error; a model of another architecture has hundreds."""


@torch.no_grad()
def import_weights(model: nn.Module, config: ModelConfig) -> None:
    """Fill the model, built from `config`, with the weights of the checkpoint that `config.init_from` names.

    Every tensor of ours gets a value and every tensor of theirs is used, or the model stays as it is. Values take the
    type and device of our parameters.
    Raises: ConfigError that names what is missing, left over, or of another shape; NotFoundError.
    """
    source = config.init_from
    if source is None:
        raise ConfigError(what="no checkpoint is named", where="model.init_from", mend="use hf:PATH_OR_ID")
    theirs, mapped = CheckpointTensors(source), import_map(source)
    where = f"model.init_from={source}, {theirs.path}"
    wanted = sources(mapped, full_schedule(config), full_schedule(mapped.model))
    ours = model.state_dict()
    used = {name for one in wanted.values() for name in one.names}
    _refuse_names("the import map leaves tensors of the model out", set(ours) - set(wanted), where)
    _refuse_names("the import map fills tensors that the model lacks", set(wanted) - set(ours), where)
    _refuse_names("the checkpoint lacks", used - theirs.names(), where)
    left_over = theirs.names() - used - set(mapped.copies)
    _refuse_names(
        "the checkpoint holds what no block of ours computes",
        {name for name in left_over if not any(re.fullmatch(pattern, name) for pattern in mapped.ignored)},
        where,
    )
    for copy, original in mapped.copies.items():
        if copy in theirs.names() and not torch.equal(theirs.read(copy), theirs.read(original)):
            raise ConfigError(
                what=f"{copy} is not {original}, though the checkpoint says that they are tied",
                where=where,
                mend="set tie_word_embeddings to false in its config.json if they are meant to differ",
            )
    for name, one in wanted.items():
        _check_shape(name, one, theirs, ours[name], where)
    for name, one in wanted.items():
        ours[name].copy_(one.transform(*(theirs.read(source) for source in one.names)))


def sources(mapped: ImportMap, ours: list[str], theirs: list[str]) -> dict[str, Computed]:
    """Our names in full, and what each is computed from; `ours` and `theirs` are the keys of the schedules."""
    found = {name: _as_computed(source, "") for name, source in mapped.outer.items()}
    for number, _ in enumerate(ours):
        prefix = mapped.block_prefix.format(number)
        for name, source in mapped.blocks[theirs[number]].items():
            found[f"blocks.{number}.{name}"] = _as_computed(source, prefix)
    return found


def _as_computed(source: str | Computed, prefix: str) -> Computed:
    if isinstance(source, str):
        return Computed(names=(prefix + source,), transform=unchanged)
    return Computed(names=tuple(prefix + name for name in source.names), transform=source.transform)


def unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _check_shape(name: str, one: Computed, theirs: CheckpointTensors, ours: Tensor, where: str) -> None:
    """Refuse a tensor that would have another shape than ours; nothing is read, nothing computed."""
    shapes = [theirs.shape(source) for source in one.names]
    shown = ", ".join(f"{source} {shape}" for source, shape in zip(one.names, shapes))
    try:
        found = tuple(one.transform(*(torch.empty(shape, device="meta") for shape in shapes)).shape)
    except RuntimeError as error:  # a shape that the map did not expect
        raise _misshapen(name, ours, f"{shown} does not fit: {str(error).splitlines()[0]}", where) from None
    if found != tuple(ours.shape):
        became = "" if one.transform is unchanged else f", which becomes {found}"
        raise _misshapen(name, ours, f"the checkpoint has {shown}{became}", where)


def _misshapen(name: str, ours: Tensor, found: str, where: str) -> ConfigError:
    return ConfigError(
        what=f"{name} has the shape {tuple(ours.shape)}, and {found}",
        where=where,
        mend="config.json and the tensors do not belong together: fetch the checkpoint again",
    )


def _refuse_names(what: str, names: Iterable[str], where: str) -> None:
    found = sorted(names)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ConfigError(
            what=f"{what}: {', '.join(found[:SHOWN])}{more}",
            where=where,
            mend="load a checkpoint of a causal language model, whole, as its library's save_pretrained writes it",
        )
