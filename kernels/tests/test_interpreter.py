"""The interpreter that remembers leaves the language and every result as they were, and makes nothing a second time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType, SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import quick_interpreter
import triton
import triton.language as tl
from triton.language.core import is_builtin
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


@triton.jit
def _twice(x):
    return tl.where(x > 0, x + x, tl.exp(x) * 0)


@triton.jit
def _double(x, y, n: tl.constexpr):
    at = tl.program_id(0) * n + tl.arange(0, n)
    tl.store(y + at, _twice(_twice(tl.load(x + at))))


@contextmanager
def calls() -> Iterator[Counter[str]]:
    """How often functions of Python are called, by name."""
    found: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            found[frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        yield found
    finally:
        sys.setprofile(None)


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


@pytest.mark.skipif(not triton.__version__.startswith("3.7."), reason="counts functions that are private to triton 3.7")
def test_what_was_made_in_one_launch_is_not_made_in_the_next() -> None:
    """Each part of the language is replaced at every launch; pointers are new in it."""
    x = torch.ones(16)
    _double[(1,)](x, x, 16)
    with calls() as found:
        _double[(1,)](x, x, 16)
    assert (found["_twice"], found["_double"]) == (2, 1) and found["binary_op"] > 6
    most = {"getmembers": 4, "_patch_lang_core": 1, "validate_block_shape": 4, "device_assert": 0}
    assert {name: found[name] for name in most if found[name] > most[name]} == {}
    assert found["_type_for_tuple_values"] < found["initialise"] / 2  # shapes of tensors
    assert found["_get_np_dtype"] < found["numpy_type"] / 2


def test_types_of_tiles_that_differ_are_told_apart() -> None:
    kinds = [
        tl.block_type(element, shape)
        for element in (tl.float32, tl.int32, tl.pointer_type(tl.float32), tl.pointer_type(tl.int32))
        for shape in ([16], [4, 4], [tl.constexpr(16), 1])
    ]
    for number, kind in enumerate(kinds):
        again = tl.block_type(kind.element_ty, list(kind.shape))
        assert again == kind and again.name == kind.name
        assert [other for other in kinds if other == kind] == [kinds[number]]
        tensor = tl.tensor(f"handle {number}", kind)
        assert (tensor.handle, tensor.type, tensor.dtype) == (f"handle {number}", kind, kind.element_ty)
        assert [size.value for size in tensor.shape] == list(kind.shape)
        assert tensor.numel.value == 16
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(tl.float32, [3])


def test_a_check_for_overflow_that_is_made_in_debugging_is_left_in() -> None:
    options = interpreter.interpreter_builder.options
    for debug in (False, True):
        builder = SimpleNamespace(options=replace(options, debug=debug, sanitize_overflow=True))
        quick_interpreter._leave_out_verdicts_that_nobody_hears(SimpleNamespace(interpreter_builder=builder))
        assert builder.options.sanitize_overflow is debug
