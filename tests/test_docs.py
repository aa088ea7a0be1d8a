"""What the documentation says is what the program does."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch

from subquad import Example, build_model, compile_model, hookspecs, load_config, schema
from subquad.__main__ import VERBS
from subquad.compiler.explain import explain
from subquad.compiler.options import ESTIMATORS, CompileOptions
from subquad.compiler.pipeline import compiled_graphs
from subquad.compiler.quality.measure import PROXIES
from subquad.component_config import defaults_of
from subquad.registry import load_registry
from subquad.training.metrics import COLUMNS
from subquad.training.tasks.catalogue import TASKS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOST = (ROOT / "subquad" / "README.md").read_text(encoding="utf-8")
SOURCES = (ROOT / "subquad" / "training" / "sources" / "README.md").read_text(encoding="utf-8")
COMPILER = (ROOT / "subquad" / "compiler" / "README.md").read_text(encoding="utf-8")
ROOMS = ("subquad", "conf", "kernels", "cost_model", "plugins", "tests", "examples")
EVALUATION = (ROOT / "subquad" / "training" / "evaluation" / "README.md").read_text(encoding="utf-8")
LONGEST_LINE_OF_A_SCREEN = 90


def commands(text: str) -> list[list[str]]:
    """The arguments of every `python -m subquad ...` line in code blocks."""
    fenced = text.split("```")[1::2]
    lines = [line for block in fenced for line in block.splitlines() if line.startswith("python -m subquad ")]
    return [shlex.split(line, comments=True)[3:] for line in lines]


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_readme_of_one_screen(room: str) -> None:
    text = (ROOT / room / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_LINE_OF_A_SCREEN


@pytest.mark.parametrize(
    "arguments",
    [found for found in commands(README) if found[0] in ("train", "explain", "warmup") and "module=" not in found[1]],
    ids=str,
)
def test_the_readmes_recipes_compose(arguments: list[str]) -> None:
    no_keys = ("resume=", "html=")
    overrides = [argument for argument in arguments[1:] if "=" in argument and not argument.startswith(no_keys)]
    if "--multirun" in arguments:
        overrides = [re.sub(r"^(model=)(\w+),.*", r"\1\2", override) for override in overrides]
    assert load_config(overrides).model.num_layers > 0


@pytest.mark.parametrize("arguments", commands(SOURCES), ids=str)
def test_the_commands_of_the_readme_of_sources_compose(arguments: list[str]) -> None:
    assert load_config(arguments[1:]).data["name"] in ("text_files", "mixture", "hf")


def test_every_fault_names_tests_that_exist() -> None:
    table = (ROOT / "tests" / "README.md").read_text(encoding="utf-8").partition("| fault |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(test_\w+\.py)`", table))
    assert len(named) > 5
    assert all((ROOT / "tests" / name).exists() for name in named)


def test_every_verb_stands_in_the_readme_and_no_other() -> None:
    named = {arguments[0] for arguments in commands(README)}
    assert set(VERBS) - {"completion"} <= named <= set(VERBS)
    assert "subquad completion" in README


def test_every_key_of_measure_stands_in_the_readme_of_the_compiler() -> None:
    keys = [field.name for field in dataclasses.fields(schema.MeasureConfig)]
    rows = re.findall(r"^\| (`.+?`) \|", COMPILER.partition("| key of `measure` |")[2].partition("\n\n")[0], flags=re.M)
    assert re.findall(r"`(\w+)`", " ".join(rows)) == keys


def test_every_key_of_a_budget_stands_in_the_readme_of_the_compiler() -> None:
    keys = [field.name for field in dataclasses.fields(schema.BudgetConfig)]
    rows = re.findall(r"^\| (`.+?`) \|", COMPILER.partition("| key of `budget` |")[2].partition("\n\n")[0], flags=re.M)
    assert re.findall(r"`(\w+)`", " ".join(rows)) == keys


def test_every_estimator_stands_in_the_readme_of_the_compiler() -> None:
    table = COMPILER.partition("| `compiler.estimator` |")[2].partition("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, flags=re.M)) == ESTIMATORS


def test_every_key_of_explain_module_stands_in_the_readme_of_the_compiler() -> None:
    keys = [field.name for field in dataclasses.fields(schema.ForeignConfig)]
    table = COMPILER.partition("| key of `explain module=` |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.M) == keys


def test_every_adapter_of_ours_stands_in_the_readme_of_the_compiler() -> None:
    named = re.findall(r"^\| `(\w+)` \|", COMPILER.partition("| adapter |")[2].partition("\n\n")[0], flags=re.M)
    registry = load_registry()
    ours = [name for name, spec in registry.adapters.items() if registry.origins[spec].name == "builtin"]
    assert named == ours


def test_every_task_stands_in_the_readme_of_evaluation() -> None:
    tasks_table = EVALUATION.partition("| task |")[2].partition("\n\n")[0]
    rows = [tuple(cell.strip() for cell in row.split("|")[1:-1]) for row in tasks_table.splitlines() if "`" in row]
    assert [row[0] for row in rows] == [f"`{name}`" for name in TASKS]
    assert [row[2] for row in rows] == [task.counts for task in TASKS.values()]
    assert [row[3] for row in rows] == [task.paper for task in TASKS.values()]


def test_every_proxy_stands_in_the_readme_of_the_compiler() -> None:
    assert all(f"`{name}`" in COMPILER for name in PROXIES)


def test_every_hook_stands_in_the_readme_of_the_host() -> None:
    hooks = {name for name in dir(hookspecs) if name.startswith("subquad_provide")}
    assert set(re.findall(r"^\| `(subquad_provide_\w+)` \|", HOST, flags=re.M)) == hooks


@pytest.mark.parametrize("name", sorted(load_registry().mixers))
def test_every_mixer_stands_in_the_table_of_the_readme(name: str) -> None:
    assert f"| `{name}` |" in README


@pytest.mark.parametrize("plugin", ["subquad-scout", "subquad-ssm", "subquad-linear"])
def test_every_key_of_a_plugins_mixers_stands_in_its_readme(plugin: str) -> None:
    text = (ROOT / "plugins" / plugin / "README.md").read_text(encoding="utf-8")
    registry = load_registry()
    for spec in registry.mixers.values():
        if registry.origin(spec).startswith(plugin):
            for key in defaults_of(spec.config):
                assert f"`{key}" in text, f"{spec.name}.{key}"


def test_the_graph_in_the_readme_is_the_compilers() -> None:
    config = load_config(["model=scout_mamba"]).model
    config.vocab_size, config.context_len, config.num_layers = 256, 256, 2
    torch.manual_seed(0)
    example = Example(tokens_shape=(8, 256), packed=True, training=True)
    model, _ = compile_model(build_model(config), example, target="cpu", options=CompileOptions(measure=False))
    printed = re.sub(r" : _\w+_", "", compiled_graphs(model)[1, "packed"].code)
    shown = re.search(r"```python\n(def forward.*?)```", HOST, flags=re.S)
    assert shown is not None

    def without_choice(text: str) -> str:
        # Which kernel is fastest depends on the machine; that one is named does not.
        return re.sub(r", '[^']+'\)", ", KERNEL)", text).strip()

    assert without_choice(shown[1]) == without_choice(printed)
    assert "', KERNEL" not in without_choice(shown[1])


def test_the_report_in_the_readme_is_what_explain_prints() -> None:
    """Line by line and in order; figures are the fit's, which is renewed more often than the README."""

    def without_figures(text: str) -> list[str]:
        units = r"\s*\[?\d[\d.,]* (?:us|ms|s|MiB|calls)\b\]?"
        return [re.sub(rf"{units}(?: \.\.{units})?", " FIGURE", line) for line in text.splitlines() if line]

    command = "model=scout_mamba target=h100"
    shown = re.search(rf"`python -m subquad explain {command}`[^`]*```text\n(.*?)```", README, flags=re.S)
    assert shown is not None
    printed = iter(without_figures(explain(load_config(command.split()))))
    for line in without_figures(shown[1]):
        assert line in printed, f"explain does not print, or not here: {line}"


def test_the_columns_of_metrics_csv_are_named_in_the_readme() -> None:
    for column in ("step", "train/loss", "val/loss", "val/bits_per_byte", "tokens_per_s"):
        assert column in COLUMNS
    assert "metrics.csv" in README
