"""Keys in a help text: defaults, and the meanings that stand in the schema, wrapped to the terminal."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from omegaconf import MISSING

from subquad.contracts import ComponentKind
from subquad.key_meanings import key_meanings, section_meaning
from subquad.registry import Registry
from subquad.schema import ModelConfig, RunConfig

WIDTH = (60, 120)
"""Columns that a help text has at least, and at most."""
LONGEST_KEY = 44
"""Columns of `key: value` up to which comments stand in one column."""
COMPONENTS: tuple[ComponentKind, ...] = ("data", "optimizer")


def terminal_width() -> int:
    """Columns of the terminal (or `COLUMNS`), within what reads well."""
    least, most = WIDTH
    return min(max(shutil.get_terminal_size((most, 24)).columns, least), most)


def keys_in_help(config_class: type) -> str:
    """One entry a key: what it means, and its default."""
    said = key_meanings(config_class)
    column = max(map(len, said)) + 4
    entries = []
    for field in dataclasses.fields(config_class):
        default = default_of(field)
        ending = "must be given" if default == MISSING else f"default {as_yaml(default)}"
        entries.append(
            textwrap.fill(
                f"{said[field.name]} ({ending})".lstrip(),
                terminal_width(),
                initial_indent=f"  {field.name}".ljust(column),
                subsequent_indent=" " * column,
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    return "\n".join(entries)


def run_in_help(composed: Mapping[str, Any], registry: Registry) -> str:
    """A composed run as YAML, with the meaning of every key as a comment behind it."""
    return "\n".join(_section(composed, RunConfig, "", registry))


def default_of(field: dataclasses.Field[Any]) -> object:
    """What a field of a dataclass is when it is not given; `???`, OmegaConf's word, when it must be."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING if field.default is dataclasses.MISSING else field.default


def as_yaml(value: object) -> str:
    """A value as one types it behind `key=`."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _section(values: Mapping[str, Any], config_class: type, indent: str, registry: Registry) -> Iterator[str]:
    """The lines of a mapping whose keys a dataclass declares; nested ones follow their heading."""
    said = key_meanings(config_class)
    plain: list[tuple[str, str]] = []
    for key, value in values.items():
        below = _below(key, value, config_class, said.get(key, ""), indent + "  ", registry)
        if below is None:
            plain.append((f"{indent}{key}: {as_yaml(value)}", said.get(key, "")))
        else:
            yield from _beside(plain)
            plain = []
            yield from below
    yield from _beside(plain)


def _below(
    key: str, value: object, config_class: type, meaning: str, indent: str, registry: Registry
) -> list[str] | None:
    """The lines of a key whose value is a mapping with declared keys of its own, else None."""
    if not isinstance(value, Mapping) or not value:
        return None
    head = f"{indent[2:]}{key}:"
    if config_class is RunConfig and key in COMPONENTS:
        component = registry.component(key, str(value.get("name")), where=f"{key}.name")
        own = _named("name", value, component.summary, component.config, indent)
        return [*_beside([(head, meaning)]), *own]
    if config_class is ModelConfig and key == "mixers":
        entries = [line for name, entry in value.items() for line in _entry(name, entry, indent, registry)]
        return [*_beside([(head, meaning)]), *entries]
    kind = _nested(config_class, key)
    if kind is None:
        return None
    return [*_beside([(head, meaning or section_meaning(kind))]), *_section(value, kind, indent, registry)]


def _entry(name: str, entry: object, indent: str, registry: Registry) -> list[str]:
    """The lines of an entry of `model.mixers`."""
    if not isinstance(entry, Mapping) or "mixer" not in entry:  # a run would refuse it
        return [f"{indent}{name}: {as_yaml(entry)}"]
    spec = registry.mixer(str(entry["mixer"]), where=f"model.mixers.{name}.mixer")
    summary = f"{spec.summary}; {spec.paper}"
    return [f"{indent}{name}:", *_named("mixer", entry, summary, spec.config, indent + "  ")]


def _named(key: str, values: Mapping[str, Any], summary: str, config_class: type, indent: str) -> list[str]:
    """The lines of what a registry key names, and below it its own keys."""
    rest = {name: value for name, value in values.items() if name != key}
    said = key_meanings(config_class) | {"channel_mixer": "the channel mixer of this entry's blocks; null: none"}
    rows = [(f"{indent}{key}: {as_yaml(values[key])}", summary)]
    rows += [(f"{indent}{name}: {as_yaml(value)}", said.get(name, "")) for name, value in rest.items()]
    return _beside(rows)


def _nested(config_class: type, key: str) -> type | None:
    """The dataclass of a field that is one."""
    for field in dataclasses.fields(config_class):
        if field.name == key and dataclasses.is_dataclass(default := default_of(field)):
            return type(default)
    return None


def _beside(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lines with their comments in one column; what does not fit goes on below, and behind a long value all of it."""
    column = max((len(text) for text, _ in rows if len(text) <= LONGEST_KEY), default=0) + 2
    lines = []
    for text, meaning in rows:
        width = max(terminal_width() - column - 2, 30)
        comments = textwrap.wrap(meaning, width, break_long_words=False, break_on_hyphens=False)
        if comments and len(text) <= LONGEST_KEY:
            lines.append(f"{text:<{column}}# {comments.pop(0)}")
        else:
            lines.append(text)
        lines += [f"{'':<{column}}# {comment}" for comment in comments]
    return lines
