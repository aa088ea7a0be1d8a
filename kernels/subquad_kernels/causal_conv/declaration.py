"""The records of the causal convolution: what it costs, and where each kernel applies."""

from __future__ import annotations

from subquad_kernels.catalogue import Kernel, Operator, Tolerance
from subquad_kernels.optional_packages import CAUSAL_CONV1D, CAUSAL_CONV1D_EXTENSIONS
from subquad_kernels.workload import DeviceLimits, DType, Option, Phase, Work, Workload

_HERE = "subquad_kernels.causal_conv"


def work(workload: Workload) -> Work:
    """2 w FLOPs per token and channel forward; 6 w backward (the sum again, dx, dweight)."""
    shape, options, e = workload.shape, workload.options, workload.element_bytes
    b, t, c, w = (shape[axis] for axis in ("b", "t", "c", "w"))
    documents = shape.get("documents", 0)
    bias, silu = bool(options["bias"]), options["activation"] == "silu"
    states = (documents or b) * (w - 1) * c * e
    boundaries = 4 * (documents + 1) if documents else 0
    inputs = b * t * c * e + (w + bias) * c * max(4, e) + (states if options["initial_state"] else 0)
    outputs = b * t * c * e + states
    tokens = b * t * c
    if workload.phase == "backward":
        return Work(
            vector_flops=tokens * (6 * w + 2 * bias + 5 * silu),
            transcendental_ops=tokens * silu,
            bytes_moved=2 * inputs + boundaries + outputs,
        )
    return Work(
        vector_flops=tokens * (2 * w + bias + silu),
        transcendental_ops=tokens * silu,
        bytes_moved=inputs + boundaries + outputs,
        saved_bytes=0 if workload.phase == "decode" else inputs + boundaries + outputs,
    )


def _example(dtype: DType, phase: Phase = "forward", *, initial_state: bool = False, **shape: int) -> Workload:
    axes = {"b": 2, "t": 37, "c": 12, "w": 4} | shape
    options: dict[str, Option] = {"activation": "silu", "bias": True, "initial_state": initial_state}
    return Workload(operator="causal_conv", shape=axes, dtype=dtype, phase=phase, options=options)


OPERATOR = Operator(
    name="causal_conv",
    summary="short causal depthwise convolution with its activation, stateful and packed",
    definition=f"{_HERE}.definition",
    tensors=("x", "weight", "bias", "initial_state", "cu_seqlens"),
    outputs=("y", "final_state"),
    residuals=(),
    defaults={"cpu": ("taps",), "cuda": ("fused", "conv1d")},
    work=work,
    tolerances={
        "float64": Tolerance(output=1e-13, gradient=1e-12, reason="sums of w and of b t terms in another order"),
        "float32": Tolerance(output=2e-6, gradient=2e-5, reason="sums of w and of b t terms in another order, fp32"),
        "bfloat16": Tolerance(output=8e-3, gradient=1.6e-2, reason="fp32 inside; results rounded once to 8 bits"),
        "float16": Tolerance(output=1e-3, gradient=2e-3, reason="fp32 inside; results rounded once to 11 bits"),
    },
    examples=(
        _example("float32"),
        _example("float32", b=1, documents=4),
        _example("float32", initial_state=True),
        _example("float32", "decode", initial_state=True, t=1),
        _example("bfloat16"),
    ),
    benchmarks={
        "cpu": _example("float32", b=1, t=256, c=384),
        "cuda": _example("bfloat16", b=4, t=1024, c=2048),
    },
)


def _anything(workload: Workload, limits: DeviceLimits) -> str | None:
    return None


MOST_TAPS = 8
"""More taps than this do not fit in registers beside their gradients."""


def _fused_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.dtype == "float64":
        return "computes in float32, not in float64"
    if workload.shape["w"] > MOST_TAPS:
        return f"has at most {MOST_TAPS} taps, not {workload.shape['w']}"
    if limits.capability is not None and limits.capability < (8, 0):
        return "needs compute capability 8.0"
    return None


def _causal_conv1d_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    shape = workload.shape
    if workload.dtype == "float64":
        return "computes in float32, not in float64"
    if not 2 <= shape["w"] <= 4:
        return f"has 2 to 4 taps, not {shape['w']}"
    if shape["c"] % 8:
        return f"needs a multiple of 8 channels where they lie side by side, not {shape['c']}"
    if "documents" in shape and workload.options["initial_state"]:
        return "has no initial states of packed documents"
    return None


def _taps_launches(workload: Workload) -> int:
    """Two for each tap forward, five backward, and the masks of documents."""
    each = 5 if workload.phase == "backward" else 2
    return 2 + each * workload.shape["w"] + (20 if "documents" in workload.shape else 0)


def _conv1d_launches(workload: Workload) -> int:
    """The convolution with what surrounds it, and the lay-out of documents."""
    return (8 if workload.phase == "backward" else 5) + (18 if "documents" in workload.shape else 0)


_BOTH = frozenset({"cpu", "cuda"})
_CUDA = frozenset({"cuda"})
KERNELS = (
    Kernel(
        operator="causal_conv",
        name="reference",
        implementation=f"{_HERE}.definition:REFERENCE",
        supports=_anything,
        devices=_BOTH,
    ),
    Kernel(
        operator="causal_conv",
        name="taps",
        implementation=f"{_HERE}.taps",
        supports=_anything,
        devices=_BOTH,
        launches=_taps_launches,
    ),
    Kernel(
        operator="causal_conv",
        name="conv1d",
        implementation=f"{_HERE}.conv1d",
        supports=_anything,
        devices=_BOTH,
        launches=_conv1d_launches,
    ),
    Kernel(
        operator="causal_conv",
        name="fused",
        implementation=f"{_HERE}.fused",
        supports=_fused_supports,
        devices=frozenset({"cuda"}),
        requires=("triton>=3.6",),
        replayable=True,
    ),
    Kernel(
        operator="causal_conv",
        name="causal_conv1d",
        implementation=f"{_HERE}.causal_conv1d",
        supports=_causal_conv1d_supports,
        devices=_CUDA,
        requires=CAUSAL_CONV1D,
        extensions=CAUSAL_CONV1D_EXTENSIONS,
    ),
)
