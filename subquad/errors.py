"""Errors that say what happened, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SubquadError(Exception):
    """The root of every error that a user may cause; printed in three lines, without a traceback.

    `exit_code` is 2 for usage and composition, 1 for a run that failed.
    """

    exit_code = 2

    def __init__(self, *, what: str, where: str, mend: str) -> None:
        super().__init__(what)
        self.what, self.where, self.mend = what, where, mend

    def __str__(self) -> str:
        return f"{type(self).__name__}: {self.what}\n  where   {self.where}\n  mend    {self.mend}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.mend)


def _rebuild(kind: type[SubquadError], what: str, where: str, mend: str) -> SubquadError:
    return kind(what=what, where=where, mend=mend)


class ConfigError(SubquadError):
    """A key, value or relation of the configuration is wrong."""


class NotFoundError(SubquadError):
    """A mixer, operator, kernel, component or device of that name is not installed."""


class PluginError(SubquadError):
    """A plugin declares something twice, misspells a hook, or cannot be imported."""


class DataError(SubquadError):
    """A corpus is missing, empty, unreadable or too short."""


class RunError(SubquadError):
    """A run failed after it had started."""

    exit_code = 1


class ResumeError(SubquadError):
    """A run folder cannot be resumed with this configuration."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? ` when a known name is close to the misspelt one, else the empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean '{close[0]}'? " if close else ""
