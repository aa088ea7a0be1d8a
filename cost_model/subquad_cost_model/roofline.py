"""The analytic baseline: the lower bound over a stated efficiency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from subquad_cost_model.bound import lower_bound_s
from subquad_cost_model.device import Device
from subquad_cost_model.estimator import Estimate
from subquad_cost_model.rows import CostRow


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Which part of the bound's speed kernels reach: `worst <= typical <= best`.

    `typical` 0.1 and `worst` 0.001: the default kernels of softmax attention, segment attention, selective scan and
    causal convolution reached 0.005 (16 tokens) to 0.38, geometric mean 0.1, over 16 to 1024 tokens on one core of an
    AMD EPYC (torch 2.13, fp32); references are slower still. GPU kernels for attention and the gated delta rule reach
    0.23 to 0.31 on average (latency tables of NVIDIA's AIConfigurator). `best` is above 1 because a probe finds less
    than the device can do when other programs run beside it (figures of one machine in use varied by 1.6x).
    """

    worst: float = 0.001
    typical: float = 0.1
    best: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.worst <= self.typical <= self.best:
            raise ValueError(f"not an interval of efficiencies: {self.worst} <= {self.typical} <= {self.best}")


@dataclass(frozen=True)
class RooflineEstimator:
    """Divides the lower bound by an efficiency.

        seconds = bound / typical,   low = bound / best,   high = bound / worst

    From a data sheet the estimate IS the bound: seconds = low = bound, and only `high` is widened by `worst`.
    `peak_bytes` is a bound as well: inputs, outputs, and what the forward keeps for the backward. `note` is that of
    every estimate, where this stands in for another estimator.
    """

    efficiency: Efficiency = Efficiency()
    name: str = "roofline"
    note: str = ""

    def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
        """One estimate per row, in order; its source is `bound`."""
        return [self._estimate(row, device) for row in rows]

    def _estimate(self, row: CostRow, device: Device) -> Estimate:
        bound_s = lower_bound_s(row, device)
        probed = device.origin == "probed"
        return Estimate(
            seconds=bound_s / self.efficiency.typical if probed else bound_s,
            low_s=bound_s / self.efficiency.best if probed else bound_s,
            high_s=bound_s / self.efficiency.worst,
            peak_bytes=row.bytes_moved + row.saved_bytes,
            source="bound",
            note=self.note,
        )
