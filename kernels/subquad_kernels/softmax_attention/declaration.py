"""The records of softmax attention: what it costs, and where each kernel applies."""

from __future__ import annotations

from subquad_kernels.catalogue import Kernel, Operator, Tolerance
from subquad_kernels.optional_packages import FLASH_ATTN, FLASH_ATTN_EXTENSIONS
from subquad_kernels.workload import DeviceLimits, DType, Phase, Work, Workload, counted_documents

_HERE = "subquad_kernels.softmax_attention"


def visible_pairs(workload: Workload) -> int:
    """How many (query, key) pairs one head of one sequence computes, or of all packed documents.

    Documents of unknown lengths are taken as equally long.
    """
    causal, window = bool(workload.options["causal"]), int(workload.options["window"])
    if "documents" in workload.shape:
        return sum(_pairs(length, length, causal, window) for length in counted_documents(workload))
    return _pairs(workload.shape["t"], workload.shape["s"], causal, window)


def visible_keys(workload: Workload) -> int:
    """How many keys of a sequence any of its queries sees: the last ones of a cache, if there is a window."""
    t, s, window = workload.shape["t"], workload.shape["s"], int(workload.options["window"])
    return min(s, t + window - 1) if window else s


def _pairs(t: int, s: int, causal: bool, window: int) -> int:
    if not causal:
        # Behind as if causal, and ahead as far as there are keys: the last query has none ahead, as the first behind.
        return _pairs(t, s, True, window) + _pairs(t, t, True, window) - t if window else t * s
    first, last = s - t + 1, s  # keys that the first and the last query may see
    if not window or last <= window:
        return t * (first + last) // 2
    if first >= window:
        return t * window
    growing = window - first
    return growing * (first + window - 1) // 2 + (t - growing) * window


def work(workload: Workload) -> Work:
    """Two matrix products forward (scores, values); five backward (scores again, dP, dQ, dK, dV)."""
    shape, e = workload.shape, workload.element_bytes
    b, t, h, h_kv, k, v = (shape[axis] for axis in ("b", "t", "h", "h_kv", "k", "v"))
    pairs = b * h * visible_pairs(workload)
    inputs = b * (t * h * k + visible_keys(workload) * h_kv * (k + v)) * e
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


def _example(
    dtype: DType, phase: Phase = "forward", window: int = 0, causal: bool = True, **shape: int
) -> Workload:
    axes = {"b": 2, "t": 37, "s": 37, "h": 4, "h_kv": 2, "k": 16, "v": 16} | shape
    options = {"causal": causal, "window": window}
    return Workload(operator="softmax_attention", shape=axes, dtype=dtype, phase=phase, options=options)


OPERATOR = Operator(
    name="softmax_attention",
    summary="softmax attention: causal, bidirectional or windowed, grouped queries, packed",
    definition=f"{_HERE}.definition",
    tensors=("q", "k", "v", "cu_seqlens"),
    outputs=("out",),
    residuals=("lse",),
    defaults={"cpu": ("sdpa_flash",), "cuda": ("sdpa_flash", "sdpa_efficient", "reference")},
    work=work,
    tolerances={
        "float64": Tolerance(output=1e-12, gradient=1e-11, reason="sums of up to s terms in another order"),
        "float32": Tolerance(output=2e-5, gradient=2e-4, reason="sums of up to s terms in another order, fp32"),
        "bfloat16": Tolerance(output=1.6e-2, gradient=3e-2, reason="probabilities rounded to 8 bits before P V"),
        "float16": Tolerance(output=2e-3, gradient=4e-3, reason="probabilities rounded to 11 bits before P V"),
    },
    examples=(
        _example("float32"),
        _example("float32", window=7),
        _example("float32", window=7, causal=False),
        _example("float32", b=1, documents=4),
        _example("float32", "decode", t=1),
        _example("bfloat16", k=64, v=64),
    ),
    benchmarks={
        "cpu": _example("float32", b=1, t=128, s=128, h=4, h_kv=4, k=64, v=64),
        "cuda": _example("bfloat16", b=4, t=1024, s=1024, h=16, h_kv=16, k=64, v=64),
    },
)


def _anything(workload: Workload, limits: DeviceLimits) -> str | None:
    return None


def _flash_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    shape = workload.shape
    if shape["k"] != shape["v"]:
        return f"keys and values differ in width ({shape['k']} and {shape['v']})"
    if limits.kind == "cuda":
        if workload.dtype not in ("bfloat16", "float16"):
            return f"computes in bfloat16 or float16 on CUDA, not {workload.dtype}"
        if shape["k"] % 8 or shape["k"] > 256:
            return f"head width {shape['k']} is not a multiple of 8 up to 256"
    elif workload.options["window"] and workload.phase != "decode" and shape["s"] > 4096:
        return "a window longer sequences than 4096 needs is a dense mask here"
    return None


def _efficient_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    shape = workload.shape
    if "documents" in shape or workload.options["window"]:
        return "knows neither packed sequences nor windows"
    if workload.options["causal"] and shape["t"] != shape["s"] and shape["t"] != 1:
        return "aligns the causal mask to the first key, not to the last"
    if workload.dtype == "float64":
        return "does not compute in float64"
    if shape["k"] % 8 or shape["v"] % 8:
        return f"head widths {shape['k']}, {shape['v']} are not multiples of 8"
    return None


def _cudnn_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.dtype not in ("bfloat16", "float16"):
        return f"computes in bfloat16 or float16, not {workload.dtype}"
    if workload.shape["k"] > 128 or workload.shape["v"] > 128:
        return f"head width {workload.shape['k']} is above 128"
    if limits.capability is not None and limits.capability < (8, 0):
        return "needs compute capability 8.0"
    return _efficient_supports(workload, limits)


def _flex_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.dtype == "float64":
        return "does not compute in float64"
    if workload.shape["k"] & (workload.shape["k"] - 1) or workload.shape["k"] < 16:
        return f"head width {workload.shape['k']} is not a power of two from 16"
    if workload.phase == "decode":
        return "is compiled per length; a decode grows by one token a call"
    return None


def _windowed_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if not workload.options["window"]:
        return "computes windows only"
    if workload.shape["t"] != workload.shape["s"]:
        return "needs as many queries as keys"
    return None


def _flash_attn_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    shape = workload.shape
    if limits.capability is not None and limits.capability < (8, 0):
        return "needs compute capability 8.0"
    if "documents" in shape and shape["t"] == 1:
        return "takes one packed token for one of every document"
    return _flash_supports(workload, limits)


def _windowed_launches(workload: Workload) -> int:
    """Products over tiles of the window, and the lay-out of documents; a third tile where both sides are seen."""
    tiles = 24 if workload.phase == "forward" else 42
    ahead = 0 if workload.options["causal"] else tiles // 4
    return tiles + ahead + (10 if "documents" in workload.shape else 0)


def _windowed_padding(workload: Workload) -> float:
    """A tile of queries meets two tiles of keys, or three, whatever document they are of (`windowed`)."""
    t, met = workload.shape["t"], 2 if workload.options["causal"] else 3
    tile = min(max(int(workload.options["window"]), 16), t)
    return max(1.0, -(-t // tile) * met * tile**2 / visible_pairs(workload))


def _flex_launches(workload: Workload) -> int:
    """The mask of blocks, which torch builds anew from a mask of all pairs; then attention, and its gradient."""
    attention = 1 if workload.phase == "forward" else 5
    return 55 + attention + (6 if "documents" in workload.shape else 0)


_BOTH = frozenset({"cpu", "cuda"})
_CUDA = frozenset({"cuda"})
KERNELS = (
    Kernel(
        operator="softmax_attention",
        name="reference",
        implementation=f"{_HERE}.definition:REFERENCE",
        supports=_anything,
        devices=_BOTH,
    ),
    Kernel(
        operator="softmax_attention",
        name="sdpa_flash",
        implementation=f"{_HERE}.sdpa_flash",
        supports=_flash_supports,
        devices=_BOTH,
    ),
    Kernel(
        operator="softmax_attention",
        name="sdpa_efficient",
        implementation=f"{_HERE}.sdpa_efficient",
        supports=_efficient_supports,
        devices=_CUDA,
    ),
    Kernel(
        operator="softmax_attention",
        name="sdpa_cudnn",
        implementation=f"{_HERE}.sdpa_cudnn",
        supports=_cudnn_supports,
        devices=_CUDA,
    ),
    Kernel(
        operator="softmax_attention",
        name="flex_attention",
        implementation=f"{_HERE}.flex",
        supports=_flex_supports,
        devices=_CUDA,
        requires=("triton>=3.6",),
        first_calls_in_threads=False,
        launches=_flex_launches,
    ),
    Kernel(
        operator="softmax_attention",
        name="windowed",
        implementation=f"{_HERE}.windowed",
        supports=_windowed_supports,
        devices=_BOTH,
        launches=_windowed_launches,
        padding=_windowed_padding,
    ),
    Kernel(
        operator="softmax_attention",
        name="flash_attn",
        implementation=f"{_HERE}.flash_attn",
        supports=_flash_attn_supports,
        devices=_CUDA,
        requires=FLASH_ATTN,
        extensions=FLASH_ATTN_EXTENSIONS,
    ),
)
