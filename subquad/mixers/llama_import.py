"""Checkpoints of Llama and Mistral: rotary softmax attention with grouped heads, and SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subquad.contracts import ImportMap
from subquad.mixers.configs import SoftmaxAttentionConfig, WindowConfig
from subquad.model.checkpoint_config import CheckpointConfig
from subquad.schema import ChannelMixerConfig, ModelConfig

BLOCK = {
    "norm.weight": "input_layernorm.weight",
    "mixer.q_proj.weight": "self_attn.q_proj.weight",
    "mixer.k_proj.weight": "self_attn.k_proj.weight",
    "mixer.v_proj.weight": "self_attn.v_proj.weight",
    "mixer.o_proj.weight": "self_attn.o_proj.weight",
    "channel_norm.weight": "post_attention_layernorm.weight",
    "channel_mixer.gate.weight": "mlp.gate_proj.weight",
    "channel_mixer.up.weight": "mlp.up_proj.weight",
    "channel_mixer.down.weight": "mlp.down_proj.weight",
}


def llama(theirs: CheckpointConfig) -> ImportMap:
    """`softmax_attention` in every block."""
    return _decoder(theirs, "softmax_attention", theirs.get("num_key_value_heads", 0), {})


def mistral(theirs: CheckpointConfig) -> ImportMap:
    """`window` in every block, or `softmax_attention` where the checkpoint says that it has no sliding window."""
    heads = theirs.get("num_key_value_heads", 8)
    window = theirs.get("sliding_window", 0) if "sliding_window" in theirs.values else 4096
    if not window:
        return _decoder(theirs, "softmax_attention", heads, {})
    return _decoder(theirs, "window", heads, {"window": window})


def llama_config(
    model: ModelConfig, mixer: SoftmaxAttentionConfig, channel_mixer: ChannelMixerConfig | None
) -> dict[str, object]:
    """What config.json says of `softmax_attention` in every block."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads or mixer.num_heads,
        "head_dim": mixer.head_dim or model.d_model // mixer.num_heads,
        # Without a channel mixer the layouts differ, whatever stands here.
        "intermediate_size": 1 if channel_mixer is None else channel_mixer.d_hidden,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": mixer.rope_theta},
        "max_position_embeddings": model.context_len,
        "attention_bias": False,
        "mlp_bias": False,
    }


def mistral_config(
    model: ModelConfig, mixer: WindowConfig, channel_mixer: ChannelMixerConfig | None
) -> dict[str, object]:
    """What config.json says of `window` in every block."""
    attention = llama_config(model, mixer, channel_mixer)
    return attention | {"architectures": ["MistralForCausalLM"], "sliding_window": mixer.window}


def _decoder(theirs: CheckpointConfig, mixer: str, key_heads: int, options: Mapping[str, Any]) -> ImportMap:
    no_bias = "our projections have no biases"
    theirs.demand("attention_bias", False, default=False, because=no_bias)
    theirs.demand("mlp_bias", False, default=False, because=no_bias)
    theirs.demand("hidden_act", "silu", default="silu", because="our channel mixer is SwiGLU")
    heads = theirs.need("num_attention_heads", int)
    d_model = theirs.need("hidden_size", int)
    tied = theirs.get("tie_word_embeddings", False)
    return ImportMap(
        model=ModelConfig(
            d_model=d_model,
            num_layers=theirs.need("num_hidden_layers", int),
            vocab_size=theirs.need("vocab_size", int),
            schedule=[mixer],
            mixers={
                mixer: {
                    "mixer": mixer,
                    "num_heads": heads,
                    "num_kv_heads": key_heads or heads,
                    "head_dim": theirs.get("head_dim", 0)
                    or theirs.whole(d_model, heads, "hidden_size / num_attention_heads"),
                    "rope_theta": rope_theta(theirs),
                    **options,
                }
            },
            channel_mixer=ChannelMixerConfig(d_hidden=theirs.need("intermediate_size", int)),
            tie_embeddings=tied,
            norm_eps=theirs.get("rms_norm_eps", 1e-6),
        ),
        outer={"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
        | ({} if tied else {"lm_head.weight": "lm_head.weight"}),
        block_prefix="model.layers.{}.",
        blocks={mixer: BLOCK},
        copies={"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
        ignored=(r".*\.rotary_emb\.inv_freq",),  # written by versions of transformers before 4.32
    )


def rope_theta(theirs: CheckpointConfig) -> float:
    """The base of the rotary angles; scaled angles are refused.  Raises: ConfigError."""
    for key in ("rope_parameters", "rope_scaling"):  # the second as before version 5 of transformers
        part = theirs.part(key)
        kind = part.get("rope_type", part.get("type", "default"))
        if kind != "default":
            theirs.refuse(f"the rotary positions are of kind '{kind}', and ours are not scaled")
    return theirs.part("rope_parameters").get("rope_theta", theirs.get("rope_theta", 10_000.0))
