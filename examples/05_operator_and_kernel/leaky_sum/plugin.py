"""What this plugin declares; imports no torch: the operator, its kernels, and a mixer that calls it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from subquad import Growth, MixerSpec, hookimpl
from subquad_kernels import DeviceLimits, Kernel, Operator, Tolerance, Work, Workload


@dataclass(kw_only=True)
class LeakySumConfig:
    """Half-lives of the channels at the start (tokens), spread geometrically from 1 to the longest."""

    longest_half_life: float = 64.0


def work(workload: Workload) -> Work:
    """2 FLOPs per token and channel forward; 4 backward, the sum backwards and the gradient of the decay."""
    shape = workload.shape
    b, t, c = (shape[axis] for axis in ("b", "t", "c"))
    states = shape.get("documents", b) * c
    tensors = b * t * c * workload.element_bytes + 4 * states  # x or y, and what the state is before or after it
    backward = workload.phase == "backward"
    return Work(
        vector_flops=(4 if backward else 2) * b * t * c,
        transcendental_ops=c,
        bytes_moved=(3 if backward else 2) * tensors + 4 * c,
        serial_steps=t,
        saved_bytes=tensors if workload.phase == "forward" else 0,  # the backward reads y
    )


def _example(dtype: str, phase: str = "forward", *, initial_state: bool = False, **shape: int) -> Workload:
    axes = {"b": 2, "t": 37, "c": 12} | shape
    return Workload(
        operator="leaky_sum", shape=axes, dtype=dtype, phase=phase, options={"initial_state": initial_state}
    )  # fmt: skip


OPERATOR = Operator(
    name="leaky_sum",
    summary="decayed sum along the sequence, one state per channel, stateful and packed",
    definition="leaky_sum.definition",
    tensors=("x", "log_decay", "initial_state", "cu_seqlens"),
    outputs=("y", "final_state"),
    residuals=(),
    defaults={"cpu": ("reference",), "cuda": ("fused", "reference")},
    work=work,
    tolerances={
        "float64": Tolerance(output=1e-13, gradient=1e-12, reason="sums of b t terms in another order"),
        "float32": Tolerance(output=1e-5, gradient=1e-4, reason="t rounded steps, sums of b t terms, fp32"),
        "bfloat16": Tolerance(output=8e-3, gradient=1.6e-2, reason="fp32 inside; y is kept in 8 bits"),
        "float16": Tolerance(output=1e-3, gradient=2e-3, reason="fp32 inside; y is kept in 11 bits"),
    },
    examples=(
        _example("float32"),
        _example("float32", b=1, documents=4, initial_state=True),
        _example("float32", "decode", initial_state=True, t=1),
        _example("bfloat16", initial_state=True),
    ),
    benchmarks={"cpu": _example("float32", b=1, t=64, c=256), "cuda": _example("bfloat16", b=4, t=1024, c=2048)},
)


def _anything(workload: Workload, limits: DeviceLimits) -> str | None:
    return None


def _fused_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    return "computes in float32, not in float64" if workload.dtype == "float64" else None


KERNELS = (
    Kernel(
        operator="leaky_sum",
        name="reference",
        implementation="leaky_sum.definition:REFERENCE",
        supports=_anything,
        devices=frozenset({"cpu", "cuda"}),
        origin="subquad-leaky-sum",
    ),
    Kernel(
        operator="leaky_sum",
        name="fused",
        implementation="leaky_sum.fused",
        supports=_fused_supports,
        devices=frozenset({"cuda"}),
        requires=("triton>=3.6",),
        origin="subquad-leaky-sum",
    ),
)


@hookimpl
def subquad_provide_operators() -> Iterable[Operator]:
    return [OPERATOR]


@hookimpl
def subquad_provide_kernels() -> Iterable[Kernel]:
    return KERNELS


@hookimpl
def subquad_provide_mixers() -> Iterable[MixerSpec]:
    return [
        MixerSpec(
            name="leaky_sum",
            summary="a gated moving average per channel",
            paper="an example, not a paper",
            config=LeakySumConfig,
            build="leaky_sum.mixer:LeakySum",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            no_decay=("rate",),
            float32_parameters=("rate",),  # it acts exponentially on the state
            operators=("leaky_sum",),
        )
    ]
