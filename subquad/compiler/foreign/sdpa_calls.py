"""The adapter for any module that calls scaled_dot_product_attention: the call is answered by a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from subquad.compiler.foreign.replaced_forward import forward_as_written, replace_forward
from subquad.contracts import AttentionFunction

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def adapt(module: nn.Module, attention: Mapping[str, AttentionFunction]) -> Mapping[str, str]:
    """Run the forward of each owner as it is, with its calls of scaled_dot_product_attention answered by kernels."""
    declined = {}
    for path, function in attention.items():
        owner = module.get_submodule(path)
        if function.written != "sdpa":
            declined[path] = f"writes its softmax out, and no adapter knows the class {type(owner).__name__}"
        elif (reason := replace_forward(owner, function, _forward)) is not None:
            declined[path] = reason
    return declined


def _forward(module: nn.Module, attention: AttentionFunction, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():  # dynamo cannot trace every function below such a mode
        return forward_as_written(module)(*args, **kwargs)
    with _Answered(attention):
        return forward_as_written(module)(*args, **kwargs)


class _Answered(TorchFunctionMode):
    """Answers scaled_dot_product_attention; what the kernels decline, and every other function, runs as called."""

    def __init__(self, attention: AttentionFunction) -> None:
        super().__init__()
        self._attention = attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(_NAMES, args)) | kwargs
            out = self._attention(
                given["query"], given["key"], given["value"], mask=given.get("attn_mask"),
                causal=given.get("is_causal", False), scale=given.get("scale"),
                dropout_p=given.get("dropout_p", 0.0),
            )  # fmt: skip
            if out is not None:
                return out
        return func(*args, **kwargs)
