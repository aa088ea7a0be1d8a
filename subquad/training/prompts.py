"""A file of prompts: a text a line, or JSON objects a line (`.jsonl`) with a `prompt` each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subquad.errors import ConfigError, DataError

WRITTEN = ("index", "prompt", "text", "num_tokens", "ending", "carry_bytes")
"""The keys of a result; an object of a prompts file may have any others, which its result repeats."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and what else its line says."""

    text: str
    others: dict[str, Any] = field(default_factory=dict)


def read_prompts(file: str) -> list[Prompt]:
    """The prompts of a file, in order; blank lines are passed over.  Raises: DataError that names the line."""
    path = Path(file).expanduser()
    try:
        # Not splitlines: a text may hold U+2028, as it stands in JSON.
        lines = [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8").split("\n")]
    except OSError as error:
        raise DataError(
            what=f"{path} cannot be read: {error.strerror}", where=f"prompts={file}", mend="name a readable file"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            what=f"{path} is not UTF-8 at byte {error.start}", where=f"prompts={file}", mend="convert it to UTF-8"
        ) from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(what=f"{path} holds no prompt", where=f"prompts={file}", mend="write a prompt a line")
    if path.suffix != ".jsonl":
        return [Prompt(line) for _, line in numbered]
    return [_of_json(line, f"{path}, line {number}") for number, line in numbered]


def open_results(file: str) -> Path:
    """The path of a file of results, which must be new.  Raises: ConfigError."""
    path = Path(file).expanduser()
    try:
        path.open("x", encoding="utf-8").close()
    except OSError as error:
        raise ConfigError(
            what=f"{path} cannot be begun: {error.strerror}", where=f"out={file}", mend="name a new file"
        ) from None
    return path


def _of_json(line: str, where: str) -> Prompt:
    mend = 'write objects such as {"prompt": "def "}, one a line'
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(what=f"this is no JSON: {error}", where=where, mend=mend) from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise DataError(what="this is no object with a text under 'prompt'", where=where, mend=mend)
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(
            what="an escape is half of a pair (U+D800 to U+DFFF) and no text", where=where, mend="write both halves"
        ) from None
    others = {key: value for key, value in values.items() if key != "prompt"}
    taken = sorted(set(others) & set(WRITTEN))
    if taken:
        raise DataError(
            what=f"the key '{taken[0]}' is one that results have themselves", where=where, mend="name it otherwise"
        )
    return Prompt(values["prompt"], others)
