"""What is aligned in a docstring (equations, `Shapes:`) keeps its columns in Markdown."""

from __future__ import annotations

import re
import textwrap

ALIGNED = re.compile(r"\S {2,}\S|^ +\S", flags=re.M)
"""Two spaces within a line, or a line that is indented: columns that Markdown would run together."""
LABEL = re.compile(r"(?<=[.)`]) {2,}(?=(?:Raises|Shapes):)")
"""Behind the first sentence stands what would else begin a paragraph."""
INLINE = re.compile(r"(?<=\S) {2}(\S+(?: \S+)*) {2}(?=\S)")
"""An equation within a sentence."""


def fenced(text: str) -> str:
    """The text with a code fence around every aligned stretch of a paragraph."""
    return "\n\n".join(_paragraph(paragraph) for paragraph in LABEL.sub("\n\n", text).split("\n\n"))


def _paragraph(paragraph: str) -> str:
    if "\n" not in paragraph:
        paragraph = INLINE.sub(r" `\1` ", paragraph)
    lines = paragraph.splitlines()
    aligned = [number for number, line in enumerate(lines) if ALIGNED.search(line)]
    if not aligned or paragraph.lstrip().startswith("```"):
        return paragraph
    first, last = aligned[0], aligned[-1]
    stretch = textwrap.dedent("\n".join(lines[first : last + 1]))
    parts = ("\n".join(lines[:first]), f"```text\n{stretch}\n```", "\n".join(lines[last + 1 :]))
    return "\n\n".join(part for part in parts if part)
