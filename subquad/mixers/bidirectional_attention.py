"""Softmax attention over all tokens of a sequence, later ones among them."""

from __future__ import annotations

from subquad.bidirectional import Bidirectional
from subquad.mixers.softmax_attention import SoftmaxAttention


class BidirectionalAttention(Bidirectional, SoftmaxAttention):
    """`SoftmaxAttention` without its causal mask.  Shapes:  x: b t d  ->  b t d

    Source: Vaswani et al. 2017, 3.2.3 (the encoder's).
    """

    causal = False
