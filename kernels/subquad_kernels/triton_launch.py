"""Launches of Triton kernels that cost the host less than triton's own: what was compiled is found by one look-up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from subquad_kernels.replay import ACTIVE, Send, stream_of

_MOST_KNOWN = 4096
"""Argument lists that one kernel remembers; a decode with a growing cache brings new ones for ever."""

_NUMBERS = (int, float)


class _Collecting(threading.local):
    collection: Any = None


COLLECTING = _Collecting()
"""The collection (`compile_processes`) that hears of this thread's launches in place of the device."""


class QuickLaunch:
    """A jitted kernel, launched as one:  kernel[programs](arguments..., CONSTANT=..., num_warps=...).

    `programs` are one to three counts. triton derives a launch's specialization from every argument, each time. Here
    an argument list that was seen before - equal numbers and constants, tensors of equal types, devices and
    alignments - goes to what was compiled for it at once. Constants are named, every other argument comes by its
    place; the first is a tensor. A call that is recorded (`replay`) hears of it, and where launches are collected
    (`compile_processes`) none is made.
    """

    def __init__(self, kernel: Any) -> None:
        self.jitted = kernel
        self._names: list[str] = kernel.arg_names
        params = getattr(kernel, "params", ())  # triton's interpreter has none
        self._unspecialized = {place for place, param in enumerate(params) if param.do_not_specialize}
        self._compiled: dict[tuple[object, ...], Send] = {}
        self._locks: dict[tuple[object, ...], threading.Lock] = {}

    def __getitem__(self, programs: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, programs)

    def _launch(self, programs: tuple[int, ...], /, *values: Any, **constants: Any) -> None:
        if COLLECTING.collection is not None:
            COLLECTING.collection.launch(self.jitted, programs, values, constants)
            return
        # triton compiles for pointers to multiples of 16 bytes, and others. Most values are numbers or left out.
        key: list[object] = []
        plain: list[Any] = []
        for value in values:
            if value is not None and value.__class__ not in _NUMBERS and isinstance(value, Tensor):
                pointer = value.data_ptr()
                key += (value.dtype, value.device, pointer % 16)
                plain.append(pointer)
            else:
                key.append(value)
                plain.append(value)
        known = (*key, *constants.items())
        send = self._compiled.get(known)
        grid: tuple[int, int, int] = (*programs, 1, 1)[:3]  # type: ignore[assignment]
        rest = [constants[name] for name in self._names[len(values) :]]
        launched = False
        if send is None:
            alike = (*map(self._specialization, range(len(values)), values), *constants.items())
            send, launched = self._first(known, alike, programs, values, constants)
        if send is not None and not launched:
            send(grid, stream_of(values[0].device), plain + rest)
        if ACTIVE.recording is not None:
            ACTIVE.recording.launch(send, grid, [*values, *rest])

    def _specialization(self, place: int, value: Any) -> object:
        """What of an argument triton compiles for, or a little more: of a number whether it is 1, even by 16, and wide.

        triton: `native_specialize_impl` (3.6 to 3.7).
        """
        if isinstance(value, Tensor):
            return value.dtype, value.device, value.data_ptr() % 16 == 0
        if value.__class__ is not int:
            return value.__class__
        wide = value.bit_length() > 31
        return (int, wide) if place in self._unspecialized else (int, wide, value == 1, value % 16 == 0)

    def _first(
        self,
        known: tuple[object, ...],
        alike: tuple[object, ...],
        programs: tuple[int, ...],
        values: Sequence[Any],
        constants: dict[str, Any],
    ) -> tuple[Send | None, bool]:
        """Leave a list of arguments to triton: what it compiles for them, and whether that is launched already.

        Threads whose arguments are `alike` to triton (`first_calls`: 96 channels and 2,048) compile once: triton
        itself would in each of them. Whoever waited finds in triton's own table what the other compiled.
        """
        with self._locks.setdefault(alike, threading.Lock()):
            if (send := self._compiled.get(known)) is not None:
                return send, False
            compiled = self.jitted[programs](*values, **constants)
            # None in triton's interpreter; for AMD, triton looks at the sizes of tensors as well.
            if compiled is not None and torch.version.hip is None:
                if len(self._compiled) >= _MOST_KNOWN:
                    self._compiled.clear()
                send = self._compiled[known] = partial(_send, compiled)
        return send, True


def _send(compiled: Any, programs: tuple[int, int, int], stream: int, arguments: Sequence[Any]) -> None:
    """Hand a launch to triton's launcher of the compiled kernel; an address spares it asking the driver about a tensor.

    Names of launches and calls of hooks are made where somebody listens (a profiler of triton's), which costs as much.
    """
    if _listened():
        compiled[programs](*arguments, stream=stream)
    else:
        compiled.run(*programs, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def _listened() -> bool:
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
