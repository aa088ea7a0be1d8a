"""Checkpoints of Mamba and Mamba-2, as transformers keeps them: their modules have our layout, under other names."""

from __future__ import annotations

import math
from typing import Any

from subquad import ChannelMixerConfig, CheckpointConfig, ImportMap, ModelConfig
from subquad_ssm.config import Mamba2Config, MambaConfig
from subquad_ssm.mamba2 import NORM_EPS

BLOCK = {
    name: name for name in ("norm.weight", "mixer.in_proj.weight", "mixer.out_proj.weight", "mixer.A_log", "mixer.D")
} | {"mixer.conv.weight": "mixer.conv1d.weight", "mixer.conv.bias": "mixer.conv1d.bias"}
MAMBA = BLOCK | {name: name for name in ("mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.dt_proj.bias")}
MAMBA2 = BLOCK | {name: name for name in ("mixer.dt_bias", "mixer.norm.weight")}


def mamba(theirs: CheckpointConfig) -> ImportMap:
    """`mamba` in every block, no channel mixers."""
    return _backbone(
        theirs,
        "mamba",
        {
            "expand": theirs.get("expand", 2),
            "state_dim": theirs.need("state_size", int),
            "conv_width": theirs.get("conv_kernel", 4),
            "dt_rank": 0 if theirs.values.get("time_step_rank") == "auto" else theirs.get("time_step_rank", 0),
        },
        MAMBA,
        tied=theirs.get("tie_word_embeddings", True),
    )


def mamba2(theirs: CheckpointConfig) -> ImportMap:
    """`mamba2` in every block, no channel mixers."""
    low, high = _limits(theirs)
    if low != 0 or high != math.inf:
        theirs.refuse(f"time_step_limit is {low} .. {high}, and our step sizes have no limits")
    eps = theirs.get("layer_norm_epsilon", NORM_EPS)
    if eps != NORM_EPS:
        theirs.refuse(f"layer_norm_epsilon is {eps}, and the norm inside our mixer has {NORM_EPS}")
    return _backbone(
        theirs,
        "mamba2",
        {
            "expand": theirs.get("expand", 2),
            "state_dim": theirs.need("state_size", int),
            "head_dim": theirs.need("head_dim", int),
            "num_groups": theirs.need("n_groups", int),
            "conv_width": theirs.get("conv_kernel", 4),
        },
        MAMBA2,
        tied=theirs.get("tie_word_embeddings", False),
    )


def mamba_config(model: ModelConfig, mixer: MambaConfig, channel_mixer: ChannelMixerConfig | None) -> dict[str, object]:
    """What config.json says of `mamba` in every block."""
    return {
        "architectures": ["MambaForCausalLM"],
        "state_size": mixer.state_dim,
        "expand": mixer.expand,
        "conv_kernel": mixer.conv_width,
        "time_step_rank": mixer.resolved_dt_rank(model.d_model),
        "layer_norm_epsilon": model.norm_eps,
    }


def mamba2_config(
    model: ModelConfig, mixer: Mamba2Config, channel_mixer: ChannelMixerConfig | None
) -> dict[str, object]:
    """What config.json says of `mamba2` in every block."""
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "state_size": mixer.state_dim,
        "expand": mixer.expand,
        "head_dim": mixer.head_dim,
        "num_heads": mixer.expand * model.d_model // mixer.head_dim,
        "n_groups": mixer.num_groups,
        "conv_kernel": mixer.conv_width,
        "layer_norm_epsilon": model.norm_eps,
    }


def _backbone(
    theirs: CheckpointConfig, mixer: str, options: dict[str, Any], block: dict[str, str], *, tied: bool
) -> ImportMap:
    theirs.demand("use_bias", False, default=False, because="our projections have no biases")
    theirs.demand("use_conv_bias", True, default=True, because="our convolution has a bias")
    theirs.demand("hidden_act", "silu", default="silu", because="our convolution ends in silu")
    return ImportMap(
        model=ModelConfig(
            d_model=theirs.need("hidden_size", int),
            num_layers=theirs.need("num_hidden_layers", int),
            vocab_size=theirs.need("vocab_size", int),
            schedule=[mixer],
            mixers={mixer: {"mixer": mixer, **options}},
            channel_mixer=None,
            tie_embeddings=tied,
            norm_eps=theirs.get("layer_norm_epsilon", 1e-5),
        ),
        outer={"embedding.weight": "backbone.embeddings.weight", "norm.weight": "backbone.norm_f.weight"}
        | ({} if tied else {"lm_head.weight": "lm_head.weight"}),
        block_prefix="backbone.layers.{}.",
        blocks={mixer: block},
        copies={"lm_head.weight": "backbone.embeddings.weight"} if tied else {},
    )


def _limits(theirs: CheckpointConfig) -> tuple[float, float]:
    """The least and the largest step size; JSON has no infinity, for which versions have written different things."""
    limits = theirs.values.get("time_step_limit") or (0.0, math.inf)
    try:
        low, high = (float(value["__float__"] if isinstance(value, dict) else value) for value in limits)
    except (TypeError, ValueError, KeyError):
        theirs.refuse(f"time_step_limit is {limits!r}, and should be two numbers")
    return low, high
