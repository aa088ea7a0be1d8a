"""What would be chosen for a recipe, on this machine or another, without building its parameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch._subclasses.fake_tensor import FakeTensorMode

from subquad.compiler.assign_mixers import with_mixers
from subquad.compiler.choose import Chooser
from subquad.compiler.html_report import write_html
from subquad.compiler.know_device import know_device
from subquad.compiler.options import CompileOptions
from subquad.compiler.pipeline import capture_model, make_plan, split_model
from subquad.compiler.plan import Plan
from subquad.compiler.predict_step import predict_step
from subquad.compiler.report import format_plan
from subquad.compiler.run_shapes import is_packed, part_of, sized_model, training_example
from subquad.compiler.target import Target, resolve_target
from subquad.errors import ConfigError
from subquad.model.build import build_model
from subquad.model.shared_projections import keep_share, kept_whole
from subquad.schema import RunConfig


def explain(config: RunConfig, html: Path | None = None) -> str:
    """The report of the plan that training with this configuration would follow; as a page in the file `html` too.

    Raises: ConfigError when that file cannot be written.
    """
    _refuse_what_is_not_read(config)
    plan = explained_plan(config)
    if html is not None:
        try:
            write_html(plan, resolve_target(config.target), CompileOptions.of_run(config), html)
        except OSError as error:
            raise ConfigError(
                what=f"{html} cannot be written ({error.strerror})", where="html", mend="name another file"
            ) from None
    return format_plan(plan)


def _refuse_what_is_not_read(config: RunConfig) -> None:
    for key, named in (("resume", config.resume), ("plan", config.plan)):
        if named is not None:
            raise ConfigError(
                what="explain chooses anew, and reads neither run folders nor plans",
                where=f"{key}={named}",
                mend="leave it out; a run's report.md shows its choices, `plan diff A B` what two plans do differently",
            )


def explained_plan(config: RunConfig) -> Plan:
    """The plan itself."""
    target = resolve_target(config.target)
    know_device(target, config)
    chooser = Chooser(target, CompileOptions.of_run(config))
    config, assignment = with_mixers(config, target, chooser=chooser)
    plan = plan_of_shapes(config, target, chooser)
    return replace(plan, assignment=assignment, prediction=predict_step(config, target, plan))


def plan_of_shapes(config: RunConfig, target: Target, chooser: Chooser) -> Plan:
    """The plan of training on a target. The model is built of shapes alone: a billion parameters cost nothing."""
    sharing = config.trainer.tensor_parallel
    with FakeTensorMode():
        model = build_model(sized_model(config))
        whole = kept_whole(model.blocks, sharing)  # type: ignore[arg-type]
        keep_share(model.blocks, sharing)  # type: ignore[arg-type]
    packed = is_packed(config)
    example, part = training_example(config, target, packed=packed), part_of(config, packed=packed)
    captured = capture_model(model, example)
    if part is not None:
        captured = split_model(model, captured, example, part)
    if sharing > 1:  # ranks share projections in training alone; carries are of whole models
        captured = [
            replace(one, graphs={name: one.graphs[name] for name in example.methods if name in one.graphs})
            for one in captured
        ]
    plan = make_plan(model, captured, example, target, chooser)
    return replace(plan, notes=(*plan.notes, whole)) if whole and sharing > 1 else plan
