"""What this plugin declares; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from subquad import Growth, ImportSpec, MixerSpec, hookimpl
from subquad_ssm.config import LogLinearMamba2Config, Mamba2Config, Mamba3Config, MambaConfig


def both_ways(*names: str) -> tuple[str, ...]:
    """Parameters of a block, and of the one from the last token to the first, where there is one."""
    return (*names, *(f"back.{name}" for name in names))


MAMBA_DYNAMICS = both_ways("A_log", "D", "dt_proj.bias")
MAMBA2_DYNAMICS = both_ways("A_log", "D", "dt_bias")


@hookimpl
def subquad_provide_config_packages() -> Iterable[str]:
    return ["subquad_ssm.conf"]


@hookimpl
def subquad_provide_mixers() -> Iterable[MixerSpec]:
    return [
        MixerSpec(
            name="mamba",
            summary="selective state-space model with input-dependent steps, behind a short convolution",
            paper="Gu and Dao 2023 (arXiv 2312.00752)",
            config=MambaConfig,
            build="subquad_ssm.both_directions:build_mamba",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=MAMBA_DYNAMICS,
            # Rates and step sizes act exponentially on the state: 8 bits of them change what is remembered.
            float32_parameters=MAMBA_DYNAMICS,
            operators=("causal_conv", "selective_scan"),
            bidirectional=True,
        ),
        MixerSpec(
            name="mamba2",
            summary="selective state-space model with one decay per head, as linear attention behind a convolution",
            paper="Dao and Gu 2024 (arXiv 2405.21060)",
            config=Mamba2Config,
            build="subquad_ssm.both_directions:build_mamba2",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=MAMBA2_DYNAMICS,
            float32_parameters=MAMBA2_DYNAMICS,
            operators=("causal_conv", "gated_norm", "linear_attention"),
            bidirectional=True,
        ),
        MixerSpec(
            name="mamba3",
            summary="complex state-space model by a trapezoidal rule, with one input a token or several",
            paper="Lahoti et al. 2026 (arXiv 2603.15569)",
            config=Mamba3Config,
            build="subquad_ssm.mamba3:Mamba3",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=("D", "dt_bias", "B_bias", "C_bias"),
            float32_parameters=("D", "dt_bias", "B_bias", "C_bias"),
            operators=("gated_norm", "linear_attention", "rotary"),
        ),
        MixerSpec(
            name="log_linear_mamba2",
            summary="Mamba-2 over log t states, each read with a weight from the token",
            paper="Guo et al. 2025 (arXiv 2506.04761)",
            config=LogLinearMamba2Config,
            build="subquad_ssm.log_linear_mamba2:LogLinearMamba2",
            work_growth=Growth.LOG_LINEAR,
            carry_growth=Growth.LOGARITHMIC,
            no_decay=("A_log", "D", "L", "dt_bias"),
            float32_parameters=("A_log", "D", "L", "dt_bias"),
            operators=("causal_conv", "gated_norm", "log_linear_attention"),
        ),
    ]


@hookimpl
def subquad_provide_imports() -> Iterable[ImportSpec]:
    return [
        ImportSpec(
            model_type="mamba",
            summary="mamba; without biases of projections",
            build="subquad_ssm.imports:mamba",
            mixer="mamba",
            export="subquad_ssm.imports:mamba_config",
        ),
        ImportSpec(
            model_type="mamba2",
            summary="mamba2; without biases of projections and limits of step sizes",
            build="subquad_ssm.imports:mamba2",
            mixer="mamba2",
            export="subquad_ssm.imports:mamba2_config",
        ),
    ]
