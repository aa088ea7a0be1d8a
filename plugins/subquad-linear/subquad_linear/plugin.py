"""What this plugin declares; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from subquad import Growth, ImportSpec, MixerSpec, hookimpl
from subquad_linear.config import (
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    LightningConfig,
    MatrixLSTMConfig,
    RetNetConfig,
)


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
            build="subquad_linear.retnet:RetNet",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            operators=("linear_attention", "rotary"),
        ),
        MixerSpec(
            name="gla",
            summary="linear attention with a decay per key channel and token",
            paper="Yang et al. 2023 (arXiv 2312.06635)",
            config=GatedLinearAttentionConfig,
            build="subquad_linear.gated_linear_attention:GatedLinearAttention",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=("decay_up.bias",),
            # A bias acts exponentially on the state through the decays: 8 bits of it change what is remembered.
            float32_parameters=("decay_up.bias",),
            operators=("gated_linear_attention",),
        ),
        MixerSpec(
            name="gated_delta_net",
            summary="the delta rule with a decay per head and token, behind a short convolution",
            paper="Yang, Kautz and Hatamizadeh 2024 (arXiv 2412.06464)",
            config=GatedDeltaNetConfig,
            build="subquad_linear.gated_delta_net:GatedDeltaNet",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=("A_log", "dt_bias"),
            float32_parameters=("A_log", "dt_bias"),
            operators=("causal_conv", "delta_rule"),
        ),
        MixerSpec(
            name="delta_net",
            summary="the delta rule behind a short convolution",
            paper="Yang et al. 2024 (arXiv 2406.06484)",
            config=DeltaNetConfig,
            build="subquad_linear.delta_net:DeltaNet",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            operators=("causal_conv", "delta_rule"),
        ),
        MixerSpec(
            name="lightning",
            summary="linear attention of activated keys and values, with a constant decay per head and layer",
            paper="Qin et al. 2024 (arXiv 2401.04658)",
            config=LightningConfig,
            build="subquad_linear.lightning:Lightning",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            operators=("linear_attention",),
        ),
        MixerSpec(
            name="mlstm",
            summary="linear attention with an exponential input gate, a forget gate and a normaliser",
            paper="Beck et al. 2025 (arXiv 2503.13427)",
            config=MatrixLSTMConfig,
            build="subquad_linear.matrix_lstm:MatrixLSTM",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=("forget_gate.bias", "input_gate.bias"),
            # Gates act exponentially on the state: 8 bits of a bias change what is remembered.
            float32_parameters=("forget_gate.bias", "input_gate.bias"),
            operators=("linear_attention",),
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
