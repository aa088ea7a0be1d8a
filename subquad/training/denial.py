"""A kernel that fails in mid-run: it is denied, its nodes get another, and the run goes back to its last checkpoint.

All other choices stay, so that nothing else changes. What a device reports only later (an illegal address on CUDA) is
blamed on no kernel and leaves no device to go on with: that ends the run.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from subquad.compiler.options import CompileOptions
from subquad.compiler.plan import NodeChoice, Plan
from subquad.errors import ConfigError, RunError
from subquad.model.build import build_model
from subquad.schema import RunConfig
from subquad.training.compilation import compiled
from subquad.training.run_folder import RunFolder
from subquad_kernels.kernel_table import parse_table
from subquad_kernels.torch_operator import failed_kernel


def denied_after(error: Exception, config: RunConfig, folder: RunFolder, ranks: int) -> str | None:
    """The kernel to deny after an error in mid-run, as operator/kernel; None if no kernel raised it.

    Raises: RunError that names the kernel where the run cannot go on without it by itself.
    """
    kernel = failed_kernel(error)
    if kernel is None:
        return None
    operator, _, name = kernel.partition("/")
    why = None
    if config.kernel.get(operator) == name:
        why, mend = "the recipe pins it", f"leave kernel.{operator} out, in a new run"
    elif ranks > 1:
        why, mend = f"{ranks} ranks run it", f"go on with resume={folder.path} 'deny=[{kernel}]'"
    if why is not None:
        raise RunError(what=f"the kernel {kernel} failed ({_line(error)}), and {why}", where=kernel, mend=mend)
    return kernel


def without_denied(plan: Plan, config: RunConfig, *, packed: bool) -> Plan:
    """The plan with new choices for the nodes whose kernel the configuration denies; the same plan if there are none.

    Raises: ConfigError when no kernel is left.
    """
    options = CompileOptions.of_run(config)
    denied = [
        choice for choice in plan.choices if any(options.denies(choice.operator, name) for name in _names(choice))
    ]
    if not denied:
        return plan
    _, anew = compiled(build_model(config.model), config, None, packed=packed)
    chosen = {choice.place: choice for choice in anew.choices}
    places = {choice.place for choice in denied}
    kernels = sorted({f"{choice.operator}/{choice.chosen}" for choice in denied})
    return replace(
        plan,
        # What this run does not capture (a plan that decodes in place) has no choice anew, and none is needed.
        choices=tuple(
            chosen[choice.place] if choice.place in places else choice
            for choice in plan.choices
            if choice.place not in places or choice.place in chosen
        ),
        notes=(*plan.notes, f"denied since the run began: {', '.join(kernels)}"),
    )


def deny(kernel: str, error: Exception, config: RunConfig, plan: Plan, *, packed: bool) -> Plan:
    """Add the kernel to what the configuration denies and return the plan without it.

    Raises: RunError when nothing else can run.
    """
    config.deny = [*config.deny, kernel]
    try:
        return without_denied(plan, config, packed=packed)
    except ConfigError as nothing_left:
        raise RunError(
            what=f"the kernel {kernel} failed ({_line(error)}), and {nothing_left.what}",
            where=kernel,
            mend=nothing_left.mend,
        ) from error


def message(kernel: str, error: Exception, step: int) -> str:
    """What a person is told."""
    back = f"back to the checkpoint of step {step}" if step else "back to the beginning"
    return f"the kernel {kernel} failed ({_line(error)}); it is denied from now on, and the run goes {back}"


def free_memory() -> None:
    """Give back what the failed attempt held on the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _names(choice: NodeChoice) -> set[str]:
    return {choice.chosen, *(row.kernel for row in parse_table(choice.kernel))}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
