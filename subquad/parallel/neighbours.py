"""Operators that look at earlier tokens themselves: a halo of inputs, keys and values, or segment summaries.

Shapes:  as each operator says, t being the tokens of the part; cu_seqlens bound the documents of the whole sequence
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from subquad.errors import ConfigError
from subquad.parallel.part import NotSplitError, SequencePart
from subquad.parallel.seam import Seam, local_boundaries
from subquad_kernels.causal_conv.operator import OP as CAUSAL_CONV
from subquad_kernels.documents import document_positions
from subquad_kernels.rotary.definition import position_angles
from subquad_kernels.rotary.operator import OP as ROTARY
from subquad_kernels.segment_attention.operator import OP as SEGMENT_ATTENTION
from subquad_kernels.softmax_attention.operator import OP as SOFTMAX_ATTENTION

Outputs = tuple[Tensor, ...]


def causal_conv(
    part: SequencePart,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    kernel: str,
) -> Outputs:
    """The last w - 1 inputs of the part before are its initial state."""
    if initial_state is not None and cu_seqlens is not None:
        raise NotSplitError("its packed documents begin with states of their own")
    halo = part.node(_inputs_before)(x, weight, initial_state, cu_seqlens)
    return CAUSAL_CONV(x, weight, bias, halo, part.node(local_boundaries)(cu_seqlens, x), activation, kernel)  # type: ignore[no-any-return]


def rotary(
    part: SequencePart,
    q: Tensor,
    k: Tensor,
    angles: Tensor | None,
    cu_seqlens: Tensor | None,
    position: Tensor | None,
    start: int,
    theta: float,
    kernel: str,
) -> Outputs:
    """Positions go on; when packed, in plain torch: the operator knows no document that began before its call.

    Angles that are given are the tokens' own.
    """
    if angles is not None:
        return ROTARY(q, k, angles, cu_seqlens, position, start, theta, kernel)  # type: ignore[no-any-return]
    if cu_seqlens is not None:
        return part.node(_rotated)(q, k, cu_seqlens, theta)  # type: ignore[no-any-return]
    return ROTARY(q, k, None, None, position, part.node(_first_position)(q) + start, theta, kernel)  # type: ignore[no-any-return]


def softmax_attention(
    part: SequencePart,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int,
    scale: float | None,
    kernel: str,
) -> Outputs:
    """All keys and values before, or those within the window, stand before its own."""
    if not causal:
        raise NotSplitError("its tokens see later ones, which other ranks hold")
    reach = window - 1 if window else None
    if cu_seqlens is None:
        k, v = part.node(_with_keys_before)(k, v, reach)
        return SOFTMAX_ATTENTION(q, k, v, None, causal, window, scale, kernel)  # type: ignore[no-any-return]
    padded, k, v, bounds = part.node(_packed_with_keys_before)(q, k, v, cu_seqlens, reach)
    outputs = SOFTMAX_ATTENTION(padded, k, v, bounds, causal, window, scale, kernel)
    return part.node(_own_tokens)(outputs, q)  # type: ignore[no-any-return]


def segment_attention(
    part: SequencePart,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_k: Tensor | None,
    summary_v: Tensor | None,
    cu_seqlens: Tensor | None,
    segment_len: int,
    start: int,
    scale: float | None,
    kernel: str,
) -> Outputs:
    """The last token of every segment before is handed in as a summary; when packed, all keys and values before.

    Segments restart with each packed document, so that parts hold different numbers of summaries there.
    """
    if summary_k is not None or not isinstance(start, int) or start:
        raise NotSplitError("it is given summaries of its own")
    if cu_seqlens is None:
        summary_k, summary_v = part.node(_summaries_before)(k, v, segment_len)
        start = part.node(_first_position)(q)
        return SEGMENT_ATTENTION(q, k, v, summary_k, summary_v, None, segment_len, start, scale, kernel)  # type: ignore[no-any-return]
    padded, k, v, bounds = part.node(_packed_with_keys_before)(q, k, v, cu_seqlens, None)
    outputs = SEGMENT_ATTENTION(padded, k, v, None, None, bounds, segment_len, 0, scale, kernel)
    return part.node(_own_tokens)(outputs, q)  # type: ignore[no-any-return]


def _inputs_before(
    part: SequencePart, x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    t, reach = x.shape[1], weight.shape[1] - 1
    if t < reach:
        raise ConfigError(
            what=f"each of {part.count} ranks holds {t} tokens of a sequence, and a convolution looks {reach} back",
            where="trainer.context_parallel",
            mend=f"use trainer.seq_len={part.count * reach} or more, or fewer ranks",
        )
    (halos,) = part.before(x[:, t - reach :])
    halo = halos[-1:].sum(0)  # of the first part zeros, which hang on the exchange
    if cu_seqlens is None:
        return halo if initial_state is None or part.index else halo + initial_state.to(x.dtype)
    seam = Seam.of(part, cu_seqlens, t)
    positions = torch.arange(part.index * t - reach, part.index * t, device=x.device)
    return seam.placed(halo.masked_fill((positions < cu_seqlens.take(seam.first))[:, None], 0))


def _first_position(part: SequencePart, q: Tensor) -> int:
    return part.index * q.shape[1]


def _rotated(part: SequencePart, q: Tensor, k: Tensor, cu_seqlens: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    t = q.shape[1]
    positions = document_positions(cu_seqlens, part.count * t)[part.index * t : (part.index + 1) * t]
    exact = torch.promote_types(q.dtype, torch.float32)
    turn = position_angles(positions, q.shape[3], theta)[:, None]
    cos, sin = turn.cos().to(exact), turn.sin().to(exact)

    def rotated(x: Tensor) -> Tensor:
        a, b = x.to(exact).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)

    return rotated(q), rotated(k)


def _with_keys_before(part: SequencePart, k: Tensor, v: Tensor, reach: int | None) -> tuple[Tensor, Tensor]:
    """Keys and values of the last `reach` tokens before the part, or of all, and then its own.

    Shapes:  k: b t h_kv k    v: b t h_kv v  ->  b s h_kv k | v
    """
    t = k.shape[1]
    kept = t if reach is None else min(t, reach)
    stacks = part.before(k[:, t - kept :], v[:, t - kept :])
    if kept < t:
        stacks = tuple(stack[-1:] for stack in stacks)
    earlier = (stack.transpose(0, 1).flatten(1, 2) for stack in stacks)
    length = part.index * t if reach is None else min(reach, part.index * t)
    keys, values = (tokens[:, tokens.shape[1] - length :] for tokens in earlier)
    return torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)


def _packed_with_keys_before(
    part: SequencePart, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, reach: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for a packed sequence, which must have a query for each key: those before the part are zeros.

    Shapes:  ->  q, k, v: 1 s h k | h_kv k | h_kv v    boundaries: documents + 1, of these s tokens
    """
    t = q.shape[1]
    k, v = _with_keys_before(part, k, v, reach)
    s = k.shape[1]
    start = (part.index + 1) * t - s
    return F.pad(q, (0, 0, 0, 0, s - t, 0)), k, v, (cu_seqlens - start).clamp(0, s)


def _own_tokens(part: SequencePart, outputs: Outputs, q: Tensor) -> Outputs:
    out, *rest = outputs
    return out[:, out.shape[1] - q.shape[1] :], *rest


def _summaries_before(part: SequencePart, k: Tensor, v: Tensor, segment_len: int) -> tuple[Tensor, Tensor]:
    """Keys and values of every segment's last token before the part.  Shapes:  b t h_kv k | v  ->  b m h_kv k | v"""
    if k.shape[1] % segment_len:
        raise ConfigError(
            what=f"each of {part.count} ranks holds {k.shape[1]} tokens of a sequence,"
            f" no multiple of segments of {segment_len}",
            where="trainer.context_parallel",
            mend=f"use a trainer.seq_len that is a multiple of {part.count * segment_len}",
        )
    keys, values = part.before(k[:, segment_len - 1 :: segment_len], v[:, segment_len - 1 :: segment_len])
    return keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)
