"""Which document a token belongs to, found inside a Triton kernel: a launch where torch would take ten small ones."""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


def halvings(documents: int) -> int:
    """How often `find_documents` must halve its range."""
    return documents.bit_length()


@triton.jit
def find_documents(cu_seqlens, documents, halvings, tokens):
    """The last document that starts at or before each of a tile of tokens.

    Empty documents own no token; tokens after the last boundary belong to the last document.
    """
    low = tokens * 0
    high = low + documents
    for _ in range(halvings):
        middle = (low + high) // 2
        reached = tl.load(cu_seqlens + middle) <= tokens
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low
