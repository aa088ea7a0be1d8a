"""All that this package uses of torch without a promise from torch; tests/test_foreign_torch.py holds each line of it.

Tried on torch 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer


@contextmanager
def no_look_at_mask_values() -> Iterator[None]:
    """Keep `nn.TransformerEncoder` from comparing its mask with a causal one, which no graph can hold.

    The mask then reaches attention as it is, and its values are read there.
    """
    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = before


def is_inside_transform(tensor: Tensor) -> bool:
    """Whether a `torch.func` transform (vmap, grad, ...) runs over the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[attr-defined, no-any-return]


def encoder_layer_by_parts(
    layer: nn.TransformerEncoderLayer, src: Tensor, src_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """`nn.TransformerEncoderLayer.forward` without its fused path, which has an attention of its own."""
    parts: Any = layer
    if layer.norm_first:
        x = src + parts._sa_block(layer.norm1(src), src_mask, None, is_causal=is_causal)
        return x + parts._ff_block(layer.norm2(x))  # type: ignore[no-any-return]
    x = layer.norm1(src + parts._sa_block(src, src_mask, None, is_causal=is_causal))
    return layer.norm2(x + parts._ff_block(x))  # type: ignore[no-any-return]
