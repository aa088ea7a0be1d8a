"""How long a training step will take and what memory it needs, before a step has run.

    seconds = max(operators + products + elementwise + embedding, head and loss, host) * micro-batches + optimizer
    host    = calls * tau_host             without a GPU's graph a small model waits for the host
    peak    = weights + moments + kept + max(loss, what passes with a block)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from subquad.compiler.example import Example
from subquad.compiler.plan import Plan, StepPrediction
from subquad.compiler.run_shapes import local_tokens, sized_model
from subquad.compiler.step_work import Call, StepWork, step_work
from subquad.compiler.target import Target
from subquad.schema import RunConfig
from subquad_cost_model import CostRow, Efficiency, RooflineEstimator

PRODUCTS = Efficiency(worst=0.05, typical=0.8, best=2.0)
"""The matrix products of a 430M model took 114 ms where the data sheet's peak allows 85, which is 0.75 of it
(tools/results/scout_mamba_430m_2k_compiled_h100_2026-11-24.json); of a probe's rate, below the sheet's, it
is taken to be a little more. `tools/check_prediction.py` holds this and what follows against real steps."""
STREAMS = Efficiency(worst=0.05, typical=0.8, best=2.0)
"""There AdamW moved 40 bytes per parameter in 6.6 ms, 0.8 of the data sheet's bandwidth."""
HOST_CALL_S = 1e-5
"""What a call of aten costs the host with module, dispatch and autograd: assumed, not yet measured on a GPU's host."""
HOST_OPERATOR_S = 5e-5
"""What a call of an operator costs the host (kernels/README.md, host time: 20 to 80 us)."""
OPTIMIZER_BYTES = 40
"""Per parameter: AdamW reads weight, gradient and moments, writes three of them; clipping reads twice, writes once."""
STATE_BYTES, GRADIENT_BYTES = 12, 4
"""Weight and the two moments of AdamW, and the gradient, all float32."""
LOSS_BYTES = 12
"""Per logit, when the loss's gradient is taken: log-probabilities, their gradient, and that of the logits, float32."""
FORWARD_AGAIN = 4 / 3
"""Checkpointing computes the forward twice, a third of forward and backward."""


def predict_step(config: RunConfig, target: Target, plan: Plan) -> StepPrediction:
    """The step of a run whose kernels are those of `plan`, at the plan's shapes; torch's random state stays.

    A model that cannot be counted on shapes has no prediction, and a note that says why.
    """
    notes = []
    trainer = config.trainer
    if config.compile:
        notes.append("torch.compile fuses elementwise maps, which are counted one by one here")
    if trainer.devices > 1:
        notes.append("the exchange of gradients between devices is not counted")
    if trainer.context_parallel > 1:
        notes.append("what ranks exchange of the sequences that they share is not counted")
    example = _example(plan)
    if example.tokens_shape != local_tokens(config):
        return _unknown(f"the plan is for batches of {example.tokens_shape}")
    try:
        with torch.random.fork_rng(()):
            work = step_work(
                sized_model(config), example, kind=target.kind, checkpointing=trainer.activation_checkpointing
            )
    except Exception as error:  # a stranger's mixer may do anything on shapes
        return _unknown(f"{type(error).__name__}: {error}".splitlines()[0])
    again = FORWARD_AGAIN if trainer.activation_checkpointing else 1.0
    parts = {
        "operators": _operators(plan, again),
        "matrix products": _seconds(work.blocks, example, target, products=True),
        "elementwise": _seconds(work.blocks, example, target, products=False),
        "embedding, head, loss": _sum(
            _seconds(work.outside, example, target, products=products) for products in (True, False)
        ),
    }
    parts = {name: _scaled(figure, trainer.accumulate) for name, figure in parts.items()}
    parts["optimizer"] = _optimizer(work, target)
    seconds, low_s, high_s = _sum(parts.values())
    host_s = trainer.accumulate * _host_s(work, target)
    memory = _memory(config, work, plan, example)
    return StepPrediction(
        seconds=max(seconds, host_s),
        low_s=low_s,
        high_s=max(high_s, host_s),
        parts={name: figure[0] for name, figure in parts.items()},
        calls=trainer.accumulate * (work.calls + work.operator_calls),
        host_s=host_s,
        peak_bytes=memory["peak"],
        memory={name: size for name, size in memory.items() if name != "peak"},
        budgets={
            name: float(limit)
            for name in ("latency_s", "memory_bytes")
            if (limit := getattr(config.budget, name)) is not None
        },
        notes=tuple(notes),
    )


_Figure = tuple[float, float, float]
"""Seconds, low, high."""


def _example(plan: Plan) -> Example:
    values: dict[str, Any] = dict(plan.example)
    return Example(**values | {"tokens_shape": tuple(values["tokens_shape"])})


def _unknown(reason: str) -> StepPrediction:
    return StepPrediction(
        seconds=None, low_s=None, high_s=None, parts={}, calls=0, host_s=0.0, peak_bytes=None, memory={}, budgets={},
        notes=(f"the step is not predicted: {reason}",),
    )  # fmt: skip


def _operators(plan: Plan, again: float) -> _Figure:
    figures = [choice.figure for choice in plan.choices if choice.used and choice.figure]
    return _scaled(_sum((figure.seconds, figure.low_s, figure.high_s) for figure in figures), again)


def _seconds(calls: Counter[Call], example: Example, target: Target, *, products: bool) -> _Figure:
    """The roofline of the matrix products, or of everything else, which moves bytes."""
    kinds = [call for call in calls if bool(call.matmul_flops) == products]
    rows = [
        CostRow(
            operator="dense" if products else "elementwise",
            kernel="torch",
            phase="forward",
            dtype=example.dtype,
            shape={},
            matmul_flops=call.matmul_flops,
            bytes_moved=call.bytes_moved,
        )
        for call in kinds
    ]
    estimates = RooflineEstimator(PRODUCTS if products else STREAMS).predict(rows, target.device)
    return _sum(
        _scaled((estimate.seconds, estimate.low_s, estimate.high_s), calls[call])
        for call, estimate in zip(kinds, estimates)
    )


def _optimizer(work: StepWork, target: Target) -> _Figure:
    row = CostRow(
        operator="optimizer", kernel="torch", phase="forward", dtype="float32", shape={},
        bytes_moved=OPTIMIZER_BYTES * work.parameters,
    )  # fmt: skip
    (estimate,) = RooflineEstimator(STREAMS).predict([row], target.device)
    return estimate.seconds, estimate.low_s, estimate.high_s


def _host_s(work: StepWork, target: Target) -> float:
    """What the host needs to launch a micro-batch; on a CPU calls are not launched but run, and counted as such."""
    if target.kind == "cpu":
        return 0.0
    return HOST_CALL_S * work.calls + HOST_OPERATOR_S * work.operator_calls


def _memory(config: RunConfig, work: StepWork, plan: Plan, example: Example) -> Mapping[str, int]:
    """The peak stands where the backward begins: all is kept, and either the loss or the last block is at work.

    With several micro-batches the gradients of earlier ones stand beside it.
    """
    b, t = example.tokens_shape
    vocab = sized_model(config).vocab_size
    operators = max((choice.figure.peak_bytes for choice in plan.choices if choice.used and choice.figure), default=0)
    memory = {
        "weights and moments": STATE_BYTES * work.parameters,
        "kept for the backward": work.kept_bytes,
        "loss": LOSS_BYTES * b * t * vocab,
        "passing with a block": work.passing_bytes + operators,
    }
    gradients = GRADIENT_BYTES * work.parameters
    held = memory["weights and moments"] + work.kept_bytes + (gradients if config.trainer.accumulate > 1 else 0)
    at_backward = held + max(memory["loss"], memory["passing with a block"])
    return {**memory, "gradients": gradients, "peak": max(at_backward, memory["weights and moments"] + gradients)}


def _scaled(figure: _Figure, factor: float) -> _Figure:
    return figure[0] * factor, figure[1] * factor, figure[2] * factor


def _sum(figures: Iterable[_Figure]) -> _Figure:
    columns = list(zip(*figures)) or [(0.0,)] * 3
    return sum(columns[0]), sum(columns[1]), sum(columns[2])
