"""How tensors divide into tiles, in plain integers: triton's functions of these names take microseconds a call."""

from __future__ import annotations


def ceil_div(length: int, part: int) -> int:
    """How many parts hold the length."""
    return -(-length // part)


def power_of_two(length: int) -> int:
    """The least power of two that holds the length (1 or more)."""
    return 1 << (length - 1).bit_length()


def padded(width: int) -> int:
    """The width of a tile that holds it: a power of two, 16 at least for tensor cores."""
    return max(16, power_of_two(width))
