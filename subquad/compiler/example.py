"""What a model will be fed: enough to know every operator's workload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["forward", "packed", "prefill", "decode", "decode_in_place"]
METHODS: tuple[Method, ...] = ("forward", "packed", "prefill", "decode", "decode_in_place")
IN_PLACE: Method = "decode_in_place"
"""What only mixers that `DecodesInPlace` have, and what a run can do without: there `decode` runs."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """Shapes and use of a model: `tokens_shape` is (b, t).

    `packed`: sequences carry document boundaries, `documents` of them in a batch (0: one per row). `dtype` is what
    matrix products compute in. `training`: the gradient is needed as well. `decoding`: prefill and decode are used too,
    and what decodes in place.
    """

    tokens_shape: tuple[int, int]
    packed: bool = False
    documents: int = 0
    dtype: str = "float32"
    training: bool = False
    decoding: bool = False

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods of a mixer that this use runs."""
        whole: Method = "packed" if self.packed else "forward"
        return (whole, "prefill", "decode", IN_PLACE) if self.decoding else (whole,)

    @property
    def captured(self) -> tuple[Method, ...]:
        """The methods that get graphs: all, but that which decodes in place only where this use does."""
        return METHODS if self.decoding else tuple(method for method in METHODS if method != IN_PLACE)
