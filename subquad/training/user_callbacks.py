"""Lightning callbacks that a recipe asks for by `_target_`: only those of an allow-list are built."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

import lightning as L

from subquad.errors import ConfigError

ALLOWED_PREFIXES = ("lightning.pytorch.callbacks.",)
"""A recipe is data, which may come from anywhere: it can name no code but Lightning's own callbacks."""


def build_callbacks(entries: Sequence[object]) -> list[L.Callback]:
    """The callbacks, in order.  Raises: ConfigError for a target outside the allow-list, or wrong arguments."""
    return [_build(entry, f"callbacks[{index}]") for index, entry in enumerate(entries)]


def _build(entry: object, where: str) -> L.Callback:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("_target_"), str):
        raise ConfigError(
            what="a callback names no class",
            where=where,
            mend="write {_target_: lightning.pytorch.callbacks.NAME, ...its arguments}",
        )
    target = str(entry["_target_"])
    arguments = {str(key): value for key, value in entry.items() if key != "_target_"}
    if not target.startswith(ALLOWED_PREFIXES):
        raise ConfigError(
            what=f"_target_ may not be '{target}'",
            where=f"{where}._target_",
            mend=f"name a class below {' or '.join(ALLOWED_PREFIXES)}; other code belongs into a plugin",
        )
    module, _, name = target.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, L.Callback)):
        raise ConfigError(what=f"'{target}' is no callback", where=f"{where}._target_", mend="check its spelling")
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(what=f"{name}: {error}", where=where, mend="check the callback's arguments") from None
