"""The records of segment attention: what it costs, and where each kernel applies."""

from __future__ import annotations

from subquad_kernels.catalogue import Kernel, Operator, Tolerance
from subquad_kernels.segment_attention.tilings import step_of, walks
from subquad_kernels.workload import (
    DeviceLimits,
    DType,
    Phase,
    Work,
    Workload,
    counted_documents,
    document_sizes,
    longest_document,
)

_HERE = "subquad_kernels.segment_attention"


def visible_pairs(workload: Workload) -> int:
    """How many (query, key) pairs one head of one sequence computes, or of all packed documents.

    sum over g of 1 + floor(g / segment_len), with g from m segment_len on. Documents of unknown lengths are taken as
    equally long.
    """
    segment_len, found = int(workload.options["segment_len"]), 0
    for length in counted_documents(workload):
        whole, rest = divmod(length, segment_len)
        found += length + segment_len * whole * (whole - 1) // 2 + rest * whole + length * workload.shape["m"]
    return found


def work(workload: Workload) -> Work:
    """As softmax attention, over the visible pairs alone; keys are read once, summaries among them."""
    shape, e = workload.shape, workload.element_bytes
    b, t, h, h_kv, k, v, m = (shape[axis] for axis in ("b", "t", "h", "h_kv", "k", "v", "m"))
    pairs = b * h * visible_pairs(workload)
    inputs = b * (t * h * k + (t + m) * h_kv * (k + v)) * e
    outputs, lse = b * t * h * v * e, b * h * t * 4
    if workload.phase == "backward":
        return Work(
            matmul_flops=2 * pairs * (3 * k + 2 * v),
            vector_flops=6 * pairs + 2 * b * t * h * v,
            transcendental_ops=pairs,
            bytes_moved=2 * inputs + 2 * outputs + lse,
        )
    return Work(
        matmul_flops=2 * pairs * (k + v),
        vector_flops=4 * pairs,
        transcendental_ops=pairs + b * h * t,
        bytes_moved=inputs + outputs + lse,
        saved_bytes=0 if workload.phase == "decode" else inputs + outputs + lse,
    )


def _example(dtype: DType, phase: Phase = "forward", segment_len: int = 5, **shape: int) -> Workload:
    axes = {"b": 2, "t": 37, "h": 4, "h_kv": 2, "k": 16, "v": 16, "m": 0} | shape
    options = {"segment_len": segment_len}
    return Workload(operator="segment_attention", shape=axes, dtype=dtype, phase=phase, options=options)


OPERATOR = Operator(
    name="segment_attention",
    summary="attention to oneself and to the summaries of earlier segments (SCOUT)",
    definition=f"{_HERE}.definition",
    tensors=("q", "k", "v", "summary_k", "summary_v", "cu_seqlens"),
    outputs=("out",),
    residuals=("lse",),
    defaults={"cpu": ("compacted",), "cuda": ("tiled", "compacted")},
    work=work,
    tolerances={
        "float64": Tolerance(output=1e-12, gradient=1e-11, reason="sums of up to 1 + t / segment_len terms, reordered"),
        "float32": Tolerance(output=2e-5, gradient=2e-4, reason="sums of up to 1 + t / segment_len terms, fp32"),
        "bfloat16": Tolerance(output=1.6e-2, gradient=3e-2, reason="probabilities rounded to 8 bits before P V"),
        "float16": Tolerance(output=2e-3, gradient=4e-3, reason="probabilities rounded to 11 bits before P V"),
    },
    examples=(
        _example("float32"),
        _example("float32", b=1, documents=4),
        _example("float32", "decode", t=1, m=6),
        _example("bfloat16", k=64, v=64),
    ),
    benchmarks={
        "cpu": _example("float32", segment_len=10, b=1, t=256, h=4, h_kv=4, k=64, v=64),
        "cuda": _example("bfloat16", segment_len=10, b=4, t=1024, h=16, h_kv=16, k=64, v=64),
    },
)


def _anything(workload: Workload, limits: DeviceLimits) -> str | None:
    return None


def _merge_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    shape = workload.shape
    if shape["k"] != shape["v"]:
        return f"keys and values differ in width ({shape['k']} and {shape['v']})"
    if limits.kind == "cuda":
        if workload.dtype == "float64":
            return "does not compute in float64 on CUDA"
        if shape["k"] % 8:
            return f"head width {shape['k']} is not a multiple of 8"
    return None


def _tiled_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.dtype not in ("float32", "bfloat16", "float16"):
        return f"does not compute in {workload.dtype}"
    for axis in ("k", "v"):
        if not 16 <= workload.shape[axis] <= 256:
            return f"head width {workload.shape[axis]} is not between 16 and 256"
    return None


def _step_of(workload: Workload) -> tuple[int, int] | None:
    """Where the kernel of one token runs: parts of its cache, and tiles of a part."""
    shape = workload.shape
    if workload.phase == "backward" or shape["t"] > 1 or "documents" in shape:
        return None
    return step_of(workload)


def _tiled_launches(workload: Workload) -> int:
    """Forward one; backward one where no summary is seen, else three; one that finds the summaries of documents.

    One token takes a second launch where its cache is split.
    """
    step = _step_of(workload)
    if step is not None:
        return 2 if step[0] > 1 else 1
    t, packed = workload.shape["t"], "documents" in workload.shape
    seen = packed or t > int(workload.options["segment_len"]) or workload.shape["m"] > 0
    return (3 if workload.phase == "backward" and seen else 1) + (1 if packed else 0)


def _tiled_steps(workload: Workload) -> int:
    """Tiles that the longest programs walk: summaries of a query; backward queries of a summary, in parts."""
    step = _step_of(workload)
    return step[1] if step is not None else 1 + sum(walk.longest for walk in walks(workload))


def _tiled_padding(workload: Workload) -> float:
    """Products of whole tiles, and backward scores twice: from a tile of queries, and from one of summaries."""
    if workload.phase == "decode":
        return 1.0
    return max(1.0, sum(walk.flops for walk in walks(workload)) / work(workload).matmul_flops)


def _compacted_launches(workload: Workload) -> int:
    """A loop over tiles of 256 queries, once more for each size of documents; little where no summary is seen."""
    if workload.phase == "decode" and workload.shape["m"]:
        return 24
    forward, sizes = workload.phase != "backward", document_sizes(workload)
    laid_out = (20 if forward else 30) * sizes if "documents" in workload.shape else 0
    if longest_document(workload) <= int(workload.options["segment_len"]):
        return laid_out + (8 if forward else 24) * sizes
    tiles = -(-longest_document(workload) // 256) + sizes - 1
    return laid_out + 7 * sizes + 24 * tiles if forward else laid_out + 26 * sizes + 30 * tiles


def _padded_documents(workload: Workload) -> tuple[int, ...]:
    """Documents as they are laid out: those of a size side by side, as long as a power of two."""
    lengths = counted_documents(workload)
    return tuple(1 << (n - 1).bit_length() for n in lengths if n) if "documents" in workload.shape else lengths


def _compacted_padding(workload: Workload) -> float:
    """Every query of a tile of 256 meets what its last one sees."""
    segment_len, m, pairs = int(workload.options["segment_len"]), workload.shape["m"], 0
    for length in _padded_documents(workload):
        ends = [min(length, start + 256) for start in range(0, length, 256)]
        pairs += length + sum((end - start) * (m + (end - 1) // segment_len) for start, end in zip([0, *ends], ends))
    return max(1.0, pairs / visible_pairs(workload))


def _merge_padding(workload: Workload) -> float:
    """Every query meets every summary."""
    segment_len, m = int(workload.options["segment_len"]), workload.shape["m"]
    pairs = sum(length * (1 + m + (length - 1) // segment_len) for length in _padded_documents(workload))
    return max(1.0, pairs / visible_pairs(workload))


def _merge_launches(workload: Workload) -> int:
    """Two calls of attention and their merge, once more for each size of documents, which are laid out before.

    Backward in half precision computes the outputs again, from casts.
    """
    if workload.phase == "decode" and workload.shape["m"]:
        return 29
    alone, merged, laid_out = 6, 29, 20 if "documents" in workload.shape else 0
    if workload.phase == "backward":
        again = workload.element_bytes == 2
        alone, merged, laid_out = 19 + 10 * again, 42 + 33 * again, laid_out * (1 + again)
    unseen = longest_document(workload) <= int(workload.options["segment_len"])
    return (laid_out + (alone if unseen else merged)) * document_sizes(workload)


_BOTH = frozenset({"cpu", "cuda"})
KERNELS = (
    Kernel(
        operator="segment_attention",
        name="reference",
        implementation=f"{_HERE}.definition:REFERENCE",
        supports=_anything,
        devices=_BOTH,
    ),
    Kernel(
        operator="segment_attention",
        name="compacted",
        implementation=f"{_HERE}.compacted",
        supports=_anything,
        devices=_BOTH,
        launches=_compacted_launches,
        padding=_compacted_padding,
    ),
    Kernel(
        operator="segment_attention",
        name="sdpa_merge",
        implementation=f"{_HERE}.sdpa_merge",
        supports=_merge_supports,
        devices=_BOTH,
        launches=_merge_launches,
        padding=_merge_padding,
    ),
    Kernel(
        operator="segment_attention",
        name="tiled",
        implementation=f"{_HERE}.tiled",
        supports=_tiled_supports,
        devices=frozenset({"cuda"}),
        requires=("triton>=3.6",),
        replayable=True,
        launches=_tiled_launches,
        serial_steps=_tiled_steps,
        padding=_tiled_padding,
    ),
)
