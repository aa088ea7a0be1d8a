"""Arguments of the form key=value, for verbs that need none of Hydra."""

from __future__ import annotations

from collections.abc import Sequence

from subquad.component_config import defaults_of
from subquad.errors import ConfigError, suggestion


def key_values(verb: str, config_class: type, arguments: Sequence[str]) -> dict[str, str]:
    """The values by key; everything after the first `=` is the value, as it stands.  Raises: ConfigError."""
    known = list(defaults_of(config_class))
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            written = f"{key}=VALUE" if key in known else f"KEY=VALUE, such as {known[0]}={key.lstrip('-')}"
            raise ConfigError(
                what=f"'{argument}' is not of the form key=value",
                where=verb,
                mend=f"write {written}; the keys are {', '.join(known)}",
            )
        if key not in known:
            raise ConfigError(
                what=f"there is no key '{key}'",
                where=verb,
                mend=f"{suggestion(key, known)}the keys are {', '.join(known)}",
            )
        values[key] = value
    return values
