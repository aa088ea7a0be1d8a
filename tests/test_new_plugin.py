"""What `plugins new` writes is a distribution: it installs, it is found, and its own tests pass as written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from subquad.__main__ import main
from subquad.commands.new_plugin import write_plugin
from subquad.errors import ConfigError


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The package as written, and a folder it was installed into without network."""
    root = tmp_path_factory.mktemp("new-plugin")
    package, site = write_plugin("long_ago", root), root / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(package)], check=True, capture_output=True)
    return package, site


def run(arguments: list[str], site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )


def test_a_new_plugins_own_tests_pass_as_written(installed: tuple[Path, Path]) -> None:
    package, site = installed
    result = run(["pytest", "-q", "-W", "error", "-p", "no:cacheprovider"], site, package)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout


def test_a_new_plugins_recipe_trains(installed: tuple[Path, Path], tmp_path: Path) -> None:
    _, site = installed
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 400)
    overrides = [
        "model=long_ago", "model.d_model=32", "model.num_layers=1", "data=text_files", "data.files=[corpus.txt]",
        "trainer.max_steps=2", "trainer.seq_len=32", "trainer.batch_size=2", "trainer.progress_bar=false",
        "compiler.measure=false", "run_dir=run",
    ]  # fmt: skip
    result = run(["subquad", "train", *overrides], site, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "linear_attention" in (tmp_path / "run" / "plan.json").read_text()


@pytest.mark.slow
def test_a_new_plugin_is_listed_and_keeps_every_promise_by_the_command_that_its_readme_names(
    installed: tuple[Path, Path], tmp_path: Path
) -> None:
    package, site = installed
    assert "subquad-long-ago 0.1.0" in run(["subquad", "plugins"], site, tmp_path).stdout
    assert "python -m subquad plugins check long_ago" in (package / "README.md").read_text()
    result = run(["subquad", "plugins", "check", "subquad-long-ago", "json=verdict.json"], site, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (verdict,) = json.loads((tmp_path / "verdict.json").read_text())["verdicts"]
    assert verdict["name"] == "long_ago"
    assert all(promise["kept"] for promise in verdict["promises"])


def test_a_new_plugin_has_nothing_for_a_linter_to_say(installed: tuple[Path, Path]) -> None:
    package, _ = installed
    own = ["--isolated", "--line-length", "120", "--select", "E,F,I,B,UP,SIM,RUF,PT,TID"]
    for command in (["check", "--no-cache", *own], ["format", "--no-cache", "--diff", *own[:3]]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=package, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_nothing_of_a_template_is_left_unfilled(installed: tuple[Path, Path]) -> None:
    package, _ = installed
    for file in package.rglob("*"):
        assert "__mixer__" not in file.name
        assert file.suffix != ".tmpl"
        if file.is_file() and file.suffix in {".py", ".toml", ".md", ".yaml"}:
            assert "{{" not in file.read_text(), file


@pytest.mark.parametrize("name", ["Upper", "1st", "with-dash", "class", "../escape", ""])
def test_a_name_that_cannot_be_a_mixers_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be the name"):
        write_plugin(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_taken_is_refused_with_its_owner(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'window' already \(subquad "):
        write_plugin("window", tmp_path)


def test_what_is_printed_names_the_files_to_change_and_what_to_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "new", "ages_ago", f"into={tmp_path}"]) == 0
    shown, folder = capsys.readouterr().out, tmp_path / "subquad-ages-ago"
    assert shown.startswith(f"wrote {folder}: ")
    package = re.search(r"change (\S+)/mixer\.py", shown)
    assert package is not None
    assert all((folder / package[1] / name).is_file() for name in ("mixer.py", "config.py", "plugin.py"))
    for line in (f"cd {folder}", "plugins check ages_ago", "train model=ages_ago trainer=smoke"):
        assert line in shown


def test_a_folder_that_exists_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "subquad-mine").mkdir()
    assert main(["plugins", "new", "mine", f"into={tmp_path}"]) == 2
    assert "exists" in capsys.readouterr().err
    assert not list((tmp_path / "subquad-mine").iterdir())
