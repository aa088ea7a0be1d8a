"""Triton's interpreter, which looks through its whole language at every call of a function, remembers what it found."""

from __future__ import annotations

import importlib.util
import inspect
import os
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _interpreter_lists_its_language_once() -> None:
    """Takes a third off the time of interpreted kernels; what is replaced for a launch, and put back, is the same."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_builtin", None)
    if patch is None:  # private to triton: another version may have none, and is as fast as it is
        return
    names: dict[Any, list[str]] = {}

    def remembering(language: Any, *rest: Any) -> None:
        if language not in names:
            names[language] = [name for name, member in inspect.getmembers(language) if is_builtin(member)]
        # All of them are replaced together; a function that another one calls finds that done.
        if any(is_builtin(getattr(language, name)) for name in names[language][:1]):
            patch(language, *rest)

    interpreter._patch_builtin = remembering
