"""Two plans side by side: what differs is said, what does the same is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from subquad.__main__ import main
from subquad.compiler.explain import explained_plan
from subquad.compiler.plan import Plan
from subquad.compiler.plan_diff import plan_diff
from subquad.schema import CompilerConfig, ModelConfig, RunConfig, TrainerConfig


def plan(*schedule: str, target: str = "h100", seq_len: int = 64) -> Plan:
    return explained_plan(
        RunConfig(
            model=ModelConfig(
                d_model=32,
                num_layers=len(schedule),
                schedule=list(schedule),
                mixers={
                    "window": {"mixer": "window", "num_heads": 2, "window": 8},
                    "mamba": {"mixer": "mamba", "state_dim": 4},
                },
                candidates=["window", "mamba"],
            ),
            data={"name": "python_source"},
            trainer=TrainerConfig(batch_size=2, seq_len=seq_len),
            compiler=CompilerConfig(measure=False),
            target=target,
        )
    )


@pytest.fixture(scope="module")
def base() -> Plan:
    return plan("window", "auto")


def test_a_plan_does_what_it_does(base: Plan) -> None:
    assert plan_diff(base, base) == []


def test_other_figures_alone_are_no_difference(base: Plan) -> None:
    slower = tuple(
        replace(choice, figures=tuple(replace(figure, seconds=2 * figure.seconds) for figure in choice.figures))
        for choice in base.choices
    )
    assert plan_diff(base, replace(base, choices=slower)) == []


def test_another_device_version_length_mixer_and_kernel_are_named(base: Plan) -> None:
    assert f"target  {base.target} -> NVIDIA L40S" in plan_diff(base, replace(base, target="NVIDIA L40S"))
    newer = replace(base, versions={**base.versions, "torch": "9.9"})
    assert any(line.startswith("version torch") and line.endswith("-> 9.9") for line in plan_diff(base, newer))
    assert "example tokens_shape [2, 64] -> [2, 128]" in plan_diff(base, plan("window", "auto", seq_len=128))
    lines = plan_diff(base, plan("window", "mamba"))
    assert "layer   1 window -> mamba" in lines[0]
    assert not any(line.startswith("kernel") and "window" in line for line in lines)
    (first, *rest) = [choice for choice in base.choices if choice.used]
    other = replace(base, choices=(replace(first, chosen="another", kernel_version="abc"), *rest))
    (line, _) = plan_diff(base, other)
    assert f"layer {first.layer} window.packed {first.operator}: {first.chosen} of {first.kernel_version}" in line
    assert "-> another of abc" in line


def test_losses_are_shown_where_both_plans_chose_the_layer(base: Plan) -> None:
    assert base.assignment is not None
    other = replace(
        base,
        schedule=("window", "mamba"),
        assignment=replace(base.assignment, schedule=("window", "mamba")),
    )
    assert plan_diff(base, other)[0] == "layer   1 window -> mamba (loss 0 -> 1)"


def test_the_command_compares_files_and_run_folders(
    base: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    base.save(tmp_path / "run" / "plan.json")
    replace(base, target="another").save(tmp_path / "other.json")
    assert main(["plan", "diff", str(tmp_path / "run"), str(tmp_path / "run" / "plan.json")]) == 0
    assert "do the same" in capsys.readouterr().out
    assert main(["plan", "diff", str(tmp_path / "run"), str(tmp_path / "other.json")]) == 1
    assert "-> another" in capsys.readouterr().out
    assert main(["plan", "diff", "absent.json", str(tmp_path / "other.json")]) == 2
    said = capsys.readouterr().err
    assert "absent.json cannot be read" in said
    assert "name two run folders" in said
    assert main(["plan", "dif"]) == 2
    assert "plan diff A/plan.json B/plan.json" in capsys.readouterr().err
