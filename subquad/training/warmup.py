"""What a run does before its first step, done beforehand: kernels are compiled, checked and measured."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from subquad.compiler.assign_mixers import with_mixers
from subquad.compiler.choose import Chooser
from subquad.compiler.explain import plan_of_shapes
from subquad.compiler.options import CompileOptions
from subquad.compiler.pipeline import compile_model
from subquad.compiler.plan import Plan
from subquad.compiler.run_shapes import is_packed, sized_model, training_example
from subquad.compiler.target import Target
from subquad.errors import ConfigError, RunError
from subquad.model.build import build_model
from subquad.schema import RunConfig
from subquad.training.compilation import plan_of, target_of, uses_bfloat16
from subquad_kernels.compilations import Compilation, compilations
from subquad_kernels.first_calls import FirstCall

STEP_TOKENS = 512
"""Enough for a kernel to cut time into parts, as it does in the run; Triton compiles once for all lengths."""


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """What was done and how many seconds it took; `step_s` is None where none was made.

    `later` is what Triton compiled after the first calls: for checks, measurements and the step.
    """

    plan: Plan
    first_calls: tuple[FirstCall, ...]
    later: tuple[Compilation, ...]
    compiled_s: float
    checked_s: float
    measured_s: float
    step_s: float | None
    seconds: float


def warm_up(config: RunConfig) -> WarmUp:
    """Compile, check and measure what training with this configuration will call; the user's caches keep it.

    All kernels are compiled at once, one a core. On CUDA a step of the model itself, over few tokens, follows: it
    compiles what is left, if the plan's kernels are called in another way than their checks call them. What
    torch.compile does under `compile=true` is left to the run.
    Raises: ConfigError, NotFoundError; RunError when that step fails.
    """
    if config.resume:
        raise ConfigError(
            what="warmup reads no run folders",
            where=f"resume={config.resume}",
            mend="give it the arguments of the run, and plan=RUN_DIR/plan.json to compile for its plan",
        )
    started = time.perf_counter()
    target = target_of(config)
    chooser = Chooser(target, CompileOptions.of_run(config), compile_all=True)
    followed = plan_of(config)
    with compilations() as compiled:
        config, assignment = with_mixers(config, target, followed, chooser)
        plan = followed or replace(plan_of_shapes(config, target, chooser), assignment=assignment)
        alone = config.trainer.context_parallel == 1
        step_s = one_step_s(config, plan, target) if alone and target.kind == "cuda" else None
    ahead = {one.thread for call in chooser.first_calls for one in call.compiled}
    return WarmUp(
        plan=plan,
        first_calls=tuple(chooser.first_calls),
        later=tuple(one for one in compiled if one.thread not in ahead),
        compiled_s=chooser.compiled_s,
        checked_s=chooser.checked_s,
        measured_s=chooser.measured_s,
        step_s=step_s,
        seconds=time.perf_counter() - started,
    )


def one_step_s(config: RunConfig, plan: Plan, target: Target) -> float:
    """Build the model on the device, let it run the plan, and take the gradient over a few tokens; how long that took.

    Raises: RunError, ConfigError when the plan is for another model.
    """
    device = target.local
    assert device is not None
    started = time.perf_counter()
    packed, dtype = is_packed(config), torch.bfloat16 if uses_bfloat16(config) else torch.float32
    rows, t = 1 if packed else min(2, config.trainer.batch_size), min(config.trainer.seq_len, STEP_TOKENS)
    try:
        with torch.device(device):
            model = build_model(sized_model(config), device=device)
            tokens = torch.zeros(rows, t, dtype=torch.int64)
            boundaries = torch.tensor([0, t // 2, t], dtype=torch.int32) if packed else None
        model.activation_checkpointing = config.trainer.activation_checkpointing
        model.recompute = config.trainer.recompute
        compile_model(model, training_example(config, target, packed=packed), target=target, plan=plan)
        with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(tokens, boundaries)
        logits.float().logsumexp(dim=-1).mean().backward()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
    except (RuntimeError, ValueError) as error:  # whatever a kernel raises here it would raise in the run
        raise RunError(
            what=f"a step over {rows * t} tokens failed: {type(error).__name__}: {error}".splitlines()[0],
            where=f"model={config.model.name}",
            mend="`python -m subquad doctor` checks every kernel; deny=[KERNEL] leaves one out",
        ) from error
    return time.perf_counter() - started
