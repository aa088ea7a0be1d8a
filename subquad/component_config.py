"""A plain mapping becomes a typed config object: the same check for mixers, optimizers and data sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from subquad.errors import ConfigError, suggestion

T = TypeVar("T")


def typed_config(config_class: type[T], values: Mapping[str, object], where: str) -> T:
    """Build `config_class` from plain values, checking names and types.

    `where` is the dotted path of the mapping in the configuration, for errors.
    Raises: ConfigError for an unknown key, a wrong type, a missing value, or a relation that the class refuses.
    """
    fields = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            have = f"the keys are {', '.join(fields)}" if fields else "it has no keys"
            raise ConfigError(
                what=f"{config_class.__name__} has no key '{key}'",
                where=f"{where}.{key}",
                mend=f"{suggestion(key, fields)}{have}",
            )
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_class), dict(values)))
    except ConfigError as error:
        raise ConfigError(what=error.what, where=f"{where} ({error.where})", mend=error.mend) from None
    except MissingMandatoryValue as error:
        raise ConfigError(what=_first_line(error), where=where, mend=f"give it a value: {where}.KEY=VALUE") from None
    except ConfigKeyError as error:
        raise ConfigError(what=_first_line(error), where=where, mend="remove the key") from None
    except OmegaConfBaseException as error:
        key = f"{where}.{error.full_key}" if error.full_key else where
        raise ConfigError(what=_first_line(error), where=key, mend="give a value of the stated type") from None
    assert isinstance(typed, config_class)
    return typed


def defaults_of(config_class: type) -> dict[str, object]:
    """The default values of a config dataclass, as a plain mapping."""
    container = OmegaConf.to_container(OmegaConf.structured(config_class))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
