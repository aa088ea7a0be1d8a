"""Inputs whose numbers do not lie close together in the order of their axes, as slices and expanded tensors do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def spread(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with a NaN behind each number, or a 0: who reads them as if they were close reads it."""
    return _each(arguments, _apart)


def turned(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with the first axis innermost: a result that is laid out like its input is so, too."""
    return _each(arguments, lambda value: value.movedim(0, -1).contiguous().movedim(-1, 0))


def expanded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The first entry of the first axis for all of them, which is in memory once."""
    return _each(arguments, lambda value: value[:1].expand(value.shape) if value.is_floating_point() else value)


LAYOUTS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "spread": spread, "turned": turned, "expanded": expanded,
}  # fmt: skip


def _each(arguments: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _apart(value: Tensor) -> Tensor:
    between = torch.full_like(value, torch.nan) if value.is_floating_point() else torch.zeros_like(value)
    return torch.stack([value, between], -1)[..., 0]
