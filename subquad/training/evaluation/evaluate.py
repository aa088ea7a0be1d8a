"""evaluate: judge a finished run by a suite, and keep the record in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from subquad.errors import ConfigError, RunError, suggestion
from subquad.schema import EvaluateConfig
from subquad.training.evaluation.lm_eval_adapter import evaluate_lm_eval
from subquad.training.evaluation.loaded_run import LoadedRun, load
from subquad.training.evaluation.report import write_evaluation_report
from subquad.training.evaluation.synthetic import evaluate_task, trained_on
from subquad.training.evaluation.text import Record, evaluate_text
from subquad.training.run_folder import FORMAT_VERSION, RunFolder, read_json, write_json
from subquad.training.run_page import write_run_section
from subquad.training.tasks.catalogue import TASKS

SUITES = ("text", *TASKS, "lm_eval")


def evaluate(request: EvaluateConfig) -> tuple[RunFolder, str, Record]:
    """Run a suite; `evaluation.json`, `evaluation.md` and `report.html` keep the newest record of every suite.

    Returns the folder, the suite, and its record. Raises: ConfigError, DataError, NotFoundError, ResumeError, RunError.
    """
    _check(request)
    run = load(Path(request.run), f"run={request.run}", request.batch_size)
    suite = request.suite
    if suite == "auto":
        trained = trained_on(run.config)
        suite = "text" if trained is None else trained.task
    record = {"step": run.step, **_record(run, request, suite)}
    suites = _recorded(run.folder)
    suites[suite] = record
    try:
        write_json(run.folder.evaluation, {"suites": suites})
        write_evaluation_report(run.folder, run.config.model.name, suites)
        write_run_section(run.folder)
    except OSError as error:
        raise RunError(
            what=f"the evaluation cannot be written: {error.strerror}",
            where=str(run.folder.path),
            mend="make the folder writable, or free space on its disk",
        ) from None
    return run.folder, suite, record


def _record(run: LoadedRun, request: EvaluateConfig, suite: str) -> Record:
    if suite == "text":
        return evaluate_text(run, request)
    if suite == "lm_eval":
        return evaluate_lm_eval(run, request)
    return evaluate_task(run, request, suite)


def _recorded(folder: RunFolder) -> dict[str, Any]:
    """What earlier evaluations of this run found; a record that cannot be read is replaced."""
    try:
        record = read_json(folder.evaluation)
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return dict(record["suites"]) if record.get("format_version") == FORMAT_VERSION else {}


def _check(request: EvaluateConfig) -> None:
    if request.suite != "auto" and request.suite not in SUITES:
        raise ConfigError(
            what=f"no suite is called '{request.suite}'",
            where="evaluate.suite",
            mend=f"{suggestion(request.suite, SUITES)}there are {', '.join(SUITES)}",
        )
    for name in ("samples", "batch_size", "seed"):
        if getattr(request, name) < 0:
            raise ConfigError(
                what=f"{name} is {getattr(request, name)}", where=f"evaluate.{name}", mend="use 0 or more"
            )
    for name in ("lengths", "sizes"):
        if any(value < 1 for value in getattr(request, name)):
            raise ConfigError(
                what=f"{name} holds {min(getattr(request, name))}", where=f"evaluate.{name}", mend="use 1 or more"
            )
    if (request.suite == "lm_eval") != bool(request.tasks):
        raise ConfigError(
            what="lm_eval needs tasks" if not request.tasks else "tasks are lm_eval's",
            where="evaluate.tasks",
            mend="write suite=lm_eval tasks=[lambada_openai]; a synthetic task is named by suite=mqar",
        )
