"""Every key has a meaning where it is declared, and `--help` shows it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import pytest
import yaml
from omegaconf import OmegaConf

from subquad import load_config, schema
from subquad.__main__ import main
from subquad.commands.check_plugin import CheckConfig
from subquad.commands.key_help import as_yaml, default_of, keys_in_help
from subquad.commands.new_plugin import NewPluginConfig
from subquad.key_meanings import key_meanings, section_meaning
from subquad.registry import load_registry

REGISTRY = load_registry()
CONFIGS = {
    *(kind for name, kind in vars(schema).items() if name.endswith("Config") and dataclasses.is_dataclass(kind)),
    *(spec.config for spec in REGISTRY.mixers.values()),
    *(spec.config for spec in REGISTRY.components.values()),
    CheckConfig,
    NewPluginConfig,
}
"""Every class whose fields somebody types as keys."""
OF_VERBS = {
    "generate": schema.GenerateConfig, "export": schema.ExportConfig, "compare": schema.CompareConfig,
    "evaluate": schema.EvaluateConfig, "proxy": schema.ProxyConfig, "measure": schema.MeasureConfig,
    "calibrate": schema.CalibrateConfig, "explain": schema.ForeignConfig, "plugins check": CheckConfig,
    "plugins new": NewPluginConfig,
}  # fmt: skip


@dataclass(kw_only=True)
class Base:
    """What it is for,
    in two lines.

    More of it.
    """

    kept: int = 0  # said once
    both: int = 0  # said by the base
    bare: int = 0


@dataclass(kw_only=True)
class Derived(Base):
    """A class of another."""

    kept: int = 1
    both: int = 1  # said anew
    # above
    long: str = "#"  # beside, after a `#`


def one_line(text: str) -> str:
    """A help text without its layout."""
    return " ".join(re.sub(r"\n +#", " ", text).split())


@pytest.mark.parametrize("config_class", sorted(CONFIGS, key=str), ids=lambda kind: kind.__name__)
def test_every_key_has_a_meaning(config_class: type) -> None:
    said = key_meanings(config_class)
    nested = {f.name for f in dataclasses.fields(config_class) if dataclasses.is_dataclass(default_of(f))}
    assert [key for key, meaning in said.items() if not meaning and key not in nested] == []
    assert section_meaning(config_class)


def test_a_meaning_is_the_comment_above_and_beside_and_may_be_that_of_a_base() -> None:
    meanings = {"kept": "said once", "both": "said anew", "bare": "", "long": "above; beside, after a `#`"}
    assert key_meanings(Derived) == meanings
    assert section_meaning(Base) == "What it is for, in two lines."


def test_a_class_that_was_made_at_run_time_says_nothing() -> None:
    assert key_meanings(dataclasses.make_dataclass("Made", [("key", int, 0)])) == {"key": ""}


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize("verb", OF_VERBS)
def test_help_of_a_verb_says_what_each_key_means_within_the_terminal(
    verb: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    fields = dataclasses.fields(OF_VERBS[verb])
    for field, meaning in zip(fields, key_meanings(OF_VERBS[verb]).values(), strict=True):
        default = default_of(field)
        ending = "must be given" if default == "???" else f"default {as_yaml(default)}"
        assert f" {field.name} {one_line(meaning)} ({ending})" in one_line(shown)
    assert max(map(len, keys_in_help(OF_VERBS[verb]).splitlines())) <= columns


@pytest.mark.parametrize("verb", ["train", "explain", "warmup"])
def test_help_of_a_run_is_the_composed_configuration_with_meanings(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["model=jamba", "trainer.max_steps=7", "data=synthetic"]
    assert main([verb, "--help", *overrides]) == 0
    about, _, keys = capsys.readouterr().out.partition("Keys: key=value, such as trainer.max_steps=20\n")
    assert f"python -m subquad {verb} " in about
    shown = yaml.safe_load(keys)
    assert shown["trainer"]["max_steps"] == 7
    config = load_config(overrides)
    assert OmegaConf.merge(OmegaConf.structured(schema.RunConfig), shown) == OmegaConf.structured(config)
    said = one_line(keys)
    for section in (schema.RunConfig, schema.ModelConfig, schema.TrainerConfig, schema.BudgetConfig):
        for key, meaning in key_meanings(section).items():
            assert one_line(meaning) in said, key
    for name in ("mamba", "softmax_attention"):
        assert one_line(REGISTRY.mixers[name].summary) in said
        assert all(one_line(meaning) in said for meaning in key_meanings(REGISTRY.mixers[name].config).values())
    source = REGISTRY.components["data", "synthetic"]
    assert all(one_line(meaning) in said for meaning in [source.summary, *key_meanings(source.config).values()])


def test_help_shows_what_a_run_would_still_ask_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help", "data=hf"]) == 0
    assert re.search(r"path: \?\?\? +# name on the hub", capsys.readouterr().out)
