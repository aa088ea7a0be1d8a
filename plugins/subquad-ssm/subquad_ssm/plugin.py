"""What this plugin declares; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from subquad import Growth, ImportSpec, MixerSpec, hookimpl
from subquad_ssm.config import Mamba2Config, MambaConfig


@hookimpl
def subquad_provide_mixers() -> Iterable[MixerSpec]:
    return [
        MixerSpec(
            name="mamba",
            summary="selective state-space model with input-dependent steps, behind a short convolution",
            paper="Gu and Dao 2023 (arXiv 2312.00752)",
            config=MambaConfig,
            build="subquad_ssm.mamba:Mamba",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=("A_log", "D", "dt_proj.bias"),
            # Rates and step sizes act exponentially on the state: 8 bits of them change what is remembered.
            float32_parameters=("A_log", "D", "dt_proj.bias"),
            operators=("causal_conv", "selective_scan"),
        ),
        MixerSpec(
            name="mamba2",
            summary="selective state-space model with one decay per head, as linear attention behind a convolution",
            paper="Dao and Gu 2024 (arXiv 2405.21060)",
            config=Mamba2Config,
            build="subquad_ssm.mamba2:Mamba2",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=("A_log", "D", "dt_bias"),
            float32_parameters=("A_log", "D", "dt_bias"),
            operators=("causal_conv", "linear_attention"),
        ),
    ]


@hookimpl
def subquad_provide_imports() -> Iterable[ImportSpec]:
    return [
        ImportSpec(
            model_type="mamba",
            summary="mamba; without biases of projections",
            build="subquad_ssm.imports:mamba",
        ),
        ImportSpec(
            model_type="mamba2",
            summary="mamba2; without biases of projections and limits of step sizes",
            build="subquad_ssm.imports:mamba2",
        ),
    ]
