"""What the loss holds where the backward begins: logits of all tokens, or of a chunk of them."""

from __future__ import annotations

from subquad.compiler.example import Example
from subquad.model.chunked_cross_entropy import chunk_tokens
from subquad.schema import ModelConfig

LOGIT_BYTES = 12
"""Per logit, when the loss's gradient is taken: log-probabilities, their gradient, and that of the logits, float32."""
CHUNK_LOGIT_BYTES, CAPPED_BYTES = 8, 4
"""Per logit of a chunk: itself and its log-probability, float32; what a cap's gradient needs comes on top."""
HEAD_BYTES = 8
"""Per weight of the head: its gradient in float32, and one chunk's share, or later the scaled gradient."""


def loss_bytes(model: ModelConfig, example: Example, *, chunked: bool) -> int:
    """Bytes that stand during the loss, for `trainer.loss=whole` or `chunked`; the model's sizes are filled in."""
    b, t = example.tokens_shape
    if not chunked:
        return LOGIT_BYTES * b * t * model.vocab_size
    per_logit = CHUNK_LOGIT_BYTES + (CAPPED_BYTES if model.logit_cap else 0)
    of_chunk = per_logit * min(b * t, chunk_tokens(model.vocab_size)) * model.vocab_size
    of_head = HEAD_BYTES * model.vocab_size * model.d_model
    of_hidden = (2 if example.dtype == "bfloat16" else 4) * b * t * model.d_model  # the gradient of the head's input
    return of_chunk + of_head + of_hidden
