"""Which mixer each `auto` layer was given, as data: part of plan.json, read back to repeat the choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TOGETHER = 0.01
"""What blocks may take together beyond the sum of what each was timed to take alone: plans of twelve layers took 1.7 %
less to 0.75 % more, and two that had filled their budget to the brim were over it (`tools/check_auto.py`)."""


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one block of a candidate takes at the budget's batch and length.

    `latency_s` is that of forward and backward (or of the forward alone), `latency_high_s` the pessimistic end that
    the budget is charged where it was measured; `source` is measured, model or bound. `memory_bytes` is what stays
    while a step is under way: weights, gradients and optimizer state, and what the forward keeps; `workspace_bytes`
    the most that comes and goes with it while it is at work. `carry_bytes` is what generation keeps after that many
    tokens.
    """

    latency_s: float
    latency_high_s: float
    memory_bytes: int
    workspace_bytes: int
    carry_bytes: int
    source: str

    @property
    def charged_s(self) -> float:
        """The latency that a budget is charged, as one of many blocks.

        A bound's upper end is a hundred times off and says nothing.
        """
        if self.source == "bound":
            return self.latency_s
        return self.latency_high_s * (1 + TOGETHER) if self.source == "measured" else self.latency_high_s


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A plan in the order of loss: the key of `model.mixers` for each layer."""

    schedule: tuple[str, ...]
    loss: float
    totals: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The chosen schedule with its evidence.

    `auto` are the layers that were open; `loss` holds the quality figures by layer and candidate, None where a layer
    had no such choice. `proven`: no plan within the budgets has a smaller sum of these losses.
    """

    schedule: tuple[str, ...]
    auto: tuple[int, ...]
    tokens_shape: tuple[int, int]
    quality: str
    candidates: Mapping[str, LayerCost]
    declined: Mapping[str, str]
    loss: tuple[Mapping[str, float], ...]
    total_loss: float
    proven: bool
    budgets: Mapping[str, float]
    totals: Mapping[str, float]
    reasons: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    mixers: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # entries of the chosen keys

    @classmethod
    def of_json(cls, content: Mapping[str, object]) -> Assignment:
        """What `dataclasses.asdict` and JSON made of one.  Raises: TypeError, KeyError, ValueError."""
        values: dict[str, object] = dict(content)
        for name in ("schedule", "auto", "tokens_shape", "loss", "reasons"):
            values[name] = tuple(values[name])  # type: ignore[arg-type]
        costs: Mapping[str, Mapping[str, object]] = values["candidates"]  # type: ignore[assignment]
        values["candidates"] = {key: LayerCost(**cost) for key, cost in costs.items()}  # type: ignore[arg-type]
        others: list[dict[str, object]] = values["alternatives"]  # type: ignore[assignment]
        values["alternatives"] = tuple(
            Alternative(**(other | {"schedule": tuple(other["schedule"])}))  # type: ignore[arg-type]
            for other in others
        )
        return cls(**values)  # type: ignore[arg-type]
