"""The host's pace: how long it needs to start one small torch operation, whatever the device does meanwhile.

A kernel composed of torch operations takes as long as the host needs to dispatch, allocate and launch them, where the
device is done sooner. That changes from minute to minute with the host's clock and with what else runs on it, so it is
measured beside each timing.
"""

from __future__ import annotations

import statistics
import time
from typing import Literal

SIDE, ROUNDS, WINDOWS = 16, 8, 5
LAUNCHES = 3
"""Of a round: a product, a scaling and a sum, each into memory of its own. 120 of them take the host a millisecond, and
the device less."""


class HostPace:
    """Seconds that the host needs for a launch, asked while the device is idle: the median of five short windows."""

    def __init__(self, kind: Literal["cpu", "cuda"]) -> None:
        import torch

        self._x = torch.eye(SIDE, device=kind)
        self()  # loads what the operations need

    def __call__(self) -> float:
        import torch

        with torch.no_grad():
            return statistics.median(self._window_s() for _ in range(WINDOWS)) / (ROUNDS * LAUNCHES)

    def _window_s(self) -> float:
        started_s = time.perf_counter()
        y = x = self._x
        for _ in range(ROUNDS):
            y = (y @ x).mul(0.5).add(x)
        return time.perf_counter() - started_s
