"""The interpreter that remembers its language replaces it for a launch, in nested calls too, and puts it back."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.language.core import is_builtin

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


@triton.jit
def _twice(x):
    return tl.where(x > 0, x + x, tl.exp(x) * 0)


@triton.jit
def _double(x, y, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(y + at, _twice(_twice(tl.load(x + at))))


def test_a_launch_of_nested_calls_leaves_the_language_as_it_was() -> None:
    x = torch.linspace(-1, 1, 16)
    for _ in range(2):
        y = torch.full_like(x, float("nan"))
        _double[(1,)](x, y, 16)
        assert torch.equal(y, 4 * x.clamp(min=0))
        for language, names in ((tl, ("load", "arange", "where")), (tl.tensor, ("__add__", "to")), (tl.math, ("exp",))):
            assert all(is_builtin(getattr(language, name)) for name in names)


def test_a_launch_that_raises_leaves_the_language_as_it_was() -> None:
    with pytest.raises(Exception, match="arange"):
        _double[(1,)](torch.ones(3), torch.ones(3), 3)  # tiles have a power of two of lanes
    assert is_builtin(tl.load)
