"""Which operators compute on a part of a sequence, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from subquad.parallel import alone, neighbours, states
from subquad.parallel.part import NotSplitError, SequencePart

SPLIT: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        function.__name__: function
        for function in (
            alone.gated_norm,
            neighbours.causal_conv,
            neighbours.rotary,
            neighbours.segment_attention,
            neighbours.softmax_attention,
            states.delta_rule,
            states.gated_linear_attention,
            states.linear_attention,
            states.selective_scan,
        )
    }
)
"""Each takes the part and the arguments of the operator's op, by name, and returns the op's results."""

NOT_SPLIT: Mapping[str, str] = MappingProxyType(
    {
        "cached_attention": "it takes one token a sequence",
        "log_linear_attention": "its state has as many slots as the position has bits",
        "log_linear_delta_rule": "its state has as many slots as the position has bits",
        "slstm_scan": "its state is not linear in the one before: ranks would compute one after the other",
        "ttt_scan": "its state is not linear in the one before: ranks would compute one after the other",
    }
)


def on_part(part: SequencePart, operator: str, arguments: Mapping[str, Any]) -> Any:
    """The results of an operator on a part; traced, if its arguments are proxies.  Raises: NotSplitError."""
    if operator not in SPLIT:
        reason = NOT_SPLIT.get(operator, "nobody has said how it goes on from one part of a sequence to the next")
        raise NotSplitError(reason)
    return SPLIT[operator](part, **arguments)
