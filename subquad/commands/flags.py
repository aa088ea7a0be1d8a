"""Arguments of the form --flag, for verbs that take nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from subquad.errors import ConfigError, suggestion


def flags(verb: str, arguments: Sequence[str], known: Sequence[str]) -> frozenset[str]:
    """The flags that are given.  Raises: ConfigError for any other word."""
    for argument in arguments:
        if argument not in known:
            takes = f"{verb} takes {', '.join(known)}" if known else f"{verb} takes no arguments"
            raise ConfigError(
                what=f"'{argument}' is not understood",
                where=verb,
                mend=f"{suggestion(argument, known)}{takes}; `python -m subquad {verb} --help` says more",
            )
    return frozenset(arguments)
