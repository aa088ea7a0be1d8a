"""Processes that a test starts: it waits for them without a clock, and none outlives it.

One that hangs is ended with its test, by the timeout that every test has.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

Child = subprocess.Popen[str]


class StartProcess(Protocol):
    """Starts a command with one thread and both its outputs in pipes."""

    def __call__(self, command: Sequence[str], cwd: Path | None = None, **environment: str) -> Child: ...


@contextmanager
def children() -> Iterator[StartProcess]:
    """What starts processes; those that still live at the end are killed."""
    begun: list[Child] = []

    def start(command: Sequence[str], cwd: Path | None = None, **environment: str) -> Child:
        child = subprocess.Popen(
            command, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        begun.append(child)
        return child

    try:
        yield start
    finally:
        for child in begun:
            with child:
                child.kill()


def wait_for(condition: Callable[[], object], child: Child) -> None:
    """Until the condition holds; the child must live until then."""
    while not condition():
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.001)
