"""explain: what the compiler would choose for a configuration or a model, on a target, and why; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from subquad.commands.hydra_verb import run_with_hydra
from subquad.commands.key_values import key_values
from subquad.component_config import typed_config
from subquad.schema import ForeignConfig, RunConfig


def run(arguments: list[str]) -> int:
    """Explain once per configuration that Hydra composes from the arguments, or the model that `module=` names."""
    if any(argument.startswith("module=") for argument in arguments):
        print(explain_module(arguments))
        return 0
    return run_with_hydra("explain", arguments, explain_job)


def explain_job(config: RunConfig, overrides: Sequence[str]) -> None:
    """One job: torch is first imported here."""
    from subquad.compiler.explain import explain

    print(explain(config))


def explain_module(arguments: Sequence[str]) -> str:
    """The report of a model that the user's own code builds.  Raises: SubquadError."""
    values: dict[str, Any] = dict(key_values("explain module=", ForeignConfig, arguments))
    if "measure" in values:
        values["measure"] = yaml.safe_load(values["measure"])
    request = typed_config(ForeignConfig, values, where="explain module=")
    from subquad.compiler.foreign.compile_foreign import compile_foreign
    from subquad.compiler.foreign.user_model import user_model
    from subquad.compiler.options import CompileOptions
    from subquad.compiler.report import format_plan

    model, inputs = user_model(request.module, request.example)
    _, plan = compile_foreign(model, inputs, target=request.target, options=CompileOptions(measure=request.measure))
    return format_plan(plan)
