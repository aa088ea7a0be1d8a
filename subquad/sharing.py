"""What each layer of a backbone shares with later ones, and whether every reader finds what it reads; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from subquad.contracts import MixerContext, MixerSpec, SharedTensor, Sharing
from subquad.errors import ConfigError


def sharing_by_layer(
    layers: Sequence[tuple[str, MixerSpec, Any]], *, d_model: int, context_len: int
) -> list[tuple[MixerContext, Sharing]]:
    """Where each layer stands and what it shares there; a layer is its key in the recipe, its mixer and its config.

    Raises: ConfigError for a reader without an earlier publisher, or with one that publishes something else.
    """
    published: dict[str, SharedTensor] = {}
    found = []
    for index, (key, spec, config) in enumerate(layers):
        context = MixerContext(
            d_model=d_model,
            layer_index=index,
            num_layers=len(layers),
            context_len=context_len,
            published=dict(published),
        )
        try:
            sharing = Sharing() if spec.shares is None else spec.shares(config, context)
        except ConfigError as error:
            raise ConfigError(what=error.what, where=f"model.mixers.{key}.{error.where}", mend=error.mend) from None
        for name, wanted in sharing.reads.items():
            _check(name, wanted, published, f"layer {index} ({key})")
        published.update(sharing.publishes)
        found.append((context, sharing))
    return found


def _check(name: str, wanted: SharedTensor, published: dict[str, SharedTensor], layer: str) -> None:
    if name not in published:
        have = f"they publish {', '.join(published)}" if published else "they publish nothing"
        raise ConfigError(
            what=f"{layer} reads '{name}', and no earlier layer publishes it ({have})",
            where="model.schedule",
            mend="put a layer before it that publishes it, or let it read nothing",
        )
    if published[name] != wanted:
        raise ConfigError(
            what=f"{layer} reads '{name}' of {_described(wanted)}; the last one before it is of "
            + _described(published[name]),
            where="model.schedule",
            mend="give both layers the same sizes and options",
        )


def _described(tensor: SharedTensor) -> str:
    options = "".join(f", {name} {value}" for name, value in tensor.options.items())
    return f"{' x '.join(map(str, tensor.shape))} numbers a token{options}"
