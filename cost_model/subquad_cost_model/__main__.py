"""`python -m subquad_cost_model`: read published tables, fit a model to timed rows, judge models by them."""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from subquad_cost_model.evaluate import (
    HEADER,
    KERNEL_HEADER,
    as_line,
    as_markdown,
    errors_by_kernel,
    evaluate,
    kernel_as_markdown,
)
from subquad_cost_model.features import schema_hash
from subquad_cost_model.fit_files import save_fit
from subquad_cost_model.learned import LearnedEstimator
from subquad_cost_model.public_tables import read_public_tables
from subquad_cost_model.splits import SPLITS
from subquad_cost_model.timed_rows import TimedRow, read_timed_rows, timed, write_timed_rows
from subquad_cost_model.trees import Trees


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 2 when the files are not what they should be."""
    parser = argparse.ArgumentParser(prog="python -m subquad_cost_model", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    public = verbs.add_parser("public", help="write the published tables as timed rows")
    public.add_argument("tables", type=Path, help="folder of aiconfigurator-core, installed or unpacked")
    public.add_argument("rows", type=Path, help="parquet file to write")
    public.add_argument("--most-rows", type=int, help="per operator; whole shapes are kept, by their hashes")
    fit = verbs.add_parser("fit", help="fit the learned model to timed rows and keep it")
    fit.add_argument("rows", type=Path, help="parquet file, or a folder of them")
    fit.add_argument("out", type=Path, help="folder for the fit")
    fit.add_argument("--figures", type=Path, help="file whose text ends the card: what `evaluate` printed")
    fit.add_argument("--judge", default="", help="splits to judge such a fit by first, for the end of the card")
    judge = verbs.add_parser("evaluate", help="judge learned model, roofline and constant on rows they did not see")
    judge.add_argument("rows", type=Path, help="parquet file, or a folder of them")
    judge.add_argument("--splits", default="S0,S1,S2,S5", help=f"of {', '.join(SPLITS)}, with commas between")
    judge.add_argument("--given-back", default="", help="of S6 only splits of such names: '16 chosen', '16 per', ...")
    judge.add_argument("--salt", default="", help="another word gives other shapes and layouts to S0, S1 and S6")
    judge.add_argument("--by-kernel", action="store_true", help="errors of each kernel and phase, the worst first")
    judge.add_argument("--json", action="store_true", help="lines of JSON in place of a table")
    for verb in (fit, judge):
        verb.add_argument("--rounds", type=int, default=Trees.rounds, help="trees per head")
        verb.add_argument("--leaves", type=int, default=Trees.leaves, help="leaves per tree")
        verb.add_argument("--threads", type=int, default=Trees.threads)
    given = parser.parse_args(arguments)
    try:
        if given.verb == "public":
            _public(given)
        elif given.verb == "fit":
            _fit(given)
        else:
            _evaluate(given)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _public(given: argparse.Namespace) -> None:
    rows = read_public_tables(given.tables, most_rows=given.most_rows)
    write_timed_rows(given.rows, rows)
    print(f"{given.rows}: {_contents(rows)}")


def _fit(given: argparse.Namespace) -> None:
    rows = read_timed_rows(given.rows)
    learned = LearnedEstimator.fit(rows, trees=_trees(given))
    if given.judge:
        verdicts = evaluate(rows, given.judge.split(","), trees=_trees(given))
        figures = "\n".join([HEADER, *(as_markdown(verdict) for verdict in verdicts)]) + "\n"
    else:
        figures = given.figures.read_text(encoding="utf-8") if given.figures else "Not judged.\n"
    save_fit(learned, given.out, card=_card(rows, learned, given, figures))
    print(f"{given.out}: heads {', '.join(sorted(learned.heads))}; {_contents(rows)}")


def _evaluate(given: argparse.Namespace) -> None:
    rows = read_timed_rows(given.rows)
    if given.by_kernel:
        for protocol in given.splits.split(","):
            print(f"{protocol}\n\n{KERNEL_HEADER}")
            for of_kernel in errors_by_kernel(rows, protocol, trees=_trees(given), salt=given.salt):
                print(kernel_as_markdown(of_kernel))
        return
    if not given.json:
        print(HEADER)
    for verdict in evaluate(
        rows, given.splits.split(","), trees=_trees(given), salt=given.salt, given_back=given.given_back
    ):
        print(as_line(verdict) if given.json else as_markdown(verdict), flush=True)


def _trees(given: argparse.Namespace) -> Trees:
    spread = {"spread_rounds": max(1, given.rounds // 4), "spread_leaves": max(3, given.leaves // 4)}
    return Trees(rounds=given.rounds, leaves=given.leaves, threads=given.threads, **spread)


def _contents(rows: Sequence[TimedRow]) -> str:
    return f"{len(timed(rows))} timed rows and {len(rows) - len(timed(rows))} others"


def _card(rows: Sequence[TimedRow], learned: LearnedEstimator, given: argparse.Namespace, figures: str) -> str:
    counts = Counter((row.row.operator, row.row.phase, row.device.family, row.device.name) for row in timed(rows))
    sources = ", ".join(sorted({row.source for row in rows} - {""})) or "not stated"
    lines = [
        "# A fit of subquad-cost-model",
        "",
        f"Fitted {datetime.now(UTC).date().isoformat()} to {_contents(rows)}; {given.rounds} trees of {given.leaves} "
        f"leaves; features {schema_hash()}. Sources: {sources}.",
        "",
        "| operator | phase | family | device | rows |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(key)} | {count} |" for key, count in sorted(counts.items())),
        *_paces(rows),
        "",
        f"Heads: {', '.join(sorted(learned.heads))}; peak memory: {', '.join(sorted(learned.peaks)) or 'none'}. "
        "Kernels and words beyond those of the rows are left to the roofline, and sizes far beyond them.",
        "",
        "## Figures",
        "",
        figures,
    ]
    return "\n".join(lines)


def _paces(rows: Sequence[TimedRow]) -> list[str]:
    """What the host needed for a launch beside the timings of each device, where rows know."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in timed(rows):
        if row.host_s is not None:
            found[row.device.name].append(1e6 * row.host_s)
    return [
        f"\nThe host's pace on {name}: {median(of_it):.1f} us a launch in the median of {len(of_it)} rows, "
        f"{min(of_it):.1f} to {max(of_it):.1f}."
        for name, of_it in sorted(found.items())
    ]


if __name__ == "__main__":
    sys.exit(main())
