"""Tiles of rows as the kernels load and store them: zeros where there is nothing, and no column of padding written."""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
"""Scores are kept in units of log 2: `exp2` is one instruction."""


def rows(x: Tensor) -> Tensor:
    """Itself when each row lies in consecutive memory, as the kernels take it, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def load(pointers, row_ok, column_ok, EDGE: tl.constexpr, WHOLE: tl.constexpr):
    """Load rows; zeros beyond the last row at an EDGE, and in padded columns unless rows are WHOLE."""
    if EDGE and WHOLE:
        tile = tl.load(pointers, mask=row_ok[:, None], other=0.0)
    elif EDGE:
        tile = tl.load(pointers, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
    elif WHOLE:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=column_ok[None, :], other=0.0)
    return tile


@triton.jit
def put(pointers, tile, row_ok, column_ok, WHOLE: tl.constexpr):
    """Store the real rows and columns in the type of the memory."""
    if WHOLE:
        tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=row_ok[:, None])
    else:
        tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])
