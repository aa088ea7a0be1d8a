"""A plan as one HTML page that needs nothing else: rooflines, choice maps, crossovers in words, and every figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from subquad.compiler.choice_map import ChoiceMap, choice_maps, in_words, node_rows, without_crossover
from subquad.compiler.estimators import estimator_for
from subquad.compiler.options import CompileOptions
from subquad.compiler.plan import Figure, Plan
from subquad.compiler.report import bytes_text, format_plan, prediction_lines, seconds_text
from subquad.compiler.svg import COLOURS, LogPlot, grid, tag
from subquad.compiler.target import Target
from subquad_cost_model import Device
from subquad_cost_model.bound import matmul_ceiling

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 1rem } td, th { padding: .15rem .7rem .15rem 0; text-align: left;
vertical-align: top; border-bottom: 1px solid #e5e5e5 } td.n { text-align: right; font-variant-numeric: tabular-nums }
svg text { font: 11px system-ui, sans-serif; fill: #333 } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto;
font-size: 12px } .key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em }
tr.chosen { font-weight: 600 }
"""


@dataclass(frozen=True, kw_only=True)
class RooflinePoint:
    """A kernel on a node: FLOPs per byte of the counted work, and FLOPs per second by its estimate."""

    operator: str
    kernel: str
    chosen: bool
    flops: int
    bytes_moved: int
    figure: Figure

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes_moved

    @property
    def rate(self) -> float:
        """FLOPs per second, forward and backward together."""
        return self.flops / self.figure.seconds


def write_html(plan: Plan, target: Target, options: CompileOptions, path: Path) -> None:
    """Write the page, all of it or nothing.  Raises: OSError."""
    text = html_page(plan, target, choice_maps(plan, target, options, estimator_for(target, options)))
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def html_page(plan: Plan, target: Target, maps: Sequence[ChoiceMap]) -> str:
    """The page; it refers to nothing outside of itself."""
    b, t = plan.example["tokens_shape"]
    title = f"{plan.target}: batch {b}, {t:,} tokens, {plan.example['dtype']}"
    body = [
        tag("h1", escape(title)),
        tag("p", escape(_basis(plan))),
        tag("h2", "A training step"),
        *_step(plan),
        tag("h2", "Operators"),
        _table(maps),
        tag("h2", "Roofline"),
        roofline(roofline_points(maps), target.device, str(plan.example["dtype"])),
        tag("p", "Filled: the chosen kernel. Hollow: its rivals. Forward and backward together; a point is what the "
            "estimator expects, and its line the interval."),
        tag("h2", "Which kernel, at which length and batch"),
        *(_map_section(choices, plan.target) for choices in maps),
        tag("h2", "The plan as text"),
        tag("pre", escape(format_plan(plan))),
    ]  # fmt: skip
    head = f'<meta charset="utf-8">{tag("title", escape(title))}{tag("style", STYLE)}'
    return f'<!DOCTYPE html>\n<html lang="en">{tag("head", head)}{tag("body", chr(10).join(body))}</html>\n'


def roofline_points(maps: Sequence[ChoiceMap]) -> list[RooflinePoint]:
    """Every kernel with a figure, for every operator of the plan that computes anything."""
    points = []
    for choices in maps:
        for figure in choices.node.figures:
            rows = node_rows(choices.node, figure.kernel)
            flops = sum(row.matmul_flops + row.vector_flops for row in rows)
            moved = sum(row.bytes_moved for row in rows)
            if flops and moved and figure.seconds > 0:
                points.append(
                    RooflinePoint(
                        operator=choices.operator, kernel=figure.kernel, chosen=figure.kernel == choices.node.chosen,
                        flops=flops, bytes_moved=moved, figure=figure,
                    )
                )  # fmt: skip
    return points


def roofline(points: Sequence[RooflinePoint], device: Device, dtype: str) -> str:
    """Attained rate over intensity, under the device's ceilings."""
    if not points:
        return tag("p", "No operator of this run computes anything that was estimated.")
    products, vector = matmul_ceiling(dtype, device), device.vector_flops_per_s
    ridge = products / device.bytes_per_s
    x = min([ridge, *(point.intensity for point in points)]) / 3, max([ridge, *(p.intensity for p in points)]) * 3
    lowest = min(point.flops / point.figure.high_s for point in points)
    typical = min(point.rate for point in points)
    y = max(lowest, typical / 1e3) / 2, max(products, *(point.rate for point in points)) * 2
    plot = LogPlot(x=x, y=y, x_label="FLOPs per byte", y_label="FLOPs per second")
    start = max(x[0], y[0] / device.bytes_per_s)
    plot.line(
        [(start, start * device.bytes_per_s), (ridge, products), (x[1], products)], stroke="#222", stroke_width=2
    )
    plot.line([(x[0], vector), (x[1], vector)], stroke="#222", stroke_dasharray="5 4")
    plot.text(x[0] * 1.1, vector * 1.1, "outside matrix units")
    plot.text(x[1] / 1.1, products * 1.15, f"matrix units, {dtype}", text_anchor="end")
    colours = _colours(point.operator for point in points)
    for point in points:
        figure = point.figure
        low, high = max(point.flops / figure.high_s, y[0]), min(point.flops / max(figure.low_s, 1e-12), y[1])
        plot.line([(point.intensity, low), (point.intensity, high)], stroke=colours[point.operator], stroke_width=1)
    for point in points:
        plot.point(
            point.intensity, point.rate,
            f"{point.operator}/{point.kernel}: {seconds_text(point.figure.seconds)} ({point.figure.source})",
            colours[point.operator], filled=point.chosen, operator=point.operator, kernel=point.kernel,
            intensity=repr(point.intensity), rate=repr(point.rate), seconds=repr(point.figure.seconds),
        )  # fmt: skip
    return plot.drawn() + _legend(colours)


def _map_section(choices: ChoiceMap, device: str) -> str:
    layers = ", ".join(map(str, choices.layers))
    heading = tag("h3", escape(f"{choices.operator} in {choices.mixer}, layer {layers}"))
    said = "".join(tag("li", escape(line)) for line in words(choices, device))
    return heading + choice_grid(choices) + tag("ul", said)


def words(choices: ChoiceMap, device: str) -> list[str]:
    """The crossovers at the run's batch, one sentence each."""
    found = choices.crossovers(choices.run[0])
    return [in_words(crossover, device) for crossover in found] or [
        without_crossover(choices, choices.run[0], device)
    ]


def choice_grid(choices: ChoiceMap) -> str:
    """The fastest kernel of every cell; pale where intervals leave others a chance, grey where none can run."""
    colours = _colours(choices.kernels)
    cells: dict[tuple[int, int], tuple[str, str, Mapping[str, object]]] = {}
    opacity = {}
    for column, t in enumerate(choices.lengths):
        for row, b in enumerate(choices.batches):
            cell = choices.cells[b, t]
            rivals = "\n".join(
                f"{figure.kernel} {seconds_text(figure.seconds)} [{seconds_text(figure.low_s)} .. "
                f"{seconds_text(figure.high_s)}] {figure.source}" for figure in cell.figures
            )  # fmt: skip
            data: dict[str, object] = {"b": b, "t": t, "kernel": cell.fastest or ""}
            if cell.fastest is not None:
                data["seconds"] = repr(cell.figures[0].seconds)
            title = f"batch {b}, {t} tokens\n{rivals or 'no kernel can run here'}"
            cells[column, row] = (colours[cell.fastest] if cell.fastest else "#bbb", title, data)
            opacity[column, row] = 1.0 if cell.sure or not cell.figures else 0.45
    b, t = choices.run
    drawn = grid(
        choices.lengths, choices.batches, cells, x_label="tokens", y_label="batch", opacity=opacity,
        marked=(choices.lengths.index(t), choices.batches.index(b)),
    )  # fmt: skip
    note = "Pale: the intervals overlap, measuring could change the choice. Framed: this run."
    return drawn + _legend(colours) + tag("p", note)


def _table(maps: Sequence[ChoiceMap]) -> str:
    """Every kernel of every operator, the chosen one first."""
    heads = ("layers", "operator", "kernel", "seconds", "interval", "source", "why, and why not better")
    rows = [tag("tr", "".join(tag("th", name) for name in heads))]
    for choices in maps:
        node = choices.node
        for figure in node.figures:
            chosen = figure.kernel == node.chosen
            why = "; ".join(part for part in (node.reason if chosen else "", figure.note) if part)
            cells = [
                tag("td", escape(", ".join(map(str, choices.layers))) if chosen else ""),
                tag("td", escape(f"{choices.operator} in {choices.mixer}") if chosen else ""),
                tag("td", escape(figure.kernel)),
                tag("td", seconds_text(figure.seconds), class_="n", data_seconds=repr(figure.seconds),
                    data_operator=choices.operator, data_kernel=figure.kernel),
                tag("td", f"{seconds_text(figure.low_s)} .. {seconds_text(figure.high_s)}", class_="n"),
                tag("td", figure.source),
                tag("td", escape(why)),
            ]  # fmt: skip
            rows.append(tag("tr", "".join(cells), class_="chosen" if chosen else "rival"))
    return tag("table", "\n".join(rows))


def _step(plan: Plan) -> list[str]:
    step = plan.prediction
    if step is None:
        return [tag("p", "Not predicted.")]
    if step.seconds is None or step.peak_bytes is None:
        return [tag("p", escape("; ".join(step.notes)))]
    rows = [("<b>a step</b>", seconds_text(step.seconds), repr(step.seconds))]
    rows += [(escape(name), seconds_text(seconds), repr(seconds)) for name, seconds in step.parts.items()]
    rows += [("what the host needs", seconds_text(step.host_s), repr(step.host_s))]
    rows += [("<b>peak memory</b>", bytes_text(step.peak_bytes), repr(step.peak_bytes))]
    rows += [(escape(name), bytes_text(size), repr(size)) for name, size in step.memory.items()]
    table = tag("table", "".join(
        tag("tr", tag("td", name) + tag("td", shown, class_="n", data_value=exact)) for name, shown, exact in rows
    ))  # fmt: skip
    budgets = [line.strip() for line in prediction_lines(step) if line.endswith(")") and "budget." in line]
    return [table, *(tag("p", escape(line)) for line in (*budgets, *step.notes))]


def _basis(plan: Plan) -> str:
    bound = " No kernel can be faster than a bound from a data sheet." if plan.origin == "data sheet" else ""
    use = "training" if plan.example["training"] else "inference"
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    return f"Device figures: {plan.origin}. Use: {use}. {versions}.{bound}"


def _colours(names: Iterable[str]) -> dict[str, str]:
    ordered = dict.fromkeys(names)
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(ordered)}


def _legend(colours: Mapping[str, str]) -> str:
    return tag("p", "".join(
        tag("span", "", class_="key", style=f"background:{colour}") + escape(name) for name, colour in colours.items()
    ))  # fmt: skip
