"""One token a sequence: keys and values are read once, and enough of them are on their way at any time.

A token that is decoded sees itself and every known summary. Query heads of a group are rows of a product of matrices
with a tile of their summaries; tiles come through a pipeline of asynchronous copies. Where sequences and heads are too
few to fill the device, a long cache is split, and a second launch weighs the parts by their log-sum-exps. A cache of
one tile, as most are, is asked for before anything else, together with the token's own term, and its products with one
row are taken elementwise, by one warp.

How much of the cache is there may be on the device alone (`cached_attention`, by `cached_step.py`): the launch is then
that of a full cache, splits share out what is there, and one that finds nothing weighs nothing.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def,assignment,misc"

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad_kernels.segment_attention.tiles import LN2, LOG2E, load, rows
from subquad_kernels.segment_attention.tilings import StepLaunch, step_launch
from subquad_kernels.tile_sizes import ceil_div, padded, power_of_two
from subquad_kernels.triton_launch import QuickLaunch

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Outputs


WEIGHED_COLUMNS = 32
"""Of a program that weighs parts: those of 256 splits fit its registers."""

LOWEST: tl.constexpr = tl.constexpr(-1e30)
"""Where the maximum of a split without the token's own term begins: finite, so that one which finds nothing has the
log-sum-exp of nothing, and weighs nothing."""


@lru_cache
def launch_of(shape: tuple[int, ...], element_bytes: int) -> StepLaunch:
    """The launch of `b h h_kv k v` and so many summaries."""
    return step_launch(*shape, element_bytes=element_bytes)


def decode(
    q: Tensor, k: Tensor, v: Tensor, summary_k: Tensor | None, summary_v: Tensor | None, factor: float,
    launch: StepLaunch | None = None, position: Tensor | None = None, segment_len: int = 1,
) -> Outputs:  # fmt: skip
    """out and lse of one token a sequence; `factor` scales scores. With a `position` the summaries are a ring of m.

    Shapes:  q: b 1 h k    k: b 1 h_kv k    v: b 1 h_kv v    summary_k, summary_v: b m h_kv k | v
             position: 1 (int64)  ->  b 1 h v, b h 1
    """
    b, _, h, key_width = q.shape
    h_kv, value_width = v.shape[2:]
    q, k, v = rows(q), rows(k), rows(v)
    count = 0 if summary_k is None else summary_k.shape[1]
    keys, values = (k if summary_k is None else rows(summary_k)), (v if summary_v is None else rows(summary_v))
    launch = launch or launch_of((b, h, h_kv, key_width, value_width, count), q.element_size())
    splits, span = launch.parts(count)

    groups = h // h_kv
    if launch.rows == 1 and (count > launch.tile_n or groups > 1):
        raise ValueError(f"{launch} is for caches of one tile and heads of their own, not {count} and {groups} a group")
    out = q.new_empty(b, 1, h, value_width)
    lse = q.new_empty(b, h, 1, dtype=torch.float32)
    parts, part_lse = out, lse
    if splits > 1:
        parts, part_lse = lse.new_empty(splits, b * h, value_width), lse.new_empty(splits, b * h)
    tensors = (q, k, v, keys, values, position, parts, part_lse)
    strides = (
        q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2),
        *keys.stride()[:3], *values.stride()[:3],
    )  # fmt: skip
    block_v = padded(value_width)
    sizes = {"K": key_width, "V": value_width, "BLOCK_K": padded(key_width), "BLOCK_V": block_v}
    sizes |= {"TILE_N": launch.tile_n, "RING": position is not None, "num_warps": launch.num_warps}
    with torch.cuda.device_of(q):
        if launch.rows == 1:
            _attend_once[(b * h,)](*tensors, *strides, h, count, segment_len, factor * LOG2E.value, **sizes)
            return out, lse
        blocks = ceil_div(groups, launch.rows)
        _attend_tiles[(b * splits * h_kv * blocks,)](
            *tensors, *strides, h, groups, blocks, count, span, splits, segment_len, factor * LOG2E.value,
            ROWS=launch.rows, STAGES=launch.num_stages, **sizes,
        )  # fmt: skip
        if splits > 1:
            columns = min(block_v, WEIGHED_COLUMNS)
            _weigh[(b * h, ceil_div(value_width, columns))](
                parts, part_lse, out, lse, splits, b * h,
                V=value_width, BLOCK_V=columns, BLOCK_S=power_of_two(splits), num_warps=4,
            )  # fmt: skip
    return out, lse


@triton.jit
def _seen(position, segment_len, count, RING: tl.constexpr):
    """How many summaries there are, and which one is not seen: of a RING of `count` places, those that were written but
    for the one which the token will overwrite.
    """
    hidden = -1
    if RING:
        written = tl.load(position).to(tl.int32) // segment_len  # wider divisions are slow, and wait for the load
        hidden = written % count
        count = tl.minimum(written, count)
    return count, hidden


@triton.jit
def _load(
    keys, values, keys_n, values_n, column_k, column_v, summary, inside,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Keys and values of a tile of summaries; zeros of those that are not `inside`."""
    place = summary.to(tl.int64)[:, None]
    key = load(keys + place * keys_n + column_k[None, :], inside, column_k < K, True, K == BLOCK_K)
    value = load(values + place * values_n + column_v[None, :], inside, column_v < V, True, V == BLOCK_V)
    return key, value


@QuickLaunch
@triton.jit(do_not_specialize=["h", "count", "segment_len"])
def _attend_once(
    q, k, v, keys, values, position, out, lse,
    q_b, q_h, k_b, k_h, v_b, v_h, keys_b, keys_n, keys_h, values_b, values_n, values_h,
    h, count, segment_len, factor2,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILE_N: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """One head of one sequence, whose summaries are one tile at most.

    Shapes:  out: (b h) v    lse: (b h)
    """
    batch, head = (tl.program_id(0) // h).to(tl.int64), (tl.program_id(0) % h).to(tl.int64)
    column_k, column_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    k_ok, v_ok = column_k < K, column_v < V
    offset = tl.arange(0, TILE_N)
    count, hidden = _seen(position, segment_len, count, RING)

    # The tile is on its way before anything is waited for: ptxas moves no load over a barrier, but would, to save
    # registers, ask for values when scores are known.
    inside = (offset < count) & (offset != hidden)
    key, value = _load(
        keys + batch * keys_b + head * keys_h, values + batch * values_b + head * values_h, keys_n, values_n,
        column_k, column_v, offset, inside, K, V, BLOCK_K, BLOCK_V,
    )  # fmt: skip
    tl.debug_barrier()
    query = tl.load(q + batch * q_b + head * q_h + column_k, mask=k_ok, other=0.0)
    own_key = tl.load(k + batch * k_b + head * k_h + column_k, mask=k_ok, other=0.0)
    own_value = tl.load(v + batch * v_b + head * v_h + column_v, mask=v_ok, other=0.0)

    query = query.to(tl.float32) * factor2
    score = tl.where(inside, tl.sum(key.to(tl.float32) * query[None, :], 1), float("-inf"))
    own_score = tl.sum(query * own_key.to(tl.float32), 0)
    peak = tl.maximum(own_score, tl.max(score, 0))
    own_weight, weight = tl.exp2(own_score - peak), tl.exp2(score - peak)
    total = own_weight + tl.sum(weight, 0)
    mean = (own_weight * own_value.to(tl.float32) + tl.sum(weight[:, None] * value.to(tl.float32), 0)) / total
    place = batch * h + head
    tl.store(out + place * V + column_v, mean.to(out.dtype.element_ty), mask=v_ok)
    tl.store(lse + place, (peak + tl.log2(total)) * LN2)


@QuickLaunch
@triton.jit(do_not_specialize=["h", "groups", "blocks", "count", "span", "splits", "segment_len"])
def _attend_tiles(
    q, k, v, keys, values, position, parts, part_lse,
    q_b, q_h, k_b, k_h, v_b, v_h, keys_b, keys_n, keys_h, values_b, values_n, values_h,
    h, groups, blocks, count, span, splits, segment_len, factor2,
    ROWS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, TILE_N: tl.constexpr, STAGES: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """ROWS query heads of one key head and `span` summaries; the first split takes the token's own term.

    Shapes:  parts: splits (b h) v    part_lse: splits (b h)
    """
    # Key heads lie beside each other in memory: programs beside each other ask for them, at about the same time.
    program, across = tl.program_id(0), h // groups * blocks
    block, split, batch = program % across, program // across % splits, (program // across // splits).to(tl.int64)
    key_head = (block // blocks).to(tl.int64)
    row = block % blocks * ROWS + tl.arange(0, ROWS)
    row_ok = row < groups
    head = key_head * groups + row
    column_k, column_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    k_ok, v_ok = column_k < K, column_v < V
    keys += batch * keys_b + key_head * keys_h
    values += batch * values_b + key_head * values_h
    offset = tl.arange(0, TILE_N)
    count, hidden = _seen(position, segment_len, count, RING)
    if RING:
        span = tl.cdiv(tl.cdiv(count, TILE_N), splits) * TILE_N
    begin = split * span
    to = tl.minimum(begin + span, count)

    query = tl.load(
        q + batch * q_b + head[:, None] * q_h + column_k[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0
    )
    own_key = tl.load(k + batch * k_b + key_head * k_h + column_k, mask=k_ok, other=0.0)
    own_value = tl.load(v + batch * v_b + key_head * v_h + column_v, mask=v_ok, other=0.0)

    own_score = tl.sum(query.to(tl.float32) * own_key.to(tl.float32)[None, :], 1) * factor2
    peak = tl.where(split == 0, own_score, LOWEST)
    total = tl.where(split == 0, 1.0, 0.0) + tl.zeros([ROWS], tl.float32)
    acc = tl.where(split == 0, own_value.to(tl.float32), 0.0)[None, :] + tl.zeros([ROWS, BLOCK_V], tl.float32)
    for here in tl.range(begin, to, TILE_N, num_stages=STAGES):
        inside = (here + offset < to) & (here + offset != hidden)
        key, value = _load(
            keys, values, keys_n, values_n, column_k, column_v, here + offset, inside, K, V, BLOCK_K, BLOCK_V
        )  # fmt: skip
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * factor2
        score = tl.where(inside[None, :], score, float("-inf"))  # [ROWS, TILE_N]
        new_peak = tl.maximum(peak, tl.max(score, 1))
        shrink, weight = tl.exp2(peak - new_peak), tl.exp2(score - new_peak[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak

    place = split.to(tl.int64) * (tl.num_programs(0) // across // splits * h) + batch * h + head
    mean = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        parts + place[:, None] * V + column_v[None, :], mean.to(parts.dtype.element_ty),
        mask=row_ok[:, None] & v_ok[None, :],
    )  # fmt: skip
    tl.store(part_lse + place, (peak + tl.log2(total)) * LN2, mask=row_ok)


@QuickLaunch
@triton.jit(do_not_specialize=["splits", "heads"])
def _weigh(
    parts, part_lse, out, lse, splits, heads, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """The mean of a head's parts, weighed by exp(part_lse): the softmax over all of them, in some columns.

    Shapes:  out: (b h) v    lse: (b h)
    """
    head = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, BLOCK_S), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    place = split.to(tl.int64) * heads + head
    part = load(parts + place[:, None] * V + column[None, :], split < splits, column < V, True, V % BLOCK_V == 0)
    sums = tl.load(part_lse + place, mask=split < splits, other=float("-inf")) * LOG2E
    highest = tl.max(sums, 0)
    weight = tl.exp2(sums - highest)
    whole = tl.sum(weight, 0)
    result = tl.sum(part * weight[:, None], 0) / whole
    tl.store(out + head * V + column, result.to(out.dtype.element_ty), mask=column < V)
    tl.store(lse + head, (highest + tl.log2(whole)) * LN2)
