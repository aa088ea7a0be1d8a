"""What the host works out from the boundaries of packed documents, once for all calls that share them.

Only the device knows the boundaries: to ask for them is to wait for all that is queued, and the device then idles until
more is. The layers and passes of a step share one tensor of boundaries, so the first asks and the others find what it
made. torch counts what is written to a tensor; boundaries that a kernel of one's own or `.data` writes, which torch
does not see, belong in a new tensor. On a CPU nobody waits, and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor

Layout = TypeVar("Layout")

_MOST = 4
"""Boundaries that are remembered, with what was made of them: those of a few micro-batches in flight."""
_WAITED_FOR = {"cuda"}


@dataclass
class _Known:
    """What was made of boundaries. They are held, so that nobody else has their memory meanwhile."""

    boundaries: Tensor
    key: Hashable
    bounds: tuple[int, ...]
    layouts: dict[Hashable, object] = field(default_factory=dict)


_known: list[_Known] = []
_fixed = 0


def bounds_of(cu_seqlens: Tensor) -> tuple[int, ...]:
    """The boundaries as integers.  Shapes:  cu_seqlens: documents + 1

    Raises: RuntimeError in a CUDA graph, which would keep them, but within `fixed_boundaries`.
    """
    return _of(cu_seqlens).bounds


def layout_of(make: Callable[..., Layout], cu_seqlens: Tensor, *further: Hashable) -> Layout:
    """`make(bounds, device, *further)`, or what it made for the same boundaries before; nobody may change that.

    Raises: as `bounds_of`.
    """
    known = _of(cu_seqlens)
    key = (make, further)
    if key not in known.layouts:
        # What is kept outlives the inference that it may be made in, and is then saved for gradients.
        with torch.inference_mode(False), torch.no_grad():
            known.layouts[key] = make(known.bounds, cu_seqlens.device, *further)
    return cast("Layout", known.layouts[key])


@contextmanager
def fixed_boundaries() -> Iterator[None]:
    """CUDA graphs taken down within repeat these boundaries alone, and until others push them out: a timing's do."""
    global _fixed
    _fixed += 1
    try:
        yield
    finally:
        _fixed -= 1


def _of(cu_seqlens: Tensor) -> _Known:
    waits = cu_seqlens.device.type in _WAITED_FOR
    if waits and not _fixed and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph cannot be taken of this kernel on packed documents: the host reads their boundaries, and the "
            "graph would repeat them for others; take it of unpacked sequences, or choose a fused kernel"
        )
    if not waits or cu_seqlens.is_inference():
        return _Known(cu_seqlens, None, _read(cu_seqlens))
    key = (
        cu_seqlens.data_ptr(), cu_seqlens._version, cu_seqlens.device, cu_seqlens.dtype, cu_seqlens.shape,
        cu_seqlens.stride(),
    )  # fmt: skip
    for known in _known:
        if known.key == key:
            return known
    found = _Known(cu_seqlens.detach(), key, _read(cu_seqlens))
    _known.append(found)
    del _known[:-_MOST]
    return found


def _read(cu_seqlens: Tensor) -> tuple[int, ...]:
    return tuple(cu_seqlens.tolist())
