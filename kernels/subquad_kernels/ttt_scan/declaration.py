"""The records of test-time training: what it costs, and where each kernel applies."""

from __future__ import annotations

from subquad_kernels.catalogue import Kernel, Operator, Tolerance
from subquad_kernels.workload import (
    DeviceLimits,
    DType,
    Option,
    Phase,
    Work,
    Workload,
    document_sizes,
    longest_of_sizes,
)

_HERE = "subquad_kernels.ttt_scan"

INNER = ("linear", "mlp")
EXPANSION = 4
"""Width inside the two-layer model / width of a head (Sun et al. 2024, section 2.7)."""


def state_size(inner: str, k: int) -> int:
    """Numbers of one head's W: weights and biases of one map, or of two."""
    return k * (k + 1) if inner == "linear" else EXPANSION * k * (k + 1) + k * (EXPANSION * k + 1)


def work(workload: Workload) -> Work:
    """Three products with W a token (six or seven of each layer for `mlp`), and those of a mini-batch with itself."""
    shape, options, e = workload.shape, workload.options, workload.element_bytes
    b, t, h, k = (shape[axis] for axis in ("b", "t", "h", "k"))
    inner, c = str(options["inner"]), int(options["mini_batch"])
    documents = shape.get("documents", 0)
    exact = max(4, e)  # bytes of one element of rates, norms and states
    rows, states, size = b * t * h, documents or b, state_size(inner, k)
    state_bytes = states * 2 * h * size * exact
    bounds = 4 * (documents + 1) if documents else 0
    inputs = rows * (3 * k * e + exact) + (c + 2 * h * k) * exact + state_bytes
    outputs = rows * k * e + state_bytes
    length = -(-t // max(1, documents))
    width = min(c, length)
    # Keys forward, queries forward, the update; for `mlp` also the gradient through the second map.
    products = 3 if inner == "linear" else 3.5
    inside = k if inner == "linear" else EXPANSION * k
    mixed = 2 * width * (2 * k if inner == "linear" else 2 * (k + inside))
    matmul = rows * (int(2 * products * size) + mixed)
    vector = rows * (30 * k + (0 if inner == "linear" else 20 * inside))
    special = rows * (2 + (0 if inner == "linear" else 2 * inside))
    if workload.phase == "decode":
        return Work(
            vector_flops=matmul + vector + 4 * rows * size,
            transcendental_ops=special,
            bytes_moved=inputs + bounds + outputs,
        )
    batches = -(-length // c)
    if workload.phase == "backward":
        return Work(
            matmul_flops=3 * matmul,
            vector_flops=3 * vector,
            transcendental_ops=2 * special,
            bytes_moved=2 * inputs + bounds + outputs,
            serial_steps=3 * batches,
        )
    return Work(
        matmul_flops=matmul,
        vector_flops=vector,
        transcendental_ops=special,
        bytes_moved=inputs + bounds + outputs,
        serial_steps=batches,
        saved_bytes=inputs + outputs,
    )


def _example(dtype: DType, phase: Phase = "forward", *, inner: str = "linear", **shape: int) -> Workload:
    axes = {"b": 2, "t": 60, "h": 2, "k": 16} | shape
    options: dict[str, Option] = {"inner": inner, "mini_batch": 16}
    return Workload(operator="ttt_scan", shape=axes, dtype=dtype, phase=phase, options=options)


OPERATOR = Operator(
    name="ttt_scan",
    summary="a small model as state, trained by mini-batch gradient descent on the tokens it meets (TTT)",
    definition=f"{_HERE}.definition",
    tensors=(
        "q", "k", "v", "rates", "token_scales", "norm_weight", "norm_bias", "initial_state", "cu_seqlens",
    ),
    outputs=("y", "final_state"),
    residuals=(),
    defaults={"cpu": ("dual_form",), "cuda": ("dual_form",)},
    work=work,
    tolerances={
        "float64": Tolerance(output=1e-10, gradient=1e-9, reason="sums of a mini-batch in another order, times 1/std"),
        "float32": Tolerance(
            output=1e-4, gradient=1e-3,
            reason="rounding of W and of sums over a mini-batch, magnified by 1 / std in two norms a token",
        ),
        "bfloat16": Tolerance(output=8e-3, gradient=1.6e-2, reason="results rounded to 8 bits; computed in fp32"),
        "float16": Tolerance(output=1e-3, gradient=2e-3, reason="results rounded to 11 bits; computed in fp32"),
    },
    examples=(
        _example("float32"),
        _example("float32", inner="mlp"),
        _example("float32", b=1, documents=4),
        _example("float32", "decode", t=1, inner="mlp"),
        _example("float32", "decode", t=1),
        _example("bfloat16"),
    ),
    benchmarks={
        "cpu": _example("float32", b=1, t=128, h=2, k=32),
        "cuda": _example("bfloat16", b=4, t=1024, h=16, k=64),
    },
)  # fmt: skip


def _anything(workload: Workload, limits: DeviceLimits) -> str | None:
    return None


def _dual_launches(workload: Workload) -> int:
    """A loop over mini-batches, once more for each size of documents; an inner network of two layers takes more."""
    if workload.phase == "decode":
        return 102
    steps = sum(-(-longest // int(workload.options["mini_batch"])) for longest in longest_of_sizes(workload))
    each = 56 if workload.phase == "forward" else 181
    laid_out = 20 + 25 * document_sizes(workload) if "documents" in workload.shape else 5
    return laid_out + steps * (each if workload.options["inner"] == "linear" else 5 * each // 3)


_BOTH = frozenset({"cpu", "cuda"})
KERNELS = (
    Kernel(
        operator="ttt_scan",
        name="reference",
        implementation=f"{_HERE}.definition:REFERENCE",
        supports=_anything,
        devices=_BOTH,
    ),
    Kernel(
        operator="ttt_scan",
        name="dual_form",
        implementation=f"{_HERE}.dual_form:DUAL_FORM",
        supports=_anything,
        devices=_BOTH,
        launches=_dual_launches,
    ),
)
