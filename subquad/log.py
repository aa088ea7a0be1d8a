"""What a run tells a person as it goes, on stderr, down to the level that `log_level` names.

Results go to stdout, and an error that ends a command is always told; everything else that we say is said through here.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from subquad.schema import LOG_LEVELS

OTHERS = ("lightning", "lightning.pytorch", "lightning.fabric")
"""Loggers of other packages that follow: at `info` they keep to warnings."""
_LOGGER = logging.getLogger("subquad")


class _ToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)  # stderr as it is now: callers may exchange it


_LOGGER.addHandler(_ToStderr())
_LOGGER.setLevel(logging.INFO)
_LOGGER.propagate = False  # each line once, whatever the root logger does


def say(line: str) -> None:
    """Tell what goes on."""
    _LOGGER.info(line)


def detail(line: str) -> None:
    """Tell what only matters when something is looked for."""
    _LOGGER.debug(line)


def caution(line: str) -> None:
    """Tell what went wrong although the run goes on."""
    _LOGGER.warning(line)


@contextmanager
def at_level(name: str) -> Iterator[None]:
    """Say only what is of that level or above; at `error` warnings are not shown either."""
    assert name in LOG_LEVELS
    level = getattr(logging, name.upper())
    levels = {_LOGGER: level} | {
        logging.getLogger(other): level if level < logging.INFO else max(level, logging.WARNING) for other in OTHERS
    }
    before = {logger: logger.level for logger in levels}
    for logger, wanted in levels.items():
        logger.setLevel(wanted)
    try:
        with warnings.catch_warnings():
            if level >= logging.ERROR:
                warnings.simplefilter("ignore")
            yield
    finally:
        for logger, former in before.items():
            logger.setLevel(former)


def says(name: str) -> bool:
    """Whether lines of that level are shown now."""
    return _LOGGER.isEnabledFor(getattr(logging, name.upper()))
