"""Decoding over context, on logarithmic axes: rate, carry, and memory where it was observed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from subquad.training.bench_decoding import DecodingRow

STYLES = ("o-", "s--", "^:", "d-.")
"""By batch size."""


def draw_decoding(rows: Sequence[DecodingRow], where: str, path: Path) -> None:
    """Draw what was measured into a PNG, a colour for each model and a style for each batch size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[tuple[str, Callable[[DecodingRow], float]]] = [
        ("decoding, tokens/s", lambda row: row.tokens_per_s or 0),
        ("carry of a sequence, MiB", lambda row: row.carry_bytes / 2**20),
    ]
    if any(row.peak_bytes for row in rows):
        panels.append(("peak memory, GiB", lambda row: (row.peak_bytes or 0) / 2**30))
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    figure.suptitle(f"decoding in {where}", fontsize=10)
    models = list(dict.fromkeys(row.model for row in rows))
    batch_sizes = list(dict.fromkeys(row.batch_size for row in rows))
    for axes, (label, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for colour, model in enumerate(models):
            for style, batch_size in zip(STYLES, batch_sizes):
                points = [
                    (row.context, value(row))
                    for row in rows
                    if (row.model, row.batch_size) == (model, batch_size) and value(row) > 0
                ]
                if points:
                    name = model if len(batch_sizes) == 1 else f"{model}, batch {batch_size}"
                    axes.plot(*zip(*points), style, color=f"C{colour}", label=name, linewidth=1.2, markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(str(path))
