"""What became of a run, in its report.html before the plan: outcome, curves over steps, evaluation, configuration.

`report.html` is begun by the compiler with the plan, before the first step; this part is written when the run ends or
is interrupted, and again when it is evaluated. The page refers to nothing outside of itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from subquad.compiler.svg import COLOURS, tag
from subquad.training.compare import FIGURES, NONE, ComparedRun, read_run
from subquad.training.compare_page import curves
from subquad.training.gradient_norms import FAMILY_PREFIX
from subquad.training.positions import POSITION_PREFIX
from subquad.training.run_folder import RunFolder, write_text

PLOTS: Mapping[str, Mapping[str, str]] = {
    "loss, nats per token": {"training": "train/loss", "validation": "val/loss"},
    "validation, bits per byte": {"validation": "val/bits_per_byte"},
    "tokens per second": {"all devices": "tokens_per_s"},
    "model FLOPs utilisation": {"mean over devices": "mfu"},
    "learning rate": {"of the step": "learning_rate"},
}
"""Columns of metrics.csv that are drawn, by the plot that shows them and the name of their line there."""
SECTION = re.compile(r'<section id="run">.*?</section>\n', re.DOTALL)
TITLE = re.compile(r"<title>.*?</title>", re.DOTALL)


def write_run_section(folder: RunFolder) -> None:
    """Say on the page of a run what its folder holds; what it said before is replaced.  Raises: ResumeError, OSError.

    A folder without the page, of a version that wrote none, is left alone.
    """
    if not folder.page.is_file():
        return
    run = read_run(folder.path, folder.path.name, str(folder.path))
    head, body = SECTION.sub("", folder.page.read_text(encoding="utf-8"), count=1).split("<body>", 1)
    title = tag("title", escape(f"{run.name}: {run.config.model.name}"))
    head = TITLE.sub(lambda _: title, head, count=1)
    write_text(folder.page, f"{head}<body>{tag('section', run_section(run, folder), id='run')}\n{body}")


def run_section(run: ComparedRun, folder: RunFolder) -> str:
    """Figures, plots, evaluation, and what the run was configured as."""
    parts = [tag("h1", escape(run.name))]
    parts += [tag("p", escape(f"{gap}.")) for gap in run.gaps]
    shown = [(label, figure(run)) for label, figure in FIGURES.items()]
    parts.append(_table([row for row in shown if row[1] != NONE]))
    norms, positions = _called(run, FAMILY_PREFIX), _called(run, POSITION_PREFIX)
    by_column = {
        "validation loss by tokens of the document seen": positions,
        "gradient norm, before clipping": {"all": "gradient_norm", **norms},
    }
    for label, columns in {**PLOTS, **by_column}.items():
        lines = {name: line for name, column in columns.items() if (line := run.over_steps(column))}
        if lines:
            parts += [tag("h2", escape(label)), plot(lines, label)]
    parts += _evaluation(folder)
    versions = run.environment.get("packages") or {}
    parts += [
        tag("h2", "Environment"),
        _table([(name, version) for name, version in versions.items() if version]),
        tag("details", tag("summary", "config.yaml") + tag("pre", escape(folder.config.read_text(encoding="utf-8")))),
    ]
    return "\n".join(parts)


def plot(lines: Mapping[str, Sequence[tuple[float, float]]], label: str) -> str:
    """Lines by name over steps, with a legend where there is more than one."""
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(lines)}
    legend = "".join(
        f"{tag('span', class_='key', style=f'background:{colours[name]}')}{escape(name)}" for name in lines
    )
    return curves(lines, colours, label, over="steps") + (tag("p", legend) if len(lines) > 1 else "")


def _called(run: ComparedRun, prefix: str) -> dict[str, str]:
    """The columns of metrics.csv that begin so, by what follows, in their order there."""
    columns = dict.fromkeys(column for row in run.rows for column in row if column.startswith(prefix))
    return {column.removeprefix(prefix): column for column in columns}


def _evaluation(folder: RunFolder) -> list[str]:
    """`evaluation.md` as it stands, its pictures in their places."""
    if not folder.evaluation_report.is_file():
        return []
    parts, quoted = [tag("h2", "Evaluation")], list[str]()
    for line in folder.evaluation_report.read_text(encoding="utf-8").splitlines()[1:]:
        picture = re.fullmatch(r"!\[.*\]\((\S+\.svg)\)", line)
        path = folder.path / picture[1] if picture else Path()
        if picture and path.is_file():
            parts += [_quoted(quoted), path.read_text(encoding="utf-8")]
            quoted = []
        else:
            quoted.append(line)
    return [*parts, _quoted(quoted)]


def _quoted(lines: Sequence[str]) -> str:
    text = "\n".join(lines).strip("\n")
    return tag("pre", escape(text)) if text else ""


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return tag("table", "\n".join(
        tag("tr", tag("th", escape(label)) + tag("td", escape(value))) for label, value in rows
    ))  # fmt: skip
