"""A package outside of the repository, from its wheel in a fresh environment, is a mixer like any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    ".": ("subquad", "conf"),
    "kernels": ("subquad_kernels",),
    "cost_model": ("subquad_cost_model",),
    "plugins/subquad-ssm": ("subquad_ssm",),
}
Python = Callable[..., str]

AUTO = [
    "model=swift", "+mixer@model.mixers.softmax_attention=softmax_attention",
    "model.mixers.softmax_attention.num_heads=2", "model.d_model=32", "model.num_layers=2",
    "model.channel_mixer.d_hidden=32", "model.schedule=[auto]", "model.candidates=[softmax_attention,swift]",
]  # fmt: skip
SMALL = [
    "data=text_files", "data.files=[corpus.txt]", "trainer.max_steps=2", "trainer.seq_len=64", "trainer.batch_size=2",
    "trainer.accelerator=cpu", "trainer.progress_bar=false", "compiler.measure=false",
]  # fmt: skip
PLANT = """
import sys
from pathlib import Path
from subquad import load_config
from subquad.compiler.quality.table import QualityTable

model = load_config(sys.argv[1:]).model
loss = ({"swift": 0.0, "softmax_attention": 1.0}, {"swift": 1.0, "softmax_attention": 0.0})
table = QualityTable(proxy="planted", origin="a test", loss=loss, mixers=model.mixers, d_model=model.d_model)
table.save(Path("quality.json"))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Python:
    """Runs the interpreter of an environment with our wheels and theirs, far from the checkout; returns its output."""
    root = tmp_path_factory.mktemp("fresh")
    wheels, work = root / "wheels", root / "work"
    work.mkdir()
    sources = [_source(folder, root / f"source-{number}") for number, folder in enumerate(PARTS)]
    command = [sys.executable, "-m", "subquad", "plugins", "new", "swift", f"into={root}"]
    subprocess.run(command, check=True, capture_output=True)
    sources.append(root / "subquad-swift")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    subprocess.run([*build, str(wheels), *map(str, sources)], check=True, capture_output=True)

    venv.create(root / "env", with_pip=False)
    interpreter = root / "env" / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(interpreter),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, *map(str, wheels.glob("*.whl"))], check=True, capture_output=True)
    (site,) = (root / "env" / "lib").glob("python*/site-packages")
    # torch and the rest come from here; what is installed there stands before them.
    (site / "rest.pth").write_text(sysconfig.get_paths()["purelib"])

    words = "the quick brown fox jumps over the lazy dog\n\n"
    (work / "corpus.txt").write_text(words * 400)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "SUBQUAD_CACHE": str(root / "cache")}

    def run(*arguments: str) -> str:
        result = subprocess.run(
            [str(interpreter), *arguments], cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    subprocess.run([str(interpreter), "-c", PLANT, *AUTO], cwd=work, env=environment, check=True)
    return run


def _source(folder: str, target: Path) -> Path:
    """A copy to build from: building writes beside the source."""
    for package in PARTS[folder]:
        shutil.copytree(ROOT / folder / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / folder / name, target / name)
    return target


def schedule_of(python: Python, run_dir: str) -> list[str]:
    text = python("-c", f"print(open('{run_dir}/plan.json').read())")
    return list(json.loads(text)["schedule"])


@pytest.mark.slow
def test_the_code_that_runs_is_that_of_the_wheels(python: Python) -> None:
    files = python("-c", "import subquad, subquad_kernels, subquad_swift as s; print(subquad.__file__, s.__file__)")
    assert str(ROOT) not in files
    listed = json.loads(python("-m", "subquad", "plugins", "--json"))
    (swift,) = [plugin for plugin in listed["plugins"] if plugin["name"] == "swift"]
    assert (swift["distribution"], swift["version"]) == ("subquad-swift", "0.1.0")


@pytest.mark.slow
def test_it_trains_by_its_name(python: Python) -> None:
    small = ["model.d_model=32", "model.num_layers=1", *SMALL]
    assert "validation loss" in python("-m", "subquad", "train", "model=swift", *small, "run_dir=own")
    assert schedule_of(python, "own") == ["swift"]


@pytest.mark.slow
def test_explain_shows_it(python: Python) -> None:
    shown = python("-m", "subquad", "explain", "model=swift", "compiler.measure=false", "target=h100")
    assert "linear_attention  in swift.packed, layer 0,1,2,3" in shown


@pytest.mark.slow
def test_an_open_layer_gets_it_where_it_wins_and_only_there(python: Python) -> None:
    python("-m", "subquad", "train", *AUTO, *SMALL, "budget.quality=quality.json", "run_dir=by_quality")
    assert schedule_of(python, "by_quality") == ["swift", "softmax_attention"]
    python("-m", "subquad", "train", *AUTO, *SMALL, "run_dir=by_order")
    assert schedule_of(python, "by_order") == ["softmax_attention", "softmax_attention"]


@pytest.mark.slow
def test_an_open_layer_gets_it_where_its_carry_is_what_a_budget_allows(python: Python) -> None:
    long = [*AUTO, "trainer.seq_len=4096", "target=h100", "compiler.measure=false", "budget.quality=quality.json"]
    free = python("-m", "subquad", "explain", *long)
    assert "swift.packed, layer 0\n" in free
    bound = python("-m", "subquad", "explain", *long, "budget.carry_bytes=100000")
    assert "swift.packed, layer 0,1\n" in bound
    assert "softmax_attention loses 1 less, and here alone exceeds carry_bytes by" in bound
