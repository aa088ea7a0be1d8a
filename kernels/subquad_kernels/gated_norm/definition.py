"""The gated norm in plain torch: the definition every kernel is held against."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.workload import Workload

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Argument, Arguments, Outputs

ACTIVATIONS = ("silu", "sigmoid", "identity")
NO_GATE = "none"
"""What a workload says for the activation where there is no gate."""


def reference(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    groups: int,
    gate_first: bool,
    norm: bool,
    centre: bool,
    activation: str,
    eps: float,
) -> Outputs:
    """Root mean squares written out.  Shapes:  x, z, skip: b t c  ->  b t c"""
    exact = torch.promote_types(x.dtype, torch.float32)
    value = x.to(exact)
    if skip is not None and skip_weight is not None:
        value = value + skip.to(exact) * skip_weight.to(exact).repeat_interleave(x.shape[2] // len(skip_weight))
    opened = torch.ones_like(value) if z is None else _opened(z.to(exact), activation)
    size = (value * opened if gate_first else value).unflatten(-1, (groups, -1))
    if centre:
        size = size - size.mean(-1, keepdim=True)
    if norm:
        size = size / torch.sqrt(size.square().mean(-1, keepdim=True) + eps)
    normal = size.flatten(-2)
    if weight is not None:
        normal = normal * weight.to(exact).repeat(x.shape[2] // len(weight))
    if bias is not None:
        normal = normal + bias.to(exact).repeat(x.shape[2] // len(bias))
    return ((normal if gate_first else normal * opened).to(x.dtype),)


def _opened(gate: Tensor, activation: str) -> Tensor:
    if activation == "identity":
        return gate
    return torch.sigmoid(gate) * (gate if activation == "silu" else 1)


REFERENCE = AutogradKernel(reference)


def check(arguments: Arguments) -> None:
    """Raise ValueError when shapes do not fit."""
    values: dict[str, Any] = dict(arguments)
    x, z, skip, groups = values["x"], values["z"], values["skip"], values["groups"]
    if x.dim() != 3:
        raise ValueError(f"x has {x.dim()} axes, not 3: b t c")
    for name, other in (("z", z), ("skip", skip)):
        if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
            raise ValueError(
                f"{name} is {tuple(other.shape)} of {other.dtype}, x {tuple(x.shape)} of {x.dtype}: they must be equal"
            )
    c = x.shape[2]
    if groups < 1 or c % groups:
        raise ValueError(f"{c} channels are not {groups} equal groups")
    for name in ("weight", "bias"):
        if (given := values[name]) is not None and given.shape not in ((c,), (c // groups,)):
            raise ValueError(f"{name} is {tuple(given.shape)}, not {c}, nor {c // groups} shared by the groups")
    if z is None and values["gate_first"]:
        raise ValueError("gate_first needs a gate, and z is absent")
    if (skip is None) != (values["skip_weight"] is None):
        raise ValueError("skip and skip_weight go together")
    if skip is not None and (values["skip_weight"].dim() != 1 or c % values["skip_weight"].shape[0]):
        raise ValueError(f"skip_weight is {tuple(values['skip_weight'].shape)}, no divisor of {c} channels")
    if values["centre"] and not values["norm"]:
        raise ValueError("centre is a part of the norm, and norm is False")
    if values["activation"] not in ACTIVATIONS:
        raise ValueError(f"activation is '{values['activation']}', not one of {', '.join(ACTIVATIONS)}")
    if values["eps"] <= 0:
        raise ValueError(f"eps is {values['eps']}: a group of zeros needs more than 0")


def empty_outputs(arguments: Arguments) -> Outputs:
    """As x."""
    x = arguments["x"]
    assert isinstance(x, Tensor)
    return (x.new_empty(x.shape),)


def batch_and_length(arguments: Arguments) -> tuple[int, int]:
    """b and t of x."""
    x = arguments["x"]
    assert isinstance(x, Tensor)
    return x.shape[0], x.shape[1]


def workload_of(arguments: Arguments, phase: str) -> Workload:
    """The call's workload; how many channels share a weight of the skip is no part of it."""
    values: dict[str, Any] = dict(arguments)
    x, weight, groups = values["x"], values["weight"], values["groups"]
    b, t, c = (int(size) for size in x.shape)
    shape = dict(b=b, t=t, c=c, g=groups)
    options = {
        "gate_first": values["gate_first"],
        "activation": NO_GATE if values["z"] is None else values["activation"],
        "weight": weight is not None,
        "shared": groups > 1 and weight is not None and int(weight.shape[0]) == c // groups,
        "skip": values["skip"] is not None,
        "eps": float(values["eps"]),
    }
    # Named where they are asked for alone: what was measured before there were any stays what it is.
    options |= {} if values["norm"] else {"norm": False}
    options |= {"centre": True} if values["centre"] else {}
    options |= {"bias": True} if values["bias"] is not None else {}
    dtype: Any = str(x.dtype).removeprefix("torch.")
    return Workload(operator="gated_norm", shape=shape, dtype=dtype, phase=phase, options=options)  # type: ignore[arg-type]


def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
    """Values of unit scale, one token of them a thousand times smaller; gates of three times as much.

    A weight of the skip is for 64 channels, as in Mamba-2, or for an eighth of them and more.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape, options = workload.shape, workload.options
    b, t, c, g = (shape[axis] for axis in ("b", "t", "c", "g"))
    dtype = getattr(torch, workload.dtype)
    exact = torch.promote_types(dtype, torch.float32)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=exact)

    x, z = draw(b, t, c), 3 * draw(b, t, c)
    x[:, seed % t] *= 1e-3
    skips, gated = bool(options["skip"]), options["activation"] != NO_GATE
    own = c // g if options["shared"] else c
    return {
        "x": x.to(dtype),
        "z": z.to(dtype) if gated else None,
        "weight": 1 + 0.3 * draw(own) if options["weight"] else None,
        "bias": 0.3 * draw(own) if options.get("bias") else None,
        "skip": draw(b, t, c).to(dtype) if skips else None,
        "skip_weight": draw(c // 64 if c % 64 == 0 else gcd(c, 8)) if skips else None,
        "groups": g,
        "gate_first": bool(options["gate_first"]),
        "norm": bool(options.get("norm", True)),
        "centre": bool(options.get("centre")),
        "activation": str(options["activation"]) if gated else ACTIVATIONS[0],
        "eps": float(options["eps"]),
    }
