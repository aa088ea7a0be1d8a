"""What the compiler decided, as data: written to plan.json, read back to repeat or resume a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from subquad.compiler.assignment import Assignment
from subquad.compiler.example import IN_PLACE
from subquad.errors import ConfigError
from subquad_cost_model import Estimate

FORMAT_VERSION = 1
SOURCES = ("measured", "model", "bound", "constant")
"""Where figures come from, most trusted first."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Seconds of one call of a kernel, with an interval; `source` is bound, model, measured or constant.

    `note` says why a better source did not answer.
    """

    kernel: str
    seconds: float
    low_s: float
    high_s: float
    peak_bytes: int
    source: str
    note: str = ""

    @classmethod
    def of(cls, kernel: str, estimates: Iterable[Estimate]) -> Figure:
        """The sum over a call's phases; its source is the weakest of theirs."""
        parts = list(estimates)
        return cls(
            kernel=kernel,
            seconds=sum(part.seconds for part in parts),
            low_s=sum(part.low_s for part in parts),
            high_s=sum(part.high_s for part in parts),
            peak_bytes=max(part.peak_bytes for part in parts),
            source=max((part.source for part in parts), key=SOURCES.index),
            note="; ".join(dict.fromkeys(part.note for part in parts if part.note)),
        )


@dataclass(frozen=True, kw_only=True)
class NodeChoice:
    """The kernel of one operator node, with its rivals.

    `kernel` is the node's argument: a name, or a table over batch and length. `figures` hold the choice first, then
    its rivals; `declined` says why other kernels were no candidates. `exactness` is `identical`: the same function up
    to the operator's stated tolerance. `used` tells whether this run's example calls the node. `document_lengths` are
    the tokens of each packed document where they were known.
    """

    layer: int
    mixer: str
    method: str
    node: str
    operator: str
    kernel: str
    chosen: str
    shape: Mapping[str, int]
    options: Mapping[str, Any]
    dtype: str
    phases: tuple[str, ...]
    figures: tuple[Figure, ...]
    declined: Mapping[str, str]
    reason: str
    used: bool
    exactness: str = "identical"
    kernel_version: str = ""  # of the chosen kernel's source
    document_lengths: tuple[int, ...] = ()

    @property
    def place(self) -> tuple[int, str, str]:
        """What identifies the node: layer, method, node name."""
        return self.layer, self.method, self.node

    @property
    def figure(self) -> Figure | None:
        """The figure of the chosen kernel."""
        return next((figure for figure in self.figures if figure.kernel == self.chosen), None)


@dataclass(frozen=True, kw_only=True)
class Uncaptured:
    """A method of a mixer that runs as written, or if it decodes in place not at all: `decode` does the same.

    It could not be captured, or (in place) no kernel of one of its operators is left.
    """

    layer: int
    mixer: str
    method: str
    reason: str

    @property
    def runs(self) -> bool:
        """Whether it runs as written, or not at all."""
        return self.method != IN_PLACE


@dataclass(frozen=True, kw_only=True)
class StepPrediction:
    """What one optimizer step of the run is expected to take on one device; None where it cannot be told (`notes`).

    `parts` are seconds by kind of work and add up to `seconds`, unless the host needs longer (`host_s` for `calls`).
    `memory` are bytes by use, not all held at once; `peak_bytes` is the most. `budgets` are the limits of `budget`.
    """

    seconds: float | None
    low_s: float | None
    high_s: float | None
    parts: Mapping[str, float]
    calls: int
    host_s: float
    peak_bytes: int | None
    memory: Mapping[str, int]
    budgets: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> StepPrediction:
        """What `dataclasses.asdict` and JSON made of one.  Raises: TypeError, KeyError."""
        return cls(**{**content, "notes": tuple(content["notes"])})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Per operator node the chosen kernel, for one target, with the evidence.

    `origin` says whether the target's figures come from a probe or a data sheet; `schedule` is the mixer of each layer.
    """

    target: str
    origin: str
    versions: Mapping[str, str]
    example: Mapping[str, Any]
    schedule: tuple[str, ...]
    choices: tuple[NodeChoice, ...]
    uncaptured: tuple[Uncaptured, ...] = ()
    notes: tuple[str, ...] = field(default=())
    assignment: Assignment | None = None  # how the `auto` layers of the schedule were filled
    prediction: StepPrediction | None = None  # of a whole training step

    @property
    def kernel_versions(self) -> Mapping[str, str]:
        """The source of every kernel that the run uses, by operator/kernel."""
        return {
            f"{choice.operator}/{choice.chosen}": choice.kernel_version
            for choice in self.choices
            if choice.used and choice.kernel_version
        }

    @property
    def seconds(self) -> float:
        """Predicted seconds of all operators in one use of the example."""
        return sum(choice.figure.seconds for choice in self.choices if choice.used and choice.figure)

    def save(self, path: Path) -> None:
        """Write the plan as JSON, all of it or nothing."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(
            json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n", encoding="utf-8"
        )
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan.  Raises: ConfigError when the file is missing or no plan of this format."""
        mend = "name a plan.json of this version, or leave it out to choose anew"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format_version") != FORMAT_VERSION:
                raise ConfigError(what=f"{path} has another format version", where="plan", mend=mend)
            choices = tuple(
                NodeChoice(
                    **(
                        choice
                        | {
                            "phases": tuple(choice["phases"]),
                            "document_lengths": tuple(choice.get("document_lengths", ())),
                            "figures": tuple(Figure(**figure) for figure in choice["figures"]),
                        }
                    )
                )
                for choice in content.pop("choices")
            )
            uncaptured = tuple(Uncaptured(**entry) for entry in content.pop("uncaptured"))
            assignment, prediction = content.pop("assignment", None), content.pop("prediction", None)
            notes, schedule = tuple(content.pop("notes")), tuple(content.pop("schedule"))
            return cls(
                choices=choices,
                uncaptured=uncaptured,
                notes=notes,
                schedule=schedule,
                assignment=None if assignment is None else Assignment.of_json(assignment),
                prediction=None if prediction is None else StepPrediction.of_json(prediction),
                **content,
            )
        except OSError as error:
            raise ConfigError(what=f"{path} cannot be read ({error.strerror})", where="plan", mend=mend) from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(what=f"{path} is not a plan", where="plan", mend=mend) from None

    def staleness(self, target: str, versions: Mapping[str, str], kernels: Mapping[str, str]) -> str | None:
        """None if the plan was made for this target, these versions and these kernels' sources, else what differs.

        `kernels` holds the version of every kernel that is installed, by operator/kernel.
        """
        changes = [f"{name} {old} -> {versions.get(name)}" for name, old in self.versions.items()
                   if versions.get(name) != old]  # fmt: skip
        if self.target != target:
            changes.insert(0, f"device {self.target} -> {target}")
        for kernel, old in self.kernel_versions.items():
            if kernel not in kernels:
                changes.append(f"{kernel} is not installed")
            elif kernels[kernel] != old:
                changes.append(f"{kernel} has other code")
        return ", ".join(changes) or None
