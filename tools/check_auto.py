"""Whether layers left open are filled with the best that the budget allows, by measurement.

    python tools/check_auto.py OUT.json [cells=BATCHxLENGTH:SECONDS,...] [key=value ...]

A cell is a batch, a length and `budget.latency_s` (0: none); without `cells`, those of CELLS. Further arguments are
those of `subquad train` and join each cell; the model is 12 open layers of width 1,024 (model=auto_hybrid). In every
cell a schedule is chosen; it, every candidate alone, and the schedules that other cells chose are then taken for five
steps on random tokens. `seconds` are forward and backward through all blocks (the median). `confirmed`: the chosen
schedule keeps to its budget, and of all that do none has a smaller loss (as the choice counts it), or is faster at no
greater loss. `against` are the seconds of the others over those of the chosen schedule. Every cell is written as soon
as it is there. Record the hardware beside whatever is quoted.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from check_budgets import measured_step
from command_line import OF_TRAIN, told, words_of

from subquad import load_config
from subquad.compiler.assign_mixers import assign_mixers
from subquad.compiler.assignment import Assignment
from subquad.schema import RunConfig
from subquad.training.compilation import device_of, target_of

CELLS = ("64x512:0", "4x8192:0.1", "2x16384:0.1", "1x32768:0.1", "1x65536:0.2")
MODEL = (
    "model=auto_hybrid", "model.d_model=1024", "model.num_layers=12", "model.channel_mixer.d_hidden=2816",
    "model.mixers.softmax_attention.num_heads=16", "model.mixers.segment_attention.num_heads=16",
    "model.mixers.window.num_heads=16",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What is asked for: `name` is BATCHxLENGTH:SECONDS."""

    name: str

    @property
    def overrides(self) -> list[str]:
        """As keys of a run."""
        shape, _, seconds = self.name.partition(":")
        batch, _, length = shape.partition("x")
        asked = [f"trainer.batch_size={batch}", f"trainer.seq_len={length}"]
        return asked + ([f"budget.latency_s={seconds}"] if float(seconds or 0) else [])


def main(out: Path, cells: Sequence[str], overrides: Sequence[str]) -> None:
    configs = {cell: configured([*MODEL, *Cell(cell).overrides, *overrides]) for cell in cells}
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "overrides": list(overrides),
    }
    chosen: dict[str, Assignment] = {}
    for cell, config in configs.items():
        started = time.perf_counter()
        _, assignment = assign_mixers(copy.deepcopy(config), target_of(config))
        if assignment is None:
            raise SystemExit("the schedule has no open layers: model=auto_hybrid has")
        chosen[cell] = assignment
        results[cell] = {"schedule": list(assignment.schedule), "assign_s": round(time.perf_counter() - started, 1)}
        print(cell, json.dumps(results[cell]), flush=True)
        save(out, results)
    for cell, config in configs.items():
        assignment = chosen[cell]
        alone = [(key,) * len(assignment.schedule) for key in assignment.candidates]
        schedules = [assignment.schedule, *alone, *(other.schedule for other in chosen.values())]
        taken: list[dict[str, Any]] = []
        for schedule in dict.fromkeys(schedules):
            row: dict[str, Any] = {"schedule": named(schedule), "loss": loss_of(assignment, schedule)}
            try:
                row["seconds"] = measured_step(closed(config, schedule))["latency_s"]
            except Exception as error:  # one that finds no memory does not stop the others
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            taken.append(row)
            if device_of(config).type == "cuda":
                torch.cuda.empty_cache()
        budget = float(assignment.budgets.get("latency_s", 0)) or None
        results[cell] |= {
            "budget_s": budget,
            "predicted_s": assignment.totals["latency_s"],
            "taken": taken,
            **verdict(taken, budget),
        }
        print(cell, json.dumps({key: results[cell][key] for key in ("confirmed", "against")}), flush=True)
        save(out, results)


def configured(overrides: list[str]) -> RunConfig:
    """The run's configuration, with a vocabulary and a length that a model can be built with."""
    config = load_config(overrides)
    config.model.vocab_size = config.model.vocab_size or 256
    config.model.context_len = config.model.context_len or config.trainer.seq_len
    return config


def closed(config: RunConfig, schedule: Sequence[str]) -> RunConfig:
    """The same run with these mixers in its layers."""
    config = copy.deepcopy(config)
    config.model.schedule = list(schedule)
    return config


def loss_of(assignment: Assignment, schedule: Sequence[str]) -> float:
    """What the choice counts against a schedule: the sum over layers."""
    return sum(layer[key] for layer, key in zip(assignment.loss, schedule, strict=True) if key in layer)


def named(schedule: Sequence[str]) -> str:
    """`7 window, 5 segment_attention`, in the order of first use."""
    return ", ".join(f"{list(schedule).count(key)} {key}" for key in dict.fromkeys(schedule))


def verdict(taken: Sequence[Mapping[str, Any]], budget: float | None) -> dict[str, Any]:
    """Of the first row, the chosen schedule, against the others."""
    own, *others = taken
    if "seconds" not in own:
        return {"confirmed": False, "against": {}}
    measured = [row for row in others if "seconds" in row]
    within = [row for row in measured if budget is None or row["seconds"] <= budget]
    better = [
        row["schedule"]
        for row in within
        if row["loss"] < own["loss"] or (row["loss"] <= own["loss"] and row["seconds"] < own["seconds"])
    ]
    return {
        "confirmed": (budget is None or own["seconds"] <= budget) and not better,
        "better": better,
        "against": {row["schedule"]: round(row["seconds"] / own["seconds"], 3) for row in measured},
    }


def save(out: Path, results: Mapping[str, Any]) -> None:
    """Write what there is."""
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    (place,), words = words_of(__doc__, sys.argv[1:], "OUT.json", keys=OF_TRAIN)
    given = [word.removeprefix("cells=").split(",") for word in words if word.startswith("cells=")]
    with told():
        main(Path(place), given[-1] if given else CELLS, [word for word in words if not word.startswith("cells=")])
