"""calibrate: a few rows of this device make the model better here, and what they taught is found again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from subquad.__main__ import main
from subquad.commands.calibrate import as_text, calibrate_config
from subquad.compiler.calibrate import Calibration, Worth, calibrate, disturbances, source_model, worth
from subquad.compiler.profile import profile_path
from subquad.compiler.target import Target, resolve_target
from subquad.errors import ConfigError
from subquad_cost_model import (
    CalibratedEstimator,
    CostRow,
    Device,
    RooflineEstimator,
    TimedRow,
    load_device,
    load_profile,
    read_timed_rows,
    timed,
)
from subquad_cost_model.shape_groups import is_held_out


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles are found by the device alone: tests must not find each other's."""
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def target() -> Target:
    return resolve_target("cpu")


def test_estimates_of_this_machine_are_better_afterwards(target: Target, tmp_path: Path) -> None:
    source, beside = source_model("roofline", target.kind)
    done = calibrate(
        target, source, beside, tmp_path / "rows", budget_s=25, operators=["rotary", "causal_conv", "segment_attention"]
    )
    assert done.before is not None and done.after is not None
    # What other work disturbed need not be better, and says so.
    assert done.after.error_factor < done.before.error_factor or done.disturbed
    assert done.after.rows == done.before.rows > 10
    assert set(done.calibrated.corrections) == {"forward", "backward", "decode"}

    rows = timed(read_timed_rows(tmp_path / "rows"))
    assert {row.source for row in rows} == {"subquad calibrate"}
    assert done.fitted == sum(not is_held_out(row.row) for row in rows)

    assert done.path == profile_path(target.device)
    assert done.path is not None
    again = load_profile(done.path, RooflineEstimator(), target.device)
    asked = [row.row for row in rows]
    assert again.predict(asked, target.device) == done.calibrated.predict(asked, target.device)
    assert worth(again, [row for row in rows if is_held_out(row.row)]) == done.after
    figures = json.loads(done.path.read_text())["figures"]
    assert figures["after"]["error_factor"] == pytest.approx(done.after.error_factor)


def test_the_verb_says_what_it_is_worth_and_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["calibrate", "budget_s=8", "operators=[rotary]", "target=cpu", "fit=roofline"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert "Calibrated" in first.out and "profile: " in first.out
    assert " 0 measured before" in first.err
    assert main(arguments) == 0
    assert " 0 measured before" not in capsys.readouterr().err
    assert len(list((tmp_path / "cache" / "profiles").glob("*.json"))) == 1


def test_rows_too_few_for_a_correction_are_said_to_be(target: Target) -> None:
    untouched = CalibratedEstimator.fit([], target.device, RooflineEstimator())
    shown = as_text(Calibration(calibrated=untouched, fitted=0, before=None, after=None, path=None))
    assert "by 0 rows: no phase has enough shapes for a correction yet" in shown


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("budget_s=-1", "use more than 0"),
        ("operators=[rotray]", "did you mean 'rotary'"),
        ("fit=/nowhere", "no fit in /nowhere"),
        ("bugdet_s=3", "did you mean 'budget_s'"),
    ],
)
def test_mistakes_are_said_in_the_users_words(argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", argument]) != 0
    assert said in capsys.readouterr().err


def test_without_a_fit_the_bound_is_corrected() -> None:
    assert calibrate_config(["operators=rotary"]).operators == ["rotary"]
    source, beside = source_model("roofline", "cpu")
    assert (source, beside) == (RooflineEstimator(), ())
    with pytest.raises(ConfigError):
        source_model("/nowhere", "cpu")


def repeated(device: Device, spread: float, count: int) -> list[TimedRow]:
    """Timings whose repeats lie so far apart, as a share of their median."""
    row = CostRow(operator="mix", kernel="wide", phase="forward", dtype="bfloat16", shape={"b": 1})
    timing = TimedRow(
        row=row, device=device, status="ok", low_s=1e-3 * (1 - spread / 2), median_s=1e-3,
        high_s=1e-3 * (1 + spread / 2), repeats=3,
    )  # fmt: skip
    return [timing] * count


def test_a_busy_device_is_told_by_its_repeats_and_by_what_its_probe_reached() -> None:
    sheet = load_device("h200")
    quiet = replace(sheet, origin="probed", bytes_per_s=0.9 * sheet.bytes_per_s)
    steady, shaky = repeated(quiet, 0.02, 80), repeated(quiet, 0.5, 20)
    assert disturbances(quiet, [*steady, *shaky]) == (), "some rows of every record are shaken"
    (said,) = disturbances(quiet, [*steady[:40], *shaky])
    assert said == "repeats of 20 of 60 timings lie more than 10% apart"
    (said,) = disturbances(replace(quiet, bytes_per_s=0.5 * sheet.bytes_per_s), steady)
    assert "50% of the memory's stated bandwidth" in said
    slow = {name: rate / 2 for name, rate in sheet.matmul_flops_per_s.items()}
    (said,) = disturbances(replace(quiet, matmul_flops_per_s=slow), steady)
    assert "50% of the stated products in bfloat16" in said
    assert disturbances(replace(quiet, name="a device that nobody described"), steady) == ()


def test_what_is_not_known_and_what_went_wrong_is_said() -> None:
    source = RooflineEstimator()
    calibrated = CalibratedEstimator(source=source, device=load_device("h200"), corrections={})
    done = Calibration(calibrated=calibrated, fitted=3, before=None, after=None, path=None, disturbed=("it shook",))
    said = as_text(done)
    assert "No shape kept apart was measured" in said
    assert "busy: it shook. Calibrate it again" in said
    one = Worth(rows=6, cells=0, regret=None, error_factor=2.36, covered=0.0)
    said = as_text(replace(done, before=one, after=one, disturbed=()))
    assert said.count("2.36") == 2 and "busy" not in said and "No shape" not in said
