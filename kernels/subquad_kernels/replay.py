"""A call that was made before, made again without its host code: allocations, torch's operations and launches in order.

What a kernel does between a call and its launches - strides, grids, constants, scratch memory - follows from the
signature of its arguments: shapes, strides, types, alignments, and everything that is no tensor. `Recording` watches
one call and notes what reached the device; `Replay` does that with the tensors of another call of the same signature.
Scratch memory is one allocation then, and a tensor is its address.

A call that reads a tensor's values on the host, or that uses memory of unknown origin, is not replayed but refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Send = Callable[[tuple[int, int, int], int, Sequence[Any]], None]
"""Starts a compiled kernel: its programs, a stream, and its arguments, tensors as their addresses."""

_ROOM = 256
"""Parts of scratch memory begin at multiples of so many bytes, as allocations of their own would, or better."""

_ATEN = torch.ops.aten
_ALLOCATIONS = {
    _ATEN.empty.memory_format, _ATEN.empty_like.default, _ATEN.empty_strided.default, _ATEN.new_empty.default,
    _ATEN.new_empty_strided.default,
}  # fmt: skip
_READ_BY_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Active(threading.local):
    recording: Recording | None = None


ACTIVE = _Active()
"""The recording of the call that this thread is in the middle of."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor as part of a root: an argument of the call, memory it allocated, or the result of an operation.

    `offset` counts elements of its type, and `offset_bytes` bytes, from the root's first element.
    """

    root: int
    offset: int
    offset_bytes: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    whole: bool

    def of(self, roots: Sequence[Any]) -> Tensor:
        """The tensor itself, from this call's roots."""
        root: Tensor = roots[self.root]
        return root if self.whole else root.as_strided(self.size, self.stride, root.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class _Operation:
    """An operation of torch; `new` are those of its results that become roots, and which."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    new: tuple[tuple[int, int], ...]

    def run(self, roots: list[Any], pointers: list[int], stream: int) -> None:
        with torch._C._DisableAutocast():  # as around the host code
            found = self.function(*[_actual(value, roots) for value in self.arguments], **self.named)
        results = found if isinstance(found, (list, tuple)) else [found]
        for index, root in self.new:
            roots[root], pointers[root] = results[index], results[index].data_ptr()


def _actual(value: Any, roots: list[Any]) -> Any:
    if value.__class__ is _Place:
        return value.of(roots)
    return [_actual(part, roots) for part in value] if value.__class__ is list else value


@dataclass(frozen=True, slots=True)
class _Launch:
    """A launch; `addresses` are (argument, root, bytes from its first element)."""

    send: Send
    programs: tuple[int, int, int]
    arguments: list[Any]
    addresses: tuple[tuple[int, int, int], ...]

    def run(self, roots: list[Any], pointers: list[int], stream: int) -> None:
        arguments = self.arguments.copy()
        for index, root, offset in self.addresses:
            arguments[index] = pointers[root] + offset
        self.send(self.programs, stream, arguments)


class Recording(TorchDispatchMode):
    """What a call does to tensors, while it is done.  `inputs` are the call's own, no two of them one object."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._alive: list[Tensor] = []  # a tensor is known by its id, which must stay its own
        self._roots: list[Tensor] = []
        self._places: dict[int, _Place] = {}
        self._allocated: list[int] = []
        self._touched: set[int] = set()  # roots that operations or callers need as tensors
        self._steps: list[_Operation | _Launch] = []
        self.refusal: str | None = None
        for value in inputs:
            self._root(value)
        self._inputs, self._device = len(inputs), inputs[0].device

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to say so: seconds, for calls that nobody compiles

    def __enter__(self) -> Recording:
        ACTIVE.recording = self
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        ACTIVE.recording = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), self._device.type.upper()):
                # In inference mode what consists of other operations arrives whole: `reshape`, a view or a copy.
                with self:
                    found = func.decompose(*args, **kwargs)
                if found is not NotImplemented:
                    return found
            ACTIVE.recording = None  # what an operation launches is done again with it
            found = func(*args, **kwargs)
        finally:
            ACTIVE.recording = self
        if self.refusal is None:
            try:
                self._note(func, args, kwargs, found)
            except _RefusedError as refused:
                self.refusal = str(refused)
        return found

    def launch(self, send: Send | None, programs: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        """Note a launch; `send` is None where its kernel cannot be sent again."""
        if self.refusal is not None:
            return
        if send is None:
            self.refusal = "a launch cannot be repeated"
            return
        addresses, plain = [], list(arguments)
        for index, value in enumerate(arguments):
            if isinstance(value, Tensor):
                place = self._places.get(id(value))
                if place is None:
                    self.refusal = f"argument {index} of a launch is of unknown origin"
                    return
                addresses.append((index, place.root, place.offset_bytes))
                plain[index] = 0  # nothing of the recorded call may stay alive: the address is another's every time
        self._steps.append(_Launch(send, programs, plain, tuple(addresses)))

    def replay(self, results: Sequence[Tensor]) -> Replay | None:
        """The call as it was recorded, which returned `results`; None if it was refused."""
        places = [place for result in results if (place := self._places.get(id(result))) is not None]
        if len(places) < len(results) or any(place.root < self._inputs for place in places):
            self.refusal = self.refusal or "a result is not of the call's own memory"
        if any(place.dtype != self._roots[place.root].dtype for place in places):
            self.refusal = self.refusal or "a result is memory as another type"
        if self.refusal is not None:
            return None
        self._touched |= {place.root for place in places}
        return Replay(self, places)

    def _root(self, tensor: Tensor) -> int:
        root = len(self._roots)
        self._roots.append(tensor)
        self._keep(tensor, _Place(root, 0, 0, tuple(tensor.shape), tensor.stride(), tensor.dtype, True))
        return root

    def _keep(self, tensor: Tensor, place: _Place) -> None:
        self._alive.append(tensor)
        self._places[id(tensor)] = place

    def _place(self, tensor: Tensor) -> _Place:
        place = self._places.get(id(tensor))
        if place is None:
            raise _RefusedError("an operation's argument is of unknown origin")
        return place

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> None:
        if _READ_BY_HOST & set(func.tags):
            raise _RefusedError(f"{func} reads values on the host")
        if torch.Tag.inplace_view in func.tags:
            raise _RefusedError(f"{func} changes the shape of a tensor in place")
        results = found if isinstance(found, (list, tuple)) else [found]
        new = [(index, result) for index, result in enumerate(results) if self._is_new(result)]
        if any(result.device != self._device for _, result in new):
            raise _RefusedError(f"{func} moves values to another device")
        if func in _ALLOCATIONS:
            self._allocated.append(self._root(found))
        elif func.is_view:
            whole = self._place(args[0])
            for _, result in new:
                self._keep(result, self._part(whole, args[0], result))
        else:
            if _names_tensors(kwargs):
                raise _RefusedError(f"{func} names a tensor")
            arguments = tuple([self._argument(value) for value in args])
            roots = tuple((index, self._root(result)) for index, result in new)
            self._steps.append(_Operation(func, arguments, kwargs, roots))

    def _is_new(self, result: Any) -> bool:
        return isinstance(result, Tensor) and id(result) not in self._places

    def _part(self, place: _Place, base: Tensor, view: Tensor) -> _Place:
        ahead = int(view.storage_offset()) * view.itemsize - int(base.storage_offset()) * base.itemsize
        moved = ahead + place.offset_bytes
        root = self._roots[place.root]
        whole = moved == 0 and view.dtype == root.dtype and view.shape == root.shape and view.stride() == root.stride()
        return _Place(
            place.root, moved // view.itemsize, moved, tuple(view.shape), view.stride(), view.dtype, whole
        )  # fmt: skip

    def _argument(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._argument(part) for part in value]
        if not isinstance(value, Tensor):
            return value
        place = self._place(value)
        root = self._roots[place.root]
        if place.dtype != root.dtype:
            raise _RefusedError("an operation reads memory as another type")
        self._touched.add(place.root)
        return place


class Replay:
    """What a recorded call did, for the tensors of others of its signature."""

    def __init__(self, recording: Recording, results: Sequence[_Place]) -> None:
        self._device, self._results = recording._device, tuple(results)
        self._cuda = self._device.index if self._device.type == "cuda" else None
        plain: Callable[..., Tensor] = partial(_empty, self._device)
        # Inductor's own, on the current device, at half the host's time; private, so it may be gone some day.
        quick = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", plain)
        self._empty = plain if self._cuda is None else quick
        self._steps = tuple(recording._steps)
        self._count = len(recording._roots)
        self._memory: list[tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]] = []
        scratch: list[tuple[int, int]] = []
        self._scratch_bytes = 0
        for index in recording._allocated:
            tensor = recording._roots[index]
            if index in recording._touched:
                self._memory.append((index, tuple(tensor.shape), tensor.stride(), tensor.dtype))
            else:
                scratch.append((index, self._scratch_bytes))
                self._scratch_bytes += -(-tensor.untyped_storage().nbytes() // _ROOM) * _ROOM
        self._scratch = tuple(scratch)

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results, from the call's own tensors in the order in which they were recorded."""
        cuda = self._cuda
        if cuda is None:
            return self._run(inputs, 0)
        if cuda == torch.cuda.current_device():
            return self._run(inputs, torch._C._cuda_getCurrentRawStream(cuda))
        with torch.cuda.device(cuda):
            return self._run(inputs, torch._C._cuda_getCurrentRawStream(cuda))

    def _run(self, inputs: Sequence[Tensor], stream: int) -> Sequence[Tensor]:
        rest = self._count - len(inputs)
        roots: list[Any] = [*inputs, *[None] * rest]
        pointers = [tensor.data_ptr() for tensor in inputs]
        pointers += [0] * rest
        for index, size, stride, dtype in self._memory:
            roots[index] = tensor = self._empty(size, stride, dtype)
            pointers[index] = tensor.data_ptr()
        if self._scratch:
            # Held until everything is sent; freed memory is given to later work of this stream only.
            scratch = self._empty((self._scratch_bytes,), (1,), torch.uint8)
            start = scratch.data_ptr()
            for index, offset in self._scratch:
                pointers[index] = start + offset
        for step in self._steps:
            step.run(roots, pointers, stream)
        return [place.of(roots) for place in self._results]

    @property
    def launches(self) -> int:
        """How many kernels it launches, torch's own not counted."""
        return sum(isinstance(step, _Launch) for step in self._steps)

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations of torch that it runs, views and empty memory not counted."""
        return tuple(str(step.function) for step in self._steps if isinstance(step, _Operation))


class Repeated:
    """The work of one signature: done as it is the first time, recorded the second, replayed from then on.

    Most signatures of a generation with a growing cache are met once a layer, and are not worth a recording before.
    """

    def __init__(self, work: Callable[[Sequence[Any]], Sequence[Tensor]], *, replayable: bool) -> None:
        self._work, self._replayable = work, replayable
        self._tensors: list[int] = []
        self._replay: Replay | None = None
        self._calls = 0

    def __call__(self, values: Sequence[Any]) -> Sequence[Tensor]:
        """The work's results, all of which are contiguous."""
        if self._replay is not None:
            return self._replay([values[place] for place in self._tensors])
        self._calls += 1
        return self.record(values) if self._replayable and self._calls == 2 else self._work(values)

    def record(self, values: Sequence[Any]) -> Sequence[Tensor]:
        """Do the work, and know it from now on unless it is refused."""
        # One tensor may stand in two places: views of it are different objects.
        watched = [value.detach() if isinstance(value, Tensor) else value for value in values]
        self._tensors = [place for place, value in enumerate(watched) if isinstance(value, Tensor)]
        with Recording([watched[place] for place in self._tensors]) as recording:
            results = self._work(watched)
        self._replay = recording.replay(results)
        return results


class _RefusedError(Exception):
    """Why a call cannot be made again without its host code."""


def _names_tensors(named: dict[str, Any]) -> bool:
    parts = [part for value in named.values() for part in (value if isinstance(value, (list, tuple)) else [value])]
    return any(isinstance(part, Tensor) for part in parts)


def _empty(device: torch.device, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def stream_of(device: torch.device) -> int:
    """The stream on which work for a device is queued now, as CUDA counts streams; 0 on a CPU."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def signature_of(values: Iterable[Any]) -> tuple[object, ...]:
    """What a call's host code can know of its arguments: of tensors all but their values, and where they lie by 16."""
    key: list[object] = []
    for value in values:
        if isinstance(value, Tensor):
            key += (value.shape, value.stride(), value.dtype, value.device, value.data_ptr() % 16)
        else:
            key.append(value)
    return tuple(key)
