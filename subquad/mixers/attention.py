"""Which class an attention mixer is: by what it sees, and whose keys and values these are."""

from __future__ import annotations

from torch import nn

from subquad.contracts import MixerContext
from subquad.mixers.bidirectional_attention import BidirectionalAttention, BidirectionalWindow
from subquad.mixers.configs import SoftmaxAttentionConfig, WindowConfig
from subquad.mixers.reading_attention import ReadingAttention
from subquad.mixers.softmax_attention import SoftmaxAttention
from subquad.mixers.window import Window


def build_softmax_attention(config: SoftmaxAttentionConfig, context: MixerContext) -> nn.Module:
    """Attention over all earlier tokens, or over all."""
    if config.bidirectional:
        return BidirectionalAttention(config, context)
    return (ReadingAttention if config.kv == "read" else SoftmaxAttention)(config, context)


def build_window(config: WindowConfig, context: MixerContext) -> nn.Module:
    """Attention over the last tokens, or over those nearby."""
    if config.bidirectional:
        return BidirectionalWindow(config, context)
    return (ReadingAttention if config.kv == "read" else Window)(config, context)
