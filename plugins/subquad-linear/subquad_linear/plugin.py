"""What this plugin declares; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from subquad import Growth, MixerSpec, hookimpl
from subquad_linear.config import RetNetConfig


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
    ]
