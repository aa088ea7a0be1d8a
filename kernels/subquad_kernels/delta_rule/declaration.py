"""The records of the delta rule: what it costs, and where each kernel applies."""

from __future__ import annotations

from subquad_kernels.catalogue import Kernel, Operator, Tolerance
from subquad_kernels.optional_packages import FLA, gated_backward_defect, half_only
from subquad_kernels.workload import DeviceLimits, DType, Phase, Work, Workload, longest_document, longest_of_sizes

_HERE = "subquad_kernels.delta_rule"

CHUNK = 64
"""Tokens between two saved states; one state of n p per 64 tokens is about as large as k or v (n = p = 64)."""


def num_chunks(b: int, t: int, documents: int = 0) -> int:
    """Saved states of a call: of each sequence or, packed, the most that so many documents can have; none if t = 1."""
    if documents:
        return t // CHUNK + documents
    return b * -(-t // CHUNK) if t > 1 else 0


SEGMENTS, SEGMENT_CHUNKS = 4, 16
"""A sequence is cut into no fewer segments, each of so many chunks at least: nearly all of it is walked twice, so that
two segments, one walk after the other, take as long as the whole, and four won by 5 % where 64 programs became 256."""


def segment_programs(n: int) -> int:
    """How many programs of a scan segments may make: of keys over 64 wide fewer, as products keep the device busy.

    The walk that finds a map has n + p rows for every p of a walk proper, each with products of n: a cut at n = p = 128
    multiplies twelve times what a walk at n = p = 64 does. There 32 programs became 128 with profit, 128 became 256 at
    a loss of a quarter (an H200 of 132 multiprocessors, README).
    """
    return 256 if n <= 64 else 128


def chunks_a_segment(
    b: int, t: int, programs_a_sequence: int, *, packed: bool, programs: int, least: int = SEGMENT_CHUNKS
) -> int:
    """Chunks that one program of a scan walks at most; the boundaries of packed documents are not known here."""
    chunks = -(-t // CHUNK)
    segments = min(programs // (programs_a_sequence * (1 if packed else b)), chunks // least)
    return chunks if segments < SEGMENTS else -(-chunks // segments)


def work(workload: Workload) -> Work:
    """Forward: the products of the chunked form with chunks of 64 (README); one token: the recurrence, 7 n p.

    Per token and head, c = 64: keys with keys 2 c n, (I + A)^-1 with keys and values 2 c (n + p), scores and their
    product with writes 2 c (n + p), three products with a state 6 n p. Backward: the forward's inverse again, and two
    products for each one above. `remove` and `insert` add a second pair of keys.
    """
    shape, options, e = workload.shape, workload.options, workload.element_bytes
    b, t, h, h_k, n, p = (shape[axis] for axis in ("b", "t", "h", "h_k", "n", "p"))
    documents = shape.get("documents", 0)
    exact = max(4, e)  # bytes of one element of states, decays and gates
    decays = {"none": 0, "scalar": 1, "vector": n}[str(options["decay"])]
    free, gate = bool(options["low_rank"]), bool(options["write_gate"])
    states = (documents or b) * h * n * p * exact
    tokens = b * t * h
    inputs = b * t * h_k * 2 * n * e + tokens * (p + 2 * n * free) * e + tokens * (decays + gate) * exact
    inputs += states if options["initial_state"] else 0
    bounds = 4 * (documents + 1) if documents else 0
    outputs = tokens * p * e + states
    residuals = tokens * p * e + num_chunks(b, t, documents) * h * n * p * e
    pairs = 2 * CHUNK * (3 * n + 2 * p) * (1 + free)
    products = pairs + 6 * n * p * (1 + free)
    chain = -(-t // documents) if documents else t
    if workload.phase == "backward":
        return Work(
            matmul_flops=tokens * (2 * products + 2 * CHUNK * n),
            transcendental_ops=tokens * CHUNK * max(1, decays) if decays else 0,
            bytes_moved=2 * inputs + bounds + residuals + outputs,
            serial_steps=2 * -(-chain // CHUNK),
        )
    moved = inputs + bounds + outputs + residuals
    if t == 1:
        return Work(
            vector_flops=tokens * (7 + 2 * free) * n * p,
            transcendental_ops=tokens * decays,
            bytes_moved=moved,
            saved_bytes=0 if workload.phase == "decode" else moved,
        )
    return Work(
        matmul_flops=tokens * products,
        transcendental_ops=tokens * CHUNK * max(1, decays) if decays else 0,
        bytes_moved=moved,
        serial_steps=-(-chain // CHUNK),
        saved_bytes=0 if workload.phase == "decode" else moved,
    )


def _example(dtype: DType, phase: Phase = "forward", *, decay: str = "scalar", free: bool = False,
             initial_state: bool = False, **shape: int) -> Workload:  # fmt: skip
    axes = {"b": 2, "t": 69, "h": 2, "h_k": 1, "n": 8, "p": 6} | shape
    options: dict[str, bool | str] = {"decay": decay, "write_gate": True, "low_rank": free}
    return Workload(
        operator="delta_rule", shape=axes, dtype=dtype, phase=phase, options=options | {"initial_state": initial_state}
    )


OPERATOR = Operator(
    name="delta_rule",
    summary="delta rule with decay, or any diagonal plus rank-one transition (Gated DeltaNet, RWKV-7)",
    definition=f"{_HERE}.definition",
    tensors=("q", "k", "v", "log_decay", "write_gate", "remove", "insert", "initial_state", "cu_seqlens"),
    outputs=("y", "final_state"),
    residuals=("writes", "boundaries"),
    defaults={"cpu": ("chunked",), "cuda": ("fused", "fused_diagonal", "chunked")},
    work=work,
    tolerances={
        "float64": Tolerance(output=1e-10, gradient=1e-9, reason="a triangular system in place of t rank-one updates"),
        "float32": Tolerance(output=1e-4, gradient=5e-4, reason="rounding of fp32, grown by (I + A)^-1 of each chunk"),
        "bfloat16": Tolerance(
            output=2e-2, gradient=4e-2, reason="operands of every product rounded to 8 bits: states, writes, (I + A)^-1"
        ),
        "float16": Tolerance(output=4e-3, gradient=8e-3, reason="the same rounded to 11 bits"),
    },
    examples=(
        _example("float32"),
        _example("float32", b=1, documents=4),
        _example("float32", decay="none", initial_state=True),
        _example("float32", decay="vector", initial_state=True, free=True),
        _example("float32", b=1, decay="vector", documents=4),
        _example("float32", "decode", initial_state=True, t=1),
        _example("bfloat16"),
    ),
    benchmarks={
        "cpu": _example("float32", b=1, t=128, h=2, h_k=2, n=64, p=64),
        "cuda": _example("bfloat16", b=4, t=1024, h=16, h_k=16, n=64, p=64),
    },
)


def _anything(workload: Workload, limits: DeviceLimits) -> str | None:
    return None


def _fused_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    shape, options = workload.shape, workload.options
    if options["low_rank"]:
        return "has no transition by remove and insert"
    if options["decay"] == "vector":
        return "takes one decay per head, not one per key channel"
    if workload.dtype == "float64":
        return "computes in float32, not in float64"
    if max(shape["n"], shape["p"]) > 256:
        return f"was tried on states of up to 256 x 256, not {shape['n']} x {shape['p']}"
    if limits.capability is not None and limits.capability < (8, 0):
        return "needs compute capability 8.0"
    return None


def _fused_diagonal_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    shape, options = workload.shape, workload.options
    if not options["low_rank"] and options["decay"] != "vector":
        return "is for decays per key channel and transitions by remove and insert: fused takes the rest"
    if workload.dtype == "float64":
        return "computes in float32, not in float64"
    if max(shape["n"], shape["p"]) > 256:
        return f"holds states of up to 256 x 256, not {shape['n']} x {shape['p']}"
    if limits.capability is not None and limits.capability < (8, 0):
        return "needs compute capability 8.0"
    if limits.capability is not None and limits.capability[0] in (10, 11) and _beyond_tensor_memory(workload):
        return "its scan wants more than the 512 columns of tensor memory of compute capability 10"
    return None


def _beyond_tensor_memory(workload: Workload) -> bool:
    """What Triton was seen to want too much for, of capability 10: 64 rows in tiles of 64 columns (README)."""
    n, p = workload.shape["n"], workload.shape["p"]
    return workload.phase != "decode" and workload.element_bytes == 4 and 32 < n <= 64 and p > 32


def _fla_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.shape["n"] > 256:
        return f"holds up to 256 rows of a state, not {workload.shape['n']}"
    gated = workload.options["decay"] == "scalar" and not workload.options["low_rank"]
    # What fails in the backward alone refuses the forward too: a kernel is checked with its gradients.
    defect = gated_backward_defect(limits) if gated and workload.phase != "decode" else None
    return half_only(workload) or defect


def _fla_recurrent_supports(workload: Workload, limits: DeviceLimits) -> str | None:
    if workload.phase != "decode":
        return "has no backward: it decodes"
    return "computes in float32, not in float64" if workload.dtype == "float64" else None


def _chunked_launches(workload: Workload) -> int:
    """A loop over chunks, once more for each size of documents; over sixteen tokens, or what is left of a chunk, at a
    time where every key channel decays by itself. Packed, what lies behind a document's end is masked at every step.
    """
    if workload.phase == "decode":
        return 67
    longest, packed = longest_of_sizes(workload), "documents" in workload.shape
    steps, forward = sum(-(-n // CHUNK) for n in longest), workload.phase == "forward"
    laid_out = 25 + 15 * len(longest) if packed else 10
    if workload.options["decay"] == "vector":
        each = (62 if forward else 149) * (3 if workload.options["low_rank"] else 2) // 2
        return laid_out + (each + 16 * packed) * sum(-(-n // 16) for n in longest)
    each = {"none": (57, 102), "scalar": (63, 154)}[str(workload.options["decay"])][0 if forward else 1]
    return laid_out + (each + 24 * packed) * steps


def _segmented_steps(workload: Workload) -> int:
    """Chunks that are walked one after the other: those of a segment, twice where time is cut, in each direction."""
    shape = workload.shape
    packed, chunks = "documents" in shape, -(-longest_document(workload) // CHUNK)
    segment = chunks_a_segment(
        shape["b"], shape["t"], shape["h"] * -(-shape["p"] // 64), packed=packed, programs=segment_programs(shape["n"])
    )
    return (chunks if chunks <= segment else 2 * segment) * (2 if workload.phase == "backward" else 1)


_BOTH = frozenset({"cpu", "cuda"})
_CUDA = frozenset({"cuda"})
KERNELS = (
    Kernel(
        operator="delta_rule",
        name="reference",
        implementation=f"{_HERE}.definition:REFERENCE",
        supports=_anything,
        devices=_BOTH,
    ),
    Kernel(
        operator="delta_rule",
        name="chunked",
        implementation=f"{_HERE}.chunked",
        supports=_anything,
        devices=_BOTH,
        launches=_chunked_launches,
    ),
    Kernel(
        operator="delta_rule",
        name="fused",
        implementation=f"{_HERE}.fused",
        supports=_fused_supports,
        devices=frozenset({"cuda"}),
        requires=("triton>=3.6",),
        serial_steps=_segmented_steps,
        replayable=True,
    ),
    Kernel(
        operator="delta_rule",
        name="fused_diagonal",
        implementation=f"{_HERE}.fused_diagonal",
        supports=_fused_diagonal_supports,
        devices=_CUDA,
        requires=("triton>=3.6",),
        serial_steps=_segmented_steps,
        replayable=True,
    ),
    Kernel(
        operator="delta_rule",
        name="fla_chunked",
        implementation=f"{_HERE}.fla:CHUNKED",
        supports=_fla_supports,
        devices=_CUDA,
        requires=FLA,
        first_calls_in_threads=False,
    ),
    Kernel(
        operator="delta_rule",
        name="fla_recurrent",
        implementation=f"{_HERE}.fla:RECURRENT",
        supports=_fla_recurrent_supports,
        devices=_CUDA,
        requires=FLA,
        first_calls_in_threads=False,
    ),
)
