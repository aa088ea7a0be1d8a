"""generate: continue a text with a trained model."""

from __future__ import annotations

import dataclasses

from subquad.component_config import typed_config
from subquad.errors import ConfigError, suggestion
from subquad.schema import GenerateConfig

HELP = """Continue a text with a trained model; tokens are printed as they come.

  python -m subquad generate run=RUN_DIR prompt="def "

{keys}"""


def run(arguments: list[str]) -> int:
    """Generate as `key=value` arguments say."""
    if any(argument in ("--help", "-h") for argument in arguments):
        fields = dataclasses.fields(GenerateConfig)
        print(HELP.format(keys="\n".join(f"  {field.name:<12} default {field.default!r}" for field in fields)))
        return 0
    config = generate_config(arguments)
    from subquad.training.generate import generate

    generate(config)
    return 0


def generate_config(arguments: list[str]) -> GenerateConfig:
    """Read `key=value` arguments; everything after the first `=` is the value, as it stands.  Raises: ConfigError."""
    known = [field.name for field in dataclasses.fields(GenerateConfig)]
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            raise ConfigError(
                what=f"there is no key '{key}'" if equals else f"'{argument}' is not of the form key=value",
                where="generate",
                mend=f"{suggestion(key, known)}the keys are {', '.join(known)}",
            )
        values[key] = value
    if not values.get("run"):
        raise ConfigError(what="no run folder is named", where="generate.run", mend="name one: generate run=RUN_DIR")
    # Texts are taken literally: OmegaConf would read a prompt's `${...}` and `???` as its own.
    run_folder, prompt = values.pop("run"), values.pop("prompt", "")
    config = typed_config(GenerateConfig, {**values, "run": "given"}, where="generate")
    return dataclasses.replace(config, run=run_folder, prompt=prompt)
