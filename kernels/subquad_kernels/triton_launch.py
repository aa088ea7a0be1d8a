"""Launches of Triton kernels that cost the host less than triton's own: what was compiled is found by one look-up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

_MOST_KNOWN = 4096
"""Argument lists that one kernel remembers; a decode with a growing cache brings new ones for ever."""

_NUMBERS = (int, float)


class QuickLaunch:
    """A jitted kernel, launched as one:  kernel[programs](arguments..., CONSTANT=..., num_warps=...).

    `programs` are one to three counts. triton derives a launch's specialization from every argument, each time. Here
    an argument list that was seen before - equal numbers and constants, tensors of equal types and alignments - goes
    to what was compiled for it at once. Constants are named, every other argument comes by its place; the first is a
    tensor.
    """

    def __init__(self, kernel: Any) -> None:
        self.jitted = kernel
        self._names: list[str] = kernel.arg_names
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __getitem__(self, programs: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, programs)

    def _launch(self, programs: tuple[int, ...], /, *values: Any, **constants: Any) -> None:
        # triton compiles for pointers to multiples of 16 bytes, and others. Most values are numbers or left out.
        key = [
            (value.dtype, value.data_ptr() % 16)
            if value is not None and value.__class__ not in _NUMBERS and isinstance(value, Tensor)
            else value
            for value in values
        ]
        known = (values[0].device, *key, *constants.items())
        compiled = self._compiled.get(known)
        if compiled is None:
            compiled = self.jitted[programs](*values, **constants)
            # None in triton's interpreter; for AMD, triton looks at the sizes of tensors as well.
            if compiled is not None and torch.version.hip is None:
                if len(self._compiled) >= _MOST_KNOWN:
                    self._compiled.clear()
                self._compiled[known] = compiled
        else:
            compiled[(*programs, 1, 1)[:3]](*values, *[constants[name] for name in self._names[len(values) :]])
