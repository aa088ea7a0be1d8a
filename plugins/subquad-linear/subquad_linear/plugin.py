"""What this plugin declares; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from subquad import Growth, ImportSpec, MixerSpec, hookimpl
from subquad_linear.config import (
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    LightningConfig,
    LogLinearConfig,
    LogLinearGatedDeltaNetConfig,
    MatrixLSTMConfig,
    RetNetConfig,
    RWKV6Config,
    RWKV7Config,
    RWKVChannelMixConfig,
    ScalarLSTMConfig,
    ShortConvConfig,
    TTTLinearConfig,
    TTTLinearMambaConfig,
    TTTMLPConfig,
    TTTMLPMambaConfig,
    share_values,
)


def both_ways(*names: str) -> tuple[str, ...]:
    """Parameters of a mixer, and of the one from the last token to the first, where there is one."""
    return (*names, *(f"back.{name}" for name in names))


RWKV7_LOW_RANK = ("decay", "rate", "gate", "value")


@hookimpl
def subquad_provide_config_packages() -> Iterable[str]:
    return ["subquad_linear.conf"]


@hookimpl
def subquad_provide_mixers() -> Iterable[MixerSpec]:
    return [
        MixerSpec(
            name="retnet",
            summary="linear attention with rotary positions and a constant decay per head",
            paper="Sun et al. 2023 (arXiv 2307.08621)",
            config=RetNetConfig,
            build="subquad_linear.retnet:build_retnet",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            bidirectional=True,
            operators=("gated_norm", "linear_attention", "rotary"),
        ),
        MixerSpec(
            name="gla",
            summary="linear attention with a decay per key channel and token",
            paper="Yang et al. 2023 (arXiv 2312.06635)",
            config=GatedLinearAttentionConfig,
            build="subquad_linear.both_directions:build_gla",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=both_ways("decay_up.bias"),
            # A bias acts exponentially on the state through the decays: 8 bits of it change what is remembered.
            float32_parameters=both_ways("decay_up.bias"),
            operators=("gated_linear_attention", "gated_norm"),
            bidirectional=True,
        ),
        MixerSpec(
            name="gated_delta_net",
            summary="the delta rule with a decay per head and token, behind a short convolution",
            paper="Yang, Kautz and Hatamizadeh 2024 (arXiv 2412.06464)",
            config=GatedDeltaNetConfig,
            build="subquad_linear.both_directions:build_gated_delta_net",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=both_ways("A_log", "dt_bias"),
            float32_parameters=both_ways("A_log", "dt_bias"),
            operators=("causal_conv", "delta_rule", "gated_norm"),
            bidirectional=True,
        ),
        MixerSpec(
            name="delta_net",
            summary="the delta rule behind a short convolution",
            paper="Yang et al. 2024 (arXiv 2406.06484)",
            config=DeltaNetConfig,
            build="subquad_linear.delta_net:DeltaNet",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            operators=("causal_conv", "delta_rule", "gated_norm"),
        ),
        MixerSpec(
            name="lightning",
            summary="linear attention of activated keys and values, with a constant decay per head and layer",
            paper="Qin et al. 2024 (arXiv 2401.04658)",
            config=LightningConfig,
            build="subquad_linear.lightning:build_lightning",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            bidirectional=True,
            operators=("gated_norm", "linear_attention"),
        ),
        MixerSpec(
            name="mlstm",
            summary="linear attention with an exponential input gate, a forget gate and a normaliser",
            paper="Beck et al. 2025 (arXiv 2503.13427)",
            config=MatrixLSTMConfig,
            build="subquad_linear.both_directions:build_mlstm",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=both_ways("forget_gate.bias", "input_gate.bias"),
            # Gates act exponentially on the state: 8 bits of a bias change what is remembered.
            float32_parameters=both_ways("forget_gate.bias", "input_gate.bias"),
            operators=("gated_norm", "linear_attention"),
            bidirectional=True,
        ),
        MixerSpec(
            name="rwkv6",
            summary="linear attention with a decay per channel and token and a bonus, behind a token shift",
            paper="Peng et al. 2024 (arXiv 2404.05892)",
            config=RWKV6Config,
            build="subquad_linear.rwkv6:RWKV6",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=("mix", "mix_down.weight", "mix_up", "decay.down.weight", "decay.up.weight", "bonus"),
            # It acts doubly exponentially on the state through the decays.
            float32_parameters=("decay_base",),
            operators=("gated_linear_attention", "gated_norm"),
        ),
        MixerSpec(
            name="rwkv7",
            summary="a delta rule with a decay per channel and a removal key of its own, behind a token shift",
            paper="Peng et al. 2025 (arXiv 2503.14456)",
            config=RWKV7Config,
            build="subquad_linear.rwkv7:RWKV7",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=("mix", "bonus", *(f"{map}.{half}.weight" for map in RWKV7_LOW_RANK for half in ("down", "up"))),
            # It acts exponentially on the state through the decays.
            float32_parameters=("decay_base",),
            operators=("delta_rule", "gated_norm"),
            shares=share_values,
        ),
        MixerSpec(
            name="rwkv_channel_mix",
            summary="the other half of RWKV's layers: a squared-ReLU channel mix behind a token shift",
            paper="Peng et al. 2024 (arXiv 2404.05892), 2025 (arXiv 2503.14456)",
            config=RWKVChannelMixConfig,
            build="subquad_linear.rwkv_channel_mix:RWKVChannelMix",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            candidate=False,  # it sees two tokens
        ),
        MixerSpec(
            name="slstm",
            summary="recurrent network with exponential gates and memory mixing; serial in t",
            paper="Beck et al. 2024 (arXiv 2405.04517)",
            config=ScalarLSTMConfig,
            build="subquad_linear.scalar_lstm:ScalarLSTM",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=("bias",),
            # Gates act exponentially on the state: 8 bits of a bias change what is remembered.
            float32_parameters=("bias",),
            operators=("causal_conv", "gated_norm", "slstm_scan"),
        ),
        MixerSpec(
            name="log_linear",
            summary="linear attention with a decay per head and token, over log t states with weights from the token",
            paper="Guo et al. 2025 (arXiv 2506.04761)",
            config=LogLinearConfig,
            build="subquad_linear.log_linear:LogLinear",
            work_growth=Growth.LOG_LINEAR,
            carry_growth=Growth.LOGARITHMIC,
            no_decay=("L", "decay_proj.bias"),
            # They weigh whole states, and decide how fast these decay.
            float32_parameters=("L", "decay_proj.bias"),
            operators=("gated_norm", "log_linear_attention"),
        ),
        MixerSpec(
            name="log_linear_gated_delta_net",
            summary="the gated delta rule over log t states with weights from the token, behind a short convolution",
            paper="Guo et al. 2025 (arXiv 2506.04761)",
            config=LogLinearGatedDeltaNetConfig,
            build="subquad_linear.log_linear_gated_delta_net:LogLinearGatedDeltaNet",
            work_growth=Growth.LOG_LINEAR,
            carry_growth=Growth.LOGARITHMIC,
            no_decay=("A_log", "L", "dt_bias"),
            # They weigh whole states, and decide how fast these decay.
            float32_parameters=("A_log", "L", "dt_bias"),
            operators=("causal_conv", "gated_norm", "log_linear_delta_rule"),
        ),
        MixerSpec(
            name="ttt_linear",
            summary="a linear map as state, trained on the tokens it meets by mini-batch gradient descent",
            paper="Sun et al. 2024 (arXiv 2407.04620)",
            config=TTTLinearConfig,
            build="subquad_linear.ttt:linear",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=("b1", "norm_bias", "norm_weight"),
            # What the inner model starts from and is trained by; LN takes what is common to all of a last bias away.
            float32_parameters=("W1", "norm_bias", "norm_weight", "rate_proj.bias", "token_scale"),
            operators=("rotary", "ttt_scan"),
        ),
        MixerSpec(
            name="ttt_mlp",
            summary="a two-layer model as state, trained on the tokens it meets by mini-batch gradient descent",
            paper="Sun et al. 2024 (arXiv 2407.04620)",
            config=TTTMLPConfig,
            build="subquad_linear.ttt:mlp",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=("b1", "b2", "norm_bias", "norm_weight"),
            float32_parameters=("W1", "W2", "b1", "norm_bias", "norm_weight", "rate_proj.bias", "token_scale"),
            operators=("rotary", "ttt_scan"),
        ),
        MixerSpec(
            name="ttt_linear_mamba",
            summary="TTT-Linear with a gate, and convolved queries and keys of one map; stands after short_conv",
            paper="Sun et al. 2024 (arXiv 2407.04620)",
            config=TTTLinearMambaConfig,
            build="subquad_linear.ttt:linear_mamba",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=("b1", "norm_bias", "norm_weight"),
            float32_parameters=("W1", "norm_bias", "norm_weight", "rate_proj.bias", "token_scale"),
            operators=("causal_conv", "rotary", "ttt_scan"),
        ),
        MixerSpec(
            name="ttt_mlp_mamba",
            summary="TTT-MLP with a gate, and convolved queries and keys of one map; stands after short_conv",
            paper="Sun et al. 2024 (arXiv 2407.04620)",
            config=TTTMLPMambaConfig,
            build="subquad_linear.ttt:mlp_mamba",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=("b1", "b2", "norm_bias", "norm_weight"),
            float32_parameters=("W1", "W2", "b1", "norm_bias", "norm_weight", "rate_proj.bias", "token_scale"),
            operators=("causal_conv", "rotary", "ttt_scan"),
        ),
        MixerSpec(
            name="short_conv",
            summary="a short causal convolution, in a block of its own before each TTT layer of the Mamba backbone",
            paper="Sun et al. 2024 (arXiv 2407.04620)",
            config=ShortConvConfig,
            build="subquad_linear.short_conv:ShortConv",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            operators=("causal_conv",),
            candidate=False,  # it sees a few tokens
        ),
    ]


@hookimpl
def subquad_provide_imports() -> Iterable[ImportSpec]:
    return [
        ImportSpec(
            model_type="qwen3_next",
            summary="gated_delta_net and SwiGLU; without full_attention layers and experts",
            build="subquad_linear.imports:qwen3_next",
        ),
        ImportSpec(
            model_type="xlstm",
            summary="mlstm and SwiGLU, as in xLSTM 7B; without biases of projections",
            build="subquad_linear.imports:xlstm",
        ),
    ]
