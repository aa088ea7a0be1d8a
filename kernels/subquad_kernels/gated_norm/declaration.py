"""The records of the gated norm: what it costs, and where each kernel applies."""

from __future__ import annotations

from subquad_kernels.catalogue import Kernel, Operator, Tolerance
from subquad_kernels.tile_sizes import power_of_two
from subquad_kernels.workload import DeviceLimits, DType, Option, Phase, Work, Workload

_HERE = "subquad_kernels.gated_norm"
MOST_WIDTH = 16384
"""Channels of a group that one program can hold, four tensors of them in the backward."""


def work(workload: Workload) -> Work:
    """An exponential a gated channel, some ten FLOPs; each tensor read or written once, without the skip's weights."""
    shape, options, e = workload.shape, workload.options, workload.element_bytes
    b, t, c = (shape[axis] for axis in ("b", "t", "c"))
    skips, weighs = bool(options["skip"]), bool(options["weight"]) + bool(options.get("bias"))
    gated, centred = options["activation"] != "none", bool(options.get("centre"))
    normed = bool(options.get("norm", True))
    curved = options["activation"] in ("silu", "sigmoid")
    channels = b * t * c
    inputs = channels * (1 + gated + skips) * e
    weights = max(4, e) * (weighs * c // (shape["g"] if options["shared"] else 1))
    if workload.phase == "backward":
        return Work(
            vector_flops=channels * (10 * normed + 8 * gated + 2 * weighs + 5 * skips + 4 * centred),
            transcendental_ops=channels * curved,
            bytes_moved=2 * (inputs + weights) + channels * e,
        )
    return Work(
        vector_flops=channels * (4 * normed + 2 * gated + weighs + 2 * skips + 2 * centred),
        transcendental_ops=channels * curved,
        bytes_moved=inputs + weights + channels * e,
        saved_bytes=0 if workload.phase == "decode" else inputs + weights + channels * e,
    )


def _example(
    dtype: DType,
    phase: Phase = "forward",
    *,
    gate_first: bool = False,
    shared: bool = False,
    activation: str = "silu",
    skip: bool = False,
    weight: bool = True,
    norm: bool = True,
    centre: bool = False,
    bias: bool = False,
    **shape: int,
) -> Workload:
    axes = {"b": 2, "t": 37, "c": 48, "g": 4} | shape
    options: dict[str, Option] = {
        "gate_first": gate_first,
        "activation": activation,
        "weight": weight,
        "shared": shared,
        "skip": skip,
        "eps": 1e-5,
    }
    options |= {} if norm else {"norm": False}
    options |= {"centre": True} if centre else {}
    options |= {"bias": True} if bias else {}
    return Workload(operator="gated_norm", shape=axes, dtype=dtype, phase=phase, options=options)


OPERATOR = Operator(
    name="gated_norm",
    summary="heads normalised group by group and gated by the input",
    definition=f"{_HERE}.definition",
    tensors=("x", "z", "weight", "bias", "skip", "skip_weight"),
    outputs=("y",),
    residuals=(),
    defaults={"cpu": ("composed",), "cuda": ("fused", "composed")},
    work=work,
    tolerances={
        "float64": Tolerance(output=1e-12, gradient=1e-12, reason="sums of c / g and of b t terms in another order"),
        "float32": Tolerance(output=5e-6, gradient=2e-5, reason="sums of c / g and of b t terms in fp32"),
        "bfloat16": Tolerance(output=8e-3, gradient=8e-3, reason="fp32 inside; results rounded once to 8 bits"),
        "float16": Tolerance(output=1e-3, gradient=1e-3, reason="fp32 inside; results rounded once to 11 bits"),
    },
    examples=(
        _example("float32"),
        _example("float32", gate_first=True, skip=True, g=1),
        _example("float32", shared=True, activation="sigmoid"),
        _example("float32", weight=False),
        _example("float32", centre=True, bias=True),
        _example("float32", activation="none", shared=True),
        _example("float32", norm=False, weight=False, skip=True),
        _example("float32", "decode", t=1, gate_first=True, skip=True),
        _example("bfloat16", gate_first=True, skip=True),
    ),
    benchmarks={
        "cpu": _example("float32", b=1, t=256, c=384, g=1, gate_first=True),
        "cuda": _example("bfloat16", b=4, t=1024, c=2048, g=1, gate_first=True, skip=True),
    },
)


def _anything(workload: Workload, limits: DeviceLimits) -> str | None:
    return None


def _fused_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.dtype == "float64":
        return "computes in float32, not in float64"
    width = workload.shape["c"] // workload.shape["g"]
    if width > MOST_WIDTH:
        return f"holds groups of up to {MOST_WIDTH} channels, not {width}"
    return None


def _composed_launches(workload: Workload) -> int:
    """Casts, gate, norm and products, one after the other."""
    skips, narrow = bool(workload.options["skip"]), workload.dtype in ("bfloat16", "float16")
    if workload.phase == "backward":
        return 24 + 4 * narrow + 8 * skips
    return 9 + 3 * narrow + 3 * skips


def _fused_launches(workload: Workload) -> int:
    """One; backward torch adds up the programs' parts of the gradients of weights, and of the skip's."""
    options = workload.options
    return 1 + (workload.phase == "backward") * sum(bool(options.get(name)) for name in ("weight", "bias", "skip"))


def _fused_padding(workload: Workload) -> float:
    """A program holds whole groups, as wide as a power of two."""
    width = workload.shape["c"] // workload.shape["g"]
    return power_of_two(width) / width


_BOTH = frozenset({"cpu", "cuda"})
KERNELS = (
    Kernel(
        operator="gated_norm",
        name="reference",
        implementation=f"{_HERE}.definition:REFERENCE",
        supports=_anything,
        devices=_BOTH,
    ),
    Kernel(
        operator="gated_norm",
        name="composed",
        implementation=f"{_HERE}.composed",
        supports=_anything,
        devices=_BOTH,
        launches=_composed_launches,
    ),
    Kernel(
        operator="gated_norm",
        name="fused",
        implementation=f"{_HERE}.fused",
        supports=_fused_supports,
        devices=frozenset({"cuda"}),
        requires=("triton>=3.6",),
        replayable=True,
        launches=_fused_launches,
        padding=_fused_padding,
    ),
)
