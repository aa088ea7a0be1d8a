"""The log-linear delta rule in chunks of 64 tokens, in torch: log t matrix products one after the other.

Chunks begin at multiples of their length (see log_linear_attention/chunked.py). Inside one, with b the sum of log
decays from its first token, the delta rule is a unit lower triangular system in what tokens write (see
delta_rule/README.md),

    A_ij = beta_i (k_i . k_j) exp(b_i - b_j), j < i        P = (Q K^T o exp(b_i - b_j), j <= i) (I + A)^-1 diag(beta)

so that P_ij is q_i^T M_i .. M_{j+1} beta_j k_j: what the definition weighs. Hence

    within a chunk    Y = (P o Lambda) V,   Lambda_ij = lambda_i[bits of i xor j]
    what entered it   is read with the queries    Q' = exp(b) Q - P (exp(b) K),    q'_i = (M_i .. M_0)^T q_i
    after it          a state S has become  Phi S + R V,   R = (exp(b_c - b) K)^T (I + A)^-1 diag(beta),
                      Phi = exp(b_c) I - R (exp(b) K)
    between chunks    a right half of 2^l chunks reads its left half's R V, with Q' that go through the left half's Phi
                      at the next level; halves become the left and right halves of the next level

Exponents are masked before exp, so that none is positive; sums of log decays are fp64. Gradients are torch's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, einsum
from torch.nn import functional as F

from subquad_kernels.documents import document_groups
from subquad_kernels.log_linear_attention.chunked import bits
from subquad_kernels.log_linear_attention.declaration import CHUNK, slots
from subquad_kernels.log_linear_attention.definition import set_bits
from subquad_kernels.torch_operator import AutogradKernel

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Outputs

_LEAST = -1024.0
"""exp of it is 0 in any type: a smaller log decay does nothing more, and would take digits from the sums it enters."""


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
    exact = torch.promote_types(v.dtype, torch.float32)
    b, t, h, p = v.shape
    rates = v.new_zeros(b, t, h) if log_decay is None else log_decay.clamp(min=_LEAST).expand(b, t, h)
    queries, keys = (part.to(exact).repeat_interleave(h // part.shape[2], dim=2) for part in (q, k))
    tokens = _Tokens(
        queries,
        keys,
        v.to(exact),
        level_scales.to(exact),
        rates.double(),
        v.new_ones(b, t, h, dtype=exact) if write_gate is None else write_gate.to(exact),
    )
    initial = initial_state.to(exact) if initial_state is not None and position else None
    if cu_seqlens is None:
        y, tree = _mix(tokens, initial, position, chunk)
        final = _kept(tree, initial, position, t, slots(position + t))
    else:
        documents, size = cu_seqlens.shape[0] - 1, slots(position + t)
        y = tokens.v.new_zeros(b, t, h, p)
        finals = {}
        for group in document_groups(cu_seqlens):
            held = None if initial is None else initial[group.documents]
            padded, tree = _mix(_Tokens(*(group.pad(rows) for rows in tokens)), held, position, chunk)
            group.write(y, padded)
            for row, (document, length) in enumerate(zip(group.numbers, group.lengths)):
                before = None if held is None else held[row : row + 1]
                finals[document] = _kept(tree.of(row), before, position, length, size)
        for document in set(range(documents)) - finals.keys():  # empty ones
            own = {} if initial is None else {slot: initial[document, None, slot] for slot in set_bits(position)}
            finals[document] = _in_slots(own, size, y.new_zeros(1, h, q.shape[3], p))
        final = torch.cat([finals[document] for document in range(documents)])
    return (scale * y).to(v.dtype), final


CHUNKED = AutogradKernel(chunked)


class _Tokens(NamedTuple):
    """Some tokens of parallel sequences; one that is all zeros neither forgets nor writes.

    Shapes:  q, k: b t h n    v: b t h p    scales: b t h l    rates (fp64), beta: b t h
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scales: Tensor
    rates: Tensor
    beta: Tensor


class _Tree(NamedTuple):
    """What chunks write and do, and blocks of 2, 4, .. chunks of these, from `start` of the sequence's numbers on.

    Shapes:  writers (R): b c h n i    values: b c h i p    sums, acts (Phi), a list of levels: b blocks h n p, .. n n
    """

    start: int
    writers: Tensor
    values: Tensor
    sums: list[Tensor]
    acts: list[Tensor]

    def of(self, row: int) -> _Tree:
        """That of one sequence."""
        one = slice(row, row + 1)
        sums, acts = ([part[one] for part in parts] for parts in (self.sums, self.acts))
        return _Tree(self.start, self.writers[one], self.values[one], sums, acts)


def _mix(tokens: _Tokens, initial: Tensor | None, position: int, chunk: int) -> tuple[Tensor, _Tree]:
    """What every token reads, and what the tokens leave behind.  Shapes:  initial: b m h n p  ->  b t h p"""
    t, last = tokens.q.shape[1], tokens.scales.shape[-1] - 1
    chunk = min(chunk, 2 ** slots(t - 1))
    # Chunks lie in one block of 2^depth >= count, or in two that follow each other.
    first = position // chunk
    count = (position + t - 1) // chunk - first + 1
    depth = slots(count - 1)
    shift = first % 2**depth
    total = 2**depth if shift + count <= 2**depth else 2 ** (depth + 1)
    front = shift * chunk + position % chunk

    def lay(rows: Tensor) -> Tensor:
        """All chunks of the blocks, zeros where there is no token.  Shapes:  b t h ..  ->  b c h chunk .."""
        padded = F.pad(rows, (0, 0) * (rows.dim() - 2) + (front, total * chunk - front - t))
        laid: Tensor = padded.unflatten(1, (total, chunk)).transpose(2, 3)
        return laid

    Q, K, V, L, rates, beta = (lay(rows) for rows in tokens)
    ages = rates.cumsum(-1)
    place = torch.arange(chunk, device=Q.device)
    above = place[:, None] < place
    E = (ages[..., :, None] - ages[..., None, :]).masked_fill(above, -torch.inf).exp().to(Q.dtype)
    since, rest = ages.exp().to(Q.dtype), (ages[..., -1:] - ages).exp().to(Q.dtype)

    known = beta[..., None] * (K @ K.mT) * E  # the solver takes its diagonal for ones
    asked = torch.cat([(Q @ K.mT) * E, (rest[..., None] * K).mT], dim=-2)
    solved = torch.linalg.solve_triangular(known, asked, upper=False, left=False, unitriangular=True)
    P, writers = (solved * beta[..., None, :]).split([chunk, K.shape[-1]], dim=-2)
    aged = since[..., None] * K
    queries = since[..., None] * Q - P @ aged
    acts = since[..., -1, None, None] * torch.eye(K.shape[-1], dtype=K.dtype, device=K.device) - writers @ aged

    within = bits(place[:, None] ^ place).clamp(max=last)
    weights = einsum("bchil,ijl->bchij", L, F.one_hot(within, last + 1).to(L.dtype))
    y = (P * weights) @ V
    tree = _Tree((first - shift) * chunk, writers, V, [writers @ V], [acts])
    for level in range(slots(total - 1)):
        left, right = tree.sums[-1].unflatten(1, (-1, 2)).unbind(2)
        left_act, right_act = tree.acts[-1].unflatten(1, (-1, 2)).unbind(2)
        # Two blocks that follow each other differ in as many bits as carry over between them.
        distance = level + 1 if level < depth else slots(first ^ (first + count - 1))
        weight = L[..., min(slots(chunk - 1) + distance, last)]
        halves = (-1, 2, 2**level)
        before, reading = queries.unflatten(1, halves).unbind(2)
        reads = einsum("bxshin,bxhnp->bxship", reading, left) * weight.unflatten(1, halves)[:, :, 1, ..., None]
        y = y + torch.stack([torch.zeros_like(reads), reads], dim=2).flatten(1, 3)
        queries = torch.stack([before, einsum("bxshin,bxhnm->bxshim", reading, left_act)], dim=2).flatten(1, 3)
        tree.sums.append(right_act @ left + right)
        tree.acts.append(right_act @ left_act)

    def real(rows: Tensor) -> Tensor:
        """The call's own tokens.  Shapes:  b c h chunk ..  ->  b t h .."""
        return rows.transpose(2, 3).flatten(1, 2)[:, front : front + t]

    y = real(y)
    return y if initial is None else y + _before(real(queries), tokens.scales, initial, position), tree


def _before(queries: Tensor, scales: Tensor, initial: Tensor, position: int) -> Tensor:
    """What every token reads of the states handed in.

    A bucket stays on its level until the token's number differs from `position` in a higher bit.
    Shapes:  queries (gone through all tokens of the call before): b t h n    initial: b m h n p  ->  b t h p
    """
    last, held = scales.shape[-1] - 1, set_bits(position)
    numbers = torch.arange(position, position + queries.shape[1], device=queries.device)
    slot = torch.tensor(held, device=queries.device)
    levels = torch.maximum(slot + 1, bits(numbers ^ position)[:, None]).clamp(max=last)
    weights = einsum("bthl,tal->btha", scales, F.one_hot(levels, last + 1).to(scales.dtype))
    return einsum("btha,bthap->bthp", weights, einsum("bthn,bahnp->bthap", queries, initial[:, held]))


def _kept(tree: _Tree, initial: Tensor | None, position: int, length: int, size: int) -> Tensor:
    """The state `length` tokens after `position`, in `size` slots.  Shapes:  initial: b m h n p  ->  b size h n p

    Buckets are tokens of the last chunk, or blocks of chunks; from the end on, each goes through those behind it.
    """
    end = position + length
    chunk, n = tree.values.shape[3], tree.writers.shape[3]
    states: dict[int, Tensor] = {}
    act = torch.eye(n, dtype=tree.values.dtype, device=tree.values.device)  # of all tokens behind a bucket
    for slot in set_bits(end):
        edge = end >> slot << slot  # behind the bucket's last token
        if 2**slot < chunk:
            # What a chunk's tokens write has gone through the chunk's later ones, and padding does nothing.
            number, part = (end - tree.start) // chunk, slice(edge % chunk - 2**slot, edge % chunk)
            states[slot] = tree.writers[:, number, :, :, part] @ tree.values[:, number, :, part]
            act = tree.acts[0][:, number]
        elif edge > tree.start:
            stop = (edge - tree.start) // chunk
            level = min(slot - slots(chunk - 1), slots(stop) - 1)  # less than the bucket: it began before the call
            block = stop // 2**level - 1
            states[slot] = act @ tree.sums[level][:, block]
            act = act @ tree.acts[level][:, block]
    if initial is not None:
        lowest = slots(end ^ position) - 1  # what was below has become one with the call's own tokens
        for slot in set_bits(position):
            target = max(slot, lowest)
            aged = act @ initial[:, slot]
            states[target] = states[target] + aged if target in states else aged
    empty = tree.values.new_zeros(tree.values.shape[0], tree.values.shape[2], n, tree.values.shape[4])
    return _in_slots(states, size, empty)


def _in_slots(states: dict[int, Tensor], size: int, empty: Tensor) -> Tensor:
    """Shapes:  states, empty: b h n p  ->  b size h n p"""
    return torch.stack([states.get(slot, empty) for slot in range(size)], dim=1)
