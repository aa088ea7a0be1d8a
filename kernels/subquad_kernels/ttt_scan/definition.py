"""Test-time training in plain torch: the definition every kernel is held against."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad_kernels.documents import check_cu_seqlens
from subquad_kernels.samples import draw_boundaries
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.ttt_scan.declaration import EXPANSION, INNER, state_size
from subquad_kernels.ttt_scan.inner_model import gelu, gelu_slope, layer_norm, loss_gradient, with_one
from subquad_kernels.workload import Workload

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs

Maps = list[Tensor]
"""The maps of the inner model, each with its bias as last row.  Shapes: states h rows columns"""


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    token_scales: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    position: int,
    inner: str,
) -> Outputs:
    """One token after the other: its gradient joins A, it is read with W - s_i A, and a full mini-batch is committed.

    Shapes:  q, k, v: b t h k    rates: b t h    token_scales: c    norm_weight, norm_bias: h k
             initial_state: states 2 h s  ->  y: b t h k    final_state: states 2 h s
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (tensor.to(exact) for tensor in (q, k, v))
    rate, scales, norm = rates.to(exact), token_scales.to(exact), (norm_weight.to(exact), norm_bias.to(exact))
    c, width = len(scales), q.shape[-1]
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, final_states = [], []
    for document, (start, stop) in enumerate(pairwise(bounds)):
        rows = slice(None) if cu_seqlens is None else slice(document, document + 1)
        weights, sums = (maps_of(part, width, inner) for part in initial_state[rows].to(exact).unbind(1))
        for token in range(start, stop):
            place = (position + token - start) % c
            gradient = gradients(keys[:, token], values[:, token], weights, norm)
            sums = [a + rate[:, token, :, None, None] * g for a, g in zip(sums, gradient)]
            trained = [w - scales[place] * a for w, a in zip(weights, sums)]
            outputs.append(queries[:, token] + layer_norm(apply(queries[:, token], trained)[-1], *norm))
            if place == c - 1:
                weights, sums = trained, [torch.zeros_like(a) for a in sums]
        final_states.append(torch.stack([rows_of(weights), rows_of(sums)], dim=1))
    return torch.stack(outputs, dim=1).to(v.dtype), torch.cat(final_states)


REFERENCE = AutogradKernel(reference)


def apply(x: Tensor, maps: Maps) -> list[Tensor]:
    """What each map gives, the last one before the norm.  Shapes:  x: b h k  ->  b h columns, each"""
    results: list[Tensor] = []
    for weights in maps:
        inputs = gelu(results[-1]) if results else x
        results.append((with_one(inputs)[..., None, :] @ weights)[..., 0, :])
    return results


def gradients(k: Tensor, v: Tensor, maps: Maps, norm: tuple[Tensor, Tensor]) -> Maps:
    """d/dW of 1/2 | f(k; W) - (v - k) |^2 for each map.  Shapes:  k, v: b h k  ->  b h rows columns, each"""
    results = apply(k, maps)
    last = loss_gradient(results[-1], v - k, *norm)
    if len(maps) == 1:
        return [with_one(k)[..., :, None] * last[..., None, :]]
    back = (maps[1][..., :-1, :] @ last[..., :, None])[..., 0]
    first = back * gelu_slope(results[0])
    return [
        with_one(k)[..., :, None] * first[..., None, :],
        with_one(gelu(results[0]))[..., :, None] * last[..., None, :],
    ]


def maps_of(rows: Tensor, k: int, inner: str) -> Maps:
    """The maps in one row of numbers.  Shapes:  states h s  ->  states h rows columns, each"""
    if inner == "linear":
        return [rows.unflatten(-1, (k + 1, k))]
    inside = EXPANSION * k
    first, second = rows.split([inside * (k + 1), k * (inside + 1)], dim=-1)
    return [first.unflatten(-1, (k + 1, inside)), second.unflatten(-1, (inside + 1, k))]


def rows_of(maps: Maps) -> Tensor:
    """The inverse of `maps_of`.  Shapes:  states h rows columns, each  ->  states h s"""
    return torch.cat([weights.flatten(-2) for weights in maps], dim=-1)


def check(arguments: Arguments) -> None:
    """Raise ValueError when shapes or options do not fit."""
    values: Any = arguments
    q, scales, inner, position = (values[name] for name in ("q", "token_scales", "inner", "position"))
    if inner not in INNER:
        raise ValueError(f"inner is '{inner}', not {' or '.join(INNER)}")
    if position < 0:
        raise ValueError(f"position is {position}, not 0 or more")
    if q.dim() != 4:
        raise ValueError(f"q has {q.dim()} axes, not 4: b t h k")
    b, t, h, k = q.shape
    cu_seqlens = values["cu_seqlens"]
    check_cu_seqlens(cu_seqlens, b)
    if t == 0:
        raise ValueError(f"q {tuple(q.shape)} has no token: b t h k needs t >= 1")
    if scales.dim() != 1 or len(scales) == 0:
        raise ValueError(f"token_scales is {tuple(scales.shape)}, not c: one for each place of a mini-batch")
    states = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = {
        "k": ("b t h k", (b, t, h, k)), "v": ("b t h k", (b, t, h, k)), "rates": ("b t h", (b, t, h)),
        "norm_weight": ("h k", (h, k)), "norm_bias": ("h k", (h, k)),
        "initial_state": ("states 2 h s", (states, 2, h, state_size(inner, k))),
    }  # fmt: skip
    for name, (axes, shape) in expected.items():
        if tuple(values[name].shape) != shape:
            raise ValueError(
                f"{name} is {tuple(values[name].shape)}, not {axes} = {shape} (q is b t h k = {(b, t, h, k)})"
            )
    if not values["k"].dtype == q.dtype == values["v"].dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {values['k'].dtype}, {values['v'].dtype}: they must have one type")


def empty_outputs(arguments: Arguments) -> Outputs:
    """y: b t h k, final_state: states 2 h s."""
    v, state = arguments["v"], arguments["initial_state"]
    assert isinstance(v, Tensor)
    assert isinstance(state, Tensor)
    return v.new_empty(v.shape), v.new_empty(state.shape, dtype=torch.promote_types(v.dtype, torch.float32))


def batch_and_length(arguments: Arguments) -> tuple[int, int]:
    """b and t of v."""
    v = arguments["v"]
    assert isinstance(v, Tensor)
    return v.shape[0], v.shape[1]


def workload_of(arguments: Arguments, phase: str) -> Workload:
    """The call's workload; `mini_batch` is the number of token scales."""
    values: Any = arguments
    b, t, h, k = (int(length) for length in values["q"].shape)
    shape = dict(b=b, t=t, h=h, k=k)
    if values["cu_seqlens"] is not None:
        shape["documents"] = int(values["cu_seqlens"].shape[0]) - 1
    dtype: Any = str(values["v"].dtype).removeprefix("torch.")
    options = {"inner": values["inner"], "mini_batch": int(values["token_scales"].shape[0])}
    return Workload(operator="ttt_scan", shape=shape, dtype=dtype, phase=phase, options=options)  # type: ignore[arg-type]


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
    """Weights, rates and scales near those that training starts from; the call begins within a mini-batch.

    A rate is a learning rate of 1 (`linear`) or 0.1 (`mlp`) over the head's width, times a sigmoid.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape, inner, c = workload.shape, str(workload.options["inner"]), int(workload.options["mini_batch"])
    b, t, h, k = (shape[axis] for axis in ("b", "t", "h", "k"))
    dtype = getattr(torch, workload.dtype)
    exact = torch.promote_types(dtype, torch.float32)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

    boundaries = draw_boundaries(shape, seed, device)
    states = b if boundaries is None else boundaries.shape[0] - 1
    position = seed % (3 * c)
    state = 0.1 * draw(states, 2, h, state_size(inner, k))
    if position % c == 0:
        state[:, 1] = 0
    base = 1.0 if inner == "linear" else 0.1
    return {
        "q": draw(b, t, h, k).to(dtype),
        "k": draw(b, t, h, k).to(dtype),
        "v": draw(b, t, h, k).to(dtype),
        "rates": (base / k * torch.sigmoid(draw(b, t, h))).to(exact),
        "token_scales": (1 / torch.arange(1, c + 1, device=device) + 0.05 * draw(c)).clamp(min=0).to(exact),
        "norm_weight": (1 + 0.1 * draw(h, k)).to(exact),
        "norm_bias": (0.1 * draw(h, k)).to(exact),
        "initial_state": state.to(exact),
        "cu_seqlens": boundaries,
        "position": position,
        "inner": inner,
    }
