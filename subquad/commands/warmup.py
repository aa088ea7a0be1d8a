"""warmup: compile, check and measure what a run will call, so that `train` with the same arguments starts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from subquad.commands.hydra_verb import run_with_hydra
from subquad.commands.table import table
from subquad.schema import RunConfig

if TYPE_CHECKING:
    from subquad.training.warmup import WarmUp
    from subquad_kernels.first_calls import FirstCall


ABOUT = """Compile, check and measure the kernels that a run will call, so that the same `train` starts at once.

  python -m subquad warmup model=scout_mamba_430m trainer.seq_len=2048

What is found is kept in the cache of this machine: `python -m subquad doctor` says where that is."""


def run(arguments: list[str]) -> int:
    """Warm up once per configuration that Hydra composes from the arguments."""
    return run_with_hydra("warmup", arguments, warmup_job, about=ABOUT)


def warmup_job(config: RunConfig, overrides: Sequence[str]) -> None:
    """One job: torch is first imported here."""
    from subquad.training.warmup import warm_up

    print(as_text(warm_up(config)), flush=True)


def as_text(done: WarmUp) -> str:
    """What was compiled, what failed, and how long each part took."""
    rows = [
        (call.kernel, call.part, f"{call.seconds:.2f}", call.failure or _shape(call))
        for call in sorted(done.first_calls, key=lambda call: -call.seconds)
    ]
    header = ("kernel", "direction", "seconds", "shape of the first call, or why it failed")
    in_turn_s = sum(call.seconds for call in done.first_calls)
    parts = [
        ("compiled", done.compiled_s, f"{in_turn_s:.1f} s one after the other"),
        ("checked", done.checked_s, "against the float64 reference"),
        ("measured", done.measured_s, "where estimates overlap"),
    ]
    if done.step_s is not None:
        parts.append(("one step", done.step_s, "of the model, over few tokens"))
    failed = {
        f"left out {choice.operator}/{name}: {reason}"
        for choice in done.plan.choices
        for name, reason in choice.declined.items()
        if choice.used and "failed" in reason
    }
    chosen = dict.fromkeys(f"{choice.operator}/{choice.chosen}" for choice in done.plan.choices if choice.used)
    return "\n".join(
        [
            table("Compiled", header, rows).rstrip(),
            *_compilations(done),
            *(f"{name:<9} {seconds:7.1f} s   {remark}" for name, seconds, remark in parts),
            *sorted(failed),
            f"{done.plan.target} is ready in {done.seconds:.1f} s for {', '.join(chosen)}",
        ]
    )


def _compilations(done: WarmUp) -> list[str]:
    """Triton's kernels, the slowest first; those that are not compiled ahead are the run's to wait for."""
    from subquad_kernels.compilations import Compilation

    def row(one: Compilation, wanted_by: str) -> tuple[str, ...]:
        stages = " ".join(f"{stage} {seconds:.2f}" for stage, seconds in one.stages.items() if seconds >= 0.005)
        return one.kernel, wanted_by, f"{one.seconds:.2f}", stages or "found in Triton's folder"

    found = [(one, f"{call.kernel} {call.part}") for call in done.first_calls for one in call.compiled]
    found += [(one, "later: checks, measurements, step") for one in done.later]
    if not found:
        return []
    rows = [row(*one) for one in sorted(found, key=lambda pair: -pair[0].seconds)]
    return [table("Triton", ("kernel", "for", "seconds", "of them"), rows).rstrip()]


def _shape(call: FirstCall) -> str:
    shape = " ".join(f"{axis}={length}" for axis, length in call.workload.shape.items())
    return f"{shape} {call.workload.dtype}"
