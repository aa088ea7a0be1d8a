"""The records of the scalar LSTM's scan: what it costs, and where each kernel applies."""

from __future__ import annotations

from subquad_kernels.catalogue import Kernel, Operator, Tolerance
from subquad_kernels.workload import DeviceLimits, DType, Phase, Work, Workload, longest_document

_HERE = "subquad_kernels.slstm_scan"


def work(workload: Workload) -> Work:
    """8 p FLOPs a token and channel to mix hidden states; three times that backward, where gates are computed again.

    The serial steps are t: no step can begin before the last one's hidden state is known.
    """
    shape, e = workload.shape, workload.element_bytes
    b, t, h, p = (shape[axis] for axis in ("b", "t", "h", "p"))
    documents = shape.get("documents", 0)
    exact = max(4, e)  # bytes of one element of states, weights and biases
    channels = b * t * h * p
    states = 3 * (documents or b) * h * p * exact
    weights = (4 * h * p * p + 4 * h * p) * exact
    inputs = 4 * channels * e + weights + (states if workload.options["initial_state"] else 0)
    bounds = 4 * (documents + 1) if documents else 0
    outputs = channels * e + states
    trajectory = 3 * channels * exact
    steps = -(-t // documents) if documents else t
    if workload.phase == "backward":
        return Work(
            matmul_flops=24 * channels * p,
            vector_flops=40 * channels,
            transcendental_ops=8 * channels,
            bytes_moved=2 * inputs + bounds + trajectory + outputs,
            serial_steps=steps,
        )
    return Work(
        matmul_flops=8 * channels * p,
        vector_flops=10 * channels,
        transcendental_ops=7 * channels,  # log sigmoid twice, each an exp and a log; two sigmoids, a tanh
        bytes_moved=inputs + bounds + outputs + trajectory,
        serial_steps=steps,
        saved_bytes=0 if workload.phase == "decode" else inputs + trajectory,
    )


def _example(dtype: DType, phase: Phase = "forward", *, initial_state: bool = False, **shape: int) -> Workload:
    axes = {"b": 2, "t": 37, "h": 3, "p": 5} | shape
    options = {"initial_state": initial_state}
    return Workload(operator="slstm_scan", shape=axes, dtype=dtype, phase=phase, options=options)


OPERATOR = Operator(
    name="slstm_scan",
    summary="scalar LSTM with exponential gates and memory mixing (sLSTM): serial in t",
    definition=f"{_HERE}.definition",
    tensors=("inputs", "recurrent", "bias", "initial_state", "cu_seqlens"),
    outputs=("y", "final_state"),
    residuals=("trajectory",),
    defaults={"cpu": ("stepwise",), "cuda": ("stepwise",)},
    work=work,
    tolerances={
        "float64": Tolerance(output=1e-11, gradient=1e-10, reason="sums of up to t and p terms in another order"),
        "float32": Tolerance(output=2e-5, gradient=1e-4, reason="rounding of fp32 states, fed back over t tokens"),
        "bfloat16": Tolerance(output=8e-3, gradient=1.6e-2, reason="fp32 inside; results rounded once to 8 bits"),
        "float16": Tolerance(output=1e-3, gradient=2e-3, reason="fp32 inside; results rounded once to 11 bits"),
    },
    examples=(
        _example("float32"),
        _example("float32", initial_state=True),
        _example("float32", b=1, documents=4),
        _example("float32", "decode", t=1, initial_state=True),
        _example("bfloat16"),
    ),
    benchmarks={
        "cpu": _example("float32", b=1, t=128, h=4, p=48),
        "cuda": _example("bfloat16", b=4, t=256, h=4, p=256),
    },
)


def _anything(workload: Workload, limits: DeviceLimits) -> str | None:
    return None


def _stepwise_launches(workload: Workload) -> int:
    """Eleven for every token; its gradient computes the states again."""
    return 20 if workload.phase == "decode" else 11 * (longest_document(workload) + 1)


_BOTH = frozenset({"cpu", "cuda"})
KERNELS = (
    Kernel(
        operator="slstm_scan",
        name="reference",
        implementation=f"{_HERE}.definition:REFERENCE",
        supports=_anything,
        devices=_BOTH,
    ),
    Kernel(
        operator="slstm_scan",
        name="stepwise",
        implementation=f"{_HERE}.stepwise",
        supports=_anything,
        devices=_BOTH,
        launches=_stepwise_launches,
    ),
)
