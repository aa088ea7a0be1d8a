"""Where a program's tokens lie, and tiles of them: what the fused kernels of the delta rule load and store."""

# What Triton compiles has no Python types, and tuples that grow.
# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.triton_chunks import chunk_at


def rows_of(tensor: Tensor) -> Tensor:
    """The tokens of all sequences as rows; a view where a slice of a wider tensor allows it.

    Shapes:  b t h n  ->  b*t h*n
    """
    if tensor.stride(3) != 1 or tensor.stride(2) != tensor.shape[3]:
        tensor = tensor.contiguous()
    return tensor.reshape(tensor.shape[0] * tensor.shape[1], -1)


@triton.jit
def chunk_of(table, chunk, t, chunks, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """First row (64 bits) and number of tokens of a chunk."""
    if PACKED:
        first, size, _, _, _ = chunk_at(table, chunk)
    else:
        start = chunk % chunks * CHUNK
        first = (chunk // chunks).to(tl.int64) * t + start
        size = tl.minimum(t - start, CHUNK)
    return first, size


@triton.jit
def load(tensor, rows, stride, columns, in_rows, in_columns):
    """A tile [rows, columns] in its own type, zeros outside."""
    at = tensor + rows[:, None] * stride + columns[None, :]
    return tl.load(at, mask=in_rows[:, None] & in_columns[None, :], other=0.0)


@triton.jit
def load_transposed(tensor, rows, stride, columns, in_rows, in_columns):
    """The same tile as [columns, rows]."""
    at = tensor + rows[None, :] * stride + columns[:, None]
    return tl.load(at, mask=in_columns[:, None] & in_rows[None, :], other=0.0)


@triton.jit
def fetch(tensor, rows, stride, columns, in_columns):
    """A tile of rows that all exist: a loop's last chunk repeats its last token instead of being masked."""
    return tl.load(tensor + rows[:, None] * stride + columns[None, :], mask=in_columns[None, :], other=0.0)


@triton.jit
def fetch_transposed(tensor, rows, stride, columns, in_columns):
    return tl.load(tensor + rows[None, :] * stride + columns[:, None], mask=in_columns[:, None], other=0.0)


@triton.jit
def store_transposed(tensor, rows, stride, columns, in_rows, in_columns, tile):
    at = tensor + rows[None, :] * stride + columns[:, None]
    tl.store(at, tile.to(tensor.dtype.element_ty), mask=in_columns[:, None] & in_rows[None, :])


@triton.jit
def store(tensor, rows, stride, columns, in_rows, in_columns, tile):
    at = tensor + rows[:, None] * stride + columns[None, :]
    tl.store(at, tile.to(tensor.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])
