"""compare: what several runs were, what they reached, and where their configurations and plans differ."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from subquad.compiler.plan import Plan
from subquad.compiler.plan_diff import plan_diff
from subquad.compiler.report import bytes_text, seconds_text
from subquad.errors import ConfigError, SubquadError
from subquad.model.build import build_model
from subquad.schema import RunConfig
from subquad.training.metrics import read_metrics
from subquad.training.run_folder import RunFolder, read_config, read_json

NOT_COMPARED = ("run_dir", "resume")
"""Keys of a configuration that are another's in every run."""
NONE = "-"


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """What is known of a run; `gaps` says which of its files are missing or cannot be read."""

    name: str
    config: RunConfig
    rows: Sequence[Mapping[str, float]]
    plan: Plan | None
    prediction: Mapping[str, Any]
    environment: Mapping[str, Any]
    parameters: int | None
    gaps: tuple[str, ...]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step on all devices."""
        trainer = self.config.trainer
        return trainer.samples_per_step(trainer.devices) * trainer.seq_len

    def over_steps(self, column: str) -> list[tuple[float, float]]:
        """A column of metrics.csv over steps; what is no number (a run that diverged) is left out."""
        return [(row["step"], row[column]) for row in self.rows if math.isfinite(row.get(column, math.nan))]

    def curve(self, column: str) -> list[tuple[float, float]]:
        """The same over tokens, by which runs of other batches compare."""
        return [(step * self.tokens_per_step, value) for step, value in self.over_steps(column)]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs side by side; the cells of a row follow `runs`."""

    runs: Sequence[ComparedRun]
    figures: Sequence[tuple[str, Sequence[str]]]
    config: Sequence[tuple[str, Sequence[str]]]
    plans: Mapping[str, Sequence[str]]

    @property
    def gaps(self) -> list[str]:
        """What is missing, with its run."""
        return [f"{run.name}: {gap}" for run in self.runs for gap in run.gaps]


def compare(paths: Sequence[str]) -> Comparison:
    """Read run folders and lay them side by side; `plans` holds how each differs from the first.

    A missing `metrics.csv`, `plan.json`, `prediction.json` or `environment.json` is a gap, and no error.
    Raises: ConfigError, NotFoundError; ResumeError for a folder that is no run's.
    """
    if len(paths) < 2:
        raise ConfigError(
            what=f"{len(paths) or 'no'} run is named", where="compare.runs", mend="name two or more: runs=[A,B]"
        )
    folders = [Path(path).expanduser().absolute() for path in paths]
    runs = [
        read_run(folder, name, f"runs={path}")
        for folder, name, path in zip(folders, _names(folders), paths, strict=True)
    ]
    first, *others = runs
    return Comparison(
        runs=runs,
        figures=[(label, [figure(run) for run in runs]) for label, figure in FIGURES.items()],
        config=_config_differences(runs),
        plans={
            run.name: plan_diff(first.plan, run.plan)
            for run in others
            if first.plan is not None and run.plan is not None
        },
    )


def read_run(path: Path, name: str, where: str) -> ComparedRun:
    """What the folder of a run holds; `where` is the option that named it.  Raises: ResumeError."""
    folder = RunFolder(path)
    config = read_config(folder, where)
    gaps: list[str] = []

    def read(file: Path, reader: Callable[[Path], Any], empty: Any) -> Any:
        if not file.is_file():
            gaps.append(f"{file.name} is missing")
            return empty
        try:
            return reader(file)
        except (ConfigError, ValueError, AssertionError, OSError):
            gaps.append(f"{file.name} cannot be read")
            return empty

    rows = read(folder.metrics, read_metrics, [])
    if not rows and folder.metrics.is_file() and not gaps:
        gaps.append("metrics.csv holds no row yet")
    return ComparedRun(
        name=name,
        config=config,
        rows=rows,
        plan=read(folder.plan, Plan.load, None),
        prediction=read(folder.prediction, read_json, {}),
        environment=read(folder.environment, read_json, {}),
        parameters=_parameters(config, gaps),
        gaps=tuple(gaps),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """As few last parts of the paths as tell them apart."""
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ConfigError(what=f"{twice} is named twice", where="compare.runs", mend="name each run once")
    for count in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _parameters(config: RunConfig, gaps: list[str]) -> int | None:
    try:
        model = build_model(config.model, device="meta")
    except SubquadError as error:  # a plugin that is not installed here
        gaps.append(f"its parameters cannot be counted: {error.what}")
        return None
    return sum(parameter.numel() for parameter in model.parameters())


def _config_differences(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    flat = [_flat(asdict(run.config)) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [(key, [values.get(key, NONE) for values in flat]) for key in keys if key not in NOT_COMPARED]
    return [(key, cells) for key, cells in rows if len(set(cells)) > 1]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings under dotted keys, as text; lists are values."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return found


def _last(column: str, written: Callable[[float], str]) -> Callable[[ComparedRun], str]:
    return lambda run: next((written(row[column]) for row in reversed(run.rows) if column in row), NONE)


def _least(column: str) -> Callable[[ComparedRun], str]:
    def figure(run: ComparedRun) -> str:
        found = [row for row in run.rows if column in row]
        if not found:
            return NONE
        best = min(found, key=lambda row: row[column])
        return f"{best[column]:.4f} (step {best['step']:.0f})"

    return figure


def _median(column: str) -> Callable[[ComparedRun], str]:
    def figure(run: ComparedRun) -> str:
        found = [row[column] for row in run.rows if column in row]
        return f"{statistics.median(found):,.0f}" if found else NONE

    return figure


def _predicted(part: str, key: str, written: Callable[[float], str]) -> Callable[[ComparedRun], str]:
    def figure(run: ComparedRun) -> str:
        value = (run.prediction.get(part) or {}).get(key)
        return NONE if value is None else written(value)

    return figure


FIGURES: Mapping[str, Callable[[ComparedRun], str]] = {
    "model": lambda run: run.config.model.name,
    "mixers": lambda run: NONE if run.plan is None else ", ".join(dict.fromkeys(run.plan.schedule)),
    "parameters": lambda run: NONE if run.parameters is None else f"{run.parameters:,}",
    "device": lambda run: str(run.environment.get("device") or NONE),
    "steps": _last("step", "{:,.0f}".format),
    "tokens": lambda run: f"{run.rows[-1]['step'] * run.tokens_per_step:,.0f}" if run.rows else NONE,
    "training": _last("seconds", seconds_text),
    "training loss, last (nats per token)": _last("train/loss", "{:.4f}".format),
    "validation loss, last (nats per token)": _last("val/loss", "{:.4f}".format),
    "validation loss, least": _least("val/loss"),
    "bits per byte, last": _last("val/bits_per_byte", "{:.4f}".format),
    "tokens per second, median": _median("tokens_per_s"),
    "a step, predicted": _predicted("predicted", "seconds", seconds_text),
    "a step, measured": _predicted("measured", "seconds", seconds_text),
    "peak memory, predicted": _predicted("predicted", "peak_bytes", bytes_text),
    "peak memory, measured": _predicted("measured", "peak_bytes", bytes_text),
}
"""What the table shows of each run."""
