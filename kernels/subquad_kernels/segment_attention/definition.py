"""Segment attention in plain torch: the definition every kernel is held against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, einsum

from subquad_kernels.documents import check_cu_seqlens, document_ids, document_positions
from subquad_kernels.samples import draw_boundaries, draw_outliers
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.workload import Workload

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_k: Tensor | None,
    summary_v: Tensor | None,
    cu_seqlens: Tensor | None,
    segment_len: int,
    start: int,
    scale: float | None,
) -> Outputs:
    """o_g = sum of softmax( scale q_g . k_i ) v_i over i in { g } and the summaries strictly before g.

    Shapes:  q: b t h k    k: b t h_kv k    v: b t h_kv v    summary_k, summary_v: b m h_kv k | v
             ->  out: b t h v    lse: b h t
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    t, groups = q.shape[1], q.shape[2] // k.shape[2]
    summaries = start // segment_len
    if summary_k is not None and summary_v is not None:
        k, v = torch.cat([summary_k, k], dim=1), torch.cat([summary_v, v], dim=1)
    keys, values = k.to(exact).repeat_interleave(groups, dim=2), v.to(exact).repeat_interleave(groups, dim=2)
    scores = einsum("bthk,bshk->bhts", q.to(exact), keys) * scale_of(q, scale)

    query = torch.arange(t, device=q.device) + start
    is_self = query[:, None] == query[None, :]
    before = query[None, :] < query[:, None]
    if cu_seqlens is None:
        is_summary = (query + 1) % segment_len == 0
    else:
        is_summary = (document_positions(cu_seqlens, t) + 1) % segment_len == 0
        document = document_ids(cu_seqlens, t)
        before = before & (document[:, None] == document[None, :])
    seen = is_self | (before & is_summary[None, :])
    # The summaries handed in stand before every token of the call.
    seen = torch.cat([seen.new_ones(t, summaries), seen], dim=1)
    scores = scores.masked_fill(~seen, float("-inf"))
    out = einsum("bhts,bshv->bthv", scores.softmax(dim=-1), values)
    return out.to(q.dtype), scores.logsumexp(dim=-1)


REFERENCE = AutogradKernel(reference)


def scale_of(q: Tensor, scale: float | None) -> float:
    """The factor on the scores; k^-0.5 when none is given."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def check(arguments: Arguments) -> None:
    """Raise ValueError when shapes or options do not fit."""
    values: Any = arguments
    q, k, v = values["q"], values["k"], values["v"]
    summary_k, summary_v, cu_seqlens = values["summary_k"], values["summary_v"], values["cu_seqlens"]
    segment_len, start = values["segment_len"], values["start"]
    if segment_len < 1:
        raise ValueError(f"segment_len is {segment_len}, not 1 or more")
    if start < 0:
        raise ValueError(f"start is {start}, not 0 or more")
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} axes, not 4: b t h k, b t h_kv k, b t h_kv v")
    b, t, h, width = q.shape
    h_kv = k.shape[2]
    if k.shape[:2] != (b, t) or k.shape[3] != width or v.shape[:3] != k.shape[:3] or t == 0:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if h_kv == 0 or h % h_kv:
        raise ValueError(f"{h} query heads are not a multiple of {h_kv} key heads")
    check_cu_seqlens(cu_seqlens, b)
    if cu_seqlens is not None and start != 0:
        raise ValueError(f"a packed sequence starts at 0, not {start}")
    summaries = start // segment_len
    if (summary_k is None) != (summary_v is None):
        raise ValueError("summary_k and summary_v are given together or not at all")
    found = 0 if summary_k is None else summary_k.shape[1]
    if found != summaries:
        raise ValueError(f"{found} summaries are given for {start} earlier tokens: {summaries} are needed")
    if summary_k is not None and (
        summary_k.shape != (b, summaries, h_kv, width) or summary_v.shape != (b, summaries, h_kv, v.shape[3])
    ):
        raise ValueError(
            f"shapes do not fit: summary_k {tuple(summary_k.shape)}, summary_v {tuple(summary_v.shape)},"
            f" k {tuple(k.shape)}, v {tuple(v.shape)}"
        )


def empty_outputs(arguments: Arguments) -> Outputs:
    """out: b t h v, lse: b h t."""
    q, v = arguments["q"], arguments["v"]
    assert isinstance(q, Tensor) and isinstance(v, Tensor)
    b, t, h, _ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(b, t, h, v.shape[3]), q.new_empty(b, h, t, dtype=exact)


def batch_and_length(arguments: Arguments) -> tuple[int, int]:
    """b and t of the queries."""
    q = arguments["q"]
    assert isinstance(q, Tensor)
    return q.shape[0], q.shape[1]


def workload_of(arguments: Arguments, phase: str) -> Workload:
    """The call's workload."""
    values: Any = arguments
    q, k, v = values["q"], values["k"], values["v"]
    summary_k, cu_seqlens = values["summary_k"], values["cu_seqlens"]
    shape = dict(
        b=int(q.shape[0]), t=int(q.shape[1]), h=int(q.shape[2]), h_kv=int(k.shape[2]), k=int(q.shape[3]),
        v=int(v.shape[3]), m=0 if summary_k is None else int(summary_k.shape[1]),
    )  # fmt: skip
    if cu_seqlens is not None:
        shape["documents"] = int(cu_seqlens.shape[0]) - 1
    dtype: Any = str(q.dtype).removeprefix("torch.")
    options = {"segment_len": int(values["segment_len"])}
    return Workload(operator="segment_attention", shape=shape, dtype=dtype, phase=phase, options=options)  # type: ignore[arg-type]


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
    """Scores of a few units, as trained models have them, and one query in eight whose are of tens.

    The call starts in mid-segment when it has a past.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = workload.shape
    b, t, h, h_kv, k, v, m = (shape[axis] for axis in ("b", "t", "h", "h_kv", "k", "v", "m"))
    dtype = getattr(torch, workload.dtype)
    segment_len = int(workload.options["segment_len"])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    return {
        "q": draw_outliers(1.5 * draw(b, t, h, k), generator),
        "k": draw(b, t, h_kv, k),
        "v": draw(b, t, h_kv, v),
        "summary_k": draw(b, m, h_kv, k) if m else None,
        "summary_v": draw(b, m, h_kv, v) if m else None,
        "cu_seqlens": draw_boundaries(shape, seed, device),
        "segment_len": segment_len,
        "start": m * segment_len + (segment_len // 2 if m else 0),
        "scale": None,
    }
