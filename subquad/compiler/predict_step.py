"""How long a training step will take and what memory it needs, before a step has run.

seconds = max(operators + products + elementwise + embedding, head and loss, host) * micro-batches + optimizer
host    = calls * tau_host             without a GPU's graph a small model waits for the host
peak    = weights + moments + max(kept + loss, max_i (kept of blocks <= i + passing with i + gradients behind i))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from subquad.compiler.call_seconds import FORWARD_AGAIN, STREAMS, Span, scaled, seconds_of, total
from subquad.compiler.example import Example
from subquad.compiler.loss_memory import loss_bytes
from subquad.compiler.plan import Plan, StepPrediction
from subquad.compiler.run_shapes import local_tokens, sized_model
from subquad.compiler.step_work import StepWork, step_work
from subquad.compiler.target import Target
from subquad.schema import CHUNKED, RunConfig
from subquad_cost_model import CostRow, RooflineEstimator

HOST_CALL_S = 1e-5
"""What a call of aten costs the host with module, dispatch and autograd: assumed, not yet measured on a GPU's host."""
HOST_OPERATOR_S = 5e-5
"""What a call of an operator costs the host (kernels/README.md, host time: 20 to 80 us)."""
OPTIMIZER_BYTES = 40
"""Per parameter: AdamW reads weight, gradient and moments, writes three of them; clipping reads twice, writes once."""
STATE_BYTES, GRADIENT_BYTES = 12, 4
"""Weight and the two moments of AdamW, and the gradient, all float32."""


def predict_step(config: RunConfig, target: Target, plan: Plan) -> StepPrediction:
    """The step of a run whose kernels are those of `plan`, at the plan's shapes; torch's random state stays.

    A model that cannot be counted on shapes has no prediction, and a note that says why.
    """
    notes = []
    trainer = config.trainer
    if config.compile:
        notes.append("torch.compile fuses elementwise maps, which are counted one by one here")
    checkpointing = trainer.activation_checkpointing and trainer.recompute == "all"
    if trainer.activation_checkpointing and not checkpointing:
        notes.append("recompute=cheap is counted as if all activations were kept")
    if trainer.fp8 != "none":
        notes.append("float8 products are counted as bfloat16 ones, and the casts around them are not")
    if trainer.devices > 1:
        notes.append("the exchange of gradients between devices is not counted")
    if trainer.context_parallel > 1:
        notes.append("what ranks exchange of the sequences that they share is not counted")
    if trainer.tensor_parallel > 1:
        notes.append("what ranks exchange of the projections that they share is not counted")
    example = _example(plan)
    if example.tokens_shape != local_tokens(config):
        return _unknown(f"the plan is for batches of {example.tokens_shape}")
    try:
        with torch.random.fork_rng(()):
            work = step_work(
                sized_model(config),
                example,
                kind=target.kind,
                checkpointing=checkpointing,
                chunked_loss=trainer.loss == CHUNKED,
                tensor_parallel=trainer.tensor_parallel,
                choices=plan.choices,
            )
    except Exception as error:  # a stranger's mixer may do anything on shapes
        return _unknown(f"{type(error).__name__}: {error}".splitlines()[0])
    again = FORWARD_AGAIN if checkpointing else 1.0
    parts = {
        "operators": _operators(plan, again),
        "matrix products": seconds_of(work.blocks, example, target, products=True),
        "elementwise": seconds_of(work.blocks, example, target, products=False),
        "embedding, head, loss": total(
            seconds_of(work.outside, example, target, products=products) for products in (True, False)
        ),
    }
    parts = {name: scaled(figure, trainer.accumulate) for name, figure in parts.items()}
    parts["optimizer"] = _optimizer(work, target)
    seconds, low_s, high_s = total(parts.values())
    host_s = trainer.accumulate * _host_s(work, target)
    memory = _memory(config, work, example)
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


def _example(plan: Plan) -> Example:
    values: dict[str, Any] = dict(plan.example)
    return Example(**values | {"tokens_shape": tuple(values["tokens_shape"])})


def _unknown(reason: str) -> StepPrediction:
    return StepPrediction(
        seconds=None, low_s=None, high_s=None, parts={}, calls=0, host_s=0.0, peak_bytes=None, memory={}, budgets={},
        notes=(f"the step is not predicted: {reason}",),
    )  # fmt: skip


def _operators(plan: Plan, again: float) -> Span:
    figures = [choice.figure for choice in plan.choices if choice.used and choice.figure]
    return scaled(total((figure.seconds, figure.low_s, figure.high_s) for figure in figures), again)


def _optimizer(work: StepWork, target: Target) -> Span:
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


def _memory(config: RunConfig, work: StepWork, example: Example) -> Mapping[str, int]:
    """The peak stands at the loss, where all is kept, or where a block is at work, mostly in its backward: what it and
    those before it keep is there, and the gradients of what lies behind it.

    With several micro-batches the gradients of earlier ones stand beside it.
    """
    model = sized_model(config)
    sharing = config.trainer.tensor_parallel  # of parameters a rank counts its share, and holds its rows of that
    ranks = config.trainer.devices // sharing if config.trainer.strategy == "fsdp" or sharing > 1 else 1
    matrix = model.vocab_size * model.d_model
    gradients = GRADIENT_BYTES * work.parameters // ranks
    before = config.trainer.accumulate > 1
    earlier, behind, at_work, passing = work.kept_bytes, matrix, 0, 0
    for block in reversed(work.memory):
        found = earlier + block.passing_bytes + (0 if before else GRADIENT_BYTES * behind // ranks)
        if found > at_work:
            at_work, passing = found, block.passing_bytes
        earlier -= block.kept_bytes
        behind += block.parameters
    memory = {
        "weights and moments": STATE_BYTES * work.parameters // ranks,
        "kept for the backward": work.kept_bytes,
        "loss": loss_bytes(model, example, chunked=config.trainer.loss == CHUNKED),
        "passing with a block": passing,
    }
    if ranks > 1:  # what lies outside of blocks stays whole; of blocks one computes and the next arrives
        outside = matrix * (1 if model.tie_embeddings else 2)
        memory["gathered"] = GRADIENT_BYTES * (outside + 2 * (work.parameters - outside) // model.num_layers)
    held = memory["weights and moments"] + memory.get("gathered", 0) + (gradients if before else 0)
    at_backward = held + max(work.kept_bytes + memory["loss"], at_work)
    return {**memory, "gradients": gradients, "peak": max(at_backward, memory["weights and moments"] + gradients)}
