"""Configurations wrong in one place, drawn from the schema: each is refused in three lines, and that is all."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from subquad.compose import to_run_config
from subquad.errors import SubquadError
from subquad.schema import RunConfig
from subquad.training import fit

Path_ = tuple[str, ...]
TinyRun = Callable[..., RunConfig]

HUGE = 10**15
BAD_NUMBERS: dict[str, list[object]] = {
    "seed": [2**70, -(2**70)],
    "model.d_model": [0, -1, HUGE],
    "model.num_layers": [0, -3, HUGE],
    "model.vocab_size": [-1, 5, HUGE],
    "model.context_len": [-1, 5],
    "model.channel_mixer.d_hidden": [0, -7, HUGE],
    "model.norm_eps": [-1e-6, math.nan, math.inf],
    "model.init_std": [-0.02, math.nan, math.inf, "wide"],
    "trainer.max_steps": [0, -1],
    "trainer.max_seconds": [0.0, -1.0, math.nan],
    "trainer.batch_size": [0, -1, HUGE],
    "trainer.seq_len": [0, -1, HUGE],
    "trainer.accumulate": [0, -1],
    "trainer.learning_rate_warmup_steps": [-1],
    "trainer.final_learning_rate_fraction": [-0.1, 2.0, math.nan],
    "trainer.gradient_clip_norm": [-1.0, math.nan],
    "trainer.validate_every_n_steps": [-1],
    "trainer.validation_batches": [0, -1],
    "trainer.devices": [0, -1, HUGE],
    "trainer.num_workers": [-1, HUGE],
    "trainer.log_every_n_steps": [0, -5],
    "checkpoint.every_n_steps": [-1],
    "checkpoint.keep": [-1],
    "compiler.measure_budget_s": [-1.0, math.nan],
    "budget.latency_s": [0.0, -1.0, math.nan],
    "budget.memory_bytes": [0.0, -1.0],
    "budget.carry_bytes": [0.0, -1.0],
    "budget.seq_len": [-1],
    "budget.batch_size": [-1],
    "budget.alternatives": [-1],
    "budget.distance": [0, -1],
    "optimizer.lr": [-1.0, math.nan, math.inf],
    "data.validation_fraction": [0.0, 1.0, -0.5, math.nan],
    "model.mixers.softmax_attention.num_heads": [0, -2, 5, HUGE],
}
NAMES = (
    "trainer.precision", "trainer.accelerator", "trainer.strategy", "trainer.nonfinite", "trainer.recompute",
    "compiler.estimator", "tokenizer.kind", "tracking", "target", "data.name", "optimizer.name",
    "model.mixers.softmax_attention.mixer",
)  # fmt: skip
NO_FILES = ["", "\0", "a\0b", "\ud800", "x" * 5000, "gone", ".", "/proc/self/mem", "../" * 60 + "gone", "~", "☃/☃"]
NO_FOLDERS = ["\0", "\ud800", "x" * 5000, "/proc/run", "/dev/null/run", "corpus.txt/run"]
PATHS = {
    "run_dir": NO_FOLDERS,
    "resume": NO_FILES,
    "plan": NO_FILES,
    "data.files": NO_FILES,
    "tokenizer.file": NO_FILES,
}
CODE: list[object] = [
    {"_target_": "os.mkdir", "path": "executed"},
    {"_target_": "os.system", "command": "touch executed"},
    {"_target_": "builtins.eval", "_args_": ["open('executed', 'w')"]},
    {"_target_": "subprocess.run", "args": ["touch", "executed"]},
    {"_target_": "lightning.pytorch.callbacks.Nothing"},
    {"_target_": 7},
]
"""Were one of them called, the folder would hold a file more."""


def leaves(config: type, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """The keys of the schema that are no sections, and their types."""
    for name, kind in typing.get_type_hints(config).items():
        inner = [part for part in typing.get_args(kind) or (kind,) if dataclasses.is_dataclass(part)]
        if inner:
            yield from leaves(inner[0], (*path, name))
        else:
            yield (*path, name), kind


LEAVES = [leaf for leaf in leaves(RunConfig) if leaf[0][0] not in ("data", "optimizer", "kernel", "callbacks")]
SECTIONS = [(), *{path[:count] for path, _ in LEAVES for count in range(1, len(path))}, ("data",), ("optimizer",)]
SECTIONS += [("model", "mixers", "softmax_attention")]


def of_another_type(kind: Any) -> st.SearchStrategy[Any]:
    """Values that the type does not take: text that is no number, lists and mappings for scalars, and so on."""
    origin = typing.get_origin(kind)
    kinds = typing.get_args(kind) if origin in (typing.Union, types.UnionType) else (kind,)
    words = st.sampled_from(["soon", "☃", "1e", "None of it", "0x", "--", "ten"])
    wrong: list[st.SearchStrategy[Any]] = []
    if list in (origin, kind):
        return words | st.integers() | st.just({"a": [1]})
    if dict in (origin, kind):
        return words | st.integers() | st.just([1])
    wrong += [st.lists(st.integers(), max_size=3), st.dictionaries(st.sampled_from("ab"), st.integers(), max_size=2)]
    if str not in kinds:
        wrong.append(words)
    if int in kinds and float not in kinds:
        wrong.append(st.just(1.5))
    if types.NoneType not in kinds:
        wrong.append(st.none())
    return st.one_of(wrong)


Change = tuple[Path_, Any]


def bad_changes() -> st.SearchStrategy[Change]:
    """A key and what is put there."""

    def key(dotted: str) -> Path_:
        return tuple(dotted.split("."))

    typed = st.sampled_from(LEAVES).flatmap(lambda leaf: st.tuples(st.just(leaf[0]), of_another_type(leaf[1])))
    numbers = st.sampled_from([(key(name), value) for name, values in BAD_NUMBERS.items() for value in values])
    text = st.text(min_size=1, max_size=12).map(lambda word: f"{word}?")
    names = st.tuples(st.sampled_from([key(name) for name in NAMES]), text)
    paths = st.sampled_from(
        [(key(name), [value] if name == "data.files" else value) for name, values in PATHS.items() for value in values]
    )
    strangers = st.tuples(st.sampled_from(SECTIONS), text.filter(lambda word: "$" not in word), st.integers()).map(
        lambda drawn: ((*drawn[0], drawn[1]), drawn[2])
    )
    missing = st.sampled_from([(("data", "name"), "???"), (("model", "d_model"), "???"), (("run_dir",), "???")])
    code = st.tuples(st.sampled_from([*SECTIONS, ("callbacks",)]), st.sampled_from(CODE)).map(
        lambda drawn: (drawn[0], [drawn[1]]) if drawn[0] == ("callbacks",) else ((*drawn[0], "extra"), drawn[1])
    )
    schedule = st.tuples(st.just(("model", "schedule")), st.just([]) | st.lists(text, min_size=1, max_size=3))
    denied = st.tuples(st.just(("deny",)), st.lists(text, min_size=1, max_size=3))
    pinned = st.tuples(st.just(("kernel",)), st.dictionaries(text.filter(lambda w: "$" not in w), text, min_size=1))
    return st.one_of(typed, numbers, names, paths, strangers, missing, code, schedule, denied, pinned)


def tried(values: dict[str, Any], change: Change) -> None:
    """What the command does with a configuration, once it is composed."""
    *sections, last = change[0]
    place: Any = values
    for section in sections:
        place = place[section]
    place[last] = change[1]
    fit.train(to_run_config(OmegaConf.create(values)))


def run_begins(*_: object) -> None:
    raise AssertionError("a run began")


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_configuration_that_is_wrong_in_one_place_is_refused(
    count: int, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None ends with a traceback, none begins a run, none writes or executes anything."""
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 40)
    base = dataclasses.asdict(tiny_run("run"))
    base["data"]["files"] = ["corpus.txt"]
    base["run_dir"] = "run"
    monkeypatch.setattr(fit, "_fit", run_begins)
    with pytest.raises(AssertionError, match="a run began"):  # the base is sound
        fit.train(to_run_config(OmegaConf.create({**base, "run_dir": "sound"})))
    before = sorted(os.listdir(tmp_path))

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(bad_changes())
    def refused(change: Change) -> None:
        with pytest.raises(SubquadError) as caught:
            tried(deepcopy(base), change)
        assert caught.value.exit_code == 2
        assert all(str(part).strip() for part in (caught.value.what, caught.value.where, caught.value.mend))
        str(caught.value).encode("utf-8", "backslashreplace")
        assert sorted(os.listdir(tmp_path)) == before

    refused()
