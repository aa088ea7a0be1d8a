"""Softmax attention in plain torch: the definition every kernel is held against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, einsum

from subquad_kernels.documents import check_cu_seqlens, document_ids
from subquad_kernels.samples import draw_boundaries, draw_outliers
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.workload import Workload

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs


def visible(t: int, s: int, cu_seqlens: Tensor | None, causal: bool, window: int, device: torch.device) -> Tensor:
    """Which key each query may see.  Shape: t s (bool)"""
    query = torch.arange(s - t, s, device=device)[:, None]
    key = torch.arange(s, device=device)[None, :]
    seen = torch.ones(t, s, dtype=torch.bool, device=device)
    if causal:
        seen = key <= query
    if window:
        seen = seen & ((query - key).abs() < window)
    if cu_seqlens is not None:
        document = document_ids(cu_seqlens, s)
        seen = seen & (document[:, None] == document[None, :])
    return seen


def close(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors whose features lie one behind the other, which torch's own operators take for granted; copied if need be.

    Called by their names, they read what lies between or raise, where torch's public function would copy; so does
    FlexAttention, compiled on CUDA (torch 2.11).
    """
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int,
    scale: float | None,
) -> Outputs:
    """o_i = sum_j softmax_j( scale q_i . k_j ) v_j over the visible keys j.

    Shapes:  q: b t h k    k: b s h_kv k    v: b s h_kv v  ->  out: b t h v    lse: b h t
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k.shape[2]
    keys, values = k.to(exact).repeat_interleave(groups, dim=2), v.to(exact).repeat_interleave(groups, dim=2)
    scores = einsum("bthk,bshk->bhts", q.to(exact), keys) * scale_of(q, scale)
    seen = visible(q.shape[1], k.shape[1], cu_seqlens, causal, window, q.device)
    scores = scores.masked_fill(~seen, float("-inf"))
    out = einsum("bhts,bshv->bthv", scores.softmax(dim=-1), values)
    return out.to(q.dtype), scores.logsumexp(dim=-1)


REFERENCE = AutogradKernel(reference)


def scale_of(q: Tensor, scale: float | None) -> float:
    """The factor on the scores; k^-0.5 when none is given."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def check(arguments: Arguments) -> None:
    """Raise ValueError when shapes or options do not fit."""
    q, k, v, cu_seqlens = (arguments[name] for name in ("q", "k", "v", "cu_seqlens"))
    assert isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} axes, not 4: b t h k, b s h_kv k, b s h_kv v")
    b, t, h, width = q.shape
    _, s, h_kv, _ = k.shape
    if k.shape[0] != b or k.shape[3] != width or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if h_kv == 0 or h % h_kv:
        raise ValueError(f"{h} query heads are not a multiple of {h_kv} key heads")
    if t > s or t == 0:
        raise ValueError(f"{t} queries for {s} keys: there must be one or more, at most as many as keys")
    check_cu_seqlens(cu_seqlens, b)
    if cu_seqlens is not None and t != s:
        raise ValueError(f"a packed sequence has as many queries as keys, not {t} and {s}")


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
    """The call's workload; a forward of one query on a longer cache is a decode."""
    q, k, v, cu_seqlens = (arguments[name] for name in ("q", "k", "v", "cu_seqlens"))
    assert isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    shape = dict(
        b=int(q.shape[0]), t=int(q.shape[1]), s=int(k.shape[1]), h=int(q.shape[2]), h_kv=int(k.shape[2]),
        k=int(q.shape[3]), v=int(v.shape[3]),
    )  # fmt: skip
    if isinstance(cu_seqlens, Tensor):
        shape["documents"] = int(cu_seqlens.shape[0]) - 1
    options: dict[str, Any] = {"causal": arguments["causal"], "window": arguments["window"]}
    dtype: Any = str(q.dtype).removeprefix("torch.")
    return Workload(operator="softmax_attention", shape=shape, dtype=dtype, phase=phase, options=options)  # type: ignore[arg-type]


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
    """Scores of a few units, as trained models have them, and one query in eight whose are of tens."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = workload.shape
    b, t, s, h, h_kv, k, v = (shape[axis] for axis in ("b", "t", "s", "h", "h_kv", "k", "v"))
    dtype = getattr(torch, workload.dtype)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    return {
        "q": draw_outliers(1.5 * draw(b, t, h, k), generator),
        "k": draw(b, s, h_kv, k),
        "v": draw(b, s, h_kv, v),
        "cu_seqlens": draw_boundaries(shape, seed, device),
        "causal": bool(workload.options["causal"]),
        "window": int(workload.options["window"]),
        "scale": None,
    }
