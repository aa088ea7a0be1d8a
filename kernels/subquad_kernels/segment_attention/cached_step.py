"""`cached_attention` by the kernel of one token (`tiled_step.py`), whose summaries then lie in a ring.

A token that sees every earlier one sees summaries of segments of one token: one kernel serves softmax attention,
windows and segment attention. Its launch is that of a full ring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from subquad_kernels.cached_attention.definition import REFERENCE, scale_of
from subquad_kernels.segment_attention.tiled_step import decode

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs


def forward(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, segment_len: int,
    scale: float | None,
) -> Outputs:  # fmt: skip
    """out."""
    out, _ = decode(q, k, v, keys, values, scale_of(q, scale), position=position, segment_len=segment_len)
    return (out,)


def backward(arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """Those of the reference: nobody trains through a decode, and it takes what memory the reference takes."""
    return REFERENCE.backward(arguments, outputs, gradients)
