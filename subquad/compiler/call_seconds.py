"""Seconds of what torch computes around the operators, call by call, by the device's ceilings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from subquad.compiler.example import Example
from subquad.compiler.step_work import Call
from subquad.compiler.target import Target
from subquad_cost_model import CostRow, Efficiency, RooflineEstimator

PRODUCTS = Efficiency(worst=0.05, typical=0.8, best=2.0)
"""The matrix products of a 430M model took 114 ms where the data sheet's peak allows 85, which is 0.75 of it
(tools/results/scout_mamba_430m_2k_compiled_h100_2026-11-24.json); of a probe's rate, below the sheet's, it
is taken to be a little more. `tools/check_prediction.py` holds this and what follows against real steps."""
STREAMS = Efficiency(worst=0.05, typical=0.8, best=2.0)
"""There AdamW moved 40 bytes per parameter in 6.6 ms, 0.8 of the data sheet's bandwidth."""
FORWARD_AGAIN = 4 / 3
"""Checkpointing computes the forward twice, a third of forward and backward."""

Span = tuple[float, float, float]
"""Seconds, low, high."""


def seconds_of(calls: Counter[Call], example: Example, target: Target, *, products: bool) -> Span:
    """The roofline of the matrix products, or of everything else, which moves bytes."""
    kinds = [call for call in calls if bool(call.matmul_flops) == products]
    rows = [
        CostRow(
            operator="dense" if products else "elementwise",
            kernel="torch",
            phase="forward",
            dtype=example.dtype,
            shape={},
            matmul_flops=call.matmul_flops,
            bytes_moved=call.bytes_moved,
        )
        for call in kinds
    ]
    estimates = RooflineEstimator(PRODUCTS if products else STREAMS).predict(rows, target.device)
    return total(
        scaled((estimate.seconds, estimate.low_s, estimate.high_s), calls[call])
        for call, estimate in zip(kinds, estimates)
    )


def scaled(span: Span, factor: float) -> Span:
    """All three times a factor."""
    return span[0] * factor, span[1] * factor, span[2] * factor


def total(spans: Iterable[Span]) -> Span:
    """The sums of all three."""
    columns = list(zip(*spans)) or [(0.0,)] * 3
    return sum(columns[0]), sum(columns[1]), sum(columns[2])
