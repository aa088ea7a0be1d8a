"""evaluation.md and its pictures, from the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from subquad.compiler.svg import COLOURS, LogPlot, standalone
from subquad.training.run_folder import RunFolder, write_text


def write_evaluation_report(folder: RunFolder, model: str, suites: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `evaluation.md`, with a picture beside it for each table that has a course to show."""
    lines = [f"# {model}: evaluation", ""]
    for name, record in suites.items():
        if name == "text":
            lines += _text(folder, record)
        elif name == "lm_eval":
            lines += _lm_eval(record)
        else:
            lines += _task(folder, name, record)
    lines += ["Every figure is in `evaluation.json`.", ""]
    write_text(folder.evaluation_report, "\n".join(lines))


def _text(folder: RunFolder, record: Mapping[str, Any]) -> list[str]:
    by_length, by_position = record["by_length"], record["by_position"]
    total = by_length[-1]
    lines = ["## Held-out text", ""]
    lines += [f"Step {record['step']}: {total['tokens']:,} targets ({total['bytes']:,} bytes) of the validation split, "
              f"in {record['rows']} rows of {record['longest']:,} tokens; the run was trained on rows of "
              f"{record['trained_length']:,}. Byte frequencies alone: {record['unigram_bits_per_byte']:.4f} bits per "
              "byte.", ""]  # fmt: skip
    lines += ["By the length that the context is cut to (the same targets in each row):", ""]
    lines += _table(("tokens", "targets", "perplexity", "bits per byte"),
                    [(f"{row['length']:,}", *_figures(row)) for row in by_length])  # fmt: skip
    lines += ["", "![bits per byte by length](evaluation-length.svg)", ""]
    lines += [f"By position, in rows of {record['longest']:,} tokens: how many tokens of the document were seen:", ""]
    lines += _table(("seen", "targets", "perplexity", "bits per byte"),
                    [(_span(row["first"], row["last"]), *_figures(row)) for row in by_position])  # fmt: skip
    lines += ["", "![bits per byte by position](evaluation-position.svg)", ""]
    for kind, label, ticks, points in (
        ("length", "tokens that the context is cut to", [row["length"] for row in by_length],
         [(row["length"], row) for row in by_length]),
        ("position", "tokens seen", [row["first"] for row in by_position],
         [((row["first"] * row["last"]) ** 0.5, row) for row in by_position]),
    ):  # fmt: skip
        unit, y_label = "bits_per_byte", "bits per byte"
        if points[0][1][unit] is None:
            unit, y_label = "nats_per_token", "nats per token"
        line = [(x, row[unit]) for x, row in points]
        plot = _plot([x for x, _ in line], [y for _, y in line], label, y_label, ticks)
        _draw(plot, line, COLOURS[0])
        write_text(folder.path / f"evaluation-{kind}.svg", standalone(plot.drawn()))
    return lines


def _task(folder: RunFolder, name: str, record: Mapping[str, Any]) -> list[str]:
    levels, counts = record["levels"], record["counts"]
    lines = [f"## {name}", "", f"{record['paper']}. Step {record['step']}, seed {record['seed']}, vocabulary of "
             f"{record['vocab_size']}."]  # fmt: skip
    if record["trained_on"] != "this task":
        lines[-1] += f" The run was trained on other data ({record['trained_on']}) and has never seen this task."
    lines += ["", "Accuracy counts answers, exact counts rows whose answers are all right; chance is the best constant "
              "guess.", ""]  # fmt: skip
    lines += _table(("tokens", counts, "rows", "answers", "accuracy", "chance", "exact"), [
        (f"{level['length']:,}", str(level["size"]), str(level["rows"]), f"{level['answers']:,}",
         f"{level['accuracy']:.4f}", f"{level['chance']:.4f}", f"{level['exact']:.4f}")
        for level in levels
    ])  # fmt: skip
    picture = f"evaluation-{name}.svg"
    lines += ["", f"![accuracy of {name}]({picture})", ""]
    sizes = sorted({level["size"] for level in levels})
    lengths = sorted({level["length"] for level in levels})
    plot = _plot(sizes, [0.0, 1.0], counts, "accuracy", sizes)
    chance = sorted({(level["size"], level["chance"]) for level in levels})
    plot.line(chance, stroke="#888", stroke_dasharray="5 4")
    plot.text(chance[0][0], chance[0][1] + 0.02, "chance", fill="#888")
    for colour, length in zip(_colours(len(lengths)), lengths):
        line = [(level["size"], level["accuracy"]) for level in levels if level["length"] == length]
        _draw(plot, line, colour)
        plot.text(line[-1][0], min(line[-1][1] + 0.03, 1.0), f"{length:,} tokens", text_anchor="end")
    write_text(folder.path / picture, standalone(plot.drawn()))
    return lines


def _lm_eval(record: Mapping[str, Any]) -> list[str]:
    rows = [
        (task, str(metric), f"{value:.4f}", "" if error is None else f"{error:.4f}")
        for task, metrics in record["tasks"].items()
        for metric, (value, error) in metrics.items()
    ]
    limit = f", the first {record['samples']} documents of each task" if record["samples"] else ""
    head = f"lm-eval {record['version']}, step {record['step']}{limit}."
    return ["## lm-eval", "", head, "", *_table(("task", "metric", "value", "standard error"), rows), ""]


def _figures(row: Mapping[str, Any]) -> tuple[str, str, str]:
    bits = row["bits_per_byte"]
    return f"{row['tokens']:,}", f"{row['perplexity']:.3f}", "" if bits is None else f"{bits:.4f}"


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _plot(xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str, ticks: Sequence[float]) -> LogPlot:
    """Axes with room around the points; x is logarithmic."""
    margin = 0.05 * (max(ys) - min(ys)) or 0.1 * abs(max(ys)) or 1.0
    return LogPlot(
        x=(min(xs) / 1.3, max(xs) * 1.3), y=(min(ys) - margin, max(ys) + margin), x_label=x_label, y_label=y_label,
        linear_y=True, x_ticks=ticks,
    )  # fmt: skip


def _draw(plot: LogPlot, points: Sequence[tuple[float, float]], colour: str) -> None:
    plot.line(points, stroke=colour, stroke_width=2)
    for x, y in points:
        plot.point(x, y, f"{x:g}: {y:.4f}", colour, filled=False)


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]
