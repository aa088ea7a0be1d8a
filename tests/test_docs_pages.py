"""The pages of the documentation: their commands run as they stand, their links lead somewhere, nothing is left out."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from tool import tool

import subquad
from subquad import hookspecs, load_config, schema
from subquad.__main__ import VERBS, main
from subquad.registry import load_registry

ROOT = Path(__file__).resolve().parent.parent
DOCS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PROMPT = "$ python -m subquad "
docs_pages = tool("docs_pages")
PATHS = {f"{name}.md" for name in DOCS} | set(docs_pages.PAGES) | set(docs_pages.ROOMS)
"""Of all pages, written and generated."""


@dataclass(frozen=True)
class Shown:
    """A command of a page, and the lines that the page shows below it."""

    arguments: list[str]
    lines: list[str]

    @property
    def fails(self) -> bool:
        return any(re.match(r"\w+Error: ", line) for line in self.lines)


def session(text: str) -> list[Shown]:
    """What a page shows of a terminal: commands behind `$`, and what they print."""
    found: list[Shown] = []
    for block in re.findall(r"```console\n(.*?)```", text, flags=re.S):
        for line in block.splitlines():
            if line.startswith("$"):
                assert line.startswith(PROMPT), line
                found.append(Shown(shlex.split(line)[4:], []))
            else:
                found[-1].lines.append(line)
    return found


def recipes(text: str) -> list[list[str]]:
    """The arguments of commands that the page names but that take a GPU, hours or a folder of the reader's."""
    lines = [line for block in re.findall(r"```\n(.*?)```", text, flags=re.S) for line in block.splitlines()]
    return [shlex.split(line.partition("-m subquad ")[2], comments=True) for line in lines if "-m subquad " in line]


def holds(output: str, line: str) -> bool:
    """Whether the output has this line; dots stand for anything."""
    pattern = re.escape(line).replace(re.escape("..."), ".*")
    return re.search(f"^{pattern}$", output, flags=re.M) is not None


PAGES_WITH_SESSIONS = [name for name, text in DOCS.items() if session(text)]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_WITH_SESSIONS)
def test_the_commands_of_a_page_run_in_their_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for shown in session(DOCS[page]):
        code = main(shown.arguments)
        output = "\n".join(capsys.readouterr())
        assert (code != 0) == shown.fails, f"{shown.arguments}\n{output}"
        assert all(holds(output, line) for line in shown.lines), f"{shown.arguments}\n{output}"


def test_most_guides_have_commands_that_run() -> None:
    assert len(PAGES_WITH_SESSIONS) >= 7


@pytest.mark.parametrize("page", DOCS)
def test_the_commands_of_a_page_compose(page: str) -> None:
    for arguments in [*(shown.arguments for shown in session(DOCS[page]) if not shown.fails), *recipes(DOCS[page])]:
        assert arguments[0] in VERBS, arguments
        if arguments[0] in ("train", "explain", "warmup"):
            overrides = [word for word in arguments[1:] if "=" in word and not word.startswith("html=")]
            overrides = [re.sub(r"^(model=\w+),.*", r"\1", word) for word in overrides]
            assert load_config(overrides).model.num_layers > 0


def test_an_error_is_shown_as_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The cheap ones of the page of troubles; the slow test runs them all."""
    (shown,) = [found for found in session(DOCS["troubleshooting"]) if "trainer.max_stepz=3" in found.arguments]
    assert main(shown.arguments) == 2
    printed = capsys.readouterr().err
    assert all(holds(printed, line) for line in shown.lines)
    assert not holds(printed, "ConfigError: there is no key 'max_steps'")


@pytest.mark.parametrize("page", DOCS)
def test_a_page_includes_what_is_there_and_links_to_pages(page: str) -> None:
    text = docs_pages.linked(docs_pages.included(DOCS[page]), f"{page}.md")
    assert "<!-- include" not in text
    links = re.findall(r"\]\(([\w/.]+\.md)(?:#[\w-]+)?\)", text)
    assert {link for link in links if link not in PATHS} == set()


def test_pages_name_targets_of_make_and_files_that_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    text = "\n".join(DOCS.values())
    assert set(re.findall(r"`make ([\w-]+)`", text)) <= targets
    paths = re.findall(r"`((?:tests|examples|tools|conf|plugins|docs|subquad|kernels|cost_model)/[\w./-]+)`", text)
    assert len(paths) >= 3
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_a_passage_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"README\.md has 0 lines that start with '## Nowhere'"):
        docs_pages.included('<!-- include README.md after "## Nowhere" -->')


def test_a_readme_that_is_named_is_a_link_to_its_page() -> None:
    linked = docs_pages.linked
    assert linked("see `conf/README.md`", "index.md") == "see [`conf/README.md`](rooms/conf.md)"
    assert linked("`compiler/README.md`", "rooms/subquad.md") == "[`compiler/README.md`](../rooms/compiler.md)"
    assert linked("[rows](data/README.md)", "rooms/cost_model.md") == "[rows](../rooms/timed_rows.md)"


def test_every_page_stands_in_the_navigation() -> None:
    named = re.findall(r"^ +- .+: ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(named) == sorted(PATHS)


def test_every_key_stands_in_the_reference() -> None:
    configuration, commands = docs_pages.configuration(), docs_pages.commands()
    for name, section in docs_pages.SECTIONS.items():
        for field in dataclasses.fields(getattr(schema, name)):
            key = f"{section}.{field.name}" if section else field.name
            assert f"| `{key}` |" in configuration or f"## {key}\n" in configuration, key
    kinds = {kind for name, kind in vars(schema).items() if name.endswith("Config")}
    in_sections = {getattr(schema, name) for name in docs_pages.SECTIONS}
    assert kinds - in_sections <= set(docs_pages.VERB_CONFIGS.values())
    for verb, kind in docs_pages.VERB_CONFIGS.items():
        part = commands.partition(f"\n## {verb}\n")[2].partition("\n## ")[0]
        assert all(f"| `{field.name}` |" in part for field in dataclasses.fields(kind)), verb


def test_a_key_has_the_comments_and_the_default_of_the_schema() -> None:
    fields = {field.name: field for field in docs_pages.fields_of(schema.ModelConfig)}
    assert fields["schedule"].says.startswith("keys of `mixers`, repeated")
    assert fields["vocab_size"].default == "0"
    assert fields["init_from"].default == "null"
    row = "| `budget.distance` | `int` | `1` | layers in which any two of them differ at least |"
    assert row in docs_pages.configuration()


def test_every_mixer_operator_hook_and_public_name_stands_in_the_reference() -> None:
    registry = load_registry()
    mixers, operators = docs_pages.mixers(), docs_pages.operators()
    assert all(f"## {name}\n" in mixers for name in registry.mixers)
    assert all(f"## {name}\n" in operators for name in registry.operators)
    hooks = {name for name in dir(hookspecs) if name.startswith("subquad_provide")}
    assert set(re.findall(r"::: subquad\.hookspecs\.(\w+)", docs_pages.hooks())) == hooks
    assert set(re.findall(r"::: [\w.]+\.(\w+)", docs_pages.python())) == set(subquad.__all__)


@pytest.mark.parametrize(
    ("docstring", "markdown"),
    [
        ("A claim.", "A claim."),
        ("A claim.\n\n    y = x\n    z = y\n\nProse.", "A claim.\n\n```text\ny = x\nz = y\n```\n\nProse."),
        ("Shapes:  x: b t d\n         y: b d\nProse.", "```text\nShapes:  x: b t d\n         y: b d\n```\n\nProse."),
        ("A claim.  Raises: ConfigError.", "A claim.\n\nRaises: ConfigError."),
        ("SwiGLU  a(b c)  of width d.", "SwiGLU `a(b c)` of width d."),
    ],
)
def test_columns_of_a_docstring_are_kept(docstring: str, markdown: str) -> None:
    assert tool("aligned_text").fenced(docstring) == markdown
