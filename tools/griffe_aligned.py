"""Lets griffe, which reads docstrings for the documentation, keep what is aligned in them."""

from __future__ import annotations

from typing import Any

import griffe
from aligned_text import fenced


class Aligned(griffe.Extension):
    """Fences the aligned stretches of every docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of whatever was loaded (griffe calls this)."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
