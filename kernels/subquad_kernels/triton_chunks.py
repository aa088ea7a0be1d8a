"""Packed documents cut into chunks, none of which holds tokens of two: a table laid out on the device.

There alone the boundaries are known. How many chunks there may be the host knows, so that nothing waits for the device
and boundaries may change under a CUDA graph.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.triton_launch import QuickLaunch

_BLOCK = 256
"""Documents, or chunks of one, that a program looks at together."""


def lay_out(cu_seqlens: Tensor, slots: int, chunk: int, *, least: int = 0) -> tuple[Tensor, Tensor]:
    """List the chunks of all documents in order; an empty document has `least`, 0 or 1, of no tokens.

    `slots` has room for the most chunks that so many documents can have: t // chunk + documents.
    Shapes:  table: slots + 1, 4    (a chunk's first token, tokens, document, 2 (its last) + (its first); slots that no
                                     document needs have no tokens; the last row begins with how many are taken)
             starts: documents + 1  (each document's first slot, then how many are taken)
    """
    documents = cu_seqlens.shape[0] - 1
    table, starts = cu_seqlens.new_empty(slots + 1, 4), cu_seqlens.new_empty(documents + 1)
    _lay_out[(documents,)](
        cu_seqlens.contiguous(), table, starts, documents, slots, chunk, LEAST=least, BLOCK=_BLOCK, num_warps=1
    )  # fmt: skip
    return table, starts


@QuickLaunch
@triton.jit(do_not_specialize=["documents", "slots", "chunk"])
def _lay_out(cu_seqlens, table, starts, documents, slots, chunk, LEAST: tl.constexpr, BLOCK: tl.constexpr):
    """A document's chunks, after those of the documents before it; the last one's program clears what is left."""
    document = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    ahead = tl.zeros([BLOCK], tl.int32)
    for base in range(0, document, BLOCK):
        others = base + columns
        inside = others < document
        begins = tl.load(cu_seqlens + others, mask=inside, other=0)
        lengths = tl.load(cu_seqlens + others + 1, mask=inside, other=0) - begins
        ahead += tl.where(inside, tl.maximum((lengths + chunk - 1) // chunk, LEAST), 0)
    start = tl.sum(ahead, axis=0)
    begin = tl.load(cu_seqlens + document)
    length = tl.load(cu_seqlens + document + 1) - begin
    count = tl.maximum((length + chunk - 1) // chunk, LEAST)
    tl.store(starts + document, start)
    last = document == documents - 1
    if last:
        tl.store(starts + documents, start + count)
        tl.store(table + slots * 4, start + count)
    rows = tl.where(last, slots - start, count)
    for base in range(0, rows, BLOCK):
        ordinal = base + columns
        inside = ordinal < rows
        row = table + (start + ordinal) * 4
        tl.store(row, begin + ordinal * chunk, mask=inside)
        tl.store(row + 1, tl.minimum(tl.maximum(length - ordinal * chunk, 0), chunk), mask=inside)
        tl.store(row + 2, tl.zeros([BLOCK], tl.int32) + document, mask=inside)
        ends = (ordinal >= count - 1).to(tl.int32)
        begins = ((ordinal == 0) | (ordinal >= count)).to(tl.int32)
        tl.store(row + 3, 2 * ends + begins, mask=inside)


@triton.jit
def taken(table, slots):
    """How many of the slots hold a chunk."""
    return tl.load(table + slots * 4)


@triton.jit
def chunk_at(table, slot):
    """First row (64 bits), tokens, document, and whether that begins or ends with the chunk."""
    row = table + slot * 4
    mark = tl.load(row + 3)
    return tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2), (mark & 1) != 0, (mark & 2) != 0
