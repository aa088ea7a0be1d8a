"""The examples run as their READMEs say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HOOKS = ("05_operator_and_kernel", "06_kernel_for_one_gpu", "07_adapter_and_pass", "08_data_and_optimizer")
"""The examples of all that a plugin can add besides a mixer."""
TAKES_SECONDS = "compiles_without_graph_breaks or run_with_both_learns"


@pytest.fixture(scope="module")
def gated_conv_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The third-party plugin, built and installed into a folder of its own."""
    root = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLES / "02_write_a_plugin", root / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(root / "site"), str(root / "source")], check=True, capture_output=True)
    return root / "site"


@pytest.fixture(scope="module")
def hooks_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The other plugins, installed by writing what an installer would write."""
    site = tmp_path_factory.mktemp("hooks")
    for name in HOOKS:
        project = tomllib.loads((EXAMPLES / name / "pyproject.toml").read_text())
        contents = project["tool"]["setuptools"]
        for package in contents.get("packages", ()):
            shutil.copytree(EXAMPLES / name / package, site / package)
        for module in contents.get("py-modules", ()):
            shutil.copy(EXAMPLES / name / f"{module}.py", site)
        distribution, version = project["project"]["name"], project["project"]["version"]
        metadata = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        entries = project["project"]["entry-points"]["subquad"].items()
        lines = ["[subquad]", *(f"{entry} = {module}" for entry, module in entries)]
        (metadata / "entry_points.txt").write_text("\n".join(lines))
    return site


def run(arguments: list[str], site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "SUBQUAD_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_example_plugin_is_listed_with_its_distribution(gated_conv_path: Path, tmp_path: Path) -> None:
    result = run(["subquad", "plugins", "--json"], gated_conv_path, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "subquad-gated-conv" in json.dumps(json.loads(result.stdout))


@pytest.mark.slow
def test_the_example_plugin_trains(gated_conv_path: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n\n" * 400)
    overrides = [
        "model=transformer", "+mixer@model.mixers.gated_conv=gated_conv", "model.d_model=32", "model.num_layers=2",
        "model.schedule=[gated_conv,softmax_attention]", "data=text_files", f"data.files=[{corpus}]",
        "trainer.max_steps=3", "trainer.seq_len=32", "trainer.batch_size=2", "trainer.progress_bar=false",
        "compiler.measure=false", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    result = run(["subquad", "train", *overrides], gated_conv_path, tmp_path)
    assert result.returncode == 0, result.stderr
    plan = (tmp_path / "run" / "plan.json").read_text()
    assert "gated_conv" in plan
    assert "causal_conv" in plan


def test_the_example_plugins_own_tests_pass(gated_conv_path: Path, tmp_path: Path) -> None:
    """Among them that it is discovered under its name."""
    tests = EXAMPLES / "02_write_a_plugin" / "test_gated_conv.py"
    arguments = ["pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tests)]
    result = run(arguments, gated_conv_path, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "selected", [f"not ({TAKES_SECONDS})", pytest.param(TAKES_SECONDS, marks=pytest.mark.slow)], ids=["fast", "slow"]
)
def test_the_own_tests_of_every_other_plugin_pass(selected: str, hooks_path: Path, tmp_path: Path) -> None:
    folders = [str(EXAMPLES / name) for name in HOOKS]
    arguments = ["pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-k", selected]
    result = run([*arguments, *folders], hooks_path, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", HOOKS)
def test_an_example_builds_into_a_wheel_that_holds_what_it_needs(name: str, hooks_path: Path, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / name, tmp_path / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    site = tmp_path / "site"
    subprocess.run([*command, "--target", str(site), str(tmp_path / "source")], check=True, capture_output=True)
    modules = {str(path.relative_to(site)) for path in site.rglob("*.py")}
    assert modules
    assert modules <= {str(path.relative_to(hooks_path)) for path in hooks_path.rglob("*.py")}
    listed = run(["subquad", "plugins", "--json"], site, tmp_path)
    distribution = tomllib.loads((EXAMPLES / name / "pyproject.toml").read_text())["project"]["name"]
    assert distribution in {plugin["distribution"] for plugin in json.loads(listed.stdout)["plugins"]}


def test_a_foreign_model_compiles_as_the_example_says(tmp_path: Path) -> None:
    environment = os.environ | {"SUBQUAD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "04_compile_your_own_model.py")]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "ms as written" in result.stdout  # whichever way is faster here
    assert "outputs differ by" in result.stdout
