"""Caches that grow in place: what is appended is written behind what is held, and nothing else is copied.

A cache is a tensor whose second axis is tokens; what `appended` returns is a view of memory with room behind it. Caches
are values all the same: memory knows how far it was written, and only the cache that ends there may go on in place. One
that was continued otherwise before, or was not made here, is first copied to memory of its own. Memory has room for a
quarter more than is held, so that all copies together are at most five times what is held in the end.

For torch.fx each function is one node. torch.compile, and whoever differentiates, gets `torch.cat` and a slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic
from torch.utils.weak import WeakTensorKeyDictionary

LEAST_ROOM = 64
"""Tokens for which there is room in any case."""


def appended(cache: Tensor, new: Tensor) -> Tensor:
    """The cache with new tokens behind it.  Shapes:  cache: b s ...    new: b t ...  ->  b (s + t) ...

    Raises: RuntimeError, as torch.cat does, where the two differ in another axis.
    """
    if torch.compiler.is_compiling():
        return torch.cat([cache, new], dim=1)
    if has_torch_function_variadic(cache, new):
        return handle_torch_function(appended, (cache, new), cache, new)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() or not _alike(cache, new):
        return torch.cat([cache, new], dim=1)
    count = new.shape[1]
    if not count:
        return cache
    place = _PLACES.get(cache)
    if place is None or not place.can_go_on(count):
        place = _with_room(cache, cache.shape[1] + count)
    memory, stop = place.memory, place.stop + count
    memory.tokens.narrow(1, place.stop, count).copy_(new)
    memory.written = stop
    return _shown(_Place(memory, place.start, stop))


def latest(cache: Tensor, count: int) -> Tensor:
    """The last tokens of a cache, at most `count` of them, which goes on in place.  Shapes:  b s ...  ->  b n ..."""
    if torch.compiler.is_compiling():
        return cache[:, -count:]
    if has_torch_function_variadic(cache):
        return handle_torch_function(latest, (cache,), cache, count)  # type: ignore[no-any-return]
    place = _PLACES.get(cache)
    if place is None:
        return cache[:, -count:]
    start = max(place.start, place.stop - count)
    if place.memory.tokens.shape[1] > 2 * _capacity(place.stop - start):
        # What lies before would be kept for nothing: a long prompt, of which a window remains.
        return _shown(_with_room(cache[:, -count:], count))
    return _shown(_Place(place.memory, start, place.stop))


@dataclass(slots=True)
class _Memory:
    """Room for tokens, of which the first `written` belong to caches."""

    tokens: Tensor
    written: int


@dataclass(frozen=True, slots=True)
class _Place:
    """A cache: the tokens `start` to `stop` of memory."""

    memory: _Memory
    start: int
    stop: int

    def can_go_on(self, count: int) -> bool:
        """Whether the memory behind it is free, and may be written to: not outside of inference mode if it is of it."""
        tokens = self.memory.tokens
        return (
            self.memory.written == self.stop
            and self.stop + count <= tokens.shape[1]
            and (torch.is_inference_mode_enabled() or not tokens.is_inference())
        )


_PLACES = WeakTensorKeyDictionary()
"""Where caches lie. Not an attribute of the tensor: a copy or a file of it would take the room along."""


def _shown(place: _Place) -> Tensor:
    view = place.memory.tokens.narrow(1, place.start, place.stop - place.start)
    _PLACES[view] = place
    return view


def _with_room(cache: Tensor, held: int) -> _Place:
    """A copy, with room for `held` tokens in all and for more."""
    tokens = cache.new_empty(cache.shape[0], _capacity(held), *cache.shape[2:])
    tokens[:, : cache.shape[1]] = cache
    return _Place(_Memory(tokens, cache.shape[1]), 0, cache.shape[1])


def _capacity(held: int) -> int:
    return held + max(LEAST_ROOM, held // 4)


def _alike(cache: Tensor, new: Tensor) -> bool:
    """Plain tensors that differ in length alone; what they are otherwise, torch.cat decides or refuses."""
    held, added = cache.shape, new.shape
    return (
        type(cache) is type(new) is Tensor
        and cache.dtype == new.dtype
        and cache.device == new.device
        and not cache.is_meta
        and held[0] == added[0]
        and held[2:] == added[2:]
    )
