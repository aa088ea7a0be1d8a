"""The command line of the scripts of this folder: plain words, `key=value` words, and `--help`.

A script's docstring is its help. What it does not take is refused before it does anything.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from subquad.errors import SubquadError

OF_TRAIN = None
"""Keys of `subquad train`, which itself refuses what it does not know."""


def words_of(
    doc: str | None,
    arguments: Sequence[str],
    *words: str,
    more: str = "",
    keys: Collection[str] | None = (),
) -> tuple[list[str], list[str]]:
    """The plain words, one for each of `words` and any number of `more`, and the `key=value` words of those keys.

    Exits: after printing `doc` where --help or -h is among them; with a sentence for anything that is not taken.
    """
    if any(argument in ("--help", "-h") for argument in arguments):
        print((doc or "").strip())
        raise SystemExit(0)
    plain, keyed = list[str](), list[str]()
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if argument.startswith("-"):
            refuse(f"'{argument}' is not understood")
        if not equals and not (keys is OF_TRAIN and argument.startswith("~")):  # Hydra's `~KEY` takes a key away
            plain.append(argument)
            continue
        if keys is not OF_TRAIN and key not in keys:
            refuse(f"there is no key '{key}'; there are {', '.join(keys)}" if keys else f"'{argument}' is not taken")
        keyed.append(argument)
    if len(plain) < len(words):
        refuse(f"{words[len(plain)]} is missing")
    if len(plain) > len(words) and not more:
        refuse(f"'{plain[len(words)]}' is not understood")
    return plain, keyed


def refuse(what: str) -> NoReturn:
    """Exit with a sentence."""
    print(f"{Path(sys.argv[0]).name}: {what}; --help says what it takes", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def told() -> Iterator[None]:
    """Say what subquad refuses without a traceback, as its own command does."""
    try:
        yield
    except SubquadError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from error
