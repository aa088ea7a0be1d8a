"""What a block of each candidate costs: seconds, memory of a training step, and the carry of generation.

Memory and carries are counted on shapes alone. Seconds are measured where the device is at hand and measuring is
allowed; elsewhere they are the operators' estimates and the roofline of the dense maps around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from subquad.compiler.assignment import LayerCost
from subquad.compiler.choose import Chooser
from subquad.compiler.example import Example
from subquad.compiler.one_block import run_block, stand_ins
from subquad.compiler.pipeline import capture_model, compile_model, make_plan
from subquad.compiler.plan import Plan
from subquad.compiler.target import Target
from subquad.compiler.workload import autocast
from subquad.model.block import Block
from subquad.model.build import build_model
from subquad.schema import ModelConfig
from subquad_cost_model import CostRow, Efficiency, Estimate, RooflineEstimator, time_rivals

BYTES_PER_PARAMETER = 16
"""Weight, gradient and the two moments of AdamW, all float32."""
DENSE = Efficiency(worst=0.05, typical=0.5, best=2.0)
"""Matrix products of at least a few hundred rows reach about half of what the probe's largest product reached; on one
H100 at d_model 1024 they took 42 % of a step (README), which is 0.4 to 0.6 of the data sheet's figure."""


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
        counted = [
            (*block_memory_bytes(block, example, checkpointing), _carry_bytes(block, example))
            for block in _blocks(built)
        ]
    # Outside of the fake world: choosing runs kernels to check them.
    plan = make_plan(built, capture_model(built), example, target, chooser)
    dense = [_dense_estimate(block, example, target) for block in _blocks(built)]
    timed: dict[str, Estimate] = {}
    declined: dict[str, str] = {}
    if budget_s is not None and target.local is not None:
        timed, declined = _timed(candidates, keys, example, target.local, target, plan, checkpointing, budget_s)
    costs = {}
    for layer, key in enumerate(keys):
        if key in declined:
            continue
        latency = timed.get(key) or _estimated(plan, layer, dense[layer], checkpointing)
        memory_bytes, transient_bytes, carry_bytes = counted[layer]
        costs[key] = LayerCost(
            latency_s=latency.seconds,
            latency_high_s=latency.high_s,
            memory_bytes=memory_bytes,
            workspace_bytes=transient_bytes + _workspace_bytes(plan, layer),
            carry_bytes=carry_bytes,
            source=latency.source,
        )
    return Costs(costs, declined)


def model_of(model: ModelConfig, keys: Sequence[str]) -> ModelConfig:
    """The model with one block per key."""
    values: dict[str, Any] = {name: getattr(model, name) for name in ModelConfig.__dataclass_fields__}
    return ModelConfig(**values | {"schedule": list(keys), "num_layers": len(keys)})


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


def _estimated(plan: Plan, layer: int, dense: Estimate, checkpointing: bool) -> Estimate:
    """The operators' estimates and the dense maps around them; a sum is no better than its worst source.

    The backward takes about twice the forward, so that computing the forward again makes 3 parts 4.
    """
    again = 4 / 3 if checkpointing else 1.0
    figures = [choice.figure for choice in plan.choices if choice.layer == layer and choice.used and choice.figure]
    return Estimate(
        seconds=again * (dense.seconds + sum(figure.seconds for figure in figures)),
        low_s=again * (dense.low_s + sum(figure.low_s for figure in figures)),
        high_s=again * (dense.high_s + sum(figure.high_s for figure in figures)),
        peak_bytes=0,
        source="bound",
    )


def _dense_estimate(block: Block, example: Example, target: Target) -> Estimate:
    """Forward of every linear map, and twice that for its two gradients."""
    b, t = example.tokens_shape
    rows = b * t
    maps = [module for module in block.modules() if isinstance(module, nn.Linear)]
    weights = sum(module.in_features * module.out_features for module in maps)
    edges = sum(module.in_features + module.out_features for module in maps)
    passes = 3 if example.training else 1
    width = 2 if example.dtype in ("bfloat16", "float16") else 4
    row = CostRow(
        operator="dense",
        kernel="torch",
        phase="forward",
        dtype=example.dtype,
        shape={"rows": rows, "weights": weights},
        matmul_flops=passes * 2 * rows * weights,
        bytes_moved=passes * width * (rows * edges + weights),
        serial_steps=len(maps) * passes,
    )
    return RooflineEstimator(DENSE).predict([row], target.device)[0]


def _workspace_bytes(plan: Plan, layer: int) -> int:
    figures = [choice.figure for choice in plan.choices if choice.layer == layer and choice.used and choice.figure]
    return max((figure.peak_bytes for figure in figures), default=0)


def block_memory_bytes(block: Block, example: Example, checkpointing: bool, *, state: bool = True) -> tuple[int, int]:
    """What stays during a step, and what comes and goes with the block; call it under a FakeTensorMode.

    Stays: parameters with their training state (unless `state` is False), and what one forward keeps for the backward;
    with checkpointing the block's input alone stays, and the rest comes and goes.
    """
    parameters = sum(parameter.numel() for parameter in block.parameters())
    if not example.training:
        return 4 * parameters * state, 0
    b, t = example.tokens_shape
    x = torch.empty(b, t, block.norm.normalized_shape[0], requires_grad=True)
    with autocast(torch.device("cpu"), example.dtype):
        shared = stand_ins(block, x)
        kept = saved_bytes(block, lambda: run_block(block, x, None, shared), held=shared.values())
    if checkpointing:
        return BYTES_PER_PARAMETER * parameters * state + x.numel() * x.element_size(), kept
    return BYTES_PER_PARAMETER * parameters * state + kept, 0


def saved_bytes(block: nn.Module, forward: Callable[[], object], held: Iterable[Tensor] = ()) -> int:
    """The bytes that autograd keeps of a forward, each storage once; parameters, and what others hold, left out."""
    own = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), *held)}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage that is freed gives its address to the next one

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor), torch.enable_grad():
        alive.append(forward())  # type: ignore[arg-type]
    return sum(kept.values())


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
