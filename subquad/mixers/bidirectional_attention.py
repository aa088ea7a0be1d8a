"""Softmax attention over the tokens of both sides: all of a sequence, or those within a window."""

from __future__ import annotations

from subquad.bidirectional import Bidirectional
from subquad.mixers.softmax_attention import SoftmaxAttention
from subquad.mixers.window import Window


class BidirectionalAttention(Bidirectional, SoftmaxAttention):
    """`SoftmaxAttention` without its causal mask.  Shapes:  x: b t d  ->  b t d

    Source: Vaswani et al. 2017, 3.2.3 (the encoder's).
    """

    causal = False


class BidirectionalWindow(Bidirectional, Window):
    """Attention within a window to both sides:  V(t) = { s : |t - s| < window }.  Shapes:  x: b t d  ->  b t d

    Source: Beltagy et al. 2020, 3.1; theirs is w = 2 window - 1 tokens wide.
    """

    causal = False
