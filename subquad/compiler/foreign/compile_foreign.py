"""Compile a model that we did not write: find its attention, choose kernels, let its owners call them, compare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from subquad.compiler.choose import Chooser
from subquad.compiler.foreign.analysis import OPERATOR, Owner, analyse
from subquad.compiler.foreign.attention_call import AttentionCall, Chosen
from subquad.compiler.foreign.capture import Call
from subquad.compiler.foreign.faster import time_both_ways
from subquad.compiler.foreign.rewrite import adapt_owners
from subquad.compiler.foreign.same_outputs import difference, outputs_in_eval
from subquad.compiler.layer_numbers import layer_numbers
from subquad.compiler.options import CompileOptions
from subquad.compiler.pipeline import plan_versions
from subquad.compiler.plan import NodeChoice, Plan, Uncaptured
from subquad.compiler.target import Target, resolve_target
from subquad.compiler.workload import phases
from subquad.errors import ConfigError
from subquad.registry import load_registry
from subquad.schema import BudgetConfig
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.workload import DType, Workload


def compile_foreign(
    model: nn.Module,
    example_inputs: object,
    *,
    target: str | Target | None = None,
    options: CompileOptions | None = None,
    plan: Plan | None = None,
    budget: BudgetConfig | None = None,
) -> tuple[nn.Module, Plan]:
    """Let the model's softmax attention run chosen kernels; return the same model and the plan.

    Only identical rewrites: the function stays, up to rounding. What is not understood, or turns out slower than it
    was, stays as written, and the plan says why (`uncaptured`). The plan is for the mode (training or not) that the
    model is in; without `target` it is for the device of the model.
    Raises: ConfigError when the model cannot be captured, the plan is for another model, or the budget cannot be met.
    """
    _check_budget(budget)
    registry = load_registry()
    call = Call.of(example_inputs)
    where = target if isinstance(target, Target) else resolve_target(target or _device(model, call))
    owners, options = analyse(model, call, registry), options or CompileOptions()
    follows = plan is not None
    if plan is None:
        plan = _make_plan(model, owners, where, Chooser(where, options))
    elif list(plan.schedule) != [owner.path for owner in owners]:
        raise ConfigError(
            what=f"the plan is for attention in {', '.join(plan.schedule) or 'nothing'}",
            where="plan",
            mend="use a plan of this model, or leave it out to choose anew",
        )
    _hold_to(budget, plan)
    calls = _calls(owners, plan, where)
    before = outputs_in_eval(model, call) if calls else []
    adapted, declined = adapt_owners(model, calls, registry)
    plan = _without(plan, owners, declined)
    notes = [*plan.notes, *_notes(owners, adapted)]
    if adapted:
        undo = None
        found, allowed = difference(before, outputs_in_eval(model, call)), _allowed(owners, adapted)
        if not found <= allowed:
            undo = f"its rewrite was undone: outputs of the model differed by {found:.1e}, {allowed:.1e} is allowed"
        elif not follows and _can_time(owners, adapted, options, where, _device(model, call)):
            gradients = any(choice.phases[-1] == "backward" for choice in plan.choices)
            both = time_both_ways(
                model, call, calls.values(), gradients=gradients, budget_s=options.measure_budget_s
            )
            notes.append(f"{both}{' (with gradients)' if gradients else ''}")
            if not both.gains:
                undo = f"its rewrite was undone: {both}"
        if undo is not None:
            for function in calls.values():
                function.enabled = False
            return model, _without(plan, owners, dict.fromkeys(adapted, undo))
    return model, replace(plan, notes=tuple(notes))


def _can_time(
    owners: list[Owner], adapted: Mapping[str, str], options: CompileOptions, target: Target, device: str
) -> bool:
    """Whether timing is asked for, the target is where the model is, and kernels run on the example at all."""
    runs = any(owner.path in adapted and not owner.first.mask.padding for owner in owners)
    here = target.local is not None and target.kind == torch.device(device).type
    return runs and here and options.measure and options.estimator == "measured"


def attention_calls(model: nn.Module) -> dict[str, AttentionCall]:
    """The functions that a compiled model's owners call, by path; `enabled = False` lets one run as it was written."""
    found = {}
    for path, module in model.named_modules():
        for value in module.__dict__.values():
            function = value if isinstance(value, AttentionCall) else getattr(value, "attention", None)
            if isinstance(function, AttentionCall):
                found[path] = function
    return found


def _make_plan(model: nn.Module, owners: list[Owner], target: Target, chooser: Chooser) -> Plan:
    operator = CATALOGUE.operator(OPERATOR)
    asked = [
        (layer, owner, number, workload, model.training and not owner.attentions[number].dropout_p)
        for layer, owner in enumerate(owners)
        for number, workload in enumerate(owner.workloads)
    ]
    chooser.compile_ahead((operator, workload, training) for *_, workload, training in asked)
    choices = []
    for layer, owner, number, workload, training in asked:
        choice = chooser.choose(operator, workload, training=training, used=True)
        choices.append(
            NodeChoice(
                layer=layer,
                mixer=owner.class_name,
                method="forward",
                node="attention" if not number else f"attention_{number}",
                operator=OPERATOR,
                kernel=choice.text,
                chosen=choice.kernel,
                shape=dict(workload.shape),
                options=dict(workload.options),
                dtype=workload.dtype,
                phases=tuple(part.phase for part in phases(workload, training)),
                figures=choice.figures,
                declined=dict(choice.declined),
                reason=choice.reason,
                used=True,
                kernel_version=CATALOGUE.kernel(OPERATOR, choice.kernel).version,
            )
        )
    first = owners[0].first if owners else None
    return Plan(
        target=target.device.name,
        origin=target.device.origin,
        versions=plan_versions(),
        example={
            "tokens_shape": [first.b, first.t] if first else [0, 0], "packed": False, "documents": 0,
            "dtype": choices[0].dtype if choices else first.dtype if first else "none",
            "training": model.training, "decoding": False,
        },
        schedule=tuple(owner.path for owner in owners),
        choices=tuple(choices),
        uncaptured=tuple(
            _uncaptured(layer, owner, owner.declined) for layer, owner in enumerate(owners) if owner.declined
        ),
        notes=() if not chooser.measured_s else (f"measured for {chooser.measured_s:.1f} s",),
    )  # fmt: skip


def _calls(owners: list[Owner], plan: Plan, target: Target) -> dict[str, AttentionCall]:
    calls = {}
    for layer, owner in enumerate(owners):
        chosen = {
            (bool(choice.options["causal"]), int(choice.options["window"])): Chosen(
                kernel=choice.kernel,
                workload=Workload(
                    operator=OPERATOR,
                    shape=choice.shape,
                    dtype=cast(DType, choice.dtype),
                    options=choice.options,
                ),
                device_kind=target.kind,
            )
            for choice in plan.choices
            if choice.layer == layer
        }
        if chosen:
            calls[owner.path] = AttentionCall(written=owner.first.written, chosen=chosen)
    return calls


def _without(plan: Plan, owners: list[Owner], declined: Mapping[str, str]) -> Plan:
    """The plan without the choices of these owners, and with the reasons why they run as written."""
    layers = {layer for layer, owner in enumerate(owners) if owner.path in declined}
    reasons = tuple(_uncaptured(layer, owners[layer], declined[owners[layer].path]) for layer in sorted(layers))
    kept = tuple(entry for entry in plan.uncaptured if entry.layer not in layers)
    return replace(
        plan,
        choices=tuple(choice for choice in plan.choices if choice.layer not in layers),
        uncaptured=tuple(sorted((*kept, *reasons), key=lambda entry: entry.layer)),
    )


def _uncaptured(layer: int, owner: Owner, reason: str) -> Uncaptured:
    return Uncaptured(layer=layer, mixer=owner.class_name, method="forward", reason=reason)


def _notes(owners: list[Owner], adapted: Mapping[str, str]) -> Iterable[str]:
    """A line for all rewritten owners that look alike: which, how they were written, what stays as written."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for layer, owner in enumerate(owners):
        if owner.path in adapted:
            first = owner.first
            key = (owner.class_name, first.written, first.mask, first.depends_on, first.dropout_p, adapted[owner.path])
            groups.setdefault(key, []).append(layer)
    for layers in groups.values():
        owner = owners[layers[0]]
        first, numbers = owner.first, layer_numbers(layers)
        text = f"layer {numbers} {owner.class_name} ({owner.path}, ...)" if len(layers) > 1 else (
            f"layer {numbers} {owner.class_name} ({owner.path})"
        )  # fmt: skip
        text += f": {first.written}, mask {first.mask}, rewritten by {adapted[owner.path]}"
        if first.mask.padding:
            text += f"; batches that hide padding run as written (mask from {', '.join(first.depends_on)})"
        if first.dropout_p:
            text += f"; while training runs as written, for its dropout of {first.dropout_p:g}"
        yield text


def _allowed(owners: list[Owner], adapted: Mapping[str, str]) -> float:
    """The operator's own tolerance, for as many layers whose errors add up like independent ones."""
    tolerances = CATALOGUE.operator(OPERATOR).tolerances
    worst = max(
        tolerances[workload.dtype].output for owner in owners if owner.path in adapted for workload in owner.workloads
    )
    return worst * math.sqrt(1 + len(adapted))


def _device(model: nn.Module, call: Call) -> str:
    leaves = tree_leaves((call.args, dict(call.kwargs)))
    tensor = next((leaf for leaf in (*model.parameters(), *leaves) if isinstance(leaf, Tensor)), torch.empty(0))
    return str(tensor.device) if tensor.device.type in ("cpu", "cuda") else "auto"


def _check_budget(budget: BudgetConfig | None) -> None:
    if budget is not None and (budget.memory_bytes is not None or budget.carry_bytes is not None):
        raise ConfigError(
            what="identical rewrites change neither the memory nor the carry of a foreign model",
            where="budget",
            mend="give latency_s alone, or describe the model as a recipe, whose layers can be `auto`",
        )


def _hold_to(budget: BudgetConfig | None, plan: Plan) -> None:
    if budget is not None and budget.latency_s is not None and plan.seconds > budget.latency_s:
        raise ConfigError(
            what=f"its attention alone takes {plan.seconds:.2e} s by the best kernels, the budget is "
            f"{budget.latency_s:.2e} s",
            where="budget.latency_s",
            mend="raise the budget, shorten the sequence, or describe the model as a recipe with cheaper mixers",
        )
