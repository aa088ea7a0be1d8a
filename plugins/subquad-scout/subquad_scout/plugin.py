"""What this plugin declares; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from subquad import Growth, MixerSpec, hookimpl
from subquad_scout.config import SegmentAttentionConfig, share_summaries


@hookimpl
def subquad_provide_mixers() -> Iterable[MixerSpec]:
    return [
        MixerSpec(
            name="segment_attention",
            summary="every token sees itself and the last token of each earlier segment (SCOUT)",
            paper="SCOUT 2025 (arXiv 2509.00935)",
            config=SegmentAttentionConfig,
            build="subquad_scout.reading_segment_attention:build_segment_attention",
            # t^2 / segment_len for a fixed segment, t^1.5 for segment_len="sqrt"; promised is what always holds.
            work_growth=Growth.QUADRATIC,
            carry_growth=Growth.LINEAR,
            operators=("rotary", "segment_attention"),
            shares=share_summaries,
        )
    ]
