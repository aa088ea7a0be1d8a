"""Without measurements: the order in which candidates are listed, best first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from subquad.compiler.quality.table import QualityTable
from subquad.contracts import MixerSpec


def prior_table(
    keys: Sequence[str], mixers: Mapping[str, Mapping[str, object]], num_layers: int, d_model: int
) -> QualityTable:
    """Every layer loses as many points as a candidate's place in the list; nothing was measured."""
    return QualityTable(
        proxy="prior",
        origin=f"the order {' > '.join(keys)}; nothing was measured",
        loss=tuple({key: float(place) for place, key in enumerate(keys)} for _ in range(num_layers)),
        mixers={key: dict(mixers[key]) for key in keys},
        d_model=d_model,
    )


def by_declared_growth(specs: Mapping[str, MixerSpec]) -> list[str]:
    """An order for who gives none: the more a mixer keeps of its past, then the more it works, the earlier."""
    return sorted(specs, key=lambda key: (-specs[key].carry_growth.value, -specs[key].work_growth.value, key))
