"""explain: what the compiler would choose for a configuration and a target, and why; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence

from subquad.commands.hydra_verb import run_with_hydra
from subquad.schema import RunConfig


def run(arguments: list[str]) -> int:
    """Explain once per configuration that Hydra composes from the arguments."""
    return run_with_hydra("explain", arguments, explain_job)


def explain_job(config: RunConfig, overrides: Sequence[str]) -> None:
    """One job: torch is first imported here."""
    from subquad.compiler.explain import explain

    print(explain(config))
