"""The adapter for Hugging Face models: an attention implementation of their AttentionInterface, per model instance.

`config._attn_implementation` becomes `subquad_sdpa` or `subquad_eager`, after what the model ran before. Modules that
were given no kernels, and calls that kernels decline, run that implementation. All that this project uses of
transformers is in this file; tried with transformers 5.23.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from subquad.contracts import AttentionFunction

_PREFIX = "subquad_"
_ATTENTION = "_subquad_attention"
_CHANGES_THE_FUNCTION = ("position_bias", "softcap", "s_aux", "cache", "head_mask", "output_attentions")
"""Arguments of attention that do more than causality, masks, dropout and scale say."""

Interface = Callable[..., tuple[Tensor, Tensor | None]]


def adapt(module: nn.Module, attention: Mapping[str, AttentionFunction]) -> Mapping[str, str]:
    """Name our implementation in the configuration of every owner, and give the owner its function."""
    declined = {}
    for path, function in attention.items():
        owner = module.get_submodule(path)
        reason = _why_not(owner)
        if reason is not None:
            declined[path] = reason
            continue
        config: Any = owner.config
        before = config._attn_implementation.removeprefix(_PREFIX)
        _register(before)
        owner.__dict__[_ATTENTION] = function
        # The internal attribute: the property sets those of parts that are configured apart, too.
        config._attn_implementation_internal = _PREFIX + before
    return declined


def _why_not(owner: nn.Module) -> str | None:
    config = getattr(owner, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if not hasattr(sys.modules.get(type(owner).__module__), "ALL_ATTENTION_FUNCTIONS") or not isinstance(before, str):
        return f"{type(owner).__name__} does not ask transformers' AttentionInterface"
    before = before.removeprefix(_PREFIX)
    if before not in ("sdpa", "eager"):
        return f"runs {before} already"
    if before == "eager" and getattr(owner, "reorder_and_upcast_attn", False):
        return "computes its scores in float32 (reorder_and_upcast_attn)"
    if before == "eager" and _eager_of(owner) is None:
        return f"{type(owner).__module__} has no eager_attention_forward"
    return None


def _register(before: str) -> None:
    """Make our implementation and its masks known, once a process: those of the implementation that stands behind."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(_PREFIX + before, {"sdpa": attention_for_sdpa, "eager": attention_for_eager}[before])
    AttentionMaskInterface.register(_PREFIX + before, ALL_MASK_ATTENTION_FUNCTIONS[before])


def attention_for_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What `sdpa` computes, by a kernel where one is chosen and exact."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    causal = attention_mask is None and bool(causal) and query.shape[2] > 1
    out = _by_kernel(module, query, key, value, attention_mask, causal, kwargs)
    if out is not None:
        return out, None
    result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return result


def attention_for_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What the model's own eager attention computes, by a kernel where one is chosen, exact, and nobody asks for more.

    Eager attention sees no causality but in its mask.
    """
    if not _weights_are_recorded():
        out = _by_kernel(module, query, key, value, attention_mask, False, kwargs)
        if out is not None:
            return out, None
    eager = _eager_of(module)
    assert eager is not None
    return eager(module, query, key, value, attention_mask, **kwargs)


def _by_kernel(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, kwargs: Mapping[str, Any]
) -> Tensor | None:
    attention: AttentionFunction | None = module.__dict__.get(_ATTENTION)
    if attention is None or not (mask is None or isinstance(mask, Tensor)):
        return None
    if any(kwargs.get(name) is not None and kwargs[name] is not False for name in _CHANGES_THE_FUNCTION):
        return None
    out = attention(
        q, k, v, mask=mask, causal=causal, scale=kwargs.get("scaling"), dropout_p=kwargs.get("dropout", 0.0)
    )
    # transformers wants b t h v
    return None if out is None else out.transpose(1, 2)


def _eager_of(owner: nn.Module) -> Interface | None:
    return getattr(sys.modules.get(type(owner).__module__), "eager_attention_forward", None)


def _weights_are_recorded() -> bool:
    """Whether the call that runs now collects attention probabilities (`output_attentions=True`)."""
    from transformers.utils.output_capturing import _active_collector

    collected = _active_collector.get()
    return collected is not None and any("attentions" in key for key in collected)
