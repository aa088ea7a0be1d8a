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
from typing import TYPE_CHECKING

import torch
from torch import Tensor, einsum
from torch.nn import functional as F

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
    b, t, h, _ = v.shape
    exact = torch.promote_types(v.dtype, torch.float32)
    queries, keys = (rows.to(exact).repeat_interleave(h // q.shape[2], dim=2) for rows in (q, k))
    values, scales = v.to(exact), level_scales.to(exact)
    written = keys if write_gate is None else keys * write_gate.to(exact)[..., None]
    rates = values.new_zeros(1) if log_decay is None else log_decay.to(exact)
    rates = rates.clamp(min=_LEAST[exact]).expand(b, t, h)
    initial = None if initial_state is None else initial_state.to(exact)

    size = slots(position + t)
    if cu_seqlens is None:
        y = _read(queries, written, values, scales, rates, initial, position, chunk)
        return (scale * y).to(v.dtype), _kept(written, values, rates, initial, position, size)
    y, final = torch.zeros_like(values), []
    for group in document_groups(cu_seqlens):
        Q, K, V, L, G = (group.pad(rows) for rows in (queries, written, values, scales, rates))
        held = None if initial is None else initial[group.documents]
        group.write(y, _read(Q, K, V, L, G, held, position, chunk))
    for document, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        K, V, G = (rows[:, start:stop] for rows in (written, values, rates))
        held = None if initial is None else initial[document : document + 1]
        final.append(_kept(K, V, G, held, position, size))
    return (scale * y).to(v.dtype), torch.cat(final)


CHUNKED = AutogradKernel(chunked)


def _read(
    q: Tensor, k: Tensor, v: Tensor, scales: Tensor, rates: Tensor, initial: Tensor | None, position: int, chunk: int
) -> Tensor:
    """What every token reads of the tokens up to it and of the states handed in.  Shapes:  q: b t h n  ->  b t h p"""
    t, last = q.shape[1], scales.shape[-1] - 1
    chunk = min(chunk, 2 ** slots(t - 1))
    front = position % chunk
    count = -(-(front + t) // chunk)

    def lay(rows: Tensor) -> Tensor:
        """Chunks of tokens, zeros before the first and after the last.  Shapes:  b t h ...  ->  b c h chunk ..."""
        padded = F.pad(rows, (0, 0) * (rows.dim() - 2) + (front, count * chunk - front - t))
        laid: Tensor = padded.unflatten(1, (count, chunk))
        return laid.transpose(2, 3)

    Q, K, V, L = (lay(rows) for rows in (q, k, v, scales))
    ages = lay(rates).cumsum(-1)
    place = torch.arange(chunk, device=q.device)
    below = place[:, None] >= place
    E = (ages[..., :, None] - ages[..., None, :]).masked_fill(~below, -torch.inf).exp()
    levels = _bits(place[:, None] ^ place).clamp(max=last)
    weights = einsum("bchil,ijl->bchij", L, F.one_hot(levels, last + 1).to(L.dtype))
    y = ((Q @ K.transpose(-1, -2)) * E * weights) @ V

    writes = (K * (ages[..., -1:] - ages).exp()[..., None]).transpose(-1, -2) @ V
    y = y + _between(Q, L, ages, writes, position // chunk, chunk)
    y = y.transpose(2, 3).flatten(1, 2)[:, front : front + t]
    return y if initial is None or not position else y + _before(q, scales, rates, initial, position)


def _between(Q: Tensor, L: Tensor, ages: Tensor, writes: Tensor, first: int, chunk: int) -> Tensor:
    """What the tokens of each chunk read of earlier chunks; the first of these is number `first`.

    Shapes:  Q: b c h chunk n    L: b c h chunk l    ages: b c h chunk    writes: b c h n p  ->  b c h chunk p
    """
    count, last = Q.shape[1], L.shape[-1] - 1
    y = Q.new_zeros(*Q.shape[:-1], writes.shape[-1])
    # Chunks lie in one block of 2^depth >= count, or in two that follow each other.
    depth = slots(count - 1)
    shift = first % 2**depth
    total = 2**depth if shift + count <= 2**depth else 2 ** (depth + 1)

    def align(rows: Tensor) -> Tensor:
        return F.pad(rows, (0, 0) * (rows.dim() - 2) + (shift, total - shift - count))

    Q, L, ages = align(Q), align(L), align(ages)
    sums, whole = align(writes), ages[..., -1]
    y = align(y)
    since = ages  # the age of a token from the beginning of its block
    for level in range(slots(total - 1)):
        half = 2**level
        left, right = sums.unflatten(1, (-1, 2)).unbind(2)
        left_whole, right_whole = whole.unflatten(1, (-1, 2)).unbind(2)
        reads = einsum("bxshin,bxhnp->bxship", Q.unflatten(1, (-1, 2, half))[:, :, 1], left)
        # Two blocks that follow each other differ in as many bits as carry over between them.
        distance = level + 1 if level < depth else slots(first ^ (first + count - 1))
        number = min(slots(chunk - 1) + distance, last)
        weight = L[..., number] * since.exp()
        reads = reads * weight.unflatten(1, (-1, 2, half))[:, :, 1][..., None]
        y = y + F.pad(reads[:, :, None], (0, 0) * (reads.dim() - 2) + (1, 0)).flatten(1, 3)
        older = F.pad(left_whole[:, :, None], (0, 0, 1, 0))  # a right half's tokens are older by its left half
        since = (since.unflatten(1, (-1, 2, half)) + older[:, :, :, None, :, None]).flatten(1, 3)
        sums = left * right_whole.exp()[..., None, None] + right
        whole = left_whole + right_whole
    return y[:, shift : shift + count]


def _before(q: Tensor, scales: Tensor, rates: Tensor, initial: Tensor, position: int) -> Tensor:
    """What every token reads of the states handed in.  Shapes:  q: b t h n    initial: b m h n p  ->  b t h p

    A bucket stays on its level until the token's number differs from `position` in a higher bit.
    """
    last, held = scales.shape[-1] - 1, set_bits(position)
    numbers = torch.arange(position, position + q.shape[1], device=q.device)
    slot = torch.tensor(held, device=q.device)
    levels = torch.maximum(slot + 1, _bits(numbers ^ position)[:, None]).clamp(max=last)
    weights = einsum("bthl,tal->btha", scales, F.one_hot(levels, last + 1).to(scales.dtype))
    weights = weights * rates.cumsum(1).exp()[..., None]
    return einsum("btha,bthap->bthp", weights, einsum("bthn,bahnp->bthap", q, initial[:, held]))


def _kept(k: Tensor, v: Tensor, rates: Tensor, initial: Tensor | None, position: int, size: int) -> Tensor:
    """The state after the tokens, in `size` slots.  Shapes:  k: b t h n    v: b t h p  ->  b size h n p"""
    t = k.shape[1]
    end = position + t
    # Summed from the end, where a difference of two sums would have no digits left.
    after = F.pad(rates, (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
    k = k * after[:, 1:].exp()[..., None]
    old: dict[int, Tensor] = {}
    if initial is not None and position:
        decayed = initial * after[:, 0].exp()[:, None, :, None, None]
        lowest = slots(end ^ position) - 1
        for slot in set_bits(position):
            target = max(slot, lowest)
            old[target] = old[target] + decayed[:, slot] if target in old else decayed[:, slot]
    states = []
    for slot in range(size):
        stop = (end >> slot << slot) - position  # tokens of the call, the first of them 0
        start = max(stop - 2**slot, 0)
        filled = end >> slot & 1 and stop > start
        state = (
            einsum("bthn,bthp->bhnp", k[:, start:stop], v[:, start:stop])
            if filled
            else k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1])
        )
        states.append(state + old[slot] if slot in old else state)
    return torch.stack(states, dim=1)


def _bits(numbers: Tensor) -> Tensor:
    """How many bits each number has: 0 for 0.  Exact: float64 holds integers up to 2^53."""
    return torch.frexp(numbers.double())[1].long()
