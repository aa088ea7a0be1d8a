"""The records of attention to a ring: what it costs, and where each kernel applies."""

from __future__ import annotations

from subquad_kernels.catalogue import Kernel, Operator, Tolerance
from subquad_kernels.segment_attention.tilings import step_of
from subquad_kernels.workload import DeviceLimits, DType, Work, Workload

_HERE = "subquad_kernels.cached_attention"


def work(workload: Workload) -> Work:
    """As softmax attention of one query, over all places of the ring."""
    shape, e = workload.shape, workload.element_bytes
    b, t, h, h_kv, k, v, m = (shape[axis] for axis in ("b", "t", "h", "h_kv", "k", "v", "m"))
    pairs = b * t * h * (1 + m)
    inputs, outputs = b * (t * h * k + (t + m) * h_kv * (k + v)) * e, b * t * h * v * e
    if workload.phase == "backward":
        return Work(
            matmul_flops=2 * pairs * (3 * k + 2 * v),
            vector_flops=6 * pairs + 2 * b * t * h * v,
            transcendental_ops=pairs,
            bytes_moved=2 * inputs + 2 * outputs,
        )
    return Work(
        matmul_flops=2 * pairs * (k + v),
        vector_flops=4 * pairs,
        transcendental_ops=pairs,
        bytes_moved=inputs + outputs,
        saved_bytes=0 if workload.phase == "decode" else inputs + outputs,
    )


def _example(dtype: DType, segment_len: int = 1, **shape: int) -> Workload:
    axes = {"b": 2, "t": 1, "h": 4, "h_kv": 2, "k": 16, "v": 16, "m": 37} | shape
    options = {"segment_len": segment_len}
    return Workload(operator="cached_attention", shape=axes, dtype=dtype, phase="decode", options=options)


OPERATOR = Operator(
    name="cached_attention",
    summary="attention of one token to itself and to a cache of fixed size, whose length is on the device",
    definition=f"{_HERE}.definition",
    tensors=("q", "k", "v", "keys", "values", "position"),
    outputs=("out",),
    residuals=(),
    defaults={"cpu": ("reference",), "cuda": ("tiled", "reference")},
    work=work,
    tolerances={
        "float64": Tolerance(output=1e-12, gradient=1e-11, reason="sums of up to 1 + m terms in another order"),
        "float32": Tolerance(output=2e-5, gradient=2e-4, reason="sums of up to 1 + m terms in another order, fp32"),
        "bfloat16": Tolerance(output=1.6e-2, gradient=3e-2, reason="sums in fp32; weights and results of 8 bits"),
        "float16": Tolerance(output=2e-3, gradient=4e-3, reason="sums in fp32; weights and results of 11 bits"),
    },
    examples=(
        _example("float32"),
        _example("float32", segment_len=5, h_kv=4, m=6),  # one tile, and heads of their own
        _example("bfloat16", k=64, v=64, m=600),  # split
    ),
)


def _anything(workload: Workload, limits: DeviceLimits) -> str | None:
    return None


def _tiled_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.dtype not in ("float32", "bfloat16", "float16"):
        return f"does not compute in {workload.dtype}"
    for axis in ("k", "v"):
        if not 16 <= workload.shape[axis] <= 256:
            return f"head width {workload.shape[axis]} is not between 16 and 256"
    return None


def _tiled_launches(workload: Workload) -> int:
    """One, and one that weighs the parts of a ring which is split."""
    return 2 if step_of(workload)[0] > 1 else 1


def _tiled_steps(workload: Workload) -> int:
    """Tiles of a part."""
    return step_of(workload)[1]


_BOTH = frozenset({"cpu", "cuda"})
KERNELS = (
    Kernel(
        operator="cached_attention",
        name="reference",
        implementation=f"{_HERE}.definition:REFERENCE",
        supports=_anything,
        devices=_BOTH,
    ),
    Kernel(
        operator="cached_attention",
        name="tiled",
        # Beside the kernel that it shares with segment attention, so that its version tells of changes there.
        implementation="subquad_kernels.segment_attention.cached_step",
        supports=_tiled_supports,
        devices=frozenset({"cuda"}),
        requires=("triton>=3.6",),
        replayable=True,
        launches=_tiled_launches,
        serial_steps=_tiled_steps,
    ),
)
