"""The records of linear attention: what it costs, and where each kernel applies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from subquad_kernels.catalogue import Kernel, Operator, Tolerance
from subquad_kernels.optional_packages import FLA, MAMBA, MAMBA_EXTENSIONS, gated_backward_defect, half_only
from subquad_kernels.tile_sizes import ceil_div, padded
from subquad_kernels.workload import DeviceLimits, DType, Option, Phase, Work, Workload, token_steps

if TYPE_CHECKING:
    import torch

    from subquad_kernels.catalogue import Arguments

_HERE = "subquad_kernels.linear_attention"

CHUNK = 64
"""Tokens that are mixed by one masked matrix product; the tile of a tensor core instruction has 64 rows."""

_PROGRAMS = 512
"""About four programs for each of an H100's 132 multiprocessors."""
CUT_BELOW = 256
"""Programs that fill a device, two a multiprocessor: where fewer would run, time is cut into segments."""


def segment_len(b: int, t: int, h: int, n: int, p: int) -> int:
    """Tokens of a segment of time: the longest that leaves enough programs for a device.

    A forward keeps one state a segment, 4 n p bytes a head: at 1024 tokens and n = p = 64 that is 1/32 of what
    it reads and writes in bfloat16. States of several tiles of 128 x 128, a program each, are as much larger.
    """
    tiles = ceil_div(n, 128) * ceil_div(p, 128)
    tokens = b * t * h * tiles
    lengths = (2048, 1024, 512) if tiles > 1 else (1024, 512)
    return next((length for length in lengths if tokens >= length * _PROGRAMS), 256)


def value_tile(n: int, p: int, *, half: bool, backward: bool) -> int:
    """Columns of values that a program of the fused kernel holds, beside a state of n rows: see its `launch_of`."""
    rows, columns = padded(n), padded(p)
    if not half:  # products in three parts need room
        return min(columns, 32 if rows > 64 else 64)
    tile = min(columns, 128 if backward and rows <= 128 else 64)
    return max(tile, min(rows, 64)) if backward else tile


def takes_several_heads(n: int, p: int, *, half: bool, group: int) -> bool:
    """Whether programs of the fused kernel take several heads of a group that shares keys, where shared memory is."""
    return half and padded(n) in (64, 128) and padded(p) == 64 and group % 8 == 0


def keeps_states(n: int, p: int, *, half: bool) -> bool:
    """Whether the backward of the fused kernel keeps the states of all chunks in memory, where shared memory is."""
    return half and min(padded(n), padded(p)) >= 128


def heads_of(group: int, pairs: int) -> int:
    """Heads of a group that a program takes, of so many pairs of a chunk and a head: all if the device stays full.

    32 are then faster than 8, by an eighth (README).
    """
    return next((heads for heads in (32, 16) if group % heads == 0 and pairs // heads >= CUT_BELOW), 8)


def chunk_slots(t: int, documents: int, chunk: int = CHUNK) -> int:
    """How many chunks there may be when no chunk holds tokens of two documents (0 documents: not packed)."""
    return t // chunk + documents if documents else -(-t // chunk)


def segments(b: int, t: int, h: int, documents: int, n: int, p: int) -> int:
    """Segments of time of a call; their last may be short."""
    return -(-chunk_slots(t, documents) // (segment_len(b, t, h, n, p) // CHUNK))


def work(workload: Workload) -> Work:
    """Chunks of 64: 64 (n + p) + 4 n p FLOPs a token and head forward (the causal half), 3 and 10 of these backward."""
    shape, options, e = workload.shape, workload.options, workload.element_bytes
    b, t, h, h_k, n, p = (shape[axis] for axis in ("b", "t", "h", "h_k", "n", "p"))
    documents = shape.get("documents", 0)
    exact = max(4, e)  # bytes of one element of gates and states
    per_token = (options["decay"] == "token") + bool(options["write_gate"]) + bool(options["diagonal"])
    states = (documents or b) * h * n * p * exact
    inputs = b * t * (2 * h_k * n + h * p) * e + b * t * h * per_token * exact
    inputs += h * exact if options["decay"] == "head" else 0
    inputs += states if options["initial_state"] else 0
    bounds = 4 * (documents + 1) if documents else 0
    outputs = b * t * h * p * e + states
    boundaries = (segments(b, t, h, documents, n, p) - 1) * b * h * n * p * exact
    rows = b * t * h
    steps = -(-t // max(1, documents))
    if workload.phase == "decode":  # nothing is mixed within a chunk, and no product has two matrices
        return Work(
            vector_flops=rows * (5 * n * p + 2 * n + 2 * p),
            transcendental_ops=rows if options["decay"] != "none" else 0,
            bytes_moved=inputs + bounds + outputs,
        )
    width = min(CHUNK, steps)
    intra, inter = rows * width * (n + p), 4 * rows * n * p
    pairs = rows * width // 2
    serial_steps = -(-steps // CHUNK)
    if workload.phase == "backward":
        return Work(
            matmul_flops=3 * intra + 5 * inter // 2,
            vector_flops=6 * pairs + rows * (4 * n + 4 * p),
            transcendental_ops=2 * pairs if options["decay"] != "none" else 0,
            bytes_moved=2 * inputs + bounds + boundaries + outputs,
            serial_steps=2 * serial_steps,
        )
    return Work(
        matmul_flops=intra + inter,
        vector_flops=2 * pairs + 2 * rows * p,
        transcendental_ops=pairs if options["decay"] != "none" else 0,
        bytes_moved=inputs + bounds + outputs + boundaries,
        serial_steps=serial_steps,
        saved_bytes=inputs + outputs + boundaries,
    )


def spread(arguments: Arguments) -> dict[str, torch.Tensor]:
    """A decay per head, given to each token: b t h. Of two heads' sums both may all but vanish (README)."""
    values: dict[str, Any] = dict(arguments)
    log_decay = values["log_decay"]
    if log_decay is None or log_decay.dim() == 3:
        return {}
    return {"log_decay": log_decay.expand(values["v"].shape[:3])}


def _example(
    dtype: DType, phase: Phase = "forward", *, full: bool = False, decay: str = "token", **shape: int
) -> Workload:
    axes = {"b": 2, "t": 150, "h": 4, "h_k": 2, "n": 12, "p": 20} | shape
    options: dict[str, Option] = dict.fromkeys(("write_gate", "diagonal", "initial_state"), full)
    return Workload(
        operator="linear_attention", shape=axes, dtype=dtype, phase=phase, options={"decay": decay} | options
    )


OPERATOR = Operator(
    name="linear_attention",
    summary="linear attention with a scalar decay (RetNet, Lightning, SSD, Mamba-3, simple GLA, mLSTM)",
    definition=f"{_HERE}.definition",
    tensors=("q", "k", "v", "log_decay", "write_gate", "diagonal", "initial_state", "cu_seqlens"),
    outputs=("y", "final_state"),
    residuals=("boundaries",),
    defaults={"cpu": ("chunked",), "cuda": ("fused", "chunked")},
    work=work,
    tolerances={
        "float64": Tolerance(output=1e-11, gradient=1e-10, reason="sums over a chunk and over t in another order"),
        "float32": Tolerance(
            output=5e-5, gradient=2e-4,
            reason="sums of log decays over a chunk round at 2^-24 of their size; rounding of fp32 states over t",
        ),
        "bfloat16": Tolerance(
            output=8e-3, gradient=1.6e-2,
            reason="scores, writes and the state are rounded to 8 bits as operands of tensor cores; sums are fp32",
        ),
        "float16": Tolerance(
            output=1e-3, gradient=2e-3,
            reason="scores, writes and the state are rounded to 11 bits as operands of tensor cores; sums are fp32",
        ),
    },
    examples=(
        _example("float32"),
        _example("float32", decay="head", full=True),
        _example("float32", decay="none", b=1, documents=4, full=True),
        _example("float32", "decode", t=1, full=True),
        _example("bfloat16"),
    ),
    benchmarks={
        "cpu": _example("float32", b=1, t=128, h=2, h_k=2, n=64, p=64),
        "cuda": _example("bfloat16", b=4, t=1024, h=16, h_k=16, n=64, p=64),
    },
    spread=spread,
)  # fmt: skip


def _anything(workload: Workload, limits: DeviceLimits) -> str | None:
    return None


def _fused_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.dtype == "float64":
        return "computes in float32, not in float64"
    if workload.shape["n"] > 256:
        return f"holds up to 256 rows of a state in registers, not {workload.shape['n']}"
    if limits.capability is not None and limits.capability < (8, 0):
        return "needs compute capability 8.0"
    if limits.capability is not None and limits.capability[0] in (10, 11) and _beyond_tensor_memory(workload):
        return "its backward wants more than the 512 columns of tensor memory of compute capability 10"
    return None


def _beyond_tensor_memory(workload: Workload) -> bool:
    """Backwards that Triton was seen to ask too much for, of capability 10, and wider ones (README).

    Of float32 with few rows or columns not all were compiled: where one is beyond it too, its self-check fails.
    """
    rows, columns = padded(workload.shape["n"]), padded(workload.shape["p"])
    if workload.phase != "backward":
        return False
    if workload.element_bytes == 2:
        return rows == 256 and columns <= 64
    return max(rows, columns) >= 64 and min(rows, columns) >= 32


def _fla_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    return half_only(workload) or _fla_recurrent_supports(workload, limits) or _fla_backward(workload, limits)


def _fla_backward(workload: Workload, limits: DeviceLimits) -> str | None:
    """What fails in the backward alone refuses the forward too: a kernel is checked with its gradients."""
    if workload.phase == "decode":
        return None
    if workload.shape["n"] % 2 or workload.shape["p"] % 2:
        return f"differentiates heads of even widths, not {workload.shape['n']} and {workload.shape['p']}"
    return gated_backward_defect(limits) if workload.options["decay"] != "none" else None


def _fla_recurrent_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.dtype == "float64":
        return "computes in float32, not in float64"
    return "weighs a token's own write as every other: it has no diagonal" if workload.options["diagonal"] else None


def _mamba_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if "documents" in workload.shape:
        return "hands out one final state, not one of every document"
    if workload.options["diagonal"]:
        return "weighs a token's own write as every other: it has no diagonal"
    return half_only(workload)


def _chunked_launches(workload: Workload) -> int:
    """A short loop over the chunks of all documents between products of all of them."""
    documents = workload.shape.get("documents", 0)
    slots = chunk_slots(workload.shape["t"], documents)
    if workload.phase == "decode":
        return 44
    return (45 + 2 * slots + documents) if workload.phase == "forward" else (75 + 4 * slots + documents)


def several_heads(workload: Workload) -> bool:
    """Whether the fused kernel takes several heads of this workload a program, on a device with the shared memory."""
    shape = workload.shape
    return takes_several_heads(
        shape["n"], shape["p"], half=workload.element_bytes == 2, group=shape["h"] // shape["h_k"]
    )  # fmt: skip


def states_kept(workload: Workload) -> bool:
    """Whether the backward of the fused kernel keeps this workload's states, on a device with the shared memory."""
    shape = workload.shape
    return workload.phase == "backward" and keeps_states(shape["n"], shape["p"], half=workload.element_bytes == 2)


def _fused_launches(workload: Workload) -> int:
    """Of the form that the sizes ask for (`launches.py`), on a device with the shared memory.

    Two more where time is cut, for what segments do to a state and their composition; documents are laid out first, and
    their states filled; heads that share keys, tiles of values and a decay of a whole head are summed last.
    """
    shape, options = workload.shape, workload.options
    b, t, h, h_k, n, p = (shape[axis] for axis in ("b", "t", "h", "h_k", "n", "p"))
    documents, half = shape.get("documents", 0), workload.element_bytes == 2
    if workload.phase == "decode" or (t == 1 and not documents and workload.phase == "forward"):
        return 1
    decays, gates = options["decay"] != "none", bool(options["write_gate"]) + bool(options["diagonal"])
    cut = 2 if segments(b, t, h, documents, n, p) > 1 else 0
    if workload.phase == "forward":
        laid_out = 2 if documents else 0
        if several_heads(workload):
            return laid_out + 3 + cut
        tiles = ceil_div(p, value_tile(n, p, half=half, backward=False))
        return laid_out + 1 + (cut if tiles * h * b < CUT_BELOW else 0)
    laid_out = 1 + bool(options["initial_state"]) if documents else 0
    of_head = int(options["decay"] == "head")
    if several_heads(workload):
        return laid_out + 6 + cut + decays + of_head
    shared = 2 if h > h_k else 0
    if states_kept(workload):
        tiles_n, tiles_p = (ceil_div(padded(width), 128) for width in (n, p))
        chunks = 2 if max(tiles_n, tiles_p) > 1 else 1
        summed = decays * (tiles_n > 1) + gates * (tiles_p > 1)
        return laid_out + 3 + cut + chunks + summed + shared + decays + of_head
    tiles = ceil_div(p, value_tile(n, p, half=half, backward=True))
    shared = 2 if h * tiles > h_k else 0
    return laid_out + 2 + (cut if tiles * h * b < CUT_BELOW else 0) + shared + (decays + gates) * (tiles > 1) + of_head


def _fused_steps(workload: Workload) -> int:
    shape = workload.shape
    b, t, h, n, p = (shape[axis] for axis in ("b", "t", "h", "n", "p"))
    documents, backward = shape.get("documents", 0), workload.phase == "backward"
    # States pass from segment to segment in a small kernel of its own, a tenth of a walk's step each.
    passes = segments(b, t, h, documents, n, p) // 10

    def walk(chunk: int) -> int:
        return min(chunk_slots(t, documents, chunk), segment_len(b, t, h, n, p) // chunk) + passes

    if several_heads(workload):
        return walk(CHUNK if documents else 2 * CHUNK) + (3 * walk(CHUNK) if backward else 0)
    if states_kept(workload):
        return 4 * walk(CHUNK)
    walks = 2 if backward else 1
    if -(-p // 64) * h * b >= CUT_BELOW:
        return walks * chunk_slots(t, documents)
    return walks * walk(CHUNK)


def _fused_scratch(workload: Workload) -> int:
    """Backward: dq and dk of every head and tile of values where several share one, and the gates' sums by tile.

    Time that is cut adds a gradient of the state between any two segments.
    """
    if workload.phase != "backward":
        return 0
    shape, options = workload.shape, workload.options
    b, t, h, h_k, n, p = (shape[axis] for axis in ("b", "t", "h", "h_k", "n", "p"))
    if several_heads(workload):
        return _scratch_of_several_heads(b, t, h, h // h_k, n, p, shape.get("documents", 0))
    if states_kept(workload):
        return _scratch_of_kept_states(workload)
    tiles = ceil_div(p, value_tile(n, p, half=workload.element_bytes == 2, backward=True))
    by_tile = b * t * h * tiles
    gates = (options["decay"] == "token") + bool(options["write_gate"]) + bool(options["diagonal"])
    parts = 2 * by_tile * n * workload.element_bytes if h * tiles > h_k else 0
    sums = (options["decay"] != "none") + (options["decay"] == "head") + (gates if tiles > 1 else 0)
    cuts = segments(b, t, h, shape.get("documents", 0), n, p) - 1 if tiles * h * b < CUT_BELOW else 0
    return parts + 4 * by_tile * sums + 4 * cuts * b * h * (n * p + 1)


def _scratch_of_several_heads(b: int, t: int, h: int, group: int, n: int, p: int, documents: int) -> int:
    """Backward: both kinds of states of every chunk, sums over a program's heads, gates and the decay's by head."""
    slots = b * chunk_slots(t, documents)
    parts = h // heads_of(group, slots * h)
    states = 2 * slots * h * padded(n) * padded(p) * 2
    sums = 4 * slots * parts * CHUNK * (2 * padded(n) + CHUNK)
    gates = 4 * slots * h * CHUNK * 4
    borders = 4 * (segments(b, t, h, documents, n, p) - 1) * b * h * (n * p + 1)
    return states + sums + gates + borders


def _scratch_of_kept_states(workload: Workload) -> int:
    """Backward: both kinds of states of every chunk, gates and what flows by head, dq and dk of heads that share."""
    shape, decay, documents = workload.shape, workload.options["decay"], workload.shape.get("documents", 0)
    b, t, h, h_k, n, p = (shape[axis] for axis in ("b", "t", "h", "h_k", "n", "p"))
    chunks = b * chunk_slots(t, documents) * h
    states = 2 * chunks * padded(n) * padded(p) * 2
    # What flows comes in a part of each tile of keys, gradients of gates in one of each tile of values.
    flows, parts = (1 if tiles == 1 else tiles + 1 for tiles in (padded(n) // 128, padded(p) // 128))
    gates = 4 * chunks * CHUNK * (3 + (0 if decay == "none" else flows))
    options = workload.options
    gates += 4 * b * t * h * (parts - 1) * (bool(options["write_gate"]) + bool(options["diagonal"]))
    borders = 4 * (segments(b, t, h, documents, n, p) - 1) * b * h * (n * p + 1)
    by_head = 2 * b * t * h * n * workload.element_bytes if h > h_k else 0
    return states + gates + borders + by_head + (4 * b * t * h if decay == "head" else 0)


_BOTH = frozenset({"cpu", "cuda"})
_CUDA = frozenset({"cuda"})
KERNELS = (
    Kernel(
        operator="linear_attention",
        name="reference",
        implementation=f"{_HERE}.definition:REFERENCE",
        supports=_anything,
        devices=_BOTH,
    ),
    Kernel(
        operator="linear_attention",
        name="chunked",
        implementation=f"{_HERE}.chunked",
        supports=_anything,
        devices=_BOTH,
        launches=_chunked_launches,
    ),
    Kernel(
        operator="linear_attention",
        name="fused",
        implementation=f"{_HERE}.fused",
        supports=_fused_supports,
        devices=frozenset({"cuda"}),
        requires=("triton>=3.6",),
        launches=_fused_launches,
        serial_steps=_fused_steps,
        replayable=True,
        scratch_bytes=_fused_scratch,
    ),
    Kernel(
        operator="linear_attention",
        name="fla_chunked",
        implementation=f"{_HERE}.fla:CHUNKED",
        supports=_fla_supports,
        devices=_CUDA,
        requires=FLA,
        first_calls_in_threads=False,
    ),
    Kernel(
        operator="linear_attention",
        name="fla_recurrent",
        implementation=f"{_HERE}.fla:RECURRENT",
        supports=_fla_recurrent_supports,
        devices=_CUDA,
        requires=FLA,
        first_calls_in_threads=False,
        serial_steps=token_steps,
    ),
    Kernel(
        operator="linear_attention",
        name="mamba_ssd",
        implementation=f"{_HERE}.mamba:SSD",
        supports=_mamba_supports,
        devices=_CUDA,
        requires=MAMBA,
        extensions=MAMBA_EXTENSIONS,
        first_calls_in_threads=False,
    ),
)
