"""The records of gated linear attention: what it costs, and where each kernel applies."""

from __future__ import annotations

from subquad_kernels.catalogue import Kernel, Operator, Tolerance
from subquad_kernels.optional_packages import FLA, half_only
from subquad_kernels.workload import (
    ELEMENT_BYTES,
    DeviceLimits,
    DType,
    Option,
    Phase,
    Work,
    Workload,
    longest_document,
    token_steps,
)

_HERE = "subquad_kernels.gated_linear_attention"

_CHUNK = 64
"""The chunk of which work is counted, that of `fused` and `chunked`."""
_DECAYS = 4
"""Exponentials a key channel and token where decays are mild: to and from the ends of a chunk, and of its product."""


def stretch_len(n: int, p: int) -> int:
    """Tokens between two saved states: a state of n p numbers costs no more memory than a few tokens' worth.

    256 for heads of up to 64 x 64, so that 32,768 tokens of 16 heads are 2048 programs; 512, 1024 for wider ones.
    """
    return 256 if n * p <= 64 * 64 else 512 if n * p <= 128 * 128 else 1024


def work(workload: Workload) -> Work:
    """4 n p FLOPs to write and read the state, 64 (n + p) within a chunk of 64, twice as many and more backward."""
    shape, options, e = workload.shape, workload.options, workload.element_bytes
    b, t, h, n, p = (shape[axis] for axis in ("b", "t", "h", "n", "p"))
    documents = shape.get("documents", 0)
    exact = max(4, e)  # bytes of one element of a state
    decay_bytes = ELEMENT_BYTES[str(options["decay_dtype"])]
    heads = b * t * h
    states = (documents or b) * h * n * p * exact
    inputs = heads * ((2 * n + p) * e + n * decay_bytes)
    inputs += states if options["initial_state"] else 0
    inputs += h * n * exact if options["bonus"] else 0
    inputs += 4 * (documents + 1) if documents else 0
    outputs = heads * p * e + states
    stretch = stretch_len(n, p)
    residuals = (t // stretch if documents else b * ((t - 1) // stretch)) * h * n * p * exact
    length = -(-t // max(1, documents))
    chunk = 1 if workload.phase == "decode" else min(_CHUNK, length)
    steps = -(-length // chunk)
    decays = heads * n * (1 if workload.phase == "decode" else _DECAYS)
    if workload.phase == "backward":
        return Work(
            matmul_flops=heads * (10 * n * p + 3 * chunk * (n + p)),
            vector_flops=heads * (20 * n + 3 * n * p // chunk) + 4 * decays,
            transcendental_ops=2 * decays,
            bytes_moved=2 * inputs - (4 * (documents + 1) if documents else 0) + residuals + outputs,
            serial_steps=2 * steps,
        )
    return Work(
        matmul_flops=heads * (4 * n * p + chunk * (n + p)) if workload.phase == "forward" else 0,
        vector_flops=heads * (5 * n * p if workload.phase == "decode" else 4 * n + n * p // chunk) + 2 * decays,
        transcendental_ops=decays,
        bytes_moved=inputs + outputs + residuals,
        serial_steps=steps,
        saved_bytes=0 if workload.phase == "decode" else inputs + outputs + residuals,
    )


def _example(
    dtype: DType, phase: Phase = "forward", *, read: str = "after", state: bool = False, **shape: int
) -> Workload:
    axes = {"b": 2, "t": 37, "h": 2, "n": 16, "p": 24} | shape
    options: dict[str, Option] = {
        "read": read,
        "bonus": read == "before",
        "initial_state": state,
        "decay_dtype": "float32",
    }
    return Workload(operator="gated_linear_attention", shape=axes, dtype=dtype, phase=phase, options=options)


OPERATOR = Operator(
    name="gated_linear_attention",
    summary="linear attention with a decay per key channel and token (GLA, HGRN2), or read before the write (RWKV-6)",
    definition=f"{_HERE}.definition",
    tensors=("q", "k", "v", "log_decay", "bonus", "initial_state", "cu_seqlens"),
    outputs=("y", "final_state"),
    residuals=("boundaries",),
    defaults={"cpu": ("chunked",), "cuda": ("fused", "chunked")},
    work=work,
    tolerances={
        "float64": Tolerance(output=1e-11, gradient=1e-10, reason="sums of up to t, n and p terms in another order"),
        "float32": Tolerance(output=2e-5, gradient=1e-4, reason="rounding of fp32 states, added up over t tokens"),
        "bfloat16": Tolerance(
            output=1e-2, gradient=2e-2, reason="factors of matrix products are rounded to 8 bits, sums and states fp32"
        ),
        "float16": Tolerance(
            output=2e-3, gradient=4e-3, reason="factors of matrix products are rounded to 11 bits, sums fp32"
        ),
    },
    examples=(
        _example("float32"),
        _example("float32", b=1, documents=4),
        _example("float32", read="before", state=True),
        _example("float32", "decode", state=True, t=1),
        _example("bfloat16"),
    ),
    benchmarks={
        "cpu": _example("float32", b=1, t=128, h=2, n=64, p=64),
        "cuda": _example("bfloat16", b=4, t=1024, h=16, n=64, p=64),
    },
)


def _anything(workload: Workload, limits: DeviceLimits) -> str | None:
    return None


def _fused_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.dtype == "float64" or workload.options["decay_dtype"] == "float64":
        return "computes in float32, not in float64"
    for axis in ("n", "p"):
        if workload.shape[axis] > 256:
            return f"holds states of up to 256 x 256, not {axis} = {workload.shape[axis]}"
    if limits.capability is not None and limits.capability < (8, 0):
        return "needs compute capability 8.0"
    return None


def _fla_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    return half_only(workload)


def _fla_recurrent_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.dtype == "float64" or workload.options["decay_dtype"] == "float64":
        return "computes in float32, not in float64"
    if workload.options["read"] == "before" and workload.phase != "decode":
        return "has no gradient of the final state where the state is read before the write"
    return None


def _chunked_launches(workload: Workload) -> int:
    """A loop over chunks between products of all of them."""
    if workload.phase == "decode":
        return 7
    steps = -(-longest_document(workload) // 64)
    return 85 + 18 * steps if workload.phase == "forward" else 190 + 30 * steps


def _fused_steps(workload: Workload) -> int:
    """Chunks of a stretch, states that pass from stretch to stretch, a tenth of a step each, and a program a chunk."""
    shape = workload.shape
    stretch, t = stretch_len(shape["n"], shape["p"]), longest_document(workload)
    walks = 2 if workload.phase == "backward" else 1
    return walks * (-(-min(t, stretch) // _CHUNK) + t // stretch // 10 + 1)


_BOTH = frozenset({"cpu", "cuda"})
_CUDA = frozenset({"cuda"})
KERNELS = (
    Kernel(
        operator="gated_linear_attention",
        name="reference",
        implementation=f"{_HERE}.definition:REFERENCE",
        supports=_anything,
        devices=_BOTH,
    ),
    Kernel(
        operator="gated_linear_attention",
        name="chunked",
        implementation=f"{_HERE}.chunked",
        supports=_anything,
        devices=_BOTH,
        launches=_chunked_launches,
    ),
    Kernel(
        operator="gated_linear_attention",
        name="fused",
        implementation=f"{_HERE}.fused",
        supports=_fused_supports,
        devices=frozenset({"cuda"}),
        requires=("triton>=3.6",),
        serial_steps=_fused_steps,
        replayable=True,
    ),
    Kernel(
        operator="gated_linear_attention",
        name="fla_chunked",
        implementation=f"{_HERE}.fla:CHUNKED",
        supports=_fla_supports,
        devices=_CUDA,
        requires=FLA,
        first_calls_in_threads=False,
    ),
    Kernel(
        operator="gated_linear_attention",
        name="fla_recurrent",
        implementation=f"{_HERE}.fla:RECURRENT",
        supports=_fla_recurrent_supports,
        devices=_CUDA,
        requires=FLA,
        first_calls_in_threads=False,
        serial_steps=token_steps,
    ),
)
