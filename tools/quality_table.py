"""The tables of quality, from records of `quality_run.py` alone; nothing in them is typed by hand.

    python tools/quality_table.py RECORD.jsonl [RECORD.jsonl ...]

Each model stands with its best learning rate: the one with the lowest loss on the validation rows of training, which
for text are those that bits per byte are of, and for recall are not those that accuracy is judged on. All rates are in
tables of their own. A run that did not make all its steps, or failed, is named below and is in no average. Records of
settings that `quality_cells.py` no longer has are passed over.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import mean
from typing import Any

from command_line import words_of
from quality_cells import SETTINGS, SIZES, STUDIES, Cell
from quality_run import is_done, read

Record = dict[str, Any]
Runs = Mapping[tuple[str, str], Mapping[float, list[Record]]]
"""Whole runs by task and model, then by learning rate: one for each seed."""
TASKS = ("mqar", "text")


def main(arguments: Sequence[str]) -> int:
    """Print the tables of every study that the records hold."""
    paths, _ = words_of(__doc__, arguments, "RECORD.jsonl", more="RECORD.jsonl")
    records = newest(record for path in paths for record in read(Path(path)) if is_current(record))
    if not records:
        print(f"no cell of today's settings in {', '.join(paths)}", file=sys.stderr)
        return 1
    print("\n\n".join(part for study in STUDIES for part in study_tables(study, records)))
    return 0


def is_current(record: Record) -> bool:
    """Whether the record is of a cell as it is now."""
    return bool(Cell(**{field.name: record[field.name] for field in fields(Cell)}).key == record["key"])


def newest(records: Iterable[Record]) -> list[Record]:
    """The last line of each cell; a whole run is not replaced by one that was cut short or failed later."""
    found: dict[str, Record] = {}
    for record in records:
        before = found.get(record["key"])
        if before is None or _is_whole(record) or not _is_whole(before):
            found[record["key"]] = record
    return list(found.values())


def study_tables(study: str, records: Sequence[Record]) -> list[str]:
    """Results, learning rates, speeds if they were taken, and what is missing."""
    own = [record for record in records if record["study"] == study]
    if not own:
        return []
    runs = by_rate(own)
    models = sorted({model for _, model in runs}, key=lambda model: _order(runs, model))
    parts = [f"### Study `{study}`", results(study, runs, models), *rates(runs, models), speeds(own)]
    return [part for part in [*parts, left_out(own), provenance(study, own)] if part]


def by_rate(records: Iterable[Record]) -> Runs:
    """The whole runs."""
    runs: dict[tuple[str, str], dict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if _is_whole(record) and record["task"] in TASKS:
            runs[record["task"], record["model"]][record["learning_rate"]].append(record)
    return runs


def best(runs: Runs, task: str, model: str) -> tuple[float, list[Record]] | None:
    """The learning rate of the lowest mean validation loss, and its runs; None where no run is whole."""
    tried = runs.get((task, model))
    if not tried:
        return None
    return min(tried.items(), key=lambda item: mean(record["validation_loss"] for record in item[1]))


def results(study: str, runs: Runs, models: Sequence[str]) -> str:
    """A row for each model, those that recall most first."""
    contexts = sorted({int(c) for _, found in _all(runs) for c in found.get("bits_per_byte_at", ())}, reverse=True)
    head = ["model", *(f"recall, {size} pairs" for size in SIZES), "parameters", "carry", "rate"]
    head += ["bits per byte", *(f"at {context}" for context in contexts[1:]), "parameters", "carry", "rate"]
    rows = []
    for model in models:
        cells = [f"`{model}`"]
        for task, shown in (
            ("mqar", [_recall(size) for size in SIZES]),
            ("text", [_bits, *map(_bits_at, contexts[1:])]),
        ):
            chosen = best(runs, task, model)
            if chosen is None:
                cells += ["-"] * (len(shown) + 3)
                continue
            rate, seeds = chosen
            cells += [_spread([value(record) for record in seeds]) for value in shown]
            cells += [f"{seeds[0]['parameters']:,}", f"{seeds[0]['carry_bytes']:,}", f"{rate:g}"]
        rows.append(cells)
    return _markdown(head, rows)


def rates(runs: Runs, models: Sequence[str]) -> list[str]:
    """Every learning rate that was tried, by task."""
    found = []
    for task, value, what in (
        ("mqar", _recall(SIZES[-1]), f"recall of {SIZES[-1]} pairs"), ("text", _bits, "bits per byte"),
    ):  # fmt: skip
        columns = sorted({rate for (kind, _), tried in runs.items() if kind == task for rate in tried})
        rows = [
            [f"`{model}`", *(_spread([value(r) for r in runs[task, model].get(rate, ())]) for rate in columns)]
            for model in models
            if (task, model) in runs
        ]
        if rows:
            found.append(_markdown([f"{what} by learning rate", *(f"{rate:g}" for rate in columns)], rows))
    return found


def speeds(records: Iterable[Record]) -> str:
    """Tokens/s, alone on the device."""
    rows = [
        [
            f"`{record['model']}`", f"{row['sequences']} x {row['tokens']:,}", f"{row['training_tokens_per_s']:,.0f}",
            f"{row['decoding_tokens_per_s']:,.0f}", f"{row['carry_bytes']:,}",
        ]
        for record in records for row in record.get("speed", ())
    ]  # fmt: skip
    head = ["model", "sequences x tokens", "training, tokens/s", "decoding, tokens/s", "carry of a sequence, bytes"]
    return _markdown(head, rows) if rows else ""


def left_out(records: Iterable[Record]) -> str:
    """Runs that are in no average, and why."""
    lines = [
        f"- `{record['key']}`: {_reason(record)}"
        for record in records
        if record["task"] in TASKS and not _is_whole(record)
    ]
    return "\n".join(["Left out of the averages:", *lines]) if lines else ""


def provenance(study: str, records: Sequence[Record]) -> str:
    """What the figures were made on, from what, and how to repeat one."""
    made = [record for record in records if "device" in record]
    machines = sorted({f"{record['device']}, torch {record['torch']}, {record['date']}" for record in made})
    lines = [f"{'; '.join(machines)}. `-`: no whole run. Figures are means over seeds (lowest to highest)."]
    for task in TASKS:
        one = next((record for record in made if record["task"] == task), None)
        if one is not None:
            setting = SETTINGS[study, task]
            tokens = one["steps"] * setting.batch_size * setting.seq_len
            lines.append(
                f"{task}: {one['steps']:,} steps of {setting.batch_size} x {setting.seq_len} tokens ({tokens:,}),"
                f" about {setting.parameters:,} parameters; carry in bytes after {setting.seq_len} tokens, float32."
                f" One of the runs: `{one['command']}`"
            )
    guesses = next((record["row_guess"] for record in made if "row_guess" in record), None)
    if guesses is not None:
        shares = ", ".join(f"{share:.3f} ({size} pairs)" for size, share in guesses.items())
        lines.append(f"Naming one of a row's values at random, which takes no memory of keys, gets {shares}.")
    return "\n\n".join(lines)


def _order(runs: Runs, model: str) -> tuple[float, float]:
    """Most recall first, then fewest bits."""
    recall, text = best(runs, "mqar", model), best(runs, "text", model)
    most = mean(_recall(size)(record) for record in recall[1] for size in SIZES) if recall else -1.0
    return -round(most, 3), mean(record["bits_per_byte"] for record in text[1]) if text else 99.0


def _all(runs: Runs) -> Iterable[tuple[float, Record]]:
    return ((rate, record) for tried in runs.values() for rate, records in tried.items() for record in records)


def _is_whole(record: Record) -> bool:
    return "failed" not in record and is_done(record)


def _reason(record: Record) -> str:
    if "failed" in record:
        return str(record["failed"]).splitlines()[0]
    return f"stopped after {record['made_steps']:,} of {record['steps']:,} steps"


def _recall(size: int) -> Callable[[Record], float]:
    return lambda record: float(record["accuracy"][str(size)])


def _bits(record: Record) -> float:
    return float(record["bits_per_byte"])


def _bits_at(context: int) -> Callable[[Record], float]:
    return lambda record: float(record["bits_per_byte_at"][str(context)])


def _spread(values: Sequence[float]) -> str:
    """The mean, and where seeds differ the least and the largest."""
    if not values:
        return "-"
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{mean(values):.3f} ({low} to {high})"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
