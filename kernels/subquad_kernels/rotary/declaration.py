"""The records of the rotary embedding: what it costs, and where each kernel applies."""

from __future__ import annotations

from subquad_kernels.catalogue import Kernel, Operator, Tolerance
from subquad_kernels.workload import DeviceLimits, DType, Option, Phase, Work, Workload

_HERE = "subquad_kernels.rotary"


def work(workload: Workload) -> Work:
    """3 FLOPs per feature, and a sine and a cosine per token and pair; the backward is the same rotation back.

    Angles that are given are read, and have a gradient: its products read queries and keys again.
    """
    shape, e = workload.shape, workload.element_bytes
    b, t, h, h_kv, k = (shape[axis] for axis in ("b", "t", "h", "h_kv", "k"))
    documents = shape.get("documents", 0)
    features = b * t * (h + h_kv) * k
    boundaries = 4 * (documents + 1) if documents else 0
    if (given := workload.options.get("angles")) is not None:
        pairs, turns = int(workload.options["pairs"]), 1 if given == "shared" else h
        angles, turning = b * t * turns * pairs, 2 * b * t * (h + h_kv) * pairs
        back = workload.phase == "backward"
        return Work(
            vector_flops=(5 if back else 3) * turning,
            transcendental_ops=2 * angles,
            bytes_moved=(3 if back else 2) * features * e + (2 if back else 1) * angles * max(4, e),
            saved_bytes=features * e + angles * max(4, e) if workload.phase == "forward" else 0,
        )
    return Work(
        vector_flops=3 * features,
        transcendental_ops=t * k,
        bytes_moved=2 * features * e + boundaries,
        saved_bytes=boundaries if workload.phase == "forward" else 0,
    )


def _example(dtype: DType, phase: Phase = "forward", *, angles: str = "", pairs: int = 5, **shape: int) -> Workload:
    axes = {"b": 2, "t": 37, "h": 4, "h_kv": 2, "k": 16} | shape
    options: dict[str, Option] = {"theta": 1e6}
    options |= {"angles": angles, "pairs": pairs} if angles else {}
    return Workload(operator="rotary", shape=axes, dtype=dtype, phase=phase, options=options)


OPERATOR = Operator(
    name="rotary",
    summary="rotation of queries and keys by their positions",
    definition=f"{_HERE}.definition",
    tensors=("q", "k", "angles", "cu_seqlens", "position"),
    outputs=("rotated_q", "rotated_k"),
    residuals=(),
    defaults={"cpu": ("tables",), "cuda": ("fused", "tables")},
    work=work,
    tolerances={
        "float64": Tolerance(output=1e-12, gradient=1e-12, reason="sine and cosine by another formula"),
        "float32": Tolerance(output=2e-6, gradient=2e-6, reason="sine and cosine rounded to 24 bits"),
        "bfloat16": Tolerance(output=8e-3, gradient=8e-3, reason="fp32 inside; results rounded once to 8 bits"),
        "float16": Tolerance(output=1e-3, gradient=1e-3, reason="fp32 inside; results rounded once to 11 bits"),
    },
    examples=(
        _example("float32"),
        _example("float32", b=1, documents=4),
        _example("float32", "decode", t=1),
        _example("bfloat16"),
        _example("float32", angles="shared"),
        _example("float32", angles="own", h_kv=4, pairs=8),
        _example("bfloat16", angles="own", h_kv=4),
    ),
    benchmarks={
        "cpu": _example("float32", b=1, t=128, h=4, h_kv=4, k=64),
        "cuda": _example("bfloat16", b=4, t=1024, h=16, h_kv=16, k=64),
    },
)


def _anything(workload: Workload, limits: DeviceLimits) -> str | None:
    return None


def _fused_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.dtype == "float64":
        return "computes in float32, not in float64"
    if workload.shape["k"] > 512:
        return f"holds heads of up to 512 features, not {workload.shape['k']}"
    return None


def _tables_launches(workload: Workload) -> int:
    """Two tables, and products and sums of halves for q and for k; positions where documents are packed."""
    if "angles" in workload.options:
        return 44 if workload.phase == "backward" else 24
    return 27 + (5 if "documents" in workload.shape else 0)


def _fused_steps(workload: Workload) -> int:
    """Heads that a program turns one after the other, where they share angles that are given."""
    if (given := workload.options.get("angles")) is None:
        return 1
    h, h_kv = workload.shape["h"], workload.shape["h_kv"]
    return h + h_kv if given == "shared" else (h + h_kv) // h


_BOTH = frozenset({"cpu", "cuda"})
KERNELS = (
    Kernel(
        operator="rotary",
        name="reference",
        implementation=f"{_HERE}.definition:REFERENCE",
        supports=_anything,
        devices=_BOTH,
    ),
    Kernel(
        operator="rotary",
        name="tables",
        implementation=f"{_HERE}.tables",
        supports=_anything,
        devices=_BOTH,
        launches=_tables_launches,
    ),
    Kernel(
        operator="rotary",
        name="fused",
        implementation=f"{_HERE}.fused",
        supports=_fused_supports,
        serial_steps=_fused_steps,
        devices=frozenset({"cuda"}),
        requires=("triton>=3.6",),
        replayable=True,
    ),
)
