"""The table of what each mixer keeps, from records alone; nothing in it is typed by hand.

    python tools/mixer_table.py judge [MIXER ...]   # `plugins check` of each mixer, into plugins/verdicts (a minute)
    python tools/mixer_table.py judge target=cuda   # the same on a GPU, which is shared by a mixer a core
    python -m pytest -m oracle --record-oracles=plugins/verdicts/oracles.json
    python tools/mixer_table.py                     # prints the table
    python tools/mixer_table.py write               # puts it where README.md and plugins/README.md have it

A cell says `yes` where every promise of its column is kept, `NO` where one is broken, `-` where no record says.
Times on a GPU are of the whole layer, from the newest record in plugins/benchmarks/results; where there is none, or
none of a rival, of the operator that the mixer spends its work in, from the records in kernels/benchmarks/results.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from command_line import refuse, words_of

from subquad.commands.plugins import GROWTH
from subquad.contracts import MixerSpec
from subquad.registry import load_registry

ROOT = Path(__file__).resolve().parent.parent
VERDICTS = ROOT / "plugins" / "verdicts"
BENCHMARKS = ROOT / "kernels" / "benchmarks" / "results"
LAYERS = ROOT / "plugins" / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "plugins" / "README.md")
BEGIN, END = "<!-- python tools/mixer_table.py write -->", "<!-- end of the table -->"
SETTINGS = {name: ("config={head_dim: 8, state_dim: 8}",) for name in ("mamba2", "mamba3", "log_linear_mamba2")}
"""Sizes for mixers whose defaults do not fit the width of a check."""
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "forward": (
        "keeps_shape_at_any_length", "no_output_depends_on_later_tokens", "every_output_depends_on_its_own_token",
        "sequences_of_a_batch_do_not_mix", "float32_agrees_with_float64",
    ),
    "backward": (
        "gradient_reaches_every_parameter", "gradients_are_those_of_finite_differences",
        "gradients_flow_through_a_carry_as_through_a_sequence",
    ),
    "packed": ("packed_documents_equal_separate_ones",),
    "decode": ("prefill_and_decode_equal_forward_at_every_split", "prefill_in_two_parts_equals_one"),
    "compile": ("compiles_without_graph_breaks", "captures_as_one_node_per_operator"),
}  # fmt: skip
"""Promises of `subquad.testing.mixer_suite.MixerSuite` by the column that they stand in."""
WIDTH = 64
"""Of a mixer whose record says none: its sizes fit, and what applies does not depend on it."""
BIDIRECTIONAL = ("its_bidirectional_form_sees_both_sides",)
GROWS = ("work_grows_no_faster_than_declared", "carry_grows_no_faster_than_declared")
HELPERS = ("causal_conv", "gated_norm", "rotary")
"""Operators that stand before or behind the one in which a mixer spends its work."""
LENGTH = 8192
"""Tokens of a sequence in the rows of a benchmark that are shown."""


def main(arguments: list[str]) -> int:
    """Do what the first argument says."""
    words, keys = words_of(__doc__, arguments, more="MIXER", keys=("target",))
    if words[:1] == ["judge"]:
        target = keys[-1].partition("=")[2] if keys else "cpu"
        mixers = load_registry().mixers
        names = words[1:] or list(mixers)
        for name in names:
            if name not in mixers:
                refuse(f"no mixer is called '{name}'; there are {', '.join(mixers)}")
        jobs = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(jobs) as pool:
            return max(pool.map(lambda name: judge(name, target), names))
    if keys or words not in ([], ["write"]):
        refuse(f"'{' '.join(arguments)}' is not understood")
    if words == ["write"]:
        for path in DOCUMENTS:
            path.write_text(with_table(path.read_text(encoding="utf-8"), table()), encoding="utf-8")
        return 0
    print(table())
    return 0


def judge(name: str, target: str) -> int:
    """Let `plugins check` judge a mixer in a process of its own, and keep its verdict; returns its exit code.

    What it says is printed when it has ended, so that several may be judged at once.
    """
    VERDICTS.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "subquad", "plugins", "check", name, f"target={target}", *SETTINGS.get(name, ())]
    command.append(f"json={VERDICTS / f'{name}.{target}.json'}")
    found = subprocess.run(
        command, check=False, env={"OMP_NUM_THREADS": "1"} | os.environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(found.stdout, flush=True)
    return found.returncode


def table() -> str:
    """The table and what it was read from, in Markdown."""
    head = [
        "mixer",
        *COLUMNS,
        "bidirectional",
        "CPU",
        "CUDA",
        "oracle",
        "growth: work, carry",
        "on a GPU, beside rivals",
    ]
    specs = sorted(load_registry().mixers.values(), key=lambda spec: spec.name)
    oracles, layers, times = _read(VERDICTS / "oracles.json"), layer_times(), gpu_times()
    rows = [_row(spec, oracles.get("mixers", {}), layers, times) for spec in specs]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join([*lines, "", _legend(oracles, layers, times)])


def with_table(text: str, content: str) -> str:
    """A document with the table between its two marks renewed."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the document lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def _row(
    spec: MixerSpec, oracles: Mapping[str, Any], layers: Mapping[str, GpuTime], times: Mapping[str, GpuTime]
) -> list[str]:
    kept = {target: promises_of(spec.name, target) for target in ("cpu", "cuda")}
    cells = [_cell(kept["cpu"], wanted) for wanted in COLUMNS.values()]
    growth = _cell(kept["cpu"], GROWS)
    shown = f"{GROWTH[spec.work_growth]}, {GROWTH[spec.carry_growth]}" if growth == "yes" else growth
    main_operators = [name for name in spec.operators if name not in HELPERS]
    gpu = [f"`{name}` {times.get(f'{name} {spec.name}', times[name])}" for name in main_operators if name in times]
    if spec.name in layers:
        layer = layers[spec.name]
        gpu = [f"layer {layer}", *(gpu if layer.rival is None else ())]
    return [
        f"`{spec.name}`", *cells, _both_sides(spec, kept["cpu"]), _count(kept["cpu"]), _count(kept["cuda"]),
        _oracle(oracles.get(spec.name)), shown, "; ".join(gpu) or "-",
    ]  # fmt: skip


def _both_sides(spec: MixerSpec, kept: Kept) -> str:
    """Whether it has a form that sees later tokens too, and that form keeps its promise."""
    return _cell(kept, BIDIRECTIONAL) if spec.bidirectional else "no" if spec.causal else "yes"


Kept = Mapping[str, bool | None]
"""By promise whether it is kept; None where it does not apply to the mixer."""


def promises_of(mixer: str, target: str) -> Kept:
    """Which promises a recorded verdict calls kept; empty where there is no record."""
    record = _read(VERDICTS / f"{mixer}.{target}.json")
    found: dict[str, bool | None] = {}
    for verdict in record.get("verdicts", ()):
        if (verdict["kind"], verdict["name"]) == ("mixer", mixer):
            found = {
                promise["name"]: promise["kept"] if promise.get("applies", True) else None
                for promise in verdict["promises"]
            }
            if not any("applies" in promise for promise in verdict["promises"]):
                # Before contract 1.8 what does not apply was called kept.
                found |= {name: None for name in inapplicable(mixer, record) if found.get(name)}
    return found


def inapplicable(mixer: str, record: Mapping[str, Any]) -> set[str]:
    """Promises that do not apply to a mixer, alone or behind a layer of its own kind, as its record configures it."""
    from subquad.testing.mixer_suite import MixerSuite  # only here: it loads torch

    settings = {"mixer": mixer, "config": record.get("config", {}), "d_model": record.get("d_model") or WIDTH}
    suite: type[MixerSuite] = type("Recorded", (MixerSuite,), settings)
    suites = [suite, *filter(None, [suite.behind_itself()])]
    return set.intersection(*(set(one().inapplicable()) for one in suites))


def _cell(kept: Kept, wanted: tuple[str, ...]) -> str:
    """`yes`, `NO`, `-` where a promise was not judged, or `no` where none of them applies."""
    judged = [name for name in wanted if kept.get(name, False) is not None]
    if any(kept.get(name) is False for name in judged):
        return "NO"
    if not judged:
        return "no"
    return "yes" if all(kept.get(name) for name in judged) else "-"


def _count(kept: Kept) -> str:
    judged = [value for value in kept.values() if value is not None]
    return f"{sum(judged)} of {len(judged)}" if judged else "-"


def _oracle(outcomes: Mapping[str, int] | None) -> str:
    if outcomes is None or not outcomes["passed"] + outcomes["failed"]:
        return "-"
    return f"{outcomes['passed']} of {outcomes['passed'] + outcomes['failed']}"


class GpuTime(NamedTuple):
    """Forward + backward of an operator's kernel, and of the fastest rival in the same case (None: none was timed)."""

    device: str
    sizes: str
    ours_ms: float
    rival: str | None
    rival_ms: float | None

    def __str__(self) -> str:
        sizes = f" ({self.sizes})" if self.sizes else ""
        beside = "no rival timed" if self.rival_ms is None else f"{self.rival} {self.rival_ms:.2f} ms"
        return f"{self.ours_ms:.2f} ms{sizes}, {beside}"


def layer_times() -> dict[str, GpuTime]:
    """By mixer: its layer at `LENGTH` tokens and the fastest of its rivals in the same run, the newest that has any.

    Without a rival in any record, the layer in the newest.
    """
    found: dict[str, GpuTime] = {}
    for path in sorted(LAYERS.glob("*.json"), key=_day_and_letter, reverse=True):
        record = _read(path)
        rows = [row for row in record["layers"] if row["t"] == LENGTH and "both_device_ms" in row]
        for row in rows:
            known = found.get(row["mixer"])
            if row["package"] != "subquad" or (known is not None and known.rival is not None):
                continue
            others = [
                (other["both_device_ms"], " ".join([other["package"], *([f"`{what}`"] if what != "layer" else [])]))
                for other in rows
                if other["mixer"] == row["mixer"] and other["package"] != "subquad"
                for what in [other["what"]]
            ]
            rival_ms, rival = min(others, default=(None, None))
            if known is None or rival is not None:
                label = f"width {row['d_model']}"
                found[row["mixer"]] = GpuTime(record["device"], label, row["both_device_ms"], rival, rival_ms)
    return found


def gpu_times() -> dict[str, GpuTime]:
    """By operator: the newest record in which a rival was timed, else the newest; of its rows the first that fits.

    By operator and form (`delta_rule rwkv7`) as well, where rows name the form in which a mixer calls it.
    """
    found: dict[str, GpuTime] = {}
    names = sorted(load_registry().operators, key=len, reverse=True)
    for path in sorted(BENCHMARKS.glob("*.json"), key=_newest_first):
        operator = next((name for name in names if path.stem.startswith(f"{name}_")), None)
        for form, time in _times(path) if operator is not None else ():
            for key in (operator, f"{operator} {form}"):
                if key not in found or (time.rival is not None and found[key].rival is None):
                    found[key] = time
    return found


def _day_and_letter(path: Path) -> str:
    """The end of a record's name: its date, and of several of one day the letter of a later one."""
    return (re.findall(r"\d{4}-\d\d-\d\d[a-z]?$", path.stem) or [""])[0]


def _newest_first(path: Path) -> tuple[int, int, str]:
    """Order of records: by the date in their names, then plain names before longer ones."""
    dates = re.findall(r"\d{4}-\d\d-\d\d", path.stem) or ["0000-00-00"]
    return -int(dates[-1].replace("-", "")), len(path.name), path.name


def _times(path: Path) -> Iterator[tuple[str | None, GpuTime]]:
    """The rows of our default kernel at `LENGTH` tokens, each with its form and the fastest rival of its case."""
    record = _read(path)
    rivals = record.get("rivals") if isinstance(record.get("rivals"), list) else []
    for row in record.get("timings", ()):
        case = row["case"] if isinstance(row.get("case"), dict) else row
        ours = row.get("both_device_ms", row.get("both_ms"))
        other_kernel = row.get("kernel") not in (None, "tiled", "fused")
        if ours is None or case.get("t") != LENGTH or other_kernel or row.get("tuned"):
            continue
        timed = [
            (rival["both_device_ms"], rival["rival"])
            for rival in rivals
            if "both_device_ms" in rival and rival["case"] == case.get("name")
        ]
        rival_ms, rival = min(timed, default=(None, None))
        label = ", ".join(f"{key} {case[key]}" for key in ("n", "p", "segment_len") if key in case)
        yield case.get("form"), GpuTime(record["device"], label, ours, rival, rival_ms)


def _legend(oracles: Mapping[str, Any], layers: Mapping[str, GpuTime], times: Mapping[str, GpuTime]) -> str:
    records = [_read(path) for path in sorted(VERDICTS.glob("*.c*.json"))]
    made = sorted({f"{record['device']}, torch {record['torch']}, {record['date']}" for record in records})
    devices = sorted({time.device for time in times.values()})
    timed_layers = (
        f"Layers ({', '.join(sorted({time.device for time in layers.values()}))}): forward + backward under autocast to"
        " bfloat16, the same tokens (`plugins/benchmarks/mixers.py`).",
    )
    sentences = (
        "`yes`: every promise of `MixerSuite` in that column is kept. CPU, CUDA: promises kept, of those that apply"
        f" ({'; '.join(made)}).",
        "Bidirectional: a form that sees both sides (`bidirectional: true`) keeps its promise.",
        "Oracle: comparisons with an implementation of the equations that shares no code with ours"
        f" ({oracles.get('date', 'none')}). Growth in t as declared, and no faster when measured.",
        f"GPU ({', '.join(devices)}): forward + backward of the operator, 32,768 tokens in sequences of {LENGTH:,},"
        " device time (`kernels/benchmarks/results`). `-`: no record.",
        *(timed_layers if layers else ()),
    )
    return " ".join(sentences)


def _read(path: Path) -> dict[str, Any]:
    """A record; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}  # type: ignore[no-any-return]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
