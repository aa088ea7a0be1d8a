"""A token's key and value, written into their place of rings: one launch finds the place and copies both."""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.tile_sizes import ceil_div, padded
from subquad_kernels.triton_launch import QuickLaunch

ROWS = 16
"""Heads of a program."""


def write(keys: Tensor, values: Tensor, position: Tensor, k: Tensor, v: Tensor, segment_len: int) -> None:
    """Place floor(position / segment_len) mod m becomes the token's; `position` stays.

    Shapes:  keys: b m h_kv k    values: b m h_kv v    position: 1 (int64)    k: b 1 h_kv k    v: b 1 h_kv v
    """
    b, places, h_kv, key_width = keys.shape
    value_width = values.shape[3]
    with torch.cuda.device_of(keys):
        _write[(b, ceil_div(h_kv, ROWS))](
            keys, values, position, k, v, *keys.stride(), *values.stride(),
            k.stride(0), *k.stride()[2:], v.stride(0), *v.stride()[2:], h_kv, places, segment_len,
            K=key_width, V=value_width, BLOCK_K=padded(key_width), BLOCK_V=padded(value_width), HEADS=ROWS, num_warps=4,
        )  # fmt: skip


@QuickLaunch
@triton.jit(do_not_specialize=["h_kv", "places", "segment_len"])
def _write(
    keys, values, position, k, v, keys_b, keys_n, keys_h, keys_k, values_b, values_n, values_h, values_v,
    k_b, k_h, k_k, v_b, v_h, v_v, h_kv, places, segment_len,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """HEADS key heads of one sequence."""
    place = (tl.load(position).to(tl.int32) // segment_len % places).to(tl.int64)  # wider divisions are slow
    batch = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]  # [HEADS, 1]
    column_k, column_v = tl.arange(0, BLOCK_K)[None, :], tl.arange(0, BLOCK_V)[None, :]
    there_k, there_v = (head < h_kv) & (column_k < K), (head < h_kv) & (column_v < V)
    key = tl.load(k + batch * k_b + head * k_h + column_k * k_k, mask=there_k)
    value = tl.load(v + batch * v_b + head * v_h + column_v * v_v, mask=there_v)
    tl.store(keys + batch * keys_b + place * keys_n + head * keys_h + column_k * keys_k, key, mask=there_k)
    tl.store(values + batch * values_b + place * values_n + head * values_h + column_v * values_v, value, mask=there_v)
