"""Tensors of shapes alone: what runs under this mode computes nothing and takes no memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def shapes_only(parameter: Tensor | None) -> AbstractContextManager[Any]:
    """The mode in which a parameter's module can be run; that of the parameter if it is a shape itself."""
    if isinstance(parameter, FakeTensor):
        return parameter.fake_mode  # type: ignore[no-any-return]
    return FakeTensorMode(allow_non_fake_inputs=True)
