"""Interpreted kernels in less time (`quick_interpreter.py`), and one process for scripts (`forked_scripts.py`)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
from forked_scripts import FORKS


@pytest.fixture(scope="session", autouse=True)
def _interpreter_hurries() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        import triton.language
        from quick_interpreter import hurry
        from triton.runtime import interpreter

        hurry(interpreter, triton.language)


@pytest.fixture(scope="session", autouse=True)
def _forks_end() -> Iterator[None]:
    yield
    FORKS.close()
