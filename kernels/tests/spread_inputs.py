"""Inputs that do not lie close together, as a column of a table or an expanded tensor do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def spread(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with a NaN behind each number: who reads them as if they were close reads it."""
    return {
        name: torch.stack([value, torch.full_like(value, torch.nan)], -1)[..., 0]
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
