"""A real bash completes verbs, groups and keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from subquad.__main__ import VERBS
from subquad.commands.check_plugin import CheckConfig
from subquad.component_config import defaults_of
from subquad.schema import (
    BenchConfig,
    CalibrateConfig,
    CompareConfig,
    DecodingBenchConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    MeasureConfig,
    ProxyConfig,
)


def completed(line: str, folder: Path) -> list[str]:
    """What a real bash offers for a line, by calling the function as readline would."""
    (folder / "train").mkdir()  # a path may look like a verb
    program = folder / "train" / "subquad"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m subquad "$@"\n')
    program.chmod(0o755)
    line = line.replace("PROGRAM", str(program))
    script = (
        'eval "$(subquad completion)"\n'
        "complete -p subquad >/dev/null || exit 9\n"
        "COMP_LINE=$1 COMP_POINT=${#1}; COMP_WORDS=($1); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n"
        "_subquad_complete subquad\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    result = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", line],
        env=os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=True, cwd=folder,
    )  # fmt: skip
    assert result.stderr == ""
    return result.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("subquad tr", {"train"}),
        ("subquad ", set(VERBS)),
        ("subquad train model=scout_s", {"model=scout_swa", "model=scout_swa_470m", "model=scout_swa_1_57b"}),
        ("subquad train data=synthetic data.tas", {"data.task="}),
        ("subquad explain model=mamba trainer.max_st", {"trainer.max_steps="}),
        ("PROGRAM train trainer.max_st", {"trainer.max_steps="}),
        ("subquad warmup trainer.max_st", {"trainer.max_steps="}),
        ("subquad bench ker", {"kernels="}),
        ("subquad generate pro", {"prompt=", "prompts="}),
        ("subquad evaluate s", {"suite=", "sizes=", "samples=", "seed="}),
        ("subquad plugins --", {"--json"}),
        ("subquad doctor -", {"--no-checks"}),
    ],
)
def test_bash_completes_verbs_groups_and_keys(line: str, offered: set[str], tmp_path: Path) -> None:
    assert set(completed(line, tmp_path)) == offered


@pytest.mark.parametrize(
    ("verb", "config_classes"),
    [
        ("bench", (BenchConfig, DecodingBenchConfig)),
        ("calibrate", (CalibrateConfig,)),
        ("compare", (CompareConfig,)),
        ("evaluate", (EvaluateConfig,)),
        ("export", (ExportConfig,)),
        ("generate", (GenerateConfig,)),
        ("measure", (MeasureConfig,)),
        ("plugins check mamba", (CheckConfig,)),
        ("proxy", (ProxyConfig,)),
    ],
)
def test_bash_completes_every_key_of_a_verb(verb: str, config_classes: tuple[type, ...], tmp_path: Path) -> None:
    keys = {f"{key}=" for config_class in config_classes for key in defaults_of(config_class)}
    assert set(completed(f"subquad {verb} ", tmp_path)) == keys


def test_bash_completes_every_group_after_a_verb(tmp_path: Path) -> None:
    assert {"model=", "data=", "optimizer=", "seed="} <= set(completed("subquad train ", tmp_path))
