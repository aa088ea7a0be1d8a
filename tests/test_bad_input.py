"""Whatever a user may get wrong is said in three lines: what, where, how to mend; and nothing is written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from subquad.__main__ import main
from subquad.registry import Registry, load_registry

TINY = [
    "data=text_files", "data.files=[corpus.txt]", "trainer=smoke", "trainer.seq_len=16", "trainer.progress_bar=false",
    "compiler=constant", "run_dir=run",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a corpus; whatever else appears in it was written by the command."""
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 40)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (tmp_path / "device.json").write_text("{}")
    return tmp_path


def refused(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a verb that must be refused, and return what it said after checking its form."""
    before = sorted(folder.rglob("*"))
    code = main(arguments)
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    # A machine is probed once, and that is said, before the first plan for it.
    what, where, mend = (line for line in said.splitlines() if not line.startswith("probing "))
    assert re.match(r"\w+Error: \S", what), what
    assert re.match(r"  where   \S", where), where
    assert re.match(r"  mend    \S", mend), mend
    assert sorted(folder.rglob("*")) == before, "something was written"
    return said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model=gpt5"], ["gpt5", "scout_mamba"]),
        (["model=scout_mmba"], ["did you mean 'scout_mamba'?"]),
        (["model.mixers.mamba.mixer=mmba"], ["no mixer", "did you mean 'mamba'?"]),
        (["+mixer@model.mixers.x=widnow"], ["no mixer", "did you mean 'window'?"]),
        (["kernel.softmax_attention=flash9"], ["flash9", "sdpa_flash"]),
        (["kernel.softmx=reference"], ["softmx"]),
        (["deny=[nope]"], ["nope", "deny[0]"]),
        (["trainer.max_stps=1"], ["trainer.max_stps", "did you mean 'max_steps'?"]),
        (["model.mixers.mamba.stat_dim=1"], ["model.mixers.mamba.stat_dim", "did you mean 'state_dim'?"]),
        (["trainer.max_steps=soon"], ["trainer.max_steps", "soon"]),
        (["trainer.max_steps=1.5"], ["trainer.max_steps"]),
        (["model.d_model=null"], ["model.d_model"]),
        (["model.mixers.mamba.expand=[1]"], ["model.mixers.mamba"]),
        (["optimizer.lr=-1"], ["lr is -1"]),
        (["model.mixers.segment_attention.segment_len=0"], ["segment_len is 0", "model.mixers.segment_attention"]),
        (["model.mixers.segment_attention.segment_len=root"], ["sqrt"]),
        (["+data._target_=os.system"], ["os.system", "data._target_"]),
        (["callbacks=[{_target_:subprocess.run}]"], ["subprocess.run", "callbacks[0]._target_"]),
        (["+hydra.callbacks.x._target_=os.system"], ["os.system", "hydra.callbacks.x._target_"]),
        (["hydra/launcher=slurmy"], ["slurmy", "basic"]),
        (["--config-dir", "gone"], ["gone"]),
        (["--config-name", "gone"], ["gone"]),
        (["--frobnicate"], ["--frobnicate"]),
        (["--run", "--multirun"], ["exclude"]),
        (["model=mamba,transformer"], ["--multirun"]),
        (["seed=${nowhere}"], ["nowhere"]),
        (["oops"], ["oops", "key=value"]),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused(
    arguments: list[str], expected: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["train", *arguments], folder, capsys)
    for text in expected:
        assert text in said


@pytest.mark.parametrize(
    ("mode", "recipe", "where"),
    [
        ("--run", "hydra: {job_logging: {formatters: {x: {'()': os.system}}}}", "hydra.job_logging.formatters.x.()"),
        ("--run", "hydra: {callbacks: {x: {_target_: os.system}}}", "hydra.callbacks.x._target_"),
        ("--multirun", "hydra: {callbacks: {x: {_target_: os.system}}}", "hydra.callbacks.x._target_"),
        ("--run", "model: {mixers: {mamba: {_target_: os.system}}}", "model.mixers.mamba._target_"),
    ],
)
def test_a_strangers_recipe_that_names_code_is_refused_before_anything_is_built(
    mode: str, recipe: str, where: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{recipe}\n")
    said = refused(["train", mode, "--config-dir", "conf", "experiment=theirs"], folder, capsys)
    assert "os.system" in said
    assert where in said


@pytest.mark.parametrize("verb", ["train", "explain"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model.mixers.softmax_attention.num_heads=5"], ["model.mixers.softmax_attention", "5"]),
        (["model.mixers.softmax_attention.num_kv_heads=3"], ["model.mixers.softmax_attention", "num_kv_heads"]),
        (["target=z9"], ["z9", "target"]),
        (["target=device.json"], ["device.json"]),
        (["model.schedule=[]"], ["model.schedule"]),
    ],
    ids=str,
)
def test_a_model_or_target_that_cannot_be_is_refused(
    verb: str, arguments: list[str], expected: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused([verb, "model=transformer", *TINY, *arguments], folder, capsys)
    for text in expected:
        assert text in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["target=l40s"], ["L40S"]),
        (["data.files=[gone.txt]"], ["gone.txt"]),
        (["data.files=[empty.txt]"], ["empty.txt"]),
        (["data.files=[latin.txt]"], ["latin.txt"]),
        (["trainer.seq_len=100000"], ["seq_len"]),
        (["tokenizer=file"], ["tokenizer.file"]),
        (["tokenizer=file", "tokenizer.file=gone.json"], ["gone.json"]),
        (["resume=gone"], ["gone"]),
        (["plan=gone.json"], ["gone.json"]),
        (["tracking=wandbb"], ["tracking"]),
        (["trainer.precision=half"], ["trainer.precision"]),
        (["trainer.strategy=magic"], ["trainer.strategy"]),
        (["compiler.estimator=guess"], ["compiler.estimator"]),
        (["run_dir=corpus.txt/run"], ["run_dir", "corpus.txt"]),
        (["model.mixers.softmax_attention.head_dim=7"], ["head_dim"]),
    ],
    ids=str,
)
def test_a_run_that_cannot_start_is_refused(
    arguments: list[str], expected: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["train", "model=transformer", *TINY, *arguments], folder, capsys)
    for text in expected:
        assert text in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_run_folder_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "locked").mkdir(mode=0o555)
    said = refused(["train", "model=transformer", *TINY, "run_dir=locked/run"], folder, capsys)
    assert "locked" in said


@pytest.mark.parametrize(
    ("group", "mixer", "distribution"),
    [("scout", "segment_attention", "subquad-scout"), ("ssm", "mamba", "subquad-ssm")],
)
def test_a_recipe_whose_plugin_is_missing_names_the_pip_command(
    group: str,
    mixer: str,
    distribution: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from importlib.metadata import entry_points

    from subquad.commands import hydra_verb
    from subquad.registry import ENTRY_POINT_GROUP, build_registry

    installed = [entry for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name != group]
    partial: Registry = build_registry(installed)
    assert mixer in load_registry().mixers
    monkeypatch.setattr(hydra_verb, "load_registry", lambda: partial)
    said = refused(["train", "model=scout_mamba"], folder, capsys)
    assert f"no mixer is called '{mixer}'" in said
    assert f"pip install {distribution}" in said


def test_the_process_ends_with_2_and_no_traceback(folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "subquad", "train", "model=nope"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 3
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.txt", "device.json", "empty.txt", "latin.txt"]
