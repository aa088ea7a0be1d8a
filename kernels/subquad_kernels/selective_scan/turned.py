"""A scan seen from the other end: what a reversed scan hands to one that walks forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subquad_kernels.boundaries import layout_of

_OF_TOKENS = frozenset({"x", "dt", "B", "C", "z", "y", "ungated"})
_OF_STATES = frozenset({"initial_state", "final_state"})


def turned(values: Mapping[str, Any], cu_seqlens: Tensor | None) -> dict[str, Any]:
    """Arguments, outputs or gradients by name, with tokens in reverse order; of packed ones the documents too.

    Turning twice, by the turned boundaries, gives what was there before. Tensors are copied: torch has no view of them.

    Shapes:  x, dt, z, y, ungated: b t c    B, C: b t n    initial_state, final_state: q c n
             cu_seqlens: documents + 1
    """
    found = dict(values)
    for name, value in values.items():
        if value is None:
            continue
        if name in _OF_TOKENS and value.dim() == 3:  # ungated is empty where there is no gate
            found[name] = value.flip(1)
        elif name in _OF_STATES and cu_seqlens is not None:
            found[name] = value.flip(0)
        elif name == "cu_seqlens":
            found[name] = layout_of(_turned, value)
    return found


def _turned(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """One tensor for all calls, so that what is made of it is found again."""
    return torch.tensor([bounds[-1] - bound for bound in reversed(bounds)], dtype=torch.int32).to(device)
