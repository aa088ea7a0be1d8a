"""generate: continue a text with a trained model."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml  # type: ignore[import-untyped]

from subquad.commands.key_help import keys_in_help
from subquad.commands.key_values import key_values
from subquad.component_config import typed_config
from subquad.errors import ConfigError
from subquad.schema import GenerateConfig

HELP = """Continue a text with a trained model; tokens are printed as they come.

  python -m subquad generate run=RUN_DIR prompt="def "
  python -m subquad generate run=RUN_DIR prompts=prompts.jsonl out=results.jsonl batch_size=16

{keys}

stop=TEXT is one stop string as it stands; stop='["a", "b"]' several, as YAML. A file of prompts is continued
`batch_size` at a time; mixers with a state of constant size decode prompts of all lengths together."""
LITERAL = ("run", "prompt", "prompts", "out")
"""Texts that are taken as they stand: OmegaConf would read a prompt's `${...}` and `???` as its own."""


def run(arguments: list[str]) -> int:
    """Generate as `key=value` arguments say."""
    if any(argument in ("--help", "-h") for argument in arguments):
        print(HELP.format(keys=keys_in_help(GenerateConfig)))
        return 0
    config = generate_config(arguments)
    from subquad.training.generate import generate

    generate(config)
    return 0


def generate_config(arguments: list[str]) -> GenerateConfig:
    """Read `key=value` arguments; everything after the first `=` is the value, as it stands.  Raises: ConfigError."""
    values: dict[str, Any] = dict(key_values("generate", GenerateConfig, arguments))
    if not values.get("run"):
        raise ConfigError(what="no run folder is named", where="generate.run", mend="name one: generate run=RUN_DIR")
    literal = {key: values.pop(key) for key in LITERAL if key in values}
    stop = values.pop("stop", "")
    literal["stop"] = _texts(stop) if stop.startswith("[") else [stop] if stop else []
    if "stop_ids" in values:
        values["stop_ids"] = _yaml(values["stop_ids"], "stop_ids")
    config = typed_config(GenerateConfig, {**values, "run": "given"}, where="generate")
    return dataclasses.replace(config, **literal)


def _texts(text: str) -> list[str]:
    found = _yaml(text, "stop")
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise _unreadable(text, "stop", "not all entries are texts")
    return found


def _yaml(text: str, key: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _unreadable(text, key, str(error).splitlines()[0]) from None


def _unreadable(text: str, key: str, reason: str) -> ConfigError:
    return ConfigError(
        what=f"'{text}' is no list: {reason}", where=f"generate.{key}", mend='write lists as \'["a", "b"]\''
    )
