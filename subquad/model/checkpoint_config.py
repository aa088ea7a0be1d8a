"""The config.json of a Hugging Face checkpoint, as import maps read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from subquad.errors import ConfigError

T = TypeVar("T", bool, int, float, str)


class CheckpointConfig:
    """Values by key, checked for their types; `where` names the file in errors."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def need(self, key: str, kind: type[T]) -> T:
        """The value of a key that every such checkpoint has.  Raises: ConfigError where it is missing or mistyped."""
        value = self.values.get(key)
        if kind is float and type(value) is int:
            return kind(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(
                what=f"{key} is {value!r} and should be of type {kind.__name__}",
                where=self.where,
                mend="this is no config.json as the checkpoint's library writes it: fetch the checkpoint again",
            )
        return value

    def get(self, key: str, default: T) -> T:
        """The value of a key; where it is missing or null, its library's default.  Raises: ConfigError as `need`."""
        return default if self.values.get(key) is None else self.need(key, type(default))

    def part(self, key: str) -> CheckpointConfig:
        """The mapping under a key; empty where it is missing or null."""
        values = self.values.get(key)
        return CheckpointConfig(values if isinstance(values, Mapping) else {}, f"{self.where}, {key}")

    def demand(self, key: str, only: T, *, default: T, because: str) -> None:
        """Refuse a checkpoint whose key has another value than the one our blocks compute.  Raises: ConfigError."""
        value = self.get(key, default)
        if value != only:
            self.refuse(f"{key} is {value!r}, and only {only!r} can be loaded: {because}")

    def whole(self, total: float, parts: int, what: str) -> int:
        """`total / parts`, which must be whole.  Raises: ConfigError."""
        if parts < 1 or total != int(total) or int(total) % parts:
            self.refuse(f"{what}: {total:g} is no multiple of {parts}")
        return int(total) // parts

    def refuse(self, what: str) -> NoReturn:
        """Say what our blocks cannot compute.  Raises: ConfigError."""
        raise ConfigError(what=what, where=self.where, mend="load another checkpoint")
