"""What a key means: the comment beside it where its dataclass declares it. `--help` and the reference read it there."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator

MARKS = ("# type:", "# noqa", "# fmt:")
"""Comments that speak to tools."""


def key_meanings(config_class: type) -> dict[str, str]:
    """By key of a config dataclass, the comments above and beside its field; "" where there are none.

    A field that a class declares anew without a comment keeps what its base says. A class that was made at run time has
    no source to read, and says nothing.
    """
    said = {field.name: "" for field in dataclasses.fields(config_class)}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            said |= {key: meaning for key, meaning in _own_meanings(base) if meaning}
    return said


def section_meaning(config_class: type) -> str:
    """The first paragraph of what a config dataclass says of itself, on one line."""
    return " ".join((inspect.getdoc(config_class) or "").partition("\n\n")[0].split())


def _own_meanings(config_class: type) -> Iterator[tuple[str, str]]:
    try:
        source = textwrap.dedent(inspect.getsource(config_class))
    except (OSError, TypeError):  # made at run time
        return
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith(MARKS)
    }
    lines = source.splitlines()
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above: list[str] = []
        line = node.lineno - 1
        while line in comments and lines[line - 1].lstrip().startswith("#"):
            above.insert(0, comments[line])
            line -= 1
        last = node.end_lineno or node.lineno
        beside = [comments[line] for line in range(node.lineno, last + 1) if line in comments]
        yield node.target.id, "; ".join([*above, *beside])
