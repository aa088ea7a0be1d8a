"""The records of the selective scan: what it costs, and where each kernel applies."""

from __future__ import annotations

from subquad_kernels.catalogue import Kernel, Operator, Tolerance
from subquad_kernels.optional_packages import MAMBA, MAMBA_EXTENSIONS
from subquad_kernels.selective_scan.cuts import CHUNK, Cut, backward_steps, cut, forward_steps, launch_of
from subquad_kernels.workload import DeviceLimits, DType, Phase, Work, Workload

_HERE = "subquad_kernels.selective_scan"


def work(workload: Workload) -> Work:
    """6 FLOPs and one exponential per token, channel and state forward; 19 and one backward (h computed again)."""
    shape, options, e = workload.shape, workload.options, workload.element_bytes
    b, t, c, n = (shape[axis] for axis in ("b", "t", "c", "n"))
    documents = shape.get("documents", 0)
    exact = max(4, e)  # bytes of one element of the parameters and states
    gate, skip, bias = bool(options["gate"]), bool(options["skip"]), bool(options["dt_bias"])
    states = (documents or b) * c * n * exact
    inputs = b * t * ((2 + gate) * c + 2 * n) * e + (c * n + (skip + bias) * c) * exact
    inputs += states if options["initial_state"] else 0
    inputs += 4 * (documents + 1) if documents else 0
    outputs = b * t * c * e + states
    residuals = ((t - 1) // CHUNK * b * c * n + gate * b * t * c) * exact
    tokens = b * t * c
    exponentials = tokens * n + tokens * (2 * bool(options["softplus"]) + gate)
    steps = -(-t // documents) if documents else t
    if workload.phase == "backward":
        return Work(
            vector_flops=19 * tokens * n + tokens * (4 + 5 * skip + 8 * gate + 2 * bias),
            transcendental_ops=exponentials + tokens * bool(options["softplus"]),
            bytes_moved=2 * inputs - (4 * (documents + 1) if documents else 0) + residuals + outputs,
            serial_steps=2 * steps,
        )
    return Work(
        vector_flops=6 * tokens * n + tokens * (1 + 2 * skip + 2 * gate + bias),
        transcendental_ops=exponentials,
        bytes_moved=inputs + outputs + residuals,
        serial_steps=steps,
        saved_bytes=0 if workload.phase == "decode" else inputs + outputs + residuals,
    )


def _example(
    dtype: DType, phase: Phase = "forward", *, initial_state: bool = False, reversed: bool = False, **shape: int
) -> Workload:
    axes = {"b": 2, "t": 37, "c": 12, "n": 4} | shape
    options = {"softplus": True, "skip": True, "gate": True, "dt_bias": True, "initial_state": initial_state}
    if reversed:
        options["reversed"] = True
    return Workload(operator="selective_scan", shape=axes, dtype=dtype, phase=phase, options=options)


OPERATOR = Operator(
    name="selective_scan",
    summary="selective scan of a diagonal state-space model (Mamba), with skip, gate and step bias fused",
    definition=f"{_HERE}.definition",
    tensors=("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "cu_seqlens"),
    outputs=("y", "final_state"),
    residuals=("boundaries", "ungated"),
    defaults={"cpu": ("chunked",), "cuda": ("fused", "chunked")},
    work=work,
    tolerances={
        "float64": Tolerance(output=1e-11, gradient=1e-10, reason="sums of up to t and c terms in another order"),
        "float32": Tolerance(output=2e-5, gradient=1e-4, reason="rounding of fp32 states, added up over t tokens"),
        "bfloat16": Tolerance(output=8e-3, gradient=1.6e-2, reason="fp32 inside; results rounded once to 8 bits"),
        "float16": Tolerance(output=1e-3, gradient=2e-3, reason="fp32 inside; results rounded once to 11 bits"),
    },
    examples=(
        _example("float32"),
        _example("float32", b=1, documents=4),
        _example("float32", initial_state=True),
        _example("float32", b=1, documents=4, reversed=True),
        _example("float32", "decode", initial_state=True, t=1),
        _example("bfloat16"),
    ),
    benchmarks={
        "cpu": _example("float32", b=1, t=128, c=128, n=16),
        "cuda": _example("bfloat16", b=4, t=1024, c=2048, n=16),
    },
)


def _anything(workload: Workload, limits: DeviceLimits) -> str | None:
    return None


def _fused_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.dtype == "float64":
        return "computes in float32, not in float64"
    if workload.shape["n"] > 64:
        return f"holds up to 64 states a channel in registers, not {workload.shape['n']}"
    if limits.capability is not None and limits.capability < (8, 0):
        return "needs compute capability 8.0"
    return None


def _mamba_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.dtype == "float64":
        return "computes in float32, not in float64"
    if workload.shape["n"] > 256:
        return f"has up to 256 states a channel, not {workload.shape['n']}"
    if "documents" in workload.shape:
        return "knows no documents"
    if workload.options.get("reversed", False):
        return "scans forward only"
    if workload.options["dt_bias"] and not workload.options["softplus"]:
        return "differentiates the final state through a step of zero, which a bias without softplus moves"
    return "starts from zero: it has no initial state" if workload.options["initial_state"] else None


def _mamba_step_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.phase != "decode" or workload.shape["t"] != 1 or "documents" in workload.shape:
        return "makes one step of a decode, without a backward"
    return "computes in float32, not in float64" if workload.dtype == "float64" else None


def _chunked_launches(workload: Workload) -> int:
    """A loop over tokens within a loop over chunks, of one document after the other."""
    if workload.phase == "decode":
        return 13
    tokens = workload.shape["t"]
    return 10 + 9 * tokens // 5 if workload.phase == "forward" else 30 + 53 * tokens // 10


def _cut_of(workload: Workload) -> Cut:
    shape = workload.shape
    launch = launch_of(shape["n"], backward=workload.phase == "backward")
    return cut(launch, shape["b"], shape["t"], shape["c"])


def _steps_one_token(workload: Workload) -> bool:
    return workload.shape["t"] == 1 and "documents" not in workload.shape


def _fused_steps(workload: Workload) -> int:
    """Tokens that one program after the other walks, as `fused` cuts time; documents change nothing."""
    t = workload.shape["t"]
    if workload.phase == "backward":
        return backward_steps(_cut_of(workload), t)
    return 1 if _steps_one_token(workload) else forward_steps(_cut_of(workload), t)


def _fused_launches(workload: Workload) -> int:
    """Two where time is cut, else one; backward two sums over programs, and one over tiles of channels if there are
    several; packed, one that marks documents and one that fills their states.
    """
    if workload.phase != "backward":
        if _steps_one_token(workload):
            return 1
        packed = "documents" in workload.shape
        return 1 + (_cut_of(workload).others > 0) + (2 if packed else 0)
    found = _cut_of(workload)
    packed = "documents" in workload.shape
    marks_and_states = packed + (packed and bool(workload.options["initial_state"]))
    return 3 + (found.segments > 1) + (found.tiles > 1) + marks_and_states


_BOTH = frozenset({"cpu", "cuda"})
_CUDA = frozenset({"cuda"})
KERNELS = (
    Kernel(
        operator="selective_scan",
        name="reference",
        implementation=f"{_HERE}.definition:REFERENCE",
        supports=_anything,
        devices=_BOTH,
    ),
    Kernel(
        operator="selective_scan",
        name="chunked",
        implementation=f"{_HERE}.chunked",
        supports=_anything,
        devices=_BOTH,
        launches=_chunked_launches,
    ),
    Kernel(
        operator="selective_scan",
        name="fused",
        implementation=f"{_HERE}.fused",
        supports=_fused_supports,
        devices=frozenset({"cuda"}),
        requires=("triton>=3.6",),
        launches=_fused_launches,
        serial_steps=_fused_steps,
        replayable=True,
    ),
    Kernel(
        operator="selective_scan",
        name="mamba_scan",
        implementation=f"{_HERE}.mamba:Scan",
        supports=_mamba_supports,
        devices=_CUDA,
        requires=MAMBA,
        extensions=MAMBA_EXTENSIONS,
        first_calls_in_threads=False,
    ),
    Kernel(
        operator="selective_scan",
        name="mamba_step",
        implementation=f"{_HERE}.mamba:STEP",
        supports=_mamba_step_supports,
        devices=_CUDA,
        requires=MAMBA,
        extensions=MAMBA_EXTENSIONS,
        first_calls_in_threads=False,
    ),
)
