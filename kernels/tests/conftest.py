"""Interpreted kernels, in less time: see `quick_interpreter.py`."""

from __future__ import annotations

import importlib.util
import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _interpreter_hurries() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        import triton.language
        from quick_interpreter import hurry
        from triton.runtime import interpreter

        hurry(interpreter, triton.language)
