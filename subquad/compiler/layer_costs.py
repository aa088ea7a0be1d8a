"""What a block of each candidate costs: seconds, memory of a training step, and the carry of generation.

Memory and carries are counted on shapes alone. Seconds are measured where the device is at hand and measuring is
allowed; elsewhere they are the operators' estimates and the roofline of every call around them, as for a whole step
(`predict_step.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from subquad.compiler.assignment import LayerCost
from subquad.compiler.call_seconds import FORWARD_AGAIN, Span, scaled, seconds_of, total
from subquad.compiler.choose import Chooser
from subquad.compiler.example import Example
from subquad.compiler.one_block import run_block, stand_ins
from subquad.compiler.pipeline import capture_model, compile_model, make_plan
from subquad.compiler.plan import Plan
from subquad.compiler.run_shapes import model_of
from subquad.compiler.step_work import Call, work_of_blocks
from subquad.compiler.target import Target
from subquad.compiler.workload import autocast
from subquad.model.block import Block
from subquad.model.build import build_model
from subquad.schema import ModelConfig
from subquad_cost_model import Estimate, time_rivals

BYTES_PER_PARAMETER = 16
"""Weight, gradient and the two moments of AdamW, all float32."""
WEIGHT_BYTES = 4
"""Of a parameter where nothing is trained."""


@dataclass(frozen=True)
class Costs:
    """The cost of each candidate that can run, and why others cannot."""

    of: Mapping[str, LayerCost]
    declined: Mapping[str, str]


def layer_costs(
    model: ModelConfig,
    keys: Sequence[str],
    example: Example,
    target: Target,
    chooser: Chooser,
    *,
    checkpointing: bool = False,
    budget_s: float | None = None,
) -> Costs:
    """The cost of one block of every key of `model.mixers`, at the example's batch and length.

    With `checkpointing` a block keeps its input alone and computes its forward again. Blocks are timed for `budget_s`
    seconds where the device is at hand; None: they are estimated. Torch's random state is left as it was found.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count()) if target.kind == "cuda" else ()):
        return _layer_costs(model_of(model, keys), keys, example, target, chooser, checkpointing, budget_s)


def _layer_costs(
    candidates: ModelConfig,
    keys: Sequence[str],
    example: Example,
    target: Target,
    chooser: Chooser,
    checkpointing: bool,
    budget_s: float | None,
) -> Costs:
    with FakeTensorMode():
        built = build_model(candidates)
        carries = [_carry_bytes(block, example) for block in _blocks(built)]
    # Outside of the fake world: choosing runs kernels to check them.
    plan = make_plan(built, capture_model(built, example), example, target, chooser)
    works = work_of_blocks(candidates, example, kind=target.kind, checkpointing=checkpointing, choices=plan.choices)
    timed: dict[str, Estimate] = {}
    declined: dict[str, str] = {}
    if budget_s is not None and target.local is not None:
        timed, declined = _timed(candidates, keys, example, target.local, target, plan, checkpointing, budget_s)
    costs = {}
    for layer, key in enumerate(keys):
        if key in declined:
            continue
        latency = timed.get(key) or _estimated(plan, layer, _span(works[layer].calls, example, target), checkpointing)
        memory = works[layer].memory
        state_bytes = BYTES_PER_PARAMETER if example.training else WEIGHT_BYTES
        costs[key] = LayerCost(
            latency_s=latency.seconds,
            latency_high_s=latency.high_s,
            memory_bytes=state_bytes * memory.parameters + memory.kept_bytes,
            workspace_bytes=memory.passing_bytes,
            carry_bytes=carries[layer],
            source=latency.source,
        )
    return Costs(costs, declined)


def _timed(
    model: ModelConfig,
    keys: Sequence[str],
    example: Example,
    device: str,
    target: Target,
    plan: Plan,
    checkpointing: bool,
    budget_s: float,
) -> tuple[dict[str, Estimate], dict[str, str]]:
    """Seconds of each block with its chosen kernels on this device, and why a block did not run."""
    built = build_model(model, device=device)
    compile_model(built, example, target=target, plan=plan)
    runs: dict[str, Callable[[], object]] = {}
    declined: dict[str, str] = {}
    for key, block in zip(keys, _blocks(built)):
        run = _step(block, example, device, model.d_model, checkpointing)
        try:
            run()
        except (RuntimeError, ValueError) as error:  # too little memory, or a shape that a kernel refuses
            declined[key] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            runs[key] = run
    if not runs:
        return {}, declined
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else None
    timings = time_rivals(runs, synchronize=synchronize, budget_s=budget_s)
    return {
        key: Estimate(
            seconds=timing.median_s, low_s=timing.low_s, high_s=timing.high_s, peak_bytes=0, source="measured"
        )
        for key, timing in timings.items()
    }, declined


def _step(block: Block, example: Example, device: str, d_model: int, checkpointing: bool) -> Callable[[], object]:
    """One forward of a block, and its backward when training."""
    b, t = example.tokens_shape
    x = torch.randn(1, b * t, d_model, device=device) if example.packed else torch.randn(b, t, d_model, device=device)
    bounds = torch.arange(0, b * t + 1, t, dtype=torch.int32, device=device) if example.packed else None
    x.requires_grad_(example.training)
    shared = stand_ins(block, x)

    def run() -> None:
        with torch.set_grad_enabled(example.training), autocast(torch.device(device), example.dtype):
            y = run_block(block, x, bounds, shared, checkpointing=checkpointing)
        if example.training:
            y.sum().backward()
            x.grad = None
            block.zero_grad()

    return run


def _estimated(plan: Plan, layer: int, rest: Span, checkpointing: bool) -> Estimate:
    """The operators' estimates and the calls around them; a sum is no better than its worst source."""
    figures = [choice.figure for choice in plan.choices if choice.layer == layer and choice.used and choice.figure]
    again = FORWARD_AGAIN if checkpointing else 1.0
    operators = scaled(total((figure.seconds, figure.low_s, figure.high_s) for figure in figures), again)
    seconds, low_s, high_s = total((operators, rest))
    return Estimate(seconds=seconds, low_s=low_s, high_s=high_s, peak_bytes=0, source="bound")


def _span(calls: Counter[Call], example: Example, target: Target) -> Span:
    return total(seconds_of(calls, example, target, products=products) for products in (True, False))


def _carry_bytes(block: Block, example: Example) -> int:
    """What generation keeps of a block after the example's tokens."""
    b, t = example.tokens_shape
    x = torch.empty(b, t, block.norm.normalized_shape[0])
    with torch.no_grad(), autocast(torch.device("cpu"), example.dtype):
        shared = (stand_ins(block, x),) if block.sharing else ()
        _, carry, *_ = block.mixer.prefill(x, block.mixer.empty_carry(b), *shared)
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(carry) if isinstance(leaf, Tensor))


def _blocks(model: nn.Module) -> list[Block]:
    return list(model.blocks)  # type: ignore[arg-type, call-overload, no-any-return]
