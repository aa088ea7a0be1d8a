"""evaluate: what a trained run reaches on held-out text by position and length, and on tasks."""

from __future__ import annotations

from typing import Any

import yaml

from subquad.commands.key_help import keys_in_help
from subquad.commands.key_values import key_values
from subquad.commands.table import table
from subquad.component_config import typed_config
from subquad.errors import ConfigError
from subquad.schema import EvaluateConfig

HELP = """Judge a trained run, and write evaluation.json, evaluation.md and pictures into its folder.

  python -m subquad evaluate run=RUN_DIR                       # its validation text, or the task it was trained on
  python -m subquad evaluate run=RUN_DIR lengths=[128,512,2048]
  python -m subquad evaluate run=RUN_DIR suite=mqar sizes=[4,8,16,32] samples=1000
  python -m subquad evaluate run=RUN_DIR suite=lm_eval tasks=[lambada_openai] samples=200

{keys}

A model knows a synthetic task only if it was trained on it: train data=synthetic data.task=mqar."""


def run(arguments: list[str]) -> int:
    """Evaluate what `key=value` arguments say."""
    if any(argument in ("--help", "-h") for argument in arguments):
        print(HELP.format(keys=keys_in_help(EvaluateConfig)))
        return 0
    request = evaluate_config(arguments)
    from subquad.training.evaluation.evaluate import evaluate

    folder, suite, record = evaluate(request)
    print(_table(suite, record))
    print(f"written: {folder.evaluation} and {folder.evaluation_report.name}")
    return 0


def evaluate_config(arguments: list[str]) -> EvaluateConfig:
    """Read `key=value` arguments; all but the run folder are YAML.  Raises: ConfigError."""
    values: dict[str, object] = dict(key_values("evaluate", EvaluateConfig, arguments))
    for key, text in values.items():
        if key == "run":
            continue
        try:
            values[key] = yaml.safe_load(str(text))
        except yaml.YAMLError as error:
            raise ConfigError(
                what=f"'{text}' is not YAML: {str(error).splitlines()[0]}",
                where=f"evaluate.{key}",
                mend="write lists as [a, b], in quotes",
            ) from None
        if key in ("lengths", "sizes", "tasks") and not isinstance(values[key], list):
            values[key] = [values[key]]
    if not values.get("run"):
        raise ConfigError(what="no run folder is named", where="evaluate.run", mend="name one: evaluate run=RUN_DIR")
    return typed_config(EvaluateConfig, values, where="evaluate")


def _table(suite: str, record: dict[str, Any]) -> str:
    title = f"{suite}, step {record['step']}"
    if suite == "text":
        rows = [(f"context {row['length']}", *_figures(row)) for row in record["by_length"]]
        rows += [(f"seen {row['first']} to {row['last']}", *_figures(row)) for row in record["by_position"]]
        return table(title, ("tokens", "targets", "perplexity", "bits/byte"), rows)
    if suite == "lm_eval":
        scores = [
            (task, metric, f"{value:.4f}")
            for task, metrics in record["tasks"].items()
            for metric, (value, _) in metrics.items()
        ]
        return table(title, ("task", "metric", "value"), scores)
    if record["trained_on"] != "this task":
        title += f" (trained on {record['trained_on']}, not on this task)"
    levels = [
        (str(level["length"]), str(level["size"]), f"{level['accuracy']:.4f}", f"{level['chance']:.4f}",
         f"{level['row_guess']:.4f}", f"{level['exact']:.4f}")
        for level in record["levels"]
    ]  # fmt: skip
    return table(title, ("tokens", record["counts"], "accuracy", "chance", "row guess", "exact rows"), levels)


def _figures(row: dict[str, Any]) -> tuple[str, str, str]:
    bits = row["bits_per_byte"]
    return str(row["tokens"]), f"{row['perplexity']:.3f}", "" if bits is None else f"{bits:.4f}"
