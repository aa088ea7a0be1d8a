"""export: write a trained model for others to load."""

from __future__ import annotations

from subquad.commands.key_help import keys_in_help
from subquad.commands.key_values import key_values
from subquad.errors import ConfigError
from subquad.schema import ExportConfig

HELP = """Write the newest weights of a run as a folder that others load.

  python -m subquad export run=RUN_DIR out=FOLDER              # for subquad.load_model and generate run=FOLDER
  python -m subquad export run=RUN_DIR format=hf out=FOLDER    # for transformers

{keys}

format=hf writes a checkpoint of transformers' own class where it has one (llama, mistral, mamba, mamba2), and else a
modeling file beside the weights that imports subquad and asks for trust_remote_code=True."""


def run(arguments: list[str]) -> int:
    """Export what `key=value` arguments say."""
    if any(argument in ("--help", "-h") for argument in arguments):
        print(HELP.format(keys=keys_in_help(ExportConfig)))
        return 0
    config = export_config(arguments)
    from subquad.training.export import export

    print(f"written: {config.out}\n{export(config)}")
    return 0


def export_config(arguments: list[str]) -> ExportConfig:
    """Read `key=value` arguments, as they stand.  Raises: ConfigError."""
    values = key_values("export", ExportConfig, arguments)
    for key, mend in (("run", "name a run folder: run=RUN_DIR"), ("out", "name a new folder: out=FOLDER")):
        if not values.get(key):
            raise ConfigError(what=f"{key} is missing", where=f"export.{key}", mend=mend)
    return ExportConfig(**values)
