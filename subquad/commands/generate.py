"""generate: continue a text with a trained model."""

from __future__ import annotations

import dataclasses

from subquad.commands.key_values import key_values, keys_with_defaults
from subquad.component_config import typed_config
from subquad.errors import ConfigError
from subquad.schema import GenerateConfig

HELP = """Continue a text with a trained model; tokens are printed as they come.

  python -m subquad generate run=RUN_DIR prompt="def "

{keys}"""


def run(arguments: list[str]) -> int:
    """Generate as `key=value` arguments say."""
    if any(argument in ("--help", "-h") for argument in arguments):
        print(HELP.format(keys=keys_with_defaults(GenerateConfig)))
        return 0
    config = generate_config(arguments)
    from subquad.training.generate import generate

    generate(config)
    return 0


def generate_config(arguments: list[str]) -> GenerateConfig:
    """Read `key=value` arguments; everything after the first `=` is the value, as it stands.  Raises: ConfigError."""
    values = key_values("generate", GenerateConfig, arguments)
    if not values.get("run"):
        raise ConfigError(what="no run folder is named", where="generate.run", mend="name one: generate run=RUN_DIR")
    # Texts are taken literally: OmegaConf would read a prompt's `${...}` and `???` as its own.
    run_folder, prompt = values.pop("run"), values.pop("prompt", "")
    config = typed_config(GenerateConfig, {**values, "run": "given"}, where="generate")
    return dataclasses.replace(config, run=run_folder, prompt=prompt)
