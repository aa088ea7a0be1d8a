"""What is released installs into a clean environment of every Python and torch that is named, and runs there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".", "kernels", "cost_model", "plugins/subquad-scout", "plugins/subquad-ssm", "plugins/subquad-linear")
NAMES = ("subquad", "subquad-kernels", "subquad-cost-model", "subquad-scout", "subquad-ssm", "subquad-linear")
ENVIRONMENTS = (("3.11", "2.13.0"), ("3.12", "2.13.0"), ("3.11", "2.11.0"), ("3.12", "2.12.1"), ("3.12", "2.14.1"))
"""Python and torch. The pinned torch comes with what else is pinned; others bring the triton that they ask for."""
MINUTES_TO_INSTALL = 40

pytestmark = [pytest.mark.release, pytest.mark.slow, pytest.mark.timeout(60 * (MINUTES_TO_INSTALL + 10))]
Run = Callable[..., str]


def interpreter(version: str) -> str:
    """A Python of this version: on the path, or one that pyenv keeps; skips where there is none."""
    kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    for candidate in (shutil.which(f"python{version}"), *map(str, kept)):
        if candidate is None:
            continue
        asked = subprocess.run([candidate, "-c", "import venv"], capture_output=True, check=False)
        if asked.returncode == 0:
            return candidate
    pytest.skip(f"no Python {version} is here")


def ran(*command: str | Path, cwd: Path, minutes: float = 10) -> str:
    """What a command prints, with an environment that knows nothing of this checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": "1", "SUBQUAD_CACHE": str(cwd / "cache")}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False,
        timeout=60 * minutes,
    )  # fmt: skip
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheels of all distributions, each made from its sdist."""
    folder = tmp_path_factory.mktemp("release")
    for number, name in enumerate(FOLDERS):
        source = folder / f"source-{number}"
        leave = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*", "build", "site", "runs", "tests", "plugins")
        shutil.copytree(ROOT / name, source, ignore=leave, symlinks=True)
        ran(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "out", source, cwd=folder)
    made = sorted((folder / "out").glob("*.whl"))
    assert len(made) == len(list((folder / "out").glob("*.tar.gz"))) == len(FOLDERS)
    return made


@pytest.fixture(scope="module", params=ENVIRONMENTS, ids=lambda pair: f"python{pair[0]}-torch{pair[1]}")
def run(request: pytest.FixtureRequest, wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs the interpreter of an environment that holds the wheels and what pip brought for them, and its torch."""
    python, torch = request.param
    folder = tmp_path_factory.mktemp("environment")
    constraints, own = folder / "constraints.txt", folder / "env" / "bin" / "python"
    pins = (ROOT / "constraints.txt").read_text().split()
    if f"torch=={torch}" not in pins:
        pins = [pin for pin in pins if pin.partition("==")[0] not in ("torch", "triton", "setuptools")]
    constraints.write_text("\n".join([*pins, f"torch=={torch}" if f"torch=={torch}" not in pins else ""]))
    ran(interpreter(python), "-m", "venv", folder / "env", cwd=folder)
    ours = [f"{wheel}[train,triton]" if wheel.name.startswith("subquad-") else str(wheel) for wheel in wheels]
    install = (own, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-c", constraints, f"torch=={torch}", *ours)
    ran(*install, cwd=folder, minutes=MINUTES_TO_INSTALL)
    yield lambda *arguments: ran(own, *arguments, cwd=folder)
    shutil.rmtree(folder)  # gigabytes


def test_it_installs_without_conflicts_and_runs_what_was_asked_for(run: Run, request: pytest.FixtureRequest) -> None:
    assert "No broken requirements found" in run("-m", "pip", "check")
    python, torch = request.node.callspec.params["run"]
    assert run("-c", "import torch; print(torch.__version__)").startswith(torch)
    assert run("--version").startswith(f"Python {python}.")
    assert str(ROOT) not in run(
        "-c", "import subquad, subquad_kernels; print(subquad.__file__, subquad_kernels.__file__)"
    )


def test_every_plugin_is_there_and_every_recipe_is_shipped(run: Run) -> None:
    listed = json.loads(run("-m", "subquad", "plugins", "--json"))
    assert {plugin["distribution"] for plugin in listed["plugins"]} <= set(NAMES)
    assert {plugin["name"] for plugin in listed["plugins"]} == {"builtin", "scout", "ssm", "linear"}
    for recipe in ("scout_mamba", "mamba2_370m", "gated_delta_net_hybrid"):
        assert "num_layers" in run("-m", "subquad", "train", f"model={recipe}", "--cfg", "job")


def test_every_kernel_that_runs_here_agrees_with_its_reference(run: Run) -> None:
    assert "all is well" in run("-m", "subquad", "doctor")


def test_a_run_trains_resumes_generates_and_is_judged(run: Run) -> None:
    smoke = ("trainer=smoke", "data=synthetic", "data.task=copying", "data.sizes=[4]", "run_dir=run")
    assert "validation loss" in run("-m", "subquad", "train", *smoke)
    assert "after step 7" in run("-m", "subquad", "train", "resume=run", "trainer.max_steps=7")
    assert "copying, step 7" in run("-m", "subquad", "evaluate", "run=run")
    run("-m", "subquad", "export", "run=run", "out=exported")
    assert run("-c", "import subquad; print(type(subquad.load_model('exported')).__name__)").strip() == "LanguageModel"
