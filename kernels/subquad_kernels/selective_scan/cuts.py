"""How the fused scan is cut into tiles of channels and segments of time, in plain numbers: no torch, no triton."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from subquad_kernels.tile_sizes import ceil_div, power_of_two

CHUNK = 16
"""Tokens between two saved states; 16 was fastest of 4 .. 64 on CPU (README) and costs t c n / 16 of memory."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How one direction is laid out on a device; changes speed, never results beyond rounding.

    `tile_c` channels a program; `group` tokens (a divisor of 16) whose inputs are loaded together and, backward, whose
    states are held together; `registers` a thread may take, so that more warps share a scheduler (None: what it likes).
    Where fewer than `enough` programs would run, time is cut so that `programs` do, into segments of at least
    `shortest` tokens. Forward, a segment that is `first` times as long as the others comes before them, for it is
    scanned while they are summarised. `evict` is what the caches are told of tensors that pass through ("" or
    "evict_first").
    """

    tile_c: int
    group: int
    num_warps: int = 1
    registers: int | None = None
    enough: int = 528
    programs: int = 2112
    shortest: int = 64
    first: float = 0.0
    segment_len: int | None = None
    evict: str = ""


@lru_cache(maxsize=256)
def launch_of(n: int, *, backward: bool) -> Launch:
    """Sizes for a state size: 8 states a lane, so that the states and decays of a group fit in registers.

    A row of 16 channels has fewer elements than a warp has lanes: it is loaded in the layout of the states. Forward
    three warps share a scheduler, so that 1584 programs fill 132 multiprocessors; the backward holds two, and was
    fastest with twice the 2112 that it could hold at four, and a first segment of 0.8 of the others' length (README:
    chosen on an H200 at n = 16): a token is scanned in more time than it is summarised in.
    """
    padded = power_of_two(n)
    tile_c = min(16, max(8, 256 // padded))
    if backward:
        return Launch(tile_c=tile_c, group=4, programs=4224)
    if padded > 32:
        return Launch(tile_c=tile_c, group=4, first=0.8)
    return Launch(tile_c=tile_c, group=8, registers=168, programs=1584, first=0.8)


class Cut(NamedTuple):
    """Tiles of channels, segments of time, and tokens a segment (whole chunks); forward, tokens of the first segment
    and how many others come behind it.
    """

    tiles: int
    segments: int
    segment_len: int
    first_len: int
    others: int


def cut(launch: Launch, b: int, t: int, c: int) -> Cut:
    """How a direction of b sequences of t tokens of c channels is cut."""
    tiles = ceil_div(c, launch.tile_c)
    if launch.segment_len is not None:
        wanted = launch.segment_len
    else:
        at_once = launch.programs // (tiles * b) if tiles * b < launch.enough else 1
        wanted = t if at_once <= 1 else max(launch.shortest, math.ceil(t / (at_once + launch.first)))
    segment_len = ceil_div(wanted, CHUNK) * CHUNK
    segments = ceil_div(t, segment_len)
    first_len = segment_len if segments == 1 else ceil_div(math.ceil(launch.first * segment_len), CHUNK) * CHUNK
    return Cut(tiles, segments, segment_len, first_len, ceil_div(max(t - first_len, 0), segment_len))


def forward_steps(cut: Cut, t: int) -> int:
    """Tokens that a forward walks one after the other: the first segment is scanned, or others are summarised beside
    it, and these are scanned then.
    """
    if not cut.others:
        return t
    summarised = cut.segment_len if cut.others > 1 else 0
    return min(t, max(cut.first_len, summarised)) + min(t, cut.segment_len)


def backward_steps(cut: Cut, t: int) -> int:
    """Tokens that a backward walks one after the other: a segment is summarised where time is cut, and walked twice,
    as the states of a chunk are computed again.
    """
    summarised = cut.segment_len if cut.segments > 1 else 0
    return min(t, summarised) + 2 * min(t, cut.segment_len)
