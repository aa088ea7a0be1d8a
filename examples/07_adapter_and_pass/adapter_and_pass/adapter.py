"""The adapter for `their_library.Attention`, which writes its softmax out: a kernel computes what it writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from subquad import forward_as_written, replace_forward
from subquad.contracts import AttentionFunction


def adapt(module: nn.Module, attention: Mapping[str, AttentionFunction]) -> Mapping[str, str]:
    """Give the instance another forward; "" is the path of the module itself. What is returned is why not, by path."""
    declined = {path: "is not the module's own attention" for path in attention if path}
    if "" in attention and (reason := replace_forward(module, attention[""], _forward)) is not None:
        declined[""] = reason
    return declined


def _forward(module: Any, attention: AttentionFunction, x: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = attention(q, k, v, mask=mask)
    if mixed is None:  # another mask or type than the kernel was checked for
        return forward_as_written(module)(x, mask)
    return module.proj(mixed.transpose(1, 2).flatten(2))
