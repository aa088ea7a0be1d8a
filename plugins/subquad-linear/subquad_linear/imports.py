"""Checkpoints of xLSTM 7B's layout and of Qwen3-Next's Gated DeltaNet layers, as transformers keeps them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from subquad import ChannelMixerConfig, CheckpointConfig, Computed, ImportMap, ModelConfig
from subquad_linear.exact_norm import EPS
from subquad_linear.matrix_lstm import NORM_EPS


def xlstm(theirs: CheckpointConfig) -> ImportMap:
    """`mlstm` in every block, each with a channel mixer, and capped logits."""
    theirs.demand("use_bias", False, default=False, because="our projections and norms have no biases")
    theirs.demand("v_dim_factor", 1.0, default=1.0, because="the values of our mixer are as wide as the model")
    theirs.demand("norm_eps", NORM_EPS, default=NORM_EPS, because="the norm inside our mixer has this one")
    theirs.demand("tie_word_embeddings", False, default=False, because="their head is a map of its own")
    d_model, heads = _either(theirs, "hidden_size", "embedding_dim"), theirs.need("num_heads", int)
    expand_k = theirs.get("qk_dim_factor", 0.5)
    keys, d_hidden = int(d_model * expand_k), _rounded_up(theirs, d_model)
    fused = theirs.get("weight_mode", "single") == "fused"
    return ImportMap(
        model=ModelConfig(
            d_model=d_model,
            num_layers=_either(theirs, "num_hidden_layers", "num_blocks"),
            vocab_size=theirs.need("vocab_size", int),
            schedule=["mlstm"],
            mixers={
                "mlstm": {
                    "mixer": "mlstm",
                    "num_heads": heads,
                    "expand_k": expand_k,
                    "gate_cap": theirs.get("gate_soft_cap", 15.0),
                }
            },
            channel_mixer=ChannelMixerConfig(d_hidden=d_hidden),
            tie_embeddings=False,
            norm_eps=NORM_EPS,
            logit_cap=theirs.get("output_logit_soft_cap", 30.0),
        ),
        outer={
            "embedding.weight": "backbone.embeddings.weight",
            "norm.weight": "backbone.out_norm.weight",
            "lm_head.weight": "lm_head.weight",
        },
        block_prefix="backbone.blocks.{}.",
        blocks={
            "mlstm": {
                "norm.weight": "norm_mlstm.weight",
                "mixer.norm.weight": "mlstm_layer.multihead_norm.weight",
                "mixer.out_proj.weight": "mlstm_layer.out_proj.weight",
                "channel_norm.weight": "norm_ffn.weight",
                "channel_mixer.down.weight": "ffn.proj_down.weight",
            }
            | (_fused_maps(keys, d_model, heads, d_hidden) if fused else SINGLE_MAPS)
        },
        copies={},
    )


SINGLE_MAPS: dict[str, str | Computed] = {
    "mixer.q_proj.weight": "mlstm_layer.q.weight",
    "mixer.k_proj.weight": "mlstm_layer.k.weight",
    "mixer.v_proj.weight": "mlstm_layer.v.weight",
    "mixer.o_proj.weight": "mlstm_layer.ogate_preact.weight",
    "mixer.input_gate.weight": "mlstm_layer.igate_preact.weight",
    "mixer.input_gate.bias": "mlstm_layer.igate_preact.bias",
    "mixer.forget_gate.weight": "mlstm_layer.fgate_preact.weight",
    "mixer.forget_gate.bias": "mlstm_layer.fgate_preact.bias",
    "channel_mixer.gate.weight": "ffn.proj_up_gate.weight",
    "channel_mixer.up.weight": "ffn.proj_up.weight",
}
"""Maps that xLSTM's `weight_mode` "single" keeps apart."""


def _fused_maps(keys: int, values: int, heads: int, d_hidden: int) -> dict[str, str | Computed]:
    """The same where `weight_mode` is "fused": rows of larger maps, [q, k, v, o], [input, forget] and [gate, up]."""
    found: dict[str, str | Computed] = {}
    for theirs, parts in (
        ("mlstm_layer.qkv_opreact.weight", {"q_proj": keys, "k_proj": keys, "v_proj": values, "o_proj": values}),
        ("mlstm_layer.ifgate_preact.weight", {"input_gate": heads, "forget_gate": heads}),
        ("mlstm_layer.ifgate_preact.bias", {"input_gate": heads, "forget_gate": heads}),
        ("ffn.proj_up_gate_z.weight", {"gate": d_hidden, "up": d_hidden}),
    ):
        room, kind = "channel_mixer" if theirs.startswith("ffn") else "mixer", theirs.rpartition(".")[2]
        for number, ours in enumerate(parts):
            found[f"{room}.{ours}.{kind}"] = Computed(names=(theirs,), transform=_part(list(parts.values()), number))
    return found


def _part(sizes: list[int], number: int) -> Callable[[Tensor], Tensor]:
    return lambda rows: rows.split(sizes)[number]


def _either(theirs: CheckpointConfig, key: str, older: str) -> int:
    """A size that transformers and the authors' own code name differently."""
    return theirs.get(key, 0) or theirs.need(older, int)


def _rounded_up(theirs: CheckpointConfig, d_model: int) -> int:
    """The hidden width of the channel mixer: a multiple of what the checkpoint says, as its code rounds."""
    multiple = theirs.get("ffn_round_up_to_multiple_of", 64)
    return int((d_model * theirs.get("ffn_proj_factor", 2.667) + multiple - 1) // multiple) * multiple


ATTENTION = (
    "full_attention layers have gates on their outputs, norms of queries and keys, and rotary positions on a part of"
    " each head, which our softmax_attention has not"
)
EXPERTS = "a mixture of experts; our channel mixer is one SwiGLU"


def qwen3_next(theirs: CheckpointConfig) -> ImportMap:
    """`gated_delta_net` in every block, each with a channel mixer."""
    layers = theirs.need("num_hidden_layers", int)
    kinds = theirs.values.get("layer_types")
    if kinds is None or set(kinds) != {"linear_attention"}:
        theirs.refuse(f"layer_types are not all 'linear_attention': {ATTENTION}")
    dense = theirs.values.get("mlp_only_layers") or ()
    if theirs.get("num_experts", 512) > 0 and set(dense) < set(range(layers)):
        theirs.refuse(f"num_experts is {theirs.get('num_experts', 512)}: {EXPERTS}")
    theirs.demand("hidden_act", "silu", default="silu", because="our convolution and channel mixer end in silu")
    theirs.demand("rms_norm_eps", EPS, default=EPS, because="the norm inside our mixer has this one")
    key_heads, heads = theirs.need("linear_num_key_heads", int), theirs.need("linear_num_value_heads", int)
    key_dim, value_dim = theirs.need("linear_key_head_dim", int), theirs.need("linear_value_head_dim", int)
    together = theirs.whole(heads, key_heads, "linear_num_value_heads / linear_num_key_heads")
    tied = theirs.get("tie_word_embeddings", False)

    def rows(*parts: int, of: list[int]) -> Callable[[Tensor], Tensor]:
        """Their fused maps hold [q, k, v, z], or [b, a], for one key head after the other; ours one after all."""

        def taken(weight: Tensor) -> Tensor:
            pieces = weight.unflatten(0, (key_heads, -1)).split(of, dim=1)
            return torch.cat([pieces[part].flatten(0, 1) for part in parts])

        return taken

    outer: dict[str, str | Computed] = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": Computed(names=("model.norm.weight",), transform=_one_more),
    }
    if not tied:
        outer["lm_head.weight"] = "lm_head.weight"
    qkvz, ba = [key_dim, key_dim, together * value_dim, together * value_dim], [together, together]
    return ImportMap(
        model=ModelConfig(
            d_model=theirs.need("hidden_size", int),
            num_layers=layers,
            vocab_size=theirs.need("vocab_size", int),
            schedule=["gated_delta_net"],
            mixers={
                "gated_delta_net": {
                    "mixer": "gated_delta_net",
                    "num_heads": heads,
                    "num_key_heads": key_heads,
                    "key_dim": key_dim,
                    "expand_v": theirs.whole(value_dim, key_dim, "linear_value_head_dim / linear_key_head_dim"),
                    "conv_width": theirs.get("linear_conv_kernel_dim", 4),
                    "negative_eigenvalues": False,
                }
            },
            channel_mixer=ChannelMixerConfig(d_hidden=theirs.need("intermediate_size", int)),
            tie_embeddings=tied,
            norm_eps=EPS,
        ),
        outer=outer,
        block_prefix="model.layers.{}.",
        blocks={
            "gated_delta_net": {
                "norm.weight": Computed(names=("input_layernorm.weight",), transform=_one_more),
                "mixer.qkv_proj.weight": Computed(
                    names=("linear_attn.in_proj_qkvz.weight",), transform=rows(0, 1, 2, of=qkvz)
                ),
                "mixer.output.g_proj.weight": Computed(
                    names=("linear_attn.in_proj_qkvz.weight",), transform=rows(3, of=qkvz)
                ),
                "mixer.write_proj.weight": Computed(names=("linear_attn.in_proj_ba.weight",), transform=rows(0, of=ba)),
                "mixer.decay_proj.weight": Computed(names=("linear_attn.in_proj_ba.weight",), transform=rows(1, of=ba)),
                "mixer.conv.weight": "linear_attn.conv1d.weight",
                "mixer.A_log": "linear_attn.A_log",
                "mixer.dt_bias": "linear_attn.dt_bias",
                "mixer.output.norm.weight": "linear_attn.norm.weight",
                "mixer.output.o_proj.weight": "linear_attn.out_proj.weight",
                "channel_norm.weight": Computed(names=("post_attention_layernorm.weight",), transform=_one_more),
                "channel_mixer.gate.weight": "mlp.gate_proj.weight",
                "channel_mixer.up.weight": "mlp.up_proj.weight",
                "channel_mixer.down.weight": "mlp.down_proj.weight",
            }
        },
        copies={"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
        ignored=(r"mtp\..*",),  # the head that predicts several tokens, which transformers leaves out as well
    )


def _one_more(weight: Tensor) -> Tensor:
    """Their norms scale by 1 + weight."""
    return 1 + weight.float()
