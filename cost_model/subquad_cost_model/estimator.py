"""The interface of every cost model, and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from subquad_cost_model.device import Device
from subquad_cost_model.rows import CostRow

Source = Literal["bound", "model", "measured", "constant"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds with an interval, bytes at the peak, and where the figures come from.

    `low_s <= seconds <= high_s`; the true latency is expected inside with the model's stated coverage. `note` says why
    a better source did not answer.
    """

    seconds: float
    low_s: float
    high_s: float
    peak_bytes: int
    source: Source
    note: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.low_s <= self.seconds <= self.high_s:
            raise ValueError(f"not an interval: {self.low_s} <= {self.seconds} <= {self.high_s}")


class Estimator(Protocol):
    """Predicts how long rows take on a device."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
        """One estimate per row, in order."""
