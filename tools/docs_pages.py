"""The pages of the documentation that nobody types: a hook of mkdocs (`make docs`).

The reference comes from the schema, the registry and docstrings, pages of rooms are their READMEs, licences those of
what is installed. `python tools/docs_pages.py PAGE` prints one.
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import licences
import mixer_table
from aligned_text import fenced
from command_line import refuse, words_of
from omegaconf import MISSING

import subquad
from subquad import hookspecs, schema
from subquad.__main__ import VERBS
from subquad.commands.check_plugin import CheckConfig
from subquad.commands.key_help import as_yaml, default_of
from subquad.commands.new_plugin import NewPluginConfig
from subquad.commands.plugins import GROWTH
from subquad.key_meanings import key_meanings
from subquad.registry import Registry, load_registry

ROOT = Path(__file__).resolve().parent.parent
ROOMS: Mapping[str, str] = {
    "rooms/subquad.md": "subquad/README.md",
    "rooms/compiler.md": "subquad/compiler/README.md",
    "rooms/training.md": "subquad/training/README.md",
    "rooms/parallel.md": "subquad/parallel/README.md",
    "rooms/kernels.md": "kernels/README.md",
    "rooms/cost_model.md": "cost_model/README.md",
    "rooms/public_tables.md": "cost_model/public_tables.md",
    "rooms/timed_rows.md": "cost_model/data/README.md",
    "rooms/how_the_cost_model_was_chosen.md": "cost_model/data/how_it_was_chosen.md",
    "rooms/selection.md": "cost_model/subquad_cost_model/selection/README.md",
    "rooms/plugins.md": "plugins/README.md",
    "rooms/conf.md": "conf/README.md",
    "rooms/tests.md": "tests/README.md",
    "rooms/examples.md": "examples/README.md",
}
"""READMEs that are pages of their own."""
INCLUDED: Mapping[str, str] = {
    "data.md": "subquad/training/sources/README.md",
    "evaluation.md": "subquad/training/evaluation/README.md",
    "index.md": "README.md",
    "changes.md": "CHANGELOG.md",
}
"""READMEs that a written page includes."""
MARKUP = re.compile(r"([|*_\[\]])")
INCLUDE = re.compile(
    r'^<!-- include (?P<file>\S+) (?P<how>from|after) "(?P<first>[^"]+)"(?: to "(?P<end>[^"]+)")? -->$', flags=re.M
)
"""How a written page names a passage of a README."""
SECTIONS: Mapping[str, str] = {
    "ModelConfig": "model", "ChannelMixerConfig": "model.channel_mixer", "TokenizerConfig": "tokenizer",
    "TrainerConfig": "trainer", "CheckpointConfig": "checkpoint", "CompilerConfig": "compiler",
    "BudgetConfig": "budget", "RunConfig": "",
}  # fmt: skip
"""The keys below which the dataclasses of a run stand."""
VERB_CONFIGS: Mapping[str, type] = {
    "bench": schema.BenchConfig, "bench models=": schema.DecodingBenchConfig,
    "measure": schema.MeasureConfig, "calibrate": schema.CalibrateConfig,
    "generate": schema.GenerateConfig, "export": schema.ExportConfig, "compare": schema.CompareConfig,
    "evaluate": schema.EvaluateConfig, "proxy": schema.ProxyConfig, "explain module=": schema.ForeignConfig,
    "plugins new NAME": NewPluginConfig, "plugins check NAME": CheckConfig,
}  # fmt: skip
"""What verbs take besides the keys of a run."""


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages (mkdocs calls this)."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Include what the page includes, and let a README that is named be a link (mkdocs calls this)."""
    return linked(included(markdown), page.file.src_uri)


def pages() -> dict[str, str]:
    """Every generated page, by its path."""
    return {path: make() for path, make in PAGES.items()} | {path: room(source) for path, source in ROOMS.items()}


def room(source: str) -> str:
    """A README as a page; the table of mixers stands on one page only."""
    text = (ROOT / source).read_text(encoding="utf-8")
    if mixer_table.BEGIN not in text:
        return text
    before, _, rest = text.partition(mixer_table.BEGIN)
    return f"{before}[The table](../choose_a_mixer.md#what-each-keeps){rest.partition(mixer_table.END)[2]}"


def included(text: str) -> str:
    """A page with the passages of READMEs that it names.  Raises: ValueError when one is not there."""
    return INCLUDE.sub(lambda found: passage(found["file"], found["how"], found["first"], found["end"]), text)


def passage(file: str, how: str, first: str, end: str | None) -> str:
    """The lines of a file `from` (or `after`) the one that starts with `first` up to the one that starts with `end`."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    start = _line(lines, first, file) + (how == "after")
    stop = len(lines) if end is None else _line(lines, end, file)
    if start >= stop:
        raise ValueError(f"{file} has nothing between '{first}' and '{end}'")
    return "\n".join(lines[start:stop]).strip()


def _line(lines: list[str], beginning: str, file: str) -> int:
    found = [number for number, line in enumerate(lines) if line.startswith(beginning)]
    if len(found) != 1:
        raise ValueError(f"{file} has {len(found)} lines that start with '{beginning}', a page includes from one")
    return found[0]


def linked(text: str, page: str) -> str:
    """A page with links to the pages of the READMEs that it names: in code, or as links within the repository."""
    at = {source: path for path, source in (ROOMS | INCLUDED).items()}
    beside = Path((ROOMS | INCLUDED).get(page, "README.md")).parent
    up = "../" * page.count("/")

    def target(named: str) -> str | None:
        for source in (named, str(beside / named)):
            if source in at and at[source] != page:
                return up + at[source]
        return None

    def code(found: re.Match[str]) -> str:
        address = target(found[1])
        return found[0] if address is None else f"[{found[0]}]({address})"

    def link(found: re.Match[str]) -> str:
        return f"]({target(found[1]) or found[1]})"

    text = re.sub(r"\]\(([\w/]+README\.md)\)", link, text)
    return re.sub(r"(?<!\[)`([\w/]*README\.md)`", code, text)


def commands() -> str:
    """Verbs, and the keys of those that have keys of their own."""
    parts = ["# Commands", "`train`, `explain` and `warmup` take the keys of a run: [Configuration](configuration.md)."]
    for verb, summary in VERBS.items():
        said, _, example = summary.partition(": ")
        example = f"`python -m subquad {example}`" if example else ""
        parts.append(f"## {verb}\n\n{said[0].upper()}{said[1:]}. {example}".rstrip())
        for use, kind in VERB_CONFIGS.items():
            if use.split()[0] == verb:
                parts += [f"## {use}"] if use != verb else []
                parts.append(keys_of(kind))
    return "\n\n".join(parts)


def configuration() -> str:
    """Every key of a run, with its default and the comment beside it."""
    said = "`python -m subquad train --cfg job` prints every key as composed, `--info config` where it came from."
    parts = ["# Configuration", said]
    kinds = [schema.RunConfig, *(getattr(schema, name) for name in SECTIONS if name != "RunConfig")]
    for kind in kinds:
        section = SECTIONS[kind.__name__]
        parts += [f"## {section or 'A run'}", described(kind), keys_of(kind, section)]
    registry = load_registry()
    for component in sorted(registry.components.values(), key=lambda spec: (spec.kind, spec.name)):
        parts += [
            f"## {component.kind}={component.name}",
            f"{component.summary[0].upper()}{component.summary[1:]}.",
            keys_of(component.config, component.kind),
        ]
    return "\n\n".join(parts)


def mixers() -> str:
    """Every installed mixer: what it declares, and its keys."""
    registry = load_registry()
    parts = ["# Mixers", "What each of them keeps: [Choose a mixer](../choose_a_mixer.md#what-each-keeps)."]
    for spec in sorted(registry.mixers.values(), key=lambda spec: spec.name):
        growth = f"work {GROWTH[spec.work_growth]}, carry {GROWTH[spec.carry_growth]}"
        operators = ", ".join(f"[`{name}`](operators.md#{name})" for name in spec.operators) or "none"
        parts += [
            f"## {spec.name}",
            f"{spec.summary[0].upper()}{spec.summary[1:]} ({spec.paper}). Grows in t: {growth}. Operators: {operators}."
            f" Comes with {registry.origin(spec)}.",
            keys_of(spec.config),
        ]
    return "\n\n".join(parts)


def operators() -> str:
    """Every operator: its equation, its tolerances and its kernels."""
    registry = load_registry()
    parts = ["# Operators", "How far a kernel may stand from its float64 reference: [Kernels](../rooms/kernels.md)."]
    for operator in sorted(registry.operators.values(), key=lambda operator: operator.name):
        package = operator.definition.partition(":")[0].rpartition(".")[0]
        document = inspect.getdoc(__import__(package, fromlist=["*"]))
        assert document is not None, package
        rows = [
            (f"`{kernel.name}`", ", ".join(sorted(kernel.devices)), ", ".join(kernel.requires) or "-", kernel.origin)
            for kernel in _kernels(registry, operator.name)
        ]
        tolerances = [
            (dtype, f"{limit.output:g}", f"{limit.gradient:g}", _plain(limit.reason))
            for dtype, limit in operator.tolerances.items()
        ]
        parts += [
            f"## {operator.name}",
            fenced(document),
            _table(("kernel", "runs on", "requires", "comes from"), rows),
            _table(("dtype", "outputs", "gradients", "reason"), tolerances),
        ]
    return "\n\n".join(parts)


def hooks() -> str:
    """The questions that plugins answer."""
    names = [name for name in vars(hookspecs) if name.startswith("subquad_provide")]
    said = "What a plugin may implement, each with `@subquad.hookimpl`: [Write a plugin](../write_a_plugin.md)."
    return "\n\n".join(["# Hooks", said, *(f"::: subquad.hookspecs.{name}" for name in names)])


def python() -> str:
    """The public names of `subquad`, from their docstrings."""
    parts = ["# Python interface", fenced(inspect.getdoc(subquad) or "")]
    return "\n\n".join([*parts, *(f"::: subquad.{home(name)}.{name}" for name in subquad.__all__)])


def home(name: str) -> str:
    """The module below `subquad` in which a public name lives."""
    return str(subquad._HOMES[name])


PAGES: Mapping[str, Callable[[], str]] = {
    "reference/commands.md": commands,
    "reference/configuration.md": configuration,
    "reference/mixers.md": mixers,
    "reference/operators.md": operators,
    "reference/hooks.md": hooks,
    "reference/python.md": python,
    "licences.md": licences.page,
}


def described(kind: type) -> str:
    """What a dataclass says of itself."""
    return fenced(inspect.getdoc(kind) or "")


def keys_of(kind: type, section: str = "") -> str:
    """A table of a dataclass's fields, with the comments beside them.

    Fields that are dataclasses have tables of their own.
    """
    rows = [
        (
            f"`{section}.{field.name}`" if section else f"`{field.name}`",
            f"`{field.kind}`",
            f"`{field.default}`",
            _plain(field.says),
        )
        for field in fields_of(kind)
        if not field.nested
    ]
    return _table(("key", "type", "default", "means"), rows) if rows else "It has no keys."


@dataclasses.dataclass(frozen=True)
class Described:
    """A field of a dataclass, and what its source says of it."""

    name: str
    kind: str
    default: str
    says: str
    nested: bool


def fields_of(kind: type) -> Iterator[Described]:
    """The fields of a dataclass and its bases, each with the comments that stand above and beside it."""
    said = key_meanings(kind)
    for field in dataclasses.fields(kind):
        annotation = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
        nested = bool(re.match(r"\w*Config\b", annotation))
        default = default_of(field)
        shown = "required" if default == MISSING else "" if nested else as_yaml(default)
        yield Described(field.name, annotation, shown, said[field.name], nested)


def _kernels(registry: Registry, operator: str) -> Iterator[Any]:
    return (kernel for kernel in registry.kernels.values() if kernel.operator == operator)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _plain(text: str) -> str:
    """Text of a comment as a cell: what is not in backticks means no markup."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else MARKUP.sub(r"\\\1", html.escape(part)) for part in parts)


if __name__ == "__main__":
    (name,), _ = words_of(__doc__, sys.argv[1:], "PAGE")
    known = pages()
    if name not in known:
        refuse(f"there is no page '{name}'; there are {', '.join(known)}")
    print(known[name])
