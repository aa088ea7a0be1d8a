"""Adapters for nn.MultiheadAttention and nn.TransformerEncoderLayer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad.compiler.foreign.masks import remembered
from subquad.compiler.foreign.replaced_forward import forward_as_written, replace_forward, restore_forward
from subquad.compiler.foreign.torch_private import encoder_layer_by_parts
from subquad.contracts import AttentionFunction


def adapt_multihead(module: nn.Module, attention: Mapping[str, AttentionFunction]) -> Mapping[str, str]:
    """Replace the instance's forward by projections, a kernel, and the output projection."""
    declined = {path: "is no part of nn.MultiheadAttention" for path in attention if path}
    if "" in attention:
        reason = _why_not(module) or replace_forward(module, attention[""], _multihead_forward)
        if reason is not None:
            declined[""] = reason
    return declined


def adapt_encoder_layer(module: nn.Module, attention: Mapping[str, AttentionFunction]) -> Mapping[str, str]:
    """Adapt the layer's attention, and keep the layer from torch's fused path, which would pass it by."""
    declined = {path: "is not the layer's own attention" for path in attention if path != "self_attn"}
    if "self_attn" not in attention:
        return declined
    if type(module).forward is not nn.TransformerEncoderLayer.forward:
        return declined | {"self_attn": "its layer has another forward than nn.TransformerEncoderLayer"}
    reason = adapt_multihead(module.get_submodule("self_attn"), {"": attention["self_attn"]}).get("")
    if reason is None and (reason := replace_forward(module, attention["self_attn"], _encoder_layer_forward)):
        reason = f"of its layer, {reason}"
        restore_forward(module.get_submodule("self_attn"))
    return declined if reason is None else declined | {"self_attn": reason}


def _why_not(module: nn.Module) -> str | None:
    assert isinstance(module, nn.MultiheadAttention)
    if type(module).forward is not nn.MultiheadAttention.forward:
        return "its class has another forward than nn.MultiheadAttention"
    if module.bias_k is not None or module.add_zero_attn:
        return "adds keys of its own (add_bias_kv or add_zero_attn)"
    return None


def _multihead_forward(
    module: nn.MultiheadAttention,
    attention: AttentionFunction,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    dropout_p = module.dropout if module.training else 0.0
    # What torch trusts without a look: the hint says what the mask is. A hint without a mask is its error to raise.
    unmasked = is_causal and attn_mask is not None
    if (
        key_padding_mask is None
        and not need_weights
        and not dropout_p
        and query.dim() == 3
        and unmasked == is_causal
        and (attn_mask is None or unmasked or (attn_mask.dim() == 2 and not torch.compiler.is_compiling()))
    ):
        q, k, v = _projected(module, query, key, value)
        mask = None if attn_mask is None or unmasked else _as_seen(attn_mask)
        out = attention(q, k, v, mask=mask, causal=is_causal)
        if out is not None:
            # As torch does it: the weights of `out_proj`, not its forward.
            mixed = F.linear(out.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)
            return mixed if module.batch_first else mixed.transpose(0, 1), None
    return forward_as_written(module)(  # type: ignore[no-any-return]
        query, key, value, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
        average_attn_weights=average_attn_weights, is_causal=is_causal,
    )  # fmt: skip


def _projected(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """W_q x, W_k x, W_v x by heads.  Shapes:  b t d, or t b d  ->  b h t k"""
    bias = module.in_proj_bias
    if query is key is value and module._qkv_same_embed_dim:
        q, k, v = F.linear(query, module.in_proj_weight, bias).chunk(3, dim=-1)
    else:
        weights = (
            module.in_proj_weight.chunk(3)
            if module._qkv_same_embed_dim
            else (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        )
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (F.linear(*given) for given in zip((query, key, value), weights, biases))  # type: ignore[arg-type]
    order = (0, 2, 1, 3) if module.batch_first else (1, 2, 0, 3)
    heads = (module.num_heads, module.head_dim)
    return tuple(part.unflatten(-1, heads).permute(order) for part in (q, k, v))  # type: ignore[return-value]


@remembered
def _inverted(mask: Tensor, t: int, s: int) -> Tensor:
    return ~mask


def _as_seen(attn_mask: Tensor) -> Tensor:
    """The mask as scaled_dot_product_attention takes it: nn.MultiheadAttention says True for hidden."""
    return _inverted(attn_mask, *attn_mask.shape) if attn_mask.dtype == torch.bool else attn_mask


def _encoder_layer_forward(
    layer: nn.TransformerEncoderLayer, attention: AttentionFunction, src: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    arguments = dict(zip(("src_mask", "src_key_padding_mask", "is_causal"), args)) | kwargs
    mask, padding = arguments.get("src_mask"), arguments.get("src_key_padding_mask")
    fused = not layer.training and not torch.is_grad_enabled() and padding is None and src.dim() == 3
    if fused and not src.is_nested and not torch.compiler.is_compiling():
        return encoder_layer_by_parts(layer, src, mask, bool(arguments.get("is_causal", False)))
    return forward_as_written(layer)(src, *args, **kwargs)  # type: ignore[no-any-return]
