"""Operators with a state that is linear in the one before: a part is summed up as the map it makes of a state.

    S_after = D S_before + S_own          D: what is left of a state that passes the part,  S_own: what the part adds

Parts exchange (D, S_own) once, each composes the maps before it and computes with the state that comes out: all ranks
at the same time, where handing the state from rank to rank would have them wait in line. D and S_own are a product of
decays and one matrix product for `linear_attention` and `gated_linear_attention`. `selective_scan` and `delta_rule`
are asked for S_own themselves, so that they run twice; the delta rule's D is a matrix, which it makes of the identity.

Shapes:  as each operator says, t being the tokens of the part; cu_seqlens bound the documents of the whole sequence
"""

from __future__ import annotations

import torch
from torch import Tensor, einsum
from torch.nn import functional as F

from subquad.parallel.part import NotSplitError, SequencePart
from subquad.parallel.seam import Seam, local_boundaries
from subquad_kernels.delta_rule.operator import OP as DELTA_RULE
from subquad_kernels.gated_linear_attention.operator import OP as GATED_LINEAR_ATTENTION
from subquad_kernels.linear_attention.operator import OP as LINEAR_ATTENTION
from subquad_kernels.selective_scan.operator import OP as SELECTIVE_SCAN

Outputs = tuple[Tensor, ...]


def linear_attention(
    part: SequencePart,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    diagonal: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    kernel: str,
) -> Outputs:
    """D = exp(sum_t g_t),   S_own = sum_t exp(g_{t+1} + .. ) w_t k_t v_t^T."""
    _whole_sequences(initial_state, cu_seqlens)
    state = part.node(_linear_attention_state)(k, v, log_decay, write_gate, initial_state, cu_seqlens)
    local = part.node(local_boundaries)(cu_seqlens, v)
    return LINEAR_ATTENTION(q, k, v, log_decay, write_gate, diagonal, state, local, scale, kernel)  # type: ignore[no-any-return]


def gated_linear_attention(
    part: SequencePart,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    read: str,
    kernel: str,
) -> Outputs:
    """D = exp(sum_t g_t) for each key,   S_own = sum_t (exp(g_{t+1} + .. ) k_t) v_t^T."""
    _whole_sequences(initial_state, cu_seqlens)
    state = part.node(_gated_linear_attention_state)(k, v, log_decay, initial_state, cu_seqlens)
    local = part.node(local_boundaries)(cu_seqlens, v)
    return GATED_LINEAR_ATTENTION(q, k, v, log_decay, bonus, state, local, scale, read, kernel)  # type: ignore[no-any-return]


def selective_scan(
    part: SequencePart,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    reversed: bool,
    kernel: str,
) -> Outputs:
    """D = exp(A sum_t dt_t) for each state of a channel; S_own is what a scan from zero leaves."""
    if reversed:
        raise NotSplitError("it scans from the last token to the first, and parts hand states forward only")
    _whole_sequences(initial_state, cu_seqlens)
    local = part.node(local_boundaries)(cu_seqlens, x)
    own = SELECTIVE_SCAN(x, dt, A, B, C, None, None, dt_bias, None, local, softplus, reversed, kernel)[1]
    state = part.node(_selective_scan_state)(own, dt, A, dt_bias, softplus, initial_state, cu_seqlens)
    return SELECTIVE_SCAN(x, dt, A, B, C, D, z, dt_bias, state, local, softplus, reversed, kernel)  # type: ignore[no-any-return]


def delta_rule(
    part: SequencePart,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    remove: Tensor | None,
    insert: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    kernel: str,
) -> Outputs:
    """D is what values of zero leave of the identity, n by n; S_own what no state before leaves."""
    _whole_sequences(initial_state, cu_seqlens)
    local = part.node(local_boundaries)(cu_seqlens, v)
    nothing, identity = part.node(_nothing_and_identity)(k, v, local)
    rest = (log_decay, write_gate, remove, insert)
    left = DELTA_RULE(q, k, nothing, *rest, identity, local, scale, kernel)[1]
    own = DELTA_RULE(q, k, v, *rest, None, local, scale, kernel)[1]
    state = part.node(_delta_rule_state)(left, own, initial_state, cu_seqlens, v)
    return DELTA_RULE(q, k, v, *rest, state, local, scale, kernel)  # type: ignore[no-any-return]


def _whole_sequences(initial_state: object, cu_seqlens: object) -> None:
    if initial_state is not None and cu_seqlens is not None:
        raise NotSplitError("its packed documents begin with states of their own")


def _linear_attention_state(
    part: SequencePart,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    b, t, h = v.shape[:3]
    exact = torch.promote_types(v.dtype, torch.float32)
    decay = v.new_zeros(h, dtype=exact) if log_decay is None else log_decay.to(exact)
    rest, total = _decays_to_the_end(decay.expand(b, t, h))
    weight = rest.exp() if write_gate is None else rest.exp() * write_gate.to(exact)
    keys = k.to(exact).repeat_interleave(h // k.shape[2], dim=2) * weight.unsqueeze(-1)
    seam = None if cu_seqlens is None else Seam.of(part, cu_seqlens, t)
    return _arriving(part, total.exp()[..., None, None], _written(keys, v.to(exact), seam), initial_state, seam)


def _gated_linear_attention_state(
    part: SequencePart,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    exact = torch.promote_types(v.dtype, torch.float32)
    rest, total = _decays_to_the_end(log_decay.to(exact))
    seam = None if cu_seqlens is None else Seam.of(part, cu_seqlens, v.shape[1])
    written = _written(k.to(exact) * rest.exp(), v.to(exact), seam)
    return _arriving(part, total.exp().unsqueeze(-1), written, initial_state, seam)


def _selective_scan_state(
    part: SequencePart,
    own: Tensor,
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    step = dt.to(own.dtype) if dt_bias is None else dt.to(own.dtype) + dt_bias.to(own.dtype)
    total = (F.softplus(step) if softplus else step).sum(1)
    decay = (A.to(own.dtype) * total.unsqueeze(-1)).exp()
    seam = None if cu_seqlens is None else Seam.of(part, cu_seqlens, dt.shape[1])
    return _arriving(part, decay, own if seam is None else own.index_select(0, seam.last), initial_state, seam)


def _nothing_and_identity(part: SequencePart, k: Tensor, v: Tensor, local: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values of zero, and states whose rows are the keys.  Shapes:  b t h n, states h n n"""
    b, t, h, _ = v.shape
    n = k.shape[3]
    states = b if local is None else local.shape[0] - 1
    identity = torch.eye(n, dtype=torch.promote_types(v.dtype, torch.float32), device=v.device)
    return v.new_zeros(b, t, h, n), identity.repeat(states, h, 1, 1)


def _delta_rule_state(
    part: SequencePart,
    left: Tensor,
    own: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    v: Tensor,
) -> Tensor:
    seam = None if cu_seqlens is None else Seam.of(part, cu_seqlens, v.shape[1])
    if seam is not None:
        left, own = left.index_select(0, seam.last), own.index_select(0, seam.last)
    return _arriving(part, left, own, initial_state, seam, matrix=True)


def _decays_to_the_end(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The log decay that a token's write meets until the part ends, and that of the whole part.

    Added from the end: a difference of two sums from the beginning would have lost the digits of the last tokens.
    Shapes:  b t ...  ->  b t ...,  b ...
    """
    sums = log_decay.flip(1).cumsum(1).flip(1)
    return torch.cat([sums[:, 1:], torch.zeros_like(sums[:, :1])], dim=1), sums[:, 0]


def _written(keys: Tensor, values: Tensor, seam: Seam | None) -> Tensor:
    """sum_t k_t v_t^T, of the last document when packed; also under autocast in the given type.

    Shapes:  keys: b t h n    values: b t h p  ->  b h n p
    """
    if seam is not None:
        keys = keys.masked_fill(~seam.in_last[:, None, None], 0)
    with torch.autocast(keys.device.type, enabled=False):
        return einsum("bthn,bthp->bhnp", keys, values)


def _arriving(
    part: SequencePart,
    left: Tensor,
    own: Tensor,
    initial_state: Tensor | None,
    seam: Seam | None,
    *,
    matrix: bool = False,
) -> Tensor:
    """The state that enters the part: the maps of those before, one after the other, of the initial state.

    Shapes:  left: broadcasts to own, or b h n n (matrix)    own: states ...  ->  states ...
    """
    if seam is not None:  # nothing passes where a document begins
        left = left.masked_fill(~seam.whole.view(1, *(1 for _ in left.shape[1:])), 0)
    lefts, owns = part.before(left.to(own.dtype), own)
    state = owns[:0].sum(0)  # zeros that hang on the exchange, also in the first part
    if initial_state is not None:
        state = state + initial_state.to(own.dtype)
    with torch.autocast(own.device.type, enabled=False):
        for passed, added in zip(lefts, owns):
            state = (passed @ state if matrix else passed * state) + added
    return state if seam is None else seam.placed(state)
