"""The records of the log-linear delta rule: what it costs, and where each kernel applies."""

from __future__ import annotations

from dataclasses import replace

from subquad_kernels.catalogue import Kernel, Operator, Tolerance
from subquad_kernels.log_linear_attention import declaration as log_linear
from subquad_kernels.log_linear_attention.declaration import CHUNK, slots
from subquad_kernels.workload import (
    DeviceLimits,
    DType,
    Option,
    Phase,
    Work,
    Workload,
    counted_documents,
    longest_of_sizes,
)

_HERE = "subquad_kernels.log_linear_delta_rule"


def work(workload: Workload) -> Work:
    """The products of the chunked form (README), a level's reads and transitions; one token: 7 n p for each slot.

    Bytes are those of log-linear attention, whose tensors are the same.
    """
    shape, options = workload.shape, workload.options
    b, t, h, n, p, m = (shape[axis] for axis in ("b", "t", "h", "n", "p", "m"))
    like = log_linear.work(replace(workload, operator="log_linear_attention"))
    rows, length = b * t * h, -(-t // max(1, shape.get("documents", 0)))
    if workload.phase == "decode":
        return Work(
            vector_flops=rows * (m * (7 * n * p + 2 * p) + 2 * n * p + 2 * n + 4 * p),
            transcendental_ops=like.transcendental_ops,
            bytes_moved=like.bytes_moved,
        )
    width = min(CHUNK, length)
    chunks = -(-length // CHUNK)
    between = slots(chunks - 1)
    # Keys with keys and queries, the solver, its products with keys and values: of a chunk, and of a chunk's state.
    products = rows * (width * (7 * n + width + 2 * p) + 2 * n * (n + p))
    # Half of the tokens read at a level, and go through a transition; then halves become one.
    products += rows * (between * n * (n + p) + 2 * m * n * p)
    products += rows // length * (chunks - 1) * 2 * n * n * (n + p)
    weights = rows * width * (3 + slots(CHUNK - 1))
    exponents = rows * width if options["decay"] != "none" else 0
    if workload.phase == "backward":
        return Work(
            matmul_flops=3 * products,
            vector_flops=3 * weights,
            transcendental_ops=2 * exponents,
            bytes_moved=like.bytes_moved,
            serial_steps=4 * (between + 1),
        )
    return Work(
        matmul_flops=products,
        vector_flops=weights,
        transcendental_ops=exponents,
        bytes_moved=like.bytes_moved,
        serial_steps=between + 1,
        saved_bytes=like.saved_bytes,
    )


def _example(
    dtype: DType, phase: Phase = "forward", *, full: bool = True, decay: str = "token", **shape: int
) -> Workload:
    axes = {"b": 2, "t": 150, "h": 4, "h_k": 2, "n": 12, "p": 20, "l": 6, "m": 0} | shape
    options: dict[str, Option] = {"decay": decay, "write_gate": full}
    return Workload(operator="log_linear_delta_rule", shape=axes, dtype=dtype, phase=phase, options=options)


OPERATOR = Operator(
    name="log_linear_delta_rule",
    summary="the delta rule over log t states of a Fenwick tree, each read with a weight of its own",
    definition=f"{_HERE}.definition",
    tensors=("q", "k", "v", "level_scales", "log_decay", "write_gate", "initial_state", "cu_seqlens"),
    outputs=("y", "final_state"),
    residuals=(),
    defaults={"cpu": ("chunked",), "cuda": ("chunked",)},
    work=work,
    tolerances={
        "float64": Tolerance(output=1e-11, gradient=1e-10, reason="a solve in every chunk, buckets in another order"),
        "float32": Tolerance(
            output=5e-5, gradient=2e-4,
            reason="a solve and log t transitions in a row, rounding at 2^-24 of their size; so do states over t",
        ),
        "bfloat16": Tolerance(output=8e-3, gradient=1.6e-2, reason="results rounded to 8 bits; computed in fp32"),
        "float16": Tolerance(output=1e-3, gradient=2e-3, reason="results rounded to 11 bits; computed in fp32"),
    },
    examples=(
        _example("float32"),
        _example("float32", decay="head", m=5),
        _example("float32", decay="none", full=False, b=1, documents=4),
        _example("float32", "decode", t=1, m=7),
        _example("bfloat16"),
    ),
    benchmarks={
        "cpu": _example("float32", b=1, t=128, h=2, h_k=2, n=64, p=64, l=15),
        "cuda": _example("bfloat16", b=4, t=1024, h=16, h_k=16, n=64, p=64, l=15),
    },
)  # fmt: skip


def _anything(workload: Workload, limits: DeviceLimits) -> str | None:
    return None


def _chunked_launches(workload: Workload) -> int:
    """Some for every level of the tree over chunks; packed, of each size of documents, and for what each document
    leaves, a state for every bit of its length.
    """
    if workload.phase == "decode":
        return 83
    forward = workload.phase == "forward"
    levels = [slots(-(-longest // CHUNK) - 1) for longest in longest_of_sizes(workload)]
    if "documents" not in workload.shape:
        return 72 + 18 * levels[0] if forward else 140 + 48 * levels[0]
    documents, states = workload.shape["documents"], sum(n.bit_count() for n in counted_documents(workload))
    if forward:
        return 30 + 78 * len(levels) + 11 * sum(levels) + 4 * documents + 3 * states
    return 177 * len(levels) + 53 * sum(levels) + 2 * documents + 12 * states


_BOTH = frozenset({"cpu", "cuda"})
KERNELS = (
    Kernel(
        operator="log_linear_delta_rule",
        name="reference",
        implementation=f"{_HERE}.definition:REFERENCE",
        supports=_anything,
        devices=_BOTH,
    ),
    Kernel(
        operator="log_linear_delta_rule",
        name="chunked",
        implementation=f"{_HERE}.chunked:CHUNKED",
        supports=_anything,
        devices=_BOTH,
        launches=_chunked_launches,
    ),
)
