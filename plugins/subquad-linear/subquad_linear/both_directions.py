"""Mixers to both sides whose decays are the token's own: one from the first token to the last, another one back."""

from __future__ import annotations

from subquad import BothDirections, MixerContext
from subquad_linear.config import GatedDeltaNetConfig, GatedLinearAttentionConfig, MatrixLSTMConfig
from subquad_linear.gated_delta_net import GatedDeltaNet
from subquad_linear.gated_linear_attention import GatedLinearAttention
from subquad_linear.matrix_lstm import MatrixLSTM


class BidirectionalGatedLinearAttention(BothDirections, GatedLinearAttention):
    """Two of GLA that share nothing (`BothDirections`).  Shapes:  x: b t d  ->  b t d"""

    one_direction = GatedLinearAttention


class BidirectionalGatedDeltaNet(BothDirections, GatedDeltaNet):
    """Two of Gated DeltaNet that share nothing (`BothDirections`).  Shapes:  x: b t d  ->  b t d"""

    one_direction = GatedDeltaNet


class BidirectionalMatrixLSTM(BothDirections, MatrixLSTM):
    """Two of mLSTM that share nothing (`BothDirections`).  Shapes:  x: b t d  ->  b t d

    Alkin et al. 2024 (Vision-LSTM) turn every second layer around instead.
    """

    one_direction = MatrixLSTM


def build_gla(config: GatedLinearAttentionConfig, context: MixerContext) -> GatedLinearAttention:
    """Gated linear attention, or its form to both sides."""
    return (BidirectionalGatedLinearAttention if config.bidirectional else GatedLinearAttention)(config, context)


def build_gated_delta_net(config: GatedDeltaNetConfig, context: MixerContext) -> GatedDeltaNet:
    """Gated DeltaNet, or its form to both sides."""
    return (BidirectionalGatedDeltaNet if config.bidirectional else GatedDeltaNet)(config, context)


def build_mlstm(config: MatrixLSTMConfig, context: MixerContext) -> MatrixLSTM:
    """The matrix LSTM, or its form to both sides."""
    return (BidirectionalMatrixLSTM if config.bidirectional else MatrixLSTM)(config, context)
