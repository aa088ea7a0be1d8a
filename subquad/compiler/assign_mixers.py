"""Fill the `auto` layers of a schedule under budgets: a configuration becomes one that says every layer's mixer.

It stands before the model is built, because another mixer is another function: no later pass may exchange one.

    min sum_i loss[i, mixer_i]    subject to    sum_i cost[mixer_i] + max_i workspace[mixer_i] <= budget
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from subquad.compiler.assignment import Alternative, Assignment, LayerCost
from subquad.compiler.choose import Chooser
from subquad.compiler.example import Example
from subquad.compiler.layer_costs import BYTES_PER_PARAMETER, layer_costs
from subquad.compiler.loss_memory import loss_bytes
from subquad.compiler.options import CompileOptions
from subquad.compiler.plan import Plan
from subquad.compiler.quality.prior import by_declared_growth, prior_table
from subquad.compiler.quality.table import QualityTable
from subquad.compiler.run_shapes import compute_dtype, is_packed, model_of, sized_model
from subquad.compiler.target import Target
from subquad.component_config import defaults_of, typed_config
from subquad.contracts import MixerContext, MixerSpec
from subquad.errors import ConfigError, SubquadError
from subquad.model.build import build_model, full_schedule
from subquad.registry import load_registry
from subquad.schema import AUTO, CHUNKED, ModelConfig, RunConfig
from subquad_cost_model.selection import Budget, InfeasibleError, Problem, Selection, k_best, solve

PRIOR = "prior"
BUDGETS = ("latency_s", "memory_bytes", "carry_bytes")
"""The limits of `budget`."""


def assign_mixers(
    config: RunConfig, target: Target, chooser: Chooser | None = None
) -> tuple[RunConfig, Assignment | None]:
    """The configuration with a mixer in every layer, and why; the argument is left as it is.

    Without `auto` in the schedule nothing is done, and the assignment is None.
    Raises: ConfigError when no schedule meets the budgets (the cheapest one is named), or a candidate cannot be built.
    """
    layers = full_schedule(config.model)
    if AUTO not in layers:
        return config, None
    config = copy.deepcopy(config)
    model = sized_model(config)
    keys, declined = _candidates(config, model)
    model.mixers = config.model.mixers  # candidates of the registry have joined it
    fixed = [key for key in dict.fromkeys(layers) if key != AUTO]
    if unknown := [key for key in fixed if key not in model.mixers]:
        raise ConfigError(
            what=f"the schedule names '{unknown[0]}', which model.mixers does not hold",
            where="model.schedule",
            mend=f"add model.mixers.{unknown[0]}, or use one of {', '.join(model.mixers)}",
        )
    example = _example(config, target)
    all_keys = list(dict.fromkeys([*keys, *fixed]))
    measures = config.compiler.measure and config.compiler.estimator == "measured"
    costs = layer_costs(
        model,
        all_keys,
        example,
        target,
        chooser or Chooser(target, CompileOptions.of_run(config)),
        checkpointing=config.trainer.activation_checkpointing and config.trainer.recompute == "all",
        budget_s=config.compiler.measure_budget_s if measures else None,
    )
    declined |= costs.declined
    keys = [key for key in keys if key in costs.of]
    if not keys or any(key not in costs.of for key in fixed):
        reasons = "; ".join(f"{key}: {reason}" for key, reason in declined.items())
        raise ConfigError(what=f"no candidate runs here ({reasons})", where="model.candidates", mend="add others")
    table = _table(config, model, keys)
    loss = table.rows(keys, model.mixers, len(layers), model.d_model)
    problem = _problem(config, model, layers, all_keys, keys, costs.of, loss, example)
    try:
        plans = k_best(problem, 1 + config.budget.alternatives, distance=config.budget.distance)
    except InfeasibleError as error:
        raise _no_schedule(error, problem, all_keys) from None
    best, others = plans[0], plans[1:]
    free = solve(replace(problem, budgets=()))
    schedule = _keys_of(best, all_keys)
    assignment = Assignment(
        schedule=schedule,
        auto=tuple(layer for layer, key in enumerate(layers) if key == AUTO),
        tokens_shape=example.tokens_shape,
        quality=f"{table.proxy}: {table.origin}",
        candidates=costs.of,
        declined=declined,
        loss=tuple(row if layers[layer] == AUTO else {} for layer, row in enumerate(loss)),
        total_loss=best.loss,
        proven=best.optimal,
        budgets={name: float(limit) for name in BUDGETS if (limit := getattr(config.budget, name)) is not None},
        totals=_all_totals(best, all_keys, costs.of, _outside(config, model, example)),
        reasons=_reasons(layers, all_keys, loss, problem, best, free),
        alternatives=tuple(
            Alternative(schedule=_keys_of(plan, all_keys), loss=plan.loss, totals=dict(plan.totals)) for plan in others
        ),
        mixers={key: dict(model.mixers[key]) for key in dict.fromkeys(schedule)},
    )
    return assigned(config, assignment), assignment


def with_mixers(
    config: RunConfig, target: Target, plan: Plan | None = None, chooser: Chooser | None = None
) -> tuple[RunConfig, Assignment | None]:
    """As `assign_mixers`; a plan that is followed has already chosen.  Raises: ConfigError."""
    if plan is None or AUTO not in full_schedule(config.model):
        return assign_mixers(config, target, chooser)
    if plan.assignment is None:
        raise ConfigError(
            what="the schedule leaves layers to be chosen (auto), and the plan says nothing of them",
            where="plan",
            mend="name the plan.json of a run with this schedule, or leave it out to choose anew",
        )
    return assigned(config, plan.assignment), plan.assignment


def assigned(config: RunConfig, assignment: Assignment) -> RunConfig:
    """The configuration with the schedule of an assignment, made now or read from a plan.

    Raises: ConfigError when the assignment is for a model of another depth or other fixed layers.
    """
    layers = full_schedule(config.model)
    fits = len(layers) == len(assignment.schedule) and all(
        key in (AUTO, chosen) for key, chosen in zip(layers, assignment.schedule)
    )
    if not fits:
        raise ConfigError(
            what=f"the plan assigns {', '.join(assignment.schedule)}; the schedule is {', '.join(layers)}",
            where="plan",
            mend="use a plan of this model, or leave it out to choose anew",
        )
    config = copy.deepcopy(config)
    entries = {key: dict(entry) for key, entry in assignment.mixers.items()}
    config.model = replace(config.model, schedule=list(assignment.schedule), mixers={**config.model.mixers, **entries})
    return config


def _candidates(config: RunConfig, model: ModelConfig) -> tuple[list[str], dict[str, str]]:
    """The keys to choose from, best first as far as an order is declared, and why others are left out.

    Named ones must work. Without names: all of `model.mixers`, or all that is installed if the recipe holds none, but
    for those that declare `candidate=False`.
    """
    registry = load_registry()
    named = list(dict.fromkeys(model.candidates)) or [
        key
        for key, entry in model.mixers.items()
        if registry.mixer(entry["mixer"], where=f"model.mixers.{key}.mixer").candidate
    ]
    entries: dict[str, Mapping[str, Any]] = {}
    specs: dict[str, MixerSpec] = {}
    for key in named or [name for name, spec in registry.mixers.items() if spec.candidate]:
        entry = model.mixers.get(key)
        if entry is None:
            spec = registry.mixer(key, where="model.candidates")
            entry = {"mixer": key, **defaults_of(spec.config)}
        specs[key] = registry.mixer(entry["mixer"], where=f"model.mixers.{key}.mixer")
        entries[key] = entry
    config.model.mixers = {**config.model.mixers, **entries}
    keys = named or by_declared_growth(specs)
    declined: dict[str, str] = {}
    for key in list(keys):
        reason = _refusal(specs[key], entries[key], config)
        if reason is None:
            try:
                build_model(model_of(replace(model, mixers=config.model.mixers), [key]), device="meta")
                continue
            except SubquadError as error:
                if named:
                    raise
                reason = error.what
        elif named:
            raise ConfigError(what=f"'{key}' is no candidate: {reason}", where="model.candidates", mend="leave it out")
        keys.remove(key)
        del config.model.mixers[key]
        declined[key] = reason
    return keys, declined


def _refusal(spec: MixerSpec, entry: Mapping[str, Any], config: RunConfig) -> str | None:
    if not spec.causal:
        return "it is not causal"
    if spec.shares is not None:
        fields = {name: value for name, value in entry.items() if name not in ("mixer", "channel_mixer")}
        context = MixerContext(d_model=config.model.d_model, layer_index=0, num_layers=1, context_len=1)
        if reads := spec.shares(typed_config(spec.config, fields, "model.mixers"), context).reads:
            return f"it reads {', '.join(reads)} of an earlier layer; name its layers in the schedule"
    if is_packed(config) and not spec.packed:
        return "it knows no boundaries of documents"
    return None


def _example(config: RunConfig, target: Target) -> Example:
    """The shapes that the budgets are meant for: those of a training step unless `budget` says others."""
    return Example(
        tokens_shape=(
            config.budget.batch_size or config.trainer.batch_size,
            config.budget.seq_len or config.trainer.seq_len,
        ),
        packed=is_packed(config),
        dtype=compute_dtype(config.trainer.precision, target.kind),
        training=True,
    )


def _table(config: RunConfig, model: ModelConfig, keys: Sequence[str]) -> QualityTable:
    if config.budget.quality == PRIOR:
        return prior_table(keys, model.mixers, model.num_layers, model.d_model)
    return QualityTable.load(Path(config.budget.quality).expanduser())


def _problem(
    config: RunConfig,
    model: ModelConfig,
    layers: Sequence[str],
    all_keys: Sequence[str],
    keys: Sequence[str],
    costs: Mapping[str, LayerCost],
    loss: Sequence[Mapping[str, float]],
    example: Example,
) -> Problem:
    """The arrays: one row per layer, one column per key; a fixed layer has one option, whose loss is 0."""
    shape = (len(layers), len(all_keys))
    losses = np.full(shape, np.inf)
    for layer, key in enumerate(layers):
        for column, option in enumerate(all_keys):
            if key == AUTO and option in keys:
                losses[layer, column] = loss[layer][option]
            elif key == option:
                losses[layer, column] = 0.0
    budgets = []
    for name, per_layer, peak in _figures(all_keys, costs):
        limit = getattr(config.budget, name)
        if limit is None:
            continue
        room = limit - (_outside(config, model, example) if name == "memory_bytes" else 0)
        if room <= 0:
            raise ConfigError(
                what=f"the embedding, the head and the logits alone take {limit - room:.4g} bytes of {limit:.4g}",
                where="budget.memory_bytes",
                mend=f"use more than {limit - room:.4g}, a smaller batch, or a smaller vocabulary",
            )
        budgets.append(
            Budget(
                name=name,
                cost=np.tile(per_layer, (len(layers), 1)),
                limit=float(room),
                peak=None if peak is None else np.tile(peak, (len(layers), 1)),
            )
        )
    return Problem(loss=losses, budgets=tuple(budgets))


def _figures(
    all_keys: Sequence[str], costs: Mapping[str, LayerCost]
) -> list[tuple[str, list[float], list[float] | None]]:
    rows = [costs[key] for key in all_keys]
    return [
        ("latency_s", [cost.charged_s for cost in rows], None),
        ("memory_bytes", [cost.memory_bytes for cost in rows], [cost.workspace_bytes for cost in rows]),
        ("carry_bytes", [cost.carry_bytes for cost in rows], None),
    ]


def outside_bytes(model: ModelConfig, example: Example, *, chunked_loss: bool = False) -> int:
    """Memory that no block owns: embedding and head with their training state, logits and their gradient in float32.

    With a `chunked_loss` it is what that holds instead of logits.
    """
    b, t = example.tokens_shape
    matrices = BYTES_PER_PARAMETER * (1 if model.tie_embeddings else 2) * model.vocab_size * model.d_model
    return matrices + (loss_bytes(model, example, chunked=True) if chunked_loss else 2 * 4 * b * t * model.vocab_size)


def _outside(config: RunConfig, model: ModelConfig, example: Example) -> int:
    return outside_bytes(model, example, chunked_loss=config.trainer.loss == CHUNKED)


def _all_totals(
    best: Selection, all_keys: Sequence[str], costs: Mapping[str, LayerCost], outside: int
) -> dict[str, float]:
    """What the schedule takes of everything that can be budgeted, whether or not it is."""
    chosen = [costs[key] for key in _keys_of(best, all_keys)]
    return {
        "latency_s": sum(cost.charged_s for cost in chosen),
        "memory_bytes": sum(cost.memory_bytes for cost in chosen)
        + max(cost.workspace_bytes for cost in chosen)
        + outside,
        "carry_bytes": sum(cost.carry_bytes for cost in chosen),
    }


def _reasons(
    layers: Sequence[str],
    all_keys: Sequence[str],
    loss: Sequence[Mapping[str, float]],
    problem: Problem,
    best: Selection,
    free: Selection,
) -> tuple[str, ...]:
    """Why each layer has what it has; `free` is the best plan without budgets."""
    reasons = []
    for layer, (asked, chosen, wanted) in enumerate(zip(layers, _keys_of(best, all_keys), _keys_of(free, all_keys))):
        if asked != AUTO:
            reasons.append("fixed by the recipe")
        elif loss[layer][chosen] <= loss[layer][wanted]:
            reasons.append("loses least of its candidates")
        else:
            exchanged = (*best.choice[:layer], free.choice[layer], *best.choice[layer + 1 :])
            over = [
                f"{budget.name} by {budget.total(exchanged) / budget.limit - 1:.0%}"
                for budget in problem.budgets
                if budget.total(exchanged) > budget.limit
            ]
            less = loss[layer][chosen] - loss[layer][wanted]
            reasons.append(f"{wanted} loses {less:.4g} less, and here alone exceeds {', '.join(over)}")
    return tuple(reasons)


def _shares(problem: Problem, plan: Selection) -> list[tuple[str, float, float]]:
    return [(budget.name, plan.totals[budget.name], budget.limit) for budget in problem.budgets]


def _keys_of(plan: Selection, all_keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(all_keys[option] for option in plan.choice)


def _no_schedule(error: InfeasibleError, problem: Problem, all_keys: Sequence[str]) -> ConfigError:
    least = error.cheapest
    assert least is not None, "a budget can only be missed by what its other budgets allow"
    taken = ", ".join(f"{name} {total:.4g} of {limit:.4g}" for name, total, limit in _shares(problem, least))
    over = [name for name, total, limit in _shares(problem, least) if total > limit]
    return ConfigError(
        what=f"no schedule meets the budgets; the cheapest, {', '.join(_keys_of(least, all_keys))}, takes {taken}",
        where=", ".join(f"budget.{name}" for name in over or BUDGETS),
        mend="allow that much, add cheaper candidates (model.candidates), or a shorter or smaller batch",
    )
