"""The rotary embedding in plain torch: the definition every kernel is held against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad_kernels.documents import check_cu_seqlens, document_positions
from subquad_kernels.samples import draw_boundaries
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.workload import Workload

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs


def positions_of(
    length: int, start: int, cu_seqlens: Tensor | None, position: Tensor | None, device: torch.device
) -> Tensor:
    """The position of every token.  Shapes:  cu_seqlens: documents + 1    position: 1  ->  t (int64)"""
    if cu_seqlens is not None:
        return document_positions(cu_seqlens, length)
    places = torch.arange(start, start + length, device=device)
    return places if position is None else places + position


def position_angles(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """p theta^(-2 i / k) for every position and pair.  Shapes:  positions: t  ->  t k/2 (fp64)"""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    return positions.double()[:, None] * theta**-exponent


def reference(
    q: Tensor,
    k: Tensor,
    angles: Tensor | None,
    cu_seqlens: Tensor | None,
    position: Tensor | None,
    start: int,
    theta: float,
) -> Outputs:
    """Each pair is a complex number, multiplied by e^(i angle).

    Shapes:  q: b t h k    k: b t h_kv k    angles: b t a s    position: 1  ->  as q and k
    """
    if angles is not None:
        own = torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())

        def turned(x: Tensor) -> Tensor:
            turning, still = x.double().tensor_split([2 * own.shape[-1]], dim=-1)
            pairs = turning.unflatten(-1, (-1, 2))
            product = torch.complex(pairs[..., 0], pairs[..., 1]) * own
            return torch.cat([torch.view_as_real(product).flatten(-2), still], dim=-1).to(x.dtype)

        return turned(q), turned(k)
    positions = positions_of(q.shape[1], start, cu_seqlens, position, q.device)
    turn = torch.polar(
        torch.ones((), dtype=torch.float64, device=q.device), position_angles(positions, q.shape[3], theta)
    )

    def rotated(x: Tensor) -> Tensor:
        real, imaginary = x.double().chunk(2, dim=-1)
        product = torch.complex(real.contiguous(), imaginary.contiguous()) * turn[:, None]
        return torch.cat([product.real, product.imag], dim=-1).to(x.dtype)

    return rotated(q), rotated(k)


REFERENCE = AutogradKernel(reference)


def check(arguments: Arguments) -> None:
    """Raise ValueError when shapes do not fit."""
    values: dict[str, Any] = dict(arguments)
    q, k = values["q"], values["k"]
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q has {q.dim()} axes and k {k.dim()}, not 4: b t h k")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in b, t or k")
    if q.dtype != k.dtype:
        raise ValueError(f"q is {q.dtype} and k {k.dtype}: rotate them in one type")
    if q.shape[3] % 2 and values["angles"] is None:
        raise ValueError(f"the heads have {q.shape[3]} features; rotation needs pairs")
    if values["start"] < 0:
        raise ValueError(f"start is {values['start']}: positions begin at 0")
    check_cu_seqlens(values["cu_seqlens"], q.shape[0])
    position = values["position"]
    if position is not None and (tuple(position.shape), position.dtype) != ((1,), torch.int64):
        raise ValueError(f"position is {tuple(position.shape)} of {position.dtype}, not one int64 for all sequences")
    if position is not None and values["cu_seqlens"] is not None:
        raise ValueError("packed documents begin at position 0, and a position is given")
    if (angles := values["angles"]) is not None:
        _check_angles(angles, q, k)
        placed = [name for name in ("cu_seqlens", "position") if values[name] is not None]
        if placed or values["start"]:
            raise ValueError(f"angles are given, and {(placed or ['start'])[0]}, which asks for those of positions")
    if values["cu_seqlens"] is not None and values["start"]:
        raise ValueError(f"packed documents begin at position 0, and start is {values['start']}")


def _check_angles(angles: Tensor, q: Tensor, k: Tensor) -> None:
    heads = {1} | ({q.shape[2]} if q.shape[2] == k.shape[2] else set())
    if angles.dim() != 4 or angles.shape[:2] != q.shape[:2] or angles.shape[2] not in heads:
        raise ValueError(
            f"angles are {tuple(angles.shape)}, not b t a s of q {tuple(q.shape)} and k {tuple(k.shape)}, with a = 1 or"
            " as many as both have heads"
        )
    if not 1 <= angles.shape[3] <= q.shape[3] // 2:
        raise ValueError(f"{angles.shape[3]} angles are not for pairs of {q.shape[3]} features")


def empty_outputs(arguments: Arguments) -> Outputs:
    """As q and k."""
    q, k = arguments["q"], arguments["k"]
    assert isinstance(q, Tensor)
    assert isinstance(k, Tensor)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def batch_and_length(arguments: Arguments) -> tuple[int, int]:
    """b and t of q."""
    q = arguments["q"]
    assert isinstance(q, Tensor)
    return q.shape[0], q.shape[1]


def workload_of(arguments: Arguments, phase: str) -> Workload:
    """The call's workload; `start` and `position` are no part of it, since they change nothing but angles."""
    q, k, given, cu_seqlens = (arguments[name] for name in ("q", "k", "angles", "cu_seqlens"))
    assert isinstance(q, Tensor)
    assert isinstance(k, Tensor)
    b, t, h, width = (int(size) for size in q.shape)
    shape = dict(b=b, t=t, h=h, h_kv=int(k.shape[2]), k=width)
    if isinstance(cu_seqlens, Tensor):
        shape["documents"] = int(cu_seqlens.shape[0]) - 1
    dtype: Any = str(q.dtype).removeprefix("torch.")
    options: dict[str, Any] = {"theta": float(arguments["theta"])}  # type: ignore[arg-type]
    if isinstance(given, Tensor):
        options |= {"angles": "shared" if given.shape[2] == 1 else "own", "pairs": int(given.shape[3])}
    return Workload(operator="rotary", shape=shape, dtype=dtype, phase=phase, options=options)  # type: ignore[arg-type]


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
    """Queries and keys of unit scale; unless packed, from a position of several million on, or turned by given angles.

    One token, as in a decode, has half of its position on the device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = workload.shape
    b, t, width = shape["b"], shape["t"], shape["k"]
    dtype = getattr(torch, workload.dtype)
    boundaries = draw_boundaries(shape, seed, device)

    given = workload.options.get("angles")
    start = 0 if boundaries is not None or given else 3_000_017 + seed % 1000
    position = torch.tensor([start // 2], device=device) if t == 1 and start else None

    def draw(heads: int) -> Tensor:
        return torch.randn(b, t, heads, width, generator=generator, device=device).to(dtype)

    def turns() -> Tensor:
        a, exact = 1 if given == "shared" else shape["h"], torch.promote_types(dtype, torch.float32)
        size = (b, t, a, int(workload.options["pairs"]))
        return 3 * torch.randn(*size, generator=generator, device=device, dtype=exact)

    return {
        "q": draw(shape["h"]),
        "k": draw(shape["h_kv"]),
        "angles": None if given is None else turns(),
        "cu_seqlens": boundaries,
        "position": position,
        "start": start if position is None else start - start // 2,
        "theta": float(workload.options["theta"]),
    }
