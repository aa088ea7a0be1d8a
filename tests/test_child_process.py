"""What tests start ends with them, and a child that has gone is not waited for."""

from __future__ import annotations

import signal
import sys

import pytest
from child_process import StartProcess, children, wait_for


def test_no_child_outlives_its_test() -> None:
    with children() as start:
        child = start([sys.executable, "-c", "import time; time.sleep(600)"])
    assert child.returncode == -signal.SIGKILL


def test_a_child_that_has_gone_is_not_waited_for(start_process: StartProcess) -> None:
    child = start_process([sys.executable, "-c", "import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'] + ' thread')"])
    with pytest.raises(AssertionError, match="1 thread"):
        wait_for(lambda: False, child)
