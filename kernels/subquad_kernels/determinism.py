"""The same bits in every run, also from packages that add in whatever order threads arrive unless they are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic() -> Iterator[None]:
    """Ask as torch does, by the flag that mamba-ssm and causal-conv1d look at; also a decorator of functions.

    torch's own operators only warn meanwhile where they have no such way, as they would if nobody had asked.
    """
    asked, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warns or not asked)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=warns)
