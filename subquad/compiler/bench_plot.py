"""Time, and memory where it was observed, over length, on logarithmic axes: the slope is the growth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from subquad.compiler.bench import Case, Row


def draw(cases: Sequence[Case], device: str, path: Path) -> None:
    """Draw every kernel that ran, and the floor, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[tuple[str, Callable[[Row], float]]] = [("forward + backward, ms", lambda row: row.both_s * 1e3)]
    if any(row.peak_bytes for case in cases for row in case.rows):
        panels.append(("memory beyond the inputs, MiB", lambda row: row.peak_bytes / 2**20))
    # A figure without pyplot: no window system, no state shared with the caller's own plots.
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    workload = cases[0].workload
    figure.suptitle(f"{workload.operator}, {workload.dtype}, {device}", fontsize=10)
    kernels = dict.fromkeys(row.kernel for case in cases for row in case.rows)
    for axes, (label, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for kernel in kernels:
            points = [
                (case.workload.shape["t"], value(row))
                for case in cases
                for row in case.rows
                if row.kernel == kernel and row.why_not is None and value(row) > 0
            ]
            if points:
                axes.plot(*zip(*sorted(points)), "o-", label=kernel, linewidth=1.2, markersize=3)
        if axes is figure.axes[0]:
            floor = sorted((case.workload.shape["t"], case.floor_s * 1e3) for case in cases)
            axes.plot(*zip(*floor), "k--", label="floor", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens (t)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))
