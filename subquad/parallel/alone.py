"""Operators that take each token by itself: on a part of a sequence they are what they were."""

from __future__ import annotations

from typing import Any

from subquad.parallel.part import SequencePart
from subquad_kernels.gated_norm.operator import OP as GATED_NORM


def gated_norm(part: SequencePart, **arguments: Any) -> Any:
    """Nothing of another token is asked for."""
    return GATED_NORM(**arguments)
