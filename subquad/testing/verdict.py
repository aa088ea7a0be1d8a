"""A suite without pytest: every promise is called, and what came of it is kept."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from subquad.errors import RunError

PREFIX = "test_"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one promise; `broken` says how it is broken, None if it is kept.

    `inapplicable` says why it was not judged: it is about what the thing does not declare.
    """

    promise: str
    broken: str | None
    seconds: float
    inapplicable: str | None = None


def promises(suite: type[Any]) -> list[str]:
    """The promises of a suite, in the order in which they are written."""
    return [
        name.removeprefix(PREFIX)
        for kind in reversed(suite.__mro__)
        for name in vars(kind)
        if name.startswith(PREFIX) and inspect.isfunction(getattr(suite, name)) and _first(suite, kind, name)
    ]


def judge(suite: type[Any], *, only: str | None = None) -> list[Outcome]:
    """Call the promises of a suite, or only one, each on an instance of its own; not those that do not apply.

    Raises: RunError under `python -O`, which removes assertions: everything would be kept.
    """
    if not __debug__:
        raise RunError(what="python -O removes assertions", where="the suite", mend="run it without -O")
    without = _inapplicable(suite)
    return [
        Outcome(promise=name, broken=None, seconds=0.0, inapplicable=without[name])
        if name in without
        else _judged(suite, name)
        for name in promises(suite)
        if only in (None, name)
    ]


def _inapplicable(suite: type[Any]) -> Mapping[str, str]:
    """What the suite says of itself; nothing where what it looks at raises, which then breaks promises."""
    try:
        return suite().inapplicable()  # type: ignore[no-any-return]
    except Exception:  # as below
        return {}


def _judged(suite: type[Any], promise: str) -> Outcome:
    start, broken = time.perf_counter(), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            getattr(suite(), PREFIX + promise)()
    except AssertionError as error:
        broken = str(error) or f"an assertion of {promise} failed"
    except Exception as error:  # a stranger's mixer may raise anything; that breaks the promise, and the rest is judged
        broken = f"{type(error).__name__}: {error}"
    return Outcome(promise=promise, broken=broken, seconds=time.perf_counter() - start)


def _first(suite: type[Any], kind: type[Any], name: str) -> bool:
    """Whether `kind` is the oldest class that has the name: a method that is written anew keeps its place."""
    return next(base for base in reversed(suite.__mro__) if name in vars(base)) is kind
