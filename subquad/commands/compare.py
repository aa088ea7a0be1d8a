"""compare: lay runs side by side."""

from __future__ import annotations

from pathlib import Path

import yaml  # type: ignore[import-untyped]

from subquad.commands.key_help import keys_in_help
from subquad.commands.key_values import key_values
from subquad.commands.table import table
from subquad.errors import ConfigError
from subquad.schema import CompareConfig

HELP = """Lay runs side by side: figures, curves over tokens, differences of configurations and plans.

  python -m subquad compare runs=[runs/a,runs/b,runs/c]

{keys}

Plans are compared with that of the first run. html=null writes no page."""


def run(arguments: list[str]) -> int:
    """Compare what `key=value` arguments name."""
    if any(argument in ("--help", "-h") for argument in arguments):
        print(HELP.format(keys=keys_in_help(CompareConfig)))
        return 0
    config = compare_config(arguments)
    from subquad.training.compare import compare
    from subquad.training.compare_page import write_page

    found = compare(config.runs)
    names = [run.name for run in found.runs]
    print(table("figures", ("", *names), [(label, *cells) for label, cells in found.figures]))
    print(table("configurations", ("key", *names), [(key, *cells) for key, cells in found.config]))
    for name, lines in found.plans.items():
        print("\n  ".join([f"plans of {names[0]} and {name}", *(lines or ["they do the same"])]) + "\n")
    for gap in found.gaps:
        print(f"missing  {gap}")
    if config.html is not None:
        write_page(found, Path(config.html).expanduser())
        print(f"written: {config.html}")
    return 0


def compare_config(arguments: list[str]) -> CompareConfig:
    """Read `key=value` arguments; `runs` is a list of paths.  Raises: ConfigError."""
    values = key_values("compare", CompareConfig, arguments)
    html = values.get("html", CompareConfig().html)
    return CompareConfig(runs=_paths(values.get("runs", "")), html=None if html in ("", "null") else html)


def _paths(text: str) -> list[str]:
    try:
        found = yaml.safe_load(text) if text.startswith("[") else [part for part in text.split(",") if part]
    except yaml.YAMLError:
        found = None
    if not isinstance(found, list) or not all(isinstance(path, str) for path in found):
        raise ConfigError(
            what=f"'{text}' is no list of folders", where="compare.runs", mend="write runs=[RUN_DIR,OTHER_RUN_DIR]"
        )
    return found
