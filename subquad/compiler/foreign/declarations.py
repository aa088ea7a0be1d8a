"""The adapters that come with subquad; a plugin adds its own by the same hook."""

from __future__ import annotations

from subquad.contracts import AdapterSpec

_HERE = "subquad.compiler.foreign"

ANY_MODULE = "torch.nn.modules.module:Module"
"""The class of every module: an adapter for it is asked last, for the owner itself."""

ADAPTERS = (
    AdapterSpec(
        name="huggingface",
        module_class="transformers.modeling_utils:PreTrainedModel",
        build=f"{_HERE}.huggingface:adapt",
        distinct_heads=True,
    ),
    AdapterSpec(
        name="torch_encoder_layer",
        module_class="torch.nn.modules.transformer:TransformerEncoderLayer",
        build=f"{_HERE}.torch_modules:adapt_encoder_layer",
    ),
    AdapterSpec(
        name="torch_multihead",
        module_class="torch.nn.modules.activation:MultiheadAttention",
        build=f"{_HERE}.torch_modules:adapt_multihead",
    ),
    AdapterSpec(
        name="timm", module_class="timm.layers.attention:Attention", build=f"{_HERE}.timm_attention:adapt"
    ),
    AdapterSpec(name="sdpa_calls", module_class=ANY_MODULE, build=f"{_HERE}.sdpa_calls:adapt"),
)
