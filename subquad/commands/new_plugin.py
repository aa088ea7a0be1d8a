"""plugins new NAME: a complete plugin package from the templates that come with subquad; its tests pass as written."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from subquad import __version__
from subquad.commands.key_help import keys_in_help
from subquad.commands.key_values import key_values
from subquad.contracts import CONTRACT_VERSION
from subquad.errors import ConfigError
from subquad.registry import load_registry

SUFFIX = ".tmpl"
"""Of every template, so that no tool takes one for a module."""


@dataclass(kw_only=True)
class NewPluginConfig:
    """Where the package is written."""

    into: str = "."  # the folder in which that of the package is made


HELP = """Write a complete plugin package for a mixer of that name: pyproject, mixer, recipe, tests, CI.

  python -m subquad plugins new NAME [into=FOLDER]

{keys}"""

NEXT = """wrote {folder}: a mixer that works as written, to be made into yours

  cd {folder}
  pip install -e '.[test]'                      # into the environment that has subquad
  python -m subquad plugins check {mixer}
  python -m subquad train model={mixer} trainer=smoke

Then change {package}/mixer.py, its keys in config.py, its declaration in plugin.py, and its equation in tests/.
What runs is what these files say: nothing need be installed again."""


def run(arguments: list[str]) -> int:
    """Write the package and say what to do next.  Raises: ConfigError."""
    if not arguments or arguments[0] in ("--help", "-h"):
        print(HELP.format(keys=keys_in_help(NewPluginConfig)))
        return 0 if arguments else 2
    name, *rest = arguments
    config = NewPluginConfig(**key_values("plugins new", NewPluginConfig, rest))
    folder = write_plugin(name, Path(config.into).expanduser())
    print(NEXT.format(folder=folder, mixer=name, package=f"subquad_{name}"))
    return 0


def write_plugin(mixer: str, into: Path) -> Path:
    """Write the package of a mixer below `into` and return its folder.

    Raises: ConfigError when the name cannot be one, is taken, or the folder exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", mixer) or keyword.iskeyword(mixer):
        raise ConfigError(
            what=f"'{mixer}' cannot be the name of a mixer",
            where="plugins new",
            mend="use lower-case letters, digits and _, beginning with a letter",
        )
    registry = load_registry()
    if mixer in registry.mixers:
        raise ConfigError(
            what=f"a mixer is called '{mixer}' already ({registry.origin(registry.mixers[mixer])})",
            where="plugins new",
            mend="choose another name",
        )
    folder = into / f"subquad-{mixer.replace('_', '-')}"
    if folder.exists():
        raise ConfigError(what=f"{folder} exists", where="plugins new", mend="remove it, or name a folder: into=FOLDER")
    words = {
        "mixer": mixer,
        "package": f"subquad_{mixer}",
        "distribution": folder.name,
        "class": "".join(word.capitalize() for word in mixer.split("_")),
        "version": __version__,
        "contract": CONTRACT_VERSION,
    }
    for path, text in _templates(files("subquad") / "templates" / "plugin"):
        for word, value in words.items():
            path, text = path.replace(f"__{word}__", value), text.replace("{{" + word + "}}", value)
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return folder


def _templates(folder: Traversable, below: str = "") -> list[tuple[str, str]]:
    """Path and text of every template; `dot-` begins the name of what is hidden, which wheels leave out."""
    found = []
    for entry in folder.iterdir():
        path = below + re.sub(r"^dot-", ".", entry.name)
        if entry.is_dir():
            found += _templates(entry, f"{path}/")
        elif path.endswith(SUFFIX):
            found.append((path.removesuffix(SUFFIX), entry.read_text(encoding="utf-8")))
    return sorted(found)
