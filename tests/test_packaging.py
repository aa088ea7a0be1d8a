"""What is in the tree is in the wheels, and installs as one would expect."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

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


def pyproject(folder: str) -> dict[str, dict[str, object]]:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())


@pytest.mark.parametrize("folder", DISTRIBUTIONS)
def test_wheel_holds_every_module_recipe_device_file_and_fit_of_the_tree(folder: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    packages = DISTRIBUTIONS[folder]
    for package in packages:
        shutil.copytree(
            ROOT / folder / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / folder / name, source / name)
    expected = {
        f"{target}/{path.relative_to(source / package)}"
        for package, target in packages.items()
        for path in (source / package).rglob("*")
        if path.suffix in SHIPPED or path.name == "py.typed" or (path.parent.parent.name == "fits" and path.is_file())
    }
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    subprocess.run([*command, str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert any(name.endswith("py.typed") for name in held)


def test_all_distributions_have_one_version() -> None:
    versions = {folder: pyproject(folder)["project"]["version"] for folder in DISTRIBUTIONS}
    assert len(set(versions.values())) == 1, versions


def test_ranges_are_open_and_constraints_are_exact() -> None:
    dependencies = pyproject(".")["project"]["dependencies"]
    assert isinstance(dependencies, list)
    assert "torch>=2.11" in dependencies
    lines = (ROOT / "constraints.txt").read_text().split()
    assert "torch==2.13.0" in lines
    assert all("==" in line for line in lines)
