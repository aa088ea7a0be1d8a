"""A comparison of runs as one HTML page that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from subquad.compiler.html_report import STYLE
from subquad.compiler.svg import COLOURS, LogPlot, tag
from subquad.errors import ConfigError
from subquad.training.compare import Comparison
from subquad.training.run_folder import write_text

CURVES = {
    "val/loss": "validation loss, nats per token",
    "val/bits_per_byte": "validation, bits per byte",
    "train/loss": "training loss, nats per token",
    "tokens_per_s": "tokens per second",
    "gradient_norm": "gradient norm",
}
"""Columns of metrics.csv that are drawn over tokens, where a run has them."""

MOST_POINTS, MOST_DOTS = 2000, 60
"""Of a line: a run of weeks makes a page of some hundred kilobytes all the same, and dots that do not hide it."""


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page, all of it or nothing.  Raises: ConfigError."""
    try:
        write_text(path, page(comparison))
    except OSError as error:
        raise ConfigError(
            what=f"{path} cannot be written: {os.strerror(error.errno or 0)}",
            where="compare.html",
            mend="name a file that you may write to, or html=null",
        ) from None


def page(comparison: Comparison) -> str:
    """Figures, curves, and differences of configurations and plans."""
    names = [run.name for run in comparison.runs]
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    legend = "".join(
        f"{tag('span', class_='key', style=f'background:{colours[name]}')}{escape(name)}" for name in names
    )
    body = [tag("h1", f"{len(names)} runs"), tag("p", legend)]
    body += [tag("p", escape(f"Missing: {gap}.")) for gap in comparison.gaps]
    body += [_table("", names, comparison.figures)]
    for column, label in CURVES.items():
        lines = {run.name: line for run in comparison.runs if (line := run.curve(column))}
        if lines:
            body += [tag("h2", escape(label)), curves(lines, colours, label)]
    body.append(tag("h2", "Configurations"))
    body.append(_table("key", names, comparison.config) if comparison.config else tag("p", "They do not differ."))
    body.append(tag("h2", "Plans"))
    for name, found in comparison.plans.items():
        body.append(tag("h3", escape(f"{names[0]} and {name}")))
        body.append(tag("pre", escape("\n".join(found) if found else "the plans do the same")))
    title = tag("title", escape(f"{len(names)} runs: {', '.join(names)}"))
    head = f'<meta charset="utf-8">{title}{tag("style", STYLE)}'
    return f"<!doctype html>\n{tag('html', tag('head', head) + tag('body', chr(10).join(body)), lang='en')}\n"


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]], colours: Mapping[str, str], label: str, over: str = "tokens"
) -> str:
    """Lines by name over tokens or steps, from zero on, with room above and below; a point's title says what it is."""
    points = [point for line in lines.values() for point in line]
    low, high = min(y for _, y in points), max(y for _, y in points)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    plot = LogPlot(
        x=(0.0, max(x for x, _ in points) or 1.0),
        y=(low - room, high + room),
        x_label=over,
        y_label=label,
        size=(720, 320),
        linear_x=True,
        linear_y=True,
    )
    for name, line in lines.items():
        plot.line(thinned(line, MOST_POINTS), stroke=colours[name], stroke_width=1.5)
        for x, y in thinned(line, MOST_DOTS):
            plot.point(x, y, f"{name}: {y:.6g} after {x:,.0f} {over}", colours[name], filled=False)
    return plot.drawn()


def thinned(line: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many of a line's points, evenly spaced, the first and the last among them."""
    if len(line) <= most:
        return list(line)
    return [line[round(number * (len(line) - 1) / (most - 1))] for number in range(most)]


def _table(corner: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = tag("tr", "".join(tag("th", escape(cell)) for cell in (corner, *names)))
    lines = [
        tag("tr", tag("th", escape(label)) + "".join(tag("td", escape(cell), class_="n") for cell in cells))
        for label, cells in rows
    ]
    return tag("table", head + "\n".join(lines))
