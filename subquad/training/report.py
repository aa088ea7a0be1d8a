"""report.md: what a run was, what it reached, which kernels it ran, and how to repeat it; report.html with pictures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from subquad.compiler.plan import Plan
from subquad.compiler.report import PLAN_COLUMNS, bytes_text, choice_table, failures, seconds_text, uncaptured_lines
from subquad.training.metrics import read_metrics
from subquad.training.run_folder import RunFolder, read_config, read_json, write_text
from subquad.training.run_page import write_run_section


def write_report(folder: RunFolder, *, unigram_bits_per_byte: float | None, overrides: Sequence[str] | None) -> None:
    """Write `report.md`, `loss.png` and the run's part of `report.html` from what the run folder holds.

    `overrides` make the command to repeat.
    """
    rows = read_metrics(folder.metrics)
    config = read_config(folder, "run_dir")
    _draw(folder, rows)
    environment = read_json(folder.environment)
    lines = [f"# {config.model.name}", "", *_outcome(rows, unigram_bits_per_byte), ""]
    lines += ["![loss over steps](loss.png)", ""]
    lines += ["## Kernels", "", *_kernels(Plan.load(folder.plan)), ""]
    lines += ["## Predicted and measured", "", *_prediction(folder), ""]
    lines += ["## Environment", "", *_environment(environment), ""]
    lines += ["## Again", "", "```", _command(folder, environment, overrides), "```", ""]
    lines += ["The resolved configuration is `config.yaml`, every kernel choice with its rivals is in `plan.json`,"]
    lines += [
        "`report.html` draws the curves of every figure, rooflines, and the choice at other lengths and batches.",
        "",
    ]
    write_run_section(folder)
    write_text(folder.report, "\n".join(lines))


def _outcome(rows: list[dict[str, float]], unigram_bits_per_byte: float | None) -> list[str]:
    validated = [row for row in rows if "val/loss" in row]
    lines = ["| | |", "|---|---|"]
    if validated:
        last = validated[-1]
        lines.append(f"| steps | {last['step']:.0f} in {last['seconds']:.0f} s |")
        lines.append(f"| validation loss | {last['val/loss']:.4f} nats per token |")
        if "val/bits_per_byte" in last:
            lines.append(f"| validation | **{last['val/bits_per_byte']:.4f} bits per byte** |")
    if unigram_bits_per_byte is not None:
        lines.append(f"| the same text under byte frequencies alone | {unigram_bits_per_byte:.4f} bits per byte |")
    trained = [row for row in rows if "train/loss" in row]
    if trained:
        lines.append(f"| training loss, last recorded step | {trained[-1]['train/loss']:.4f} nats per token |")
    speeds = sorted(row["tokens_per_s"] for row in rows if "tokens_per_s" in row)
    if speeds:
        lines.append(f"| tokens per second, median | {speeds[len(speeds) // 2]:,.0f} |")
    return lines


def _kernels(plan: Plan) -> list[str]:
    rows = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in choice_table(plan)]
    notes = uncaptured_lines(plan) + [f"not chosen: {failure}" for failure in failures(plan)]
    head = [f"| {' | '.join(PLAN_COLUMNS)} |", "|---" * len(PLAN_COLUMNS) + "|"]
    return [f"For {plan.target} ({plan.origin}).", "", *head, *rows, *(["", *notes] if notes else [])]


def _prediction(folder: RunFolder) -> list[str]:
    """A step and its memory, part by part as predicted, and as they were found."""
    if not folder.prediction.exists():
        return ["No step was timed."]
    record = read_json(folder.prediction)
    predicted, measured, ratio = record["predicted"] or {}, record["measured"], record["ratio"]
    lines = ["| | predicted | measured | measured / predicted |", "|---|---|---|---|"]
    for name, key, shown in (("step", "seconds", seconds_text), ("peak memory", "peak_bytes", bytes_text)):
        cells = ["" if value is None else shown(value) for value in (predicted.get(key), measured[key])]
        lines.append(f"| {name} | {' | '.join(cells)} | {f'{ratio[key]:.2f}' if key in ratio else ''} |")
    lines += [f"| {part} | {seconds_text(value)} | | |" for part, value in predicted.get("parts", {}).items()]
    lines += [f"| {use} | {bytes_text(size)} | | |" for use, size in predicted.get("memory", {}).items()]
    spread = f"{seconds_text(measured['low_s'])} to {seconds_text(measured['high_s'])}"
    told = f"Measured: the median of {measured['steps']} steps ({spread}) after {measured['skipped']} others."
    return [*lines, "", told, *(f"Predicted: {note}." for note in predicted.get("notes", ()))]


def _environment(environment: dict[str, Any]) -> list[str]:
    packages = {name: version for name, version in environment["packages"].items() if version is not None}
    lines = ["| | |", "|---|---|"]
    for label in ("device", "threads", "python", "platform", "cuda", "driver", "git_revision"):
        if environment[label] is not None:
            lines.append(f"| {label.replace('_', ' ')} | {environment[label]} |")
    return [*lines, f"| packages | {', '.join(f'{name} {version}' for name, version in packages.items())} |"]


def _command(folder: RunFolder, environment: dict[str, Any], overrides: Sequence[str] | None) -> str:
    if overrides is None:
        return shlex.join(["python", *environment["command"]])
    kept = [override for override in overrides if not override.startswith(("run_dir=", "resume="))]
    return shlex.join(["python", "-m", "subquad", "train", *kept])


def _draw(folder: RunFolder, rows: list[dict[str, float]]) -> None:
    """Training and validation loss over steps, as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure without pyplot: no window system, no state shared with the caller's own plots.
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for column, label, style in (("train/loss", "training", "-"), ("val/loss", "validation", "o-")):
        points = [(row["step"], row[column]) for row in rows if column in row]
        if points:
            axes.plot(*zip(*points), style, label=label, linewidth=1.2, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(folder.loss_curve))
