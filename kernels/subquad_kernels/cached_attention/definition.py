"""Attention of one token to a ring in plain torch: the definition every kernel is held against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, einsum

from subquad_kernels.samples import draw_outliers
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.workload import Workload

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs


def visible(places: int, position: Tensor, segment_len: int) -> Tensor:
    """Which places the token sees.  Shapes:  position: 1  ->  m (bool)"""
    written = position // segment_len
    place = torch.arange(places, device=position.device)
    return (place < written) & (place != written % places)


def reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, segment_len: int,
    scale: float | None,
) -> Outputs:  # fmt: skip
    """o = sum of softmax( scale q . k_i ) v_i over the token itself and the places that it sees.

    Shapes:  q: b 1 h k    k: b 1 h_kv k    v: b 1 h_kv v    keys, values: b m h_kv k | v    position: 1  ->  b 1 h v
    """
    exact, groups = torch.promote_types(q.dtype, torch.float32), q.shape[2] // k.shape[2]
    seen = visible(keys.shape[1], position, segment_len)
    # Nothing may come of what was never written, not even 0 times NaN.
    keys, values = (x.masked_fill(~seen[:, None, None], 0.0) for x in (keys, values))
    keys, values = torch.cat([keys, k], dim=1).to(exact), torch.cat([values, v], dim=1).to(exact)
    keys, values = (x.repeat_interleave(groups, dim=2) for x in (keys, values))
    scores = einsum("bthk,bshk->bhts", q.to(exact), keys) * scale_of(q, scale)
    scores = scores.masked_fill(~torch.cat([seen, seen.new_ones(1)]), float("-inf"))
    return (einsum("bhts,bshv->bthv", scores.softmax(dim=-1), values).to(q.dtype),)


REFERENCE = AutogradKernel(reference)


def scale_of(q: Tensor, scale: float | None) -> float:
    """The factor on the scores; k^-0.5 when none is given."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def check(arguments: Arguments) -> None:
    """Raise ValueError when shapes or options do not fit."""
    given: Any = arguments
    q, k, v, keys, values, position = (given[name] for name in ("q", "k", "v", "keys", "values", "position"))
    if given["segment_len"] < 1:
        raise ValueError(f"segment_len is {given['segment_len']}, not 1 or more")
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} axes, not 4: b 1 h k, b 1 h_kv k, b 1 h_kv v")
    b, t, h, width = q.shape
    h_kv = k.shape[2]
    if t != 1:
        raise ValueError(f"{t} tokens a sequence are given, not one")
    if k.shape != (b, 1, h_kv, width) or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if h_kv == 0 or h % h_kv:
        raise ValueError(f"{h} query heads are not a multiple of {h_kv} key heads")
    places = keys.shape[1] if keys.dim() == 4 else 0
    if keys.shape != (b, places, h_kv, width) or values.shape != (b, places, h_kv, v.shape[3]) or not places:
        raise ValueError(
            f"shapes do not fit, or there is no place: keys {tuple(keys.shape)}, values {tuple(values.shape)},"
            f" k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if (tuple(position.shape), position.dtype) != ((1,), torch.int64):
        raise ValueError(f"position is {tuple(position.shape)} of {position.dtype}, not one int64 for all sequences")


def empty_outputs(arguments: Arguments) -> Outputs:
    """out: b 1 h v."""
    q, v = arguments["q"], arguments["v"]
    assert isinstance(q, Tensor) and isinstance(v, Tensor)
    return (q.new_empty(*q.shape[:3], v.shape[3]),)


def batch_and_length(arguments: Arguments) -> tuple[int, int]:
    """b and the one token."""
    q = arguments["q"]
    assert isinstance(q, Tensor)
    return q.shape[0], q.shape[1]


def workload_of(arguments: Arguments, phase: str) -> Workload:
    """The call's workload: the ring counts as full, since nothing but the device knows how full it is."""
    given: Any = arguments
    q, v, keys = given["q"], given["v"], given["keys"]
    shape = dict(
        b=int(q.shape[0]), t=int(q.shape[1]), h=int(q.shape[2]), h_kv=int(v.shape[2]), k=int(q.shape[3]),
        v=int(v.shape[3]), m=int(keys.shape[1]),
    )  # fmt: skip
    dtype: Any = str(q.dtype).removeprefix("torch.")
    options = {"segment_len": int(given["segment_len"])}
    return Workload(operator="cached_attention", shape=shape, dtype=dtype, phase=phase, options=options)  # type: ignore[arg-type]


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
    """Scores of a few units, or of tens; a ring that is all but full, turned over, full, empty or half full, by seed.

    What is not seen is NaN.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = workload.shape
    b, t, h, h_kv, k, v, m = (shape[axis] for axis in ("b", "t", "h", "h_kv", "k", "v", "m"))
    dtype = getattr(torch, workload.dtype)
    segment_len = int(workload.options["segment_len"])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    m = max(1, m)
    written = (m - 1, 2 * m + m // 3, m, 0, m // 2)[seed % 5]
    position = torch.tensor([written * segment_len + segment_len // 2], device=device)
    hidden = ~visible(m, position, segment_len)[:, None, None]
    return {
        "q": draw_outliers(1.5 * draw(b, t, h, k), generator),
        "k": draw(b, t, h_kv, k),
        "v": draw(b, t, h_kv, v),
        "keys": draw(b, m, h_kv, k).masked_fill(hidden, float("nan")),
        "values": draw(b, m, h_kv, v).masked_fill(hidden, float("nan")),
        "position": position,
        "segment_len": segment_len,
        "scale": None,
    }
