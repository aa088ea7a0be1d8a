"""Log-linear attention in chunks of 64 tokens, in torch: matrix products alone, log t of them one after the other.

Chunks begin at multiples of their length, so that two tokens of one chunk are on the level of their places in it, and
tokens of two chunks on that of the chunks' numbers, log_2 of the length higher. With ages summed from the log decays:

    within a chunk    Y  = ((Q K^T) o E o Lambda) V,    E_ij = exp(b_i - b_j) w_j, Lambda_ij = lambda_i[bits of i xor j]
    between chunks    a right half of 2^l chunks reads the sum of its left half's writes, and the sums become the
                      left and right halves of the next level
    states handed in  are read by every token, with the scale of the level on which their bucket is for it

Exponents are masked before exp, so that none is positive. Gradients are torch's own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, einsum
from torch.nn import functional as F

from subquad_kernels.boundaries import bounds_of
from subquad_kernels.documents import document_groups
from subquad_kernels.log_linear_attention.declaration import CHUNK, slots
from subquad_kernels.log_linear_attention.definition import set_bits
from subquad_kernels.torch_operator import AutogradKernel

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Outputs

_LEAST = {torch.float32: -128.0, torch.float64: -1024.0}
"""exp of it is 0: a smaller log decay does nothing more, and would take digits from the sums it enters."""


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_scales: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    position: int,
    scale: float,
    *,
    chunk: int = CHUNK,
) -> Outputs:
    """y, final_state. Packed documents of similar length are laid side by side."""
    t, groups = q.shape[1:3]
    exact = torch.promote_types(v.dtype, torch.float32)

    def by_group(tensor: Tensor) -> Tensor:
        """Heads by the queries and keys they share, g groups of r.  Shapes:  .. h ..  ->  .. g r .."""
        grouped: Tensor = tensor.to(exact).unflatten(2, (groups, -1))
        return grouped

    queries, keys = q.to(exact), k.to(exact)
    scales = by_group(level_scales)
    written = by_group(v if write_gate is None else v.to(exact) * write_gate.to(exact)[..., None])
    rates = torch.zeros_like(scales[..., 0]) if log_decay is None else log_decay.to(exact).expand(v.shape[:3])
    rates = rates if log_decay is None else by_group(rates.clamp(min=_LEAST[exact]))
    initial = None if initial_state is None else by_group(initial_state)

    size = slots(position + t)
    if cu_seqlens is None:
        y = _read(queries, keys, written, scales, rates, initial, position, chunk)
        final = _kept(keys, written, rates, initial, position, size)
    else:
        y, finals = torch.zeros_like(written), []
        for group in document_groups(cu_seqlens):
            Q, K, V, L, G = (group.pad(rows) for rows in (queries, keys, written, scales, rates))
            held = None if initial is None else initial[group.documents]
            group.write(y, _read(Q, K, V, L, G, held, position, chunk))
        for document, (start, stop) in enumerate(pairwise(bounds_of(cu_seqlens))):
            K, V, G = (rows[:, start:stop] for rows in (keys, written, rates))
            held = None if initial is None else initial[document : document + 1]
            finals.append(_kept(K, V, G, held, position, size))
        final = torch.cat(finals)
    return (scale * y).flatten(2, 3).to(v.dtype), final.flatten(2, 3)


CHUNKED = AutogradKernel(chunked)


def _read(
    q: Tensor, k: Tensor, v: Tensor, scales: Tensor, rates: Tensor, initial: Tensor | None, position: int, chunk: int
) -> Tensor:
    """What every token reads of the tokens up to it and of the states handed in.

    Shapes:  q, k: b t g n    v: b t g r p    scales: b t g r l    rates: b t g r    ->  b t g r p
    """
    t, last = q.shape[1], scales.shape[-1] - 1
    chunk = min(chunk, 2 ** slots(t - 1))
    front = position % chunk
    count = -(-(front + t) // chunk)

    def lay(rows: Tensor, axes: int) -> Tensor:
        """Chunks of tokens, zeros before the first and after the last.  Shapes:  b t axes ..  ->  b c axes chunk .."""
        padded = _with_zeros(rows, front, count * chunk - front - t)
        laid: Tensor = padded.unflatten(1, (count, chunk)).movedim(2, 2 + axes)
        return laid

    Q, K = lay(q, 1), lay(k, 1)
    V, L, ages = lay(v, 2), lay(scales, 2), lay(rates, 2).cumsum(-1)
    place = torch.arange(chunk, device=q.device)
    below = place[:, None] >= place
    E = (ages[..., :, None] - ages[..., None, :]).masked_fill(~below, -torch.inf).exp()
    levels = bits(place[:, None] ^ place).clamp(max=last)
    weights = einsum("bcgril,ijl->bcgrij", L, F.one_hot(levels, last + 1).to(L.dtype))
    y = ((Q @ K.transpose(-1, -2))[:, :, :, None] * E * weights) @ V

    writes = einsum("bcgjn,bcgrjp->bcgrnp", K, V * (ages[..., -1:] - ages).exp()[..., None])
    y = y + _between(Q, L, ages, writes, position // chunk)
    y = y.movedim(4, 2).flatten(1, 2)[:, front : front + t]
    return y if initial is None or not position else y + _before(q, scales, rates, initial, position)


def _between(Q: Tensor, L: Tensor, ages: Tensor, writes: Tensor, first: int) -> Tensor:
    """What the tokens of each chunk read of earlier chunks; the first of these is number `first`.

    Shapes:  Q: b c g i n    L: b c g r i l    ages: b c g r i    writes: b c g r n p  ->  b c g r i p, i in a chunk
    """
    count, chunk, last = Q.shape[1], Q.shape[3], L.shape[-1] - 1
    # Chunks lie in one block of 2^depth >= count, or in two that follow each other.
    depth = slots(count - 1)
    shift = first % 2**depth
    total = 2**depth if shift + count <= 2**depth else 2 ** (depth + 1)

    def halves(rows: Tensor, half: int) -> Tensor:
        """Shapes:  b c ..  ->  b pairs 2 half .."""
        split: Tensor = rows.unflatten(1, (-1, 2, half))
        return split

    Q, L, ages, sums = (_with_zeros(rows, shift, total - shift - count) for rows in (Q, L, ages, writes))
    y = Q.new_zeros(*ages.shape, writes.shape[-1])
    whole, since = ages[..., -1], ages  # log decays of a block, and of a token from its block's beginning
    for level in range(slots(total - 1)):
        half = 2**level
        left, right = sums.unflatten(1, (-1, 2)).unbind(2)
        left_whole, right_whole = whole.unflatten(1, (-1, 2)).unbind(2)
        # Two blocks that follow each other differ in as many bits as carry over between them.
        distance = level + 1 if level < depth else slots(first ^ (first + count - 1))
        weight = L[..., min(slots(chunk - 1) + distance, last)] * since.exp()
        reads = einsum("bxsgin,bxgrnp->bxsgrip", halves(Q, half)[:, :, 1], left)
        y = _ToRightHalves.apply(y, reads * halves(weight, half)[:, :, 1, ..., None])
        older = F.pad(left_whole[:, :, None], (0, 0, 0, 0, 1, 0))  # a right half's tokens are older by its left half
        since = (halves(since, half) + older[:, :, :, None, ..., None]).flatten(1, 3)
        sums = left * right_whole.exp()[..., None, None] + right
        whole = left_whole + right_whole
    return y[:, shift : shift + count]


class _ToRightHalves(torch.autograd.Function):
    """y with `reads` added to its right halves, in place: half of the tokens read at a level, and a sum with zeros for
    the others would move all of them. Nothing keeps y for its gradient, and that of a slice in place would copy it.

    Shapes:  y: b c ..    reads: b pairs half ..  ->  b c ..
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, reads: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        ctx.half = reads.shape[2]
        _right_halves(y, ctx.half).add_(reads)
        return y

    @staticmethod
    def backward(ctx: Any, pull: Tensor) -> tuple[Tensor, Tensor]:
        return pull, _right_halves(pull, ctx.half)


def _right_halves(rows: Tensor, half: int) -> Tensor:
    """Shapes:  b c ..  ->  b pairs half .."""
    split: Tensor = rows.unflatten(1, (-1, 2, half))
    return split[:, :, 1]


def _with_zeros(rows: Tensor, front: int, behind: int) -> Tensor:
    """Zeros before the first and after the last of axis 1; no copy where there are none."""
    return F.pad(rows, (0, 0) * (rows.dim() - 2) + (front, behind)) if front or behind else rows


def _before(q: Tensor, scales: Tensor, rates: Tensor, initial: Tensor, position: int) -> Tensor:
    """What every token reads of the states handed in.

    A bucket stays on its level until the token's number differs from `position` in a higher bit.
    Shapes:  q: b t g n    initial: b m g r n p  ->  b t g r p
    """
    last, held = scales.shape[-1] - 1, set_bits(position)
    numbers = torch.arange(position, position + q.shape[1], device=q.device)
    slot = torch.tensor(held, device=q.device)
    levels = torch.maximum(slot + 1, bits(numbers ^ position)[:, None]).clamp(max=last)
    weights = einsum("btgrl,tal->btgra", scales, F.one_hot(levels, last + 1).to(scales.dtype))
    weights = weights * rates.cumsum(1).exp()[..., None]
    return einsum("btgra,btgrap->btgrp", weights, einsum("btgn,bagrnp->btgrap", q, initial[:, held]))


def _kept(k: Tensor, v: Tensor, rates: Tensor, initial: Tensor | None, position: int, size: int) -> Tensor:
    """The state after the tokens, in `size` slots.  Shapes:  k: b t g n    v: b t g r p  ->  b size g r n p"""
    end = position + k.shape[1]
    # Summed from the end, where a difference of two sums would have no digits left.
    after = F.pad(rates, (0, 0, 0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
    v = v * after[:, 1:].exp()[..., None]
    states: dict[int, Tensor] = {}
    if initial is not None and position:
        decayed = initial * after[:, :1].exp()[..., None, None]
        lowest = slots(end ^ position) - 1
        for slot in set_bits(position):
            target = max(slot, lowest)
            states[target] = states[target] + decayed[:, slot] if target in states else decayed[:, slot]
    for slot in set_bits(end):
        stop = (end >> slot << slot) - position  # tokens of the call, the first of them 0
        start = max(stop - 2**slot, 0)
        if stop > start:
            state = einsum("btgn,btgrp->bgrnp", k[:, start:stop], v[:, start:stop])
            states[slot] = states[slot] + state if slot in states else state
    empty = v.new_zeros(v.shape[0], *v.shape[2:4], k.shape[-1], v.shape[-1])
    return torch.stack([states.get(slot, empty) for slot in range(size)], dim=1)


def bits(numbers: Tensor) -> Tensor:
    """How many bits each number has: 0 for 0.  Exact: float64 holds integers up to 2^53."""
    return torch.frexp(numbers.double())[1].long()
