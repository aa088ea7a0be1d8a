"""How the fused kernels are laid out on a device: by the sizes of a state, its type and the heads that share keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from subquad_kernels.device_limits import device_limits
from subquad_kernels.linear_attention.chunk_states import MOST, Size
from subquad_kernels.linear_attention.declaration import (
    CHUNK,
    CUT_BELOW,
    keeps_states,
    takes_several_heads,
    value_tile,
)
from subquad_kernels.linear_attention.kept_states import Kept
from subquad_kernels.linear_attention.shared_keys import Shared
from subquad_kernels.tile_sizes import padded


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How one direction is laid out on a device; changes speed, never results beyond rounding.

    `tile_p` columns of values a program; `registers` caps those of a lane. Time is cut where fewer than `enough`
    programs would run. `chunk` tokens a step and `segment_len` tokens a segment (None: what the declaration says)
    decide the shape of the residual: forward and backward must agree, and calls through the torch op keep both.
    With `shared`, programs take several heads of q and k that these share (`shared_keys`); with `kept`, those of a
    backward take a chunk each (`kept_states`). Of the rest of this `chunk` and `segment_len` count then.
    """

    tile_p: int
    num_warps: int = 4
    num_stages: int = 2
    registers: int | None = None
    enough: int = CUT_BELOW
    chunk: int = CHUNK
    segment_len: int | None = None
    shared: Shared | None = None
    kept: Kept | None = None


@lru_cache
def launch_of(
    n: int, p: int, dtype: torch.dtype, *, backward: bool, group: int = 1, packed: bool = False, room: bool = True
) -> Launch:
    """Sizes for a state of n rows and p columns: at most 64 registers a lane for it.

    Four warps hold one 64-row tile a product; eight would repeat products of 64 rows, and serve larger states alone.
    The backward holds whole values up to 128 columns: narrower tiles would each write a part of dq and dk. It takes
    values of few columns in tiles as wide as those of keys, up to 64, from where on rows in shared memory have one
    layout: ptxas 12.8 may read an operand with rows of 64 bytes from nowhere where others are of 128 (README).
    Where `group` heads share keys of 64 columns or 128, and their values have 64, a program takes several heads. Where
    both have 128 or more, a walk of the backward would spill, and states go to memory. Either needs `room` in shared
    memory.
    """
    rows, half = padded(n), dtype != torch.float32
    if room and takes_several_heads(n, p, half=half, group=group):
        return shared_launch(backward=backward, packed=packed)
    tile_p = value_tile(n, p, half=half, backward=backward)
    wide = keeps_states(n, p, half=half) and max(rows, padded(p)) > MOST
    if room and backward and keeps_states(n, p, half=half):
        return kept_launch(tile_p, tiled=wide)
    if not half or (wide and not backward and not packed):  # four warps took 1.0 ms where eight took 1.35 (README)
        return Launch(tile_p=tile_p, num_stages=1)
    return Launch(tile_p=tile_p, num_warps=4 if rows * tile_p <= 8192 else 8, num_stages=2 if rows <= 128 else 1)


def kept_launch(tile_p: int, *, tiled: bool = False) -> Launch:
    """Sizes where states are kept: two programs a multiprocessor by registers and shared memory, walks and chunks.

    A walk loads nothing ahead: on an H200 stages gained nothing, and three leave it no room beside another. Where a
    state is several tiles no product of a chunk's loops feeds another, eight warps share their sums, and three stages
    gain a fourteenth.
    """
    walk = Size(num_warps=8, num_stages=1, registers=128)
    chunks = Size(num_warps=8, num_stages=3) if tiled else Size(num_warps=4)
    return Launch(tile_p=tile_p, kept=Kept(borders=walk, states=walk, chunks=chunks))


def shared_launch(*, backward: bool, packed: bool) -> Launch:
    """Sizes where a program takes several heads: chunks of 128 halve the states that a forward writes.

    Packed, the residual lies by chunks of 64, as the backward walks them. Chosen on an H200 (README).
    """
    queries = Size(num_warps=8, num_stages=3)
    if packed:  # with documents to look after, other walks would spill
        walk = Size(num_warps=8, num_stages=3, registers=128)
        return Launch(tile_p=64, shared=Shared(borders=walk, states=walk, queries=queries))
    if backward:
        borders = Size(num_warps=8, num_stages=3, registers=80)
        return Launch(
            tile_p=64, shared=Shared(borders=borders, states=Size(num_stages=3, registers=168), queries=queries)
        )
    return Launch(tile_p=64, chunk=128, shared=Shared(read=Size(num_warps=8, num_stages=3)))


@lru_cache
def has_room(device: torch.device) -> bool:
    """Whether a program may have the shared memory that several heads' tiles take, or a chunk's with its states.

    What only compiles may.
    """
    return device.type != "cuda" or device_limits(str(device)).shared_memory_bytes >= 200 * 1024
