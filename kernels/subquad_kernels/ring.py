"""Caches that stay where they are: rings of m places, in which the tokens of a decode are written by the device.

Of every `segment_len` tokens the last is kept (1: all). Before token number p there are n = floor(p / segment_len)
entries, entry i in place i mod m. A token takes place n mod m whether it ends its segment or not: until one does, that
place does not count as written (`cached_attention`), and the next token takes it again.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from subquad_kernels.operators import cached_attention

_LIBRARY = torch.library.Library("subquad_ring", "DEF")
_LIBRARY.define("write(Tensor(a!) keys, Tensor(b!) values, Tensor position, Tensor k, Tensor v, int segment_len) -> ()")


class Rings(NamedTuple):
    """Rotated keys and values in rings, and how many tokens came before.

    Shapes:  keys: b m h_kv k    values: b m h_kv v    position: 1 (int64)
    """

    keys: Tensor
    values: Tensor
    position: Tensor


def rings_of(keys: Tensor, values: Tensor, position: int, places: int, segment_len: int = 1) -> Rings:
    """Rings in memory of their own that hold the ends of caches after so many tokens.

    Shapes:  keys: b s h_kv k    values: b s h_kv v
    """
    written = position // segment_len
    return Rings(
        _ring(keys, written, places), _ring(values, written, places), torch.tensor([position], device=keys.device)
    )


def places_for(position: int, tokens: int, segment_len: int = 1) -> int:
    """Places of a ring that overwrites no entry while so many tokens more are decoded."""
    return (position + tokens - 1) // segment_len + 1


def attend(q: Tensor, k: Tensor, v: Tensor, rings: Rings, *, segment_len: int = 1) -> tuple[Tensor, Rings]:
    """Attention of the next token to the rings and to itself, which is then written into them: they are handed back.

    Shapes:  q: b 1 h k    k: b 1 h_kv k    v: b 1 h_kv v  ->  b 1 h v
    """
    keys, values, position = rings
    out = cached_attention(q, k, v, keys, values, position, segment_len=segment_len)
    torch.ops.subquad_ring.write(keys, values, position, k, v, segment_len)  # one node where this is traced
    return out, Rings(keys, values, position.add_(1))


def cache_of(ring: Tensor, position: int, segment_len: int = 1) -> Tensor:
    """The entries before token number `position`, in order; a view while none was overwritten.

    Shapes:  ring: b m h w  ->  b min(n, m) h w
    """
    written, places = position // segment_len, ring.shape[1]
    if written <= places:
        return ring[:, :written]
    return ring.index_select(1, torch.arange(written - places, written, device=ring.device) % places)


def _write(keys: Tensor, values: Tensor, position: Tensor, k: Tensor, v: Tensor, segment_len: int) -> None:
    """The token takes its place; `position` stays."""
    place = position // segment_len % keys.shape[1]
    keys.index_copy_(1, place, k)
    values.index_copy_(1, place, v)


def _write_by_launch(keys: Tensor, values: Tensor, position: Tensor, k: Tensor, v: Tensor, segment_len: int) -> None:
    from subquad_kernels.triton_ring import write

    write(keys, values, position, k, v, segment_len)


_LIBRARY.impl("write", _write, "CompositeExplicitAutograd")
if find_spec("triton") is not None:
    _LIBRARY.impl("write", _write_by_launch, "CUDA")


@torch.library.register_fake("subquad_ring::write", lib=_LIBRARY)
def _write_nothing(*arguments: object) -> None:
    """What it writes to has its shapes already."""


def _ring(cache: Tensor, written: int, places: int) -> Tensor:
    """The cache's last entry is number `written` - 1."""
    held = min(cache.shape[1], places)
    ring = cache.new_empty(cache.shape[0], places, *cache.shape[2:])
    place = torch.arange(written - held, written, device=cache.device) % places
    return ring.index_copy_(1, place, cache[:, cache.shape[1] - held :])
