"""The records of log-linear attention: what it costs, and where each kernel applies."""

from __future__ import annotations

from subquad_kernels.catalogue import Kernel, Operator, Tolerance
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

_HERE = "subquad_kernels.log_linear_attention"

CHUNK = 64
"""Tokens that are mixed by one masked matrix product, a power of two: its levels are then those of places within it."""


def slots(tokens: int) -> int:
    """States after so many tokens: the bits of their number."""
    return tokens.bit_length()


def work(workload: Workload) -> Work:
    """Chunks of 64 as linear attention, scores once a key head, and a read of n p a token and head a level of two."""
    shape, options, e = workload.shape, workload.options, workload.element_bytes
    b, t, h, h_k, n, p, levels, m = (shape[axis] for axis in ("b", "t", "h", "h_k", "n", "p", "l", "m"))
    documents = shape.get("documents", 0)
    exact = max(4, e)  # bytes of one element of gates and states
    rows, states, length = b * t * h, documents or b, -(-t // max(1, documents))
    per_token = (options["decay"] == "token") + bool(options["write_gate"])
    inputs = b * t * (2 * h_k * n + h * p) * e + rows * (levels + per_token) * exact
    inputs += h * exact if options["decay"] == "head" else 0
    inputs += states * m * h * n * p * exact
    bounds = 4 * (documents + 1) if documents else 0
    # A call that goes on after m slots is taken to stand in the middle of their span.
    after = slots((3 * 2**m // 4 if m else 0) + t)
    outputs = rows * p * e + states * after * h * n * p * exact
    moved = inputs + bounds + outputs
    if workload.phase == "decode":
        return Work(
            vector_flops=rows * (m * (4 * n * p + 2 * p) + 2 * n * p + 2 * n + 4 * p),
            transcendental_ops=rows if options["decay"] != "none" else 0,
            bytes_moved=moved,
        )
    width = min(CHUNK, length)
    between = slots(max(0, -(-length // CHUNK) - 1))
    # Scores and values within a chunk, writes of a chunk, reads of half the levels between, of all slots handed in.
    products = b * t * width * (h_k * n + h * p) + rows * (2 + between + 2 * m) * n * p
    weights = rows * width * (3 + slots(CHUNK - 1))
    exponents = rows * width // 2 if options["decay"] != "none" else 0
    if workload.phase == "backward":
        return Work(
            matmul_flops=3 * products,
            vector_flops=3 * weights,
            transcendental_ops=2 * exponents,
            bytes_moved=moved + inputs,
            serial_steps=4 * (between + 1),
        )
    return Work(
        matmul_flops=products,
        vector_flops=weights,
        transcendental_ops=exponents,
        bytes_moved=moved,
        serial_steps=between + 1,
        saved_bytes=inputs + outputs,
    )


def _example(
    dtype: DType, phase: Phase = "forward", *, full: bool = False, decay: str = "token", **shape: int
) -> Workload:
    axes = {"b": 2, "t": 150, "h": 4, "h_k": 2, "n": 12, "p": 20, "l": 6, "m": 0} | shape
    options: dict[str, Option] = {"decay": decay, "write_gate": full}
    return Workload(operator="log_linear_attention", shape=axes, dtype=dtype, phase=phase, options=options)


OPERATOR = Operator(
    name="log_linear_attention",
    summary="linear attention over log t states of a Fenwick tree, each read with a weight of its own",
    definition=f"{_HERE}.definition",
    tensors=("q", "k", "v", "level_scales", "log_decay", "write_gate", "initial_state", "cu_seqlens"),
    outputs=("y", "final_state"),
    residuals=(),
    defaults={"cpu": ("chunked",), "cuda": ("chunked",)},
    work=work,
    tolerances={
        "float64": Tolerance(output=1e-11, gradient=1e-10, reason="sums over chunks and buckets in another order"),
        "float32": Tolerance(
            output=5e-5, gradient=2e-4,
            reason="sums of log decays over a chunk round at 2^-24 of their size; rounding of fp32 states over t",
        ),
        "bfloat16": Tolerance(output=8e-3, gradient=1.6e-2, reason="results rounded to 8 bits; computed in fp32"),
        "float16": Tolerance(output=1e-3, gradient=2e-3, reason="results rounded to 11 bits; computed in fp32"),
    },
    examples=(
        _example("float32"),
        _example("float32", decay="head", full=True, m=5),
        _example("float32", decay="none", b=1, documents=4, full=True),
        _example("float32", "decode", t=1, full=True, m=7),
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
        return 73
    forward = workload.phase == "forward"
    levels = [slots(-(-longest // CHUNK) - 1) for longest in longest_of_sizes(workload)]
    if "documents" not in workload.shape:
        return 50 + 13 * levels[0] if forward else 105 + 40 * levels[0]
    documents, states = workload.shape["documents"], sum(n.bit_count() for n in counted_documents(workload))
    if forward:
        return 30 + 60 * len(levels) + 10 * sum(levels) + 7 * documents + 2 * states
    return 36 + 107 * len(levels) + 36 * sum(levels) + 18 * documents + 11 * states


_BOTH = frozenset({"cpu", "cuda"})
KERNELS = (
    Kernel(
        operator="log_linear_attention",
        name="reference",
        implementation=f"{_HERE}.definition:REFERENCE",
        supports=_anything,
        devices=_BOTH,
    ),
    Kernel(
        operator="log_linear_attention",
        name="chunked",
        implementation=f"{_HERE}.chunked:CHUNKED",
        supports=_anything,
        devices=_BOTH,
        launches=_chunked_launches,
    ),
)
