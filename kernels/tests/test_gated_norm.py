"""The gated norm: every kernel against the written-out equation in float64, and that against torch's own norm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.gated_norm import declaration, definition, fused
from subquad_kernels.operators import gated_norm
from subquad_kernels.self_check import judge, kernel_errors
from subquad_kernels.workload import Workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ("composed", "fused")
OPTIONS = {"gate_first": False, "activation": "silu", "weight": True, "shared": False, "skip": False, "eps": 1e-5}
WAYS = {
    "mamba-2": {"gate_first": True, "skip": True},
    "a weight for all heads": {"shared": True},
    "no weight": {"weight": False},
    "sigmoid": {"activation": "sigmoid"},
    "skip, then the gate last": {"skip": True, "activation": "sigmoid", "shared": True},
    "gate first, no weight": {"gate_first": True, "weight": False},
    "centred, with a bias": {"centre": True, "bias": True},
    "all at once": {"centre": True, "bias": True, "gate_first": True, "skip": True},
    "centred, as mLSTM": {"centre": True, "activation": "sigmoid"},
    "centred, the gate as it is, a bias for all heads": {
        "centre": True,
        "bias": True,
        "activation": "identity",
        "shared": True,
    },
    "no gate": {"activation": "none"},
    "a skip and a gate, no norm": {"norm": False, "weight": False, "skip": True},
    "no norm, the gate first": {"norm": False, "gate_first": True, "bias": True, "skip": True},
    "no gate, centred": {"activation": "none", "centre": True, "bias": True, "skip": True},
}


def case(dtype: str = "float32", b: int = 2, t: int = 5, c: int = 24, g: int = 3, **options: Any) -> Workload:
    shape = {"b": b, "t": t, "c": c, "g": g}
    return Workload(operator="gated_norm", shape=shape, dtype=dtype, options=OPTIONS | options)  # type: ignore[arg-type]


def sample(workload: Workload) -> dict[str, Any]:
    return definition.sample_inputs(workload, seed=3, device=DEVICE)


def assert_exact(kernel: str, workload: Workload, arguments: dict[str, Any] | None = None) -> None:
    arguments = arguments or sample(workload)
    record = CATALOGUE.kernel("gated_norm", kernel)
    errors = kernel_errors(declaration.OPERATOR, record, arguments, gradients=True)
    given = {name for name, value in arguments.items() if isinstance(value, Tensor)}
    assert set(errors) == {"y"} | {f"d_{name}" for name in given}
    verdict = judge(declaration.OPERATOR, record, workload, errors)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("way", WAYS)
def test_the_equation_is_torch_s_norm_with_a_gate(way: str) -> None:
    """Written here with torch's rms_norm and layer_norm, group by group, and differentiated by torch."""
    workload = case("float64", **WAYS[way])
    arguments = sample(workload)
    tensors = {name: value.requires_grad_() for name, value in arguments.items() if isinstance(value, Tensor)}
    x, z, weight, bias = (arguments[name] for name in ("x", "z", "weight", "bias"))
    value = x
    if arguments["skip"] is not None:
        heads = arguments["skip"].unflatten(-1, (8, -1)) * arguments["skip_weight"][:, None]
        value = x + heads.flatten(-2)
    acts = {"silu": F.silu, "sigmoid": F.sigmoid, "identity": lambda gate: gate}
    act = 1 if z is None else acts[arguments["activation"]](z)
    before, after = (act, 1) if arguments["gate_first"] else (1, act)
    parts = []
    for i, part in enumerate((value * before).split(8, dim=-1)):
        own, added = (
            given if given is None or len(given) == 8 else given[8 * i : 8 * i + 8] for given in (weight, bias)
        )
        if not arguments["norm"]:
            parts.append(part * (1 if own is None else own) + (0 if added is None else added))
        elif arguments["centre"]:
            parts.append(F.layer_norm(part, (8,), own, added, 1e-5))
        else:
            parts.append(F.rms_norm(part, (8,), own, 1e-5) + (0 if added is None else added))
    expected = torch.cat(parts, dim=-1) * after
    (found,) = definition.reference(**arguments)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13)
    pull = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    gradients = [torch.autograd.grad(y, list(tensors.values()), pull) for y in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_gate_and_weigh(kernel: str, way: str) -> None:
    assert_exact(kernel, case(**WAYS[way]))
    assert_exact(kernel, case(b=1, t=1, c=20, g=1, **WAYS[way]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_group_wider_than_a_tile_and_more_tokens_than_one(kernel: str) -> None:
    assert_exact(kernel, case(b=1, t=3, c=1200, g=1, gate_first=True, skip=True))
    assert_exact(kernel, case(b=3, t=67, c=32, g=2, shared=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_centred_is_blind_to_a_common_shift(kernel: str) -> None:
    """The mean is taken over the group's channels alone, 24 of the 32 that a tile has."""
    x = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    shift = torch.tensor([5.0, -3.0], device=DEVICE).repeat_interleave(24)
    y, shifted = (gated_norm(rows, groups=2, centre=True, kernel=kernel) for rows in (x, x + shift))
    assert torch.allclose(y, shifted, atol=1e-5)
    assert not torch.allclose(gated_norm(x + shift, groups=2, kernel=kernel), y, atol=0.1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(kernel: str, dtype: str) -> None:
    assert_exact(kernel, case(dtype, t=33, gate_first=True, skip=True))


def test_a_program_that_takes_several_tiles_gives_the_same_sums() -> None:
    """Two programs for each group, of three tiles of four tokens: the last tile is not full."""
    arguments = sample(case(t=11, gate_first=True, skip=True))
    exact = {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    launch = fused.Launch(tile=32, warp=32, programs=6)
    (y,) = fused.forward(**arguments, launch=launch)
    (expected,) = definition.reference(**exact)
    assert torch.allclose(y.double(), expected, atol=1e-5)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    found = fused.backward(arguments, (y,), (pull,), launch=launch)
    wanted = definition.REFERENCE.backward(exact, (expected,), (pull.double(),))
    for name, gradient in wanted.items():
        assert gradient is not None
        assert torch.allclose(found[name].double(), gradient, atol=1e-4, rtol=1e-4), name  # type: ignore[union-attr]


@pytest.mark.parametrize("kernel", KERNELS)
def test_slices_of_wider_tensors_are_read_where_they_stand(kernel: str) -> None:
    """x, gate and skip are parts of what other maps made, each of another width; gradients arrive at their places."""
    draw = torch.Generator().manual_seed(4)
    wide = [torch.randn(2, 5, width, generator=draw).to(DEVICE).requires_grad_() for width in (24, 31, 50)]
    x, z, skip = wide[0], wide[1][..., 3:27], wide[2][..., 26:]
    D = torch.linspace(0.5, 2, 4, device=DEVICE)
    y, copied = (
        gated_norm(*given[:2], groups=3, skip=given[2], skip_weight=D, gate_first=True, kernel=kernel)
        for given in ((x, z, skip), tuple(part.clone(memory_format=torch.contiguous_format) for part in (x, z, skip)))
    )
    assert torch.allclose(y, copied, atol=1e-6)
    found, expected = (torch.autograd.grad(result.square().sum(), wide) for result in (y, copied))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert bool((found[1][..., :3] == 0).all())
    assert bool((found[2][..., :26] == 0).all())


def test_a_gate_of_any_size_gives_finite_values() -> None:
    x = torch.randn(1, 4, 8, device=DEVICE)
    z = torch.tensor([-1e30, -200.0, 200.0, 1e15], device=DEVICE).view(1, 4, 1).expand(1, 4, 8)
    for kernel in KERNELS:
        for gate_first in (False, True):
            given = [part.clone().requires_grad_() for part in (x, z)]
            y = gated_norm(*given, gate_first=gate_first, kernel=kernel)
            y.sum().backward()
            assert all(bool(tensor.isfinite().all()) for tensor in (y, *(part.grad for part in given)))


def test_where_the_gate_stands_is_seen() -> None:
    """The check can fail: the gate last instead of first."""
    workload = case(gate_first=True)
    arguments = sample(workload)
    (y,), (other,) = (definition.reference(**arguments | {"gate_first": first}) for first in (True, False))
    assert not torch.allclose(y, other, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(5, 24)}, "axes"),
        ({"z": torch.zeros(2, 5, 23)}, "must be equal"),
        ({"z": torch.zeros(2, 5, 24, dtype=torch.float64)}, "must be equal"),
        ({"groups": 5}, "equal groups"),
        ({"weight": torch.ones(12)}, "shared by the groups"),
        ({"skip": torch.zeros(2, 5, 24)}, "go together"),
        ({"skip": torch.zeros(2, 5, 24), "skip_weight": torch.zeros(7)}, "no divisor"),
        ({"bias": torch.ones(7)}, "bias is"),
        ({"z": None, "gate_first": True}, "needs a gate"),
        ({"norm": False, "centre": True}, "part of the norm"),
        ({"activation": "relu"}, "silu, sigmoid"),
        ({"eps": 0.0}, "more than 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    arguments = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in sample(case()).items()}
    with pytest.raises(ValueError, match=message):
        definition.check(arguments | changes)


def test_the_widest_group_is_declared() -> None:
    limits = declaration.KERNELS[-1]
    wide = replace(case(), shape={"b": 1, "t": 1, "c": 2 * declaration.MOST_WIDTH, "g": 1})
    assert "16384" in str(limits.supports(wide, None))  # type: ignore[arg-type]
