"""explain: what the compiler would choose for a configuration or a model, on a target, and why; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from subquad.commands.hydra_verb import run_with_hydra
from subquad.commands.key_help import keys_in_help
from subquad.commands.key_values import key_values
from subquad.component_config import typed_config
from subquad.errors import ConfigError
from subquad.schema import ForeignConfig, RunConfig

ABOUT = """Show which kernel each operator would get on a device, its rivals, and why; nothing is trained.

  python -m subquad explain model=scout_mamba target=h100              # a device that need not be here
  python -m subquad explain model=scout_mamba html=page.html           # the same as a page, with rooflines
  python -m subquad explain module=package.module:factory target=h100  # a model of your own code

Keys of module=, which takes no others:

{keys}

All others are keys of a run."""
HTML = "html="
"""Names a file for the report as a page; it is no key of a run, and Hydra does not see it."""


def run(arguments: list[str]) -> int:
    """Explain once per configuration that Hydra composes, or the model that `module=` names.  Raises: ConfigError."""
    if any(argument.startswith("module=") for argument in arguments) and not {"--help", "-h"} & set(arguments):
        print(explain_module(arguments))
        return 0
    page = _page(arguments)
    composed = [argument for argument in arguments if not argument.startswith(HTML)]
    job = explain_job if page is None else partial(explain_job, html=page)
    return run_with_hydra("explain", composed, job, about=ABOUT.format(keys=keys_in_help(ForeignConfig)))


def explain_job(config: RunConfig, overrides: Sequence[str], html: Path | None = None) -> None:
    """One job: torch is first imported here."""
    from subquad.compiler.explain import explain

    print(explain(config, html))
    if html is not None:
        print(f"page: {html}")


def _page(arguments: Sequence[str]) -> Path | None:
    """The file that is asked for, checked before anything is chosen."""
    named = [argument.removeprefix(HTML) for argument in arguments if argument.startswith(HTML)]
    if not named:
        return None
    path = Path(named[-1]).expanduser().absolute()
    if not named[-1] or path.is_dir() or not path.parent.is_dir():
        raise ConfigError(
            what=f"'{named[-1]}' is no file that can be written",
            where="html",
            mend="name one in a folder that is there",
        )
    if "--multirun" in arguments or "-m" in arguments:
        raise ConfigError(
            what="the jobs of a sweep would write one file", where="html", mend="leave it out, or explain one at a time"
        )
    return path


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
