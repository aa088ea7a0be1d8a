"""The harness counts what it says, and on planted devices the learned model beats its baselines on every split."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import planted
import pytest

from subquad_cost_model import (
    CostRow,
    Device,
    Estimate,
    TimedRow,
    Trees,
    load_fit,
    read_timed_rows,
    regret,
    write_timed_rows,
)
from subquad_cost_model.__main__ import main
from subquad_cost_model.evaluate import HEADER, Verdict, as_line, as_markdown, estimates_of, evaluate, judge
from subquad_cost_model.public_tables import read_public_tables
from subquad_cost_model.splits import SPLITS, Split

SMALL = Trees(rounds=100, leaves=15, spread_rounds=30, spread_leaves=7)


class Clairvoyant:
    """Knows the planted truth, times a factor."""

    name = "clairvoyant"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
        truths = [planted.truth_s(row, device) * self.factor for row in rows]
        return [Estimate(seconds=s, low_s=s / 1.5, high_s=s * 1.5, peak_bytes=0, source="model") for s in truths]


def by_selector(verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
    return {verdict.selector: verdict for verdict in verdicts}


def test_the_truth_has_no_regret_and_its_double_only_error() -> None:
    rows = planted.table(seed=0, shapes=20, noise=0.0)
    split = Split(name="S", held_out="all", fit=(), judge=tuple(range(len(rows))))
    found = by_selector(judge(rows, split, lambda seen, given: {"true": Clairvoyant(1), "double": Clairvoyant(2)}))
    for name, error, covered in (("true", 0.0, 1.0), ("double", 1.0, 0.0)):
        verdict = found[name]
        assert verdict.regret and verdict.error
        assert (verdict.regret.largest, verdict.time_regret) == (0, 0)
        assert (verdict.error.mean, verdict.error.largest) == pytest.approx((error, error))
        assert (verdict.covered, verdict.answered) == (covered, 1)
        assert verdict.width == pytest.approx(1.5)
    assert found["oracle"].regret == found["true"].regret


def test_errors_are_told_apart_by_phase() -> None:
    rows = planted.table(seed=5, shapes=10, noise=0.0, phases=("forward", "backward"))
    split = Split(name="S", held_out="all", fit=(), judge=tuple(range(len(rows))))

    class Late(Clairvoyant):
        """Off by a half on what runs backward."""

        def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
            return [
                replace(e, seconds=e.seconds * (1.5 if row.phase == "backward" else 1))
                for row, e in zip(rows, super().predict(rows, device), strict=True)
            ]

    verdict = judge(rows, split, lambda seen, given: {"late": Late(1)})[0]
    assert {phase: error.mean for phase, error in verdict.phase_errors.items()} == pytest.approx(
        {"backward": 0.5, "forward": 0.0}
    )
    assert "backward 50 / 50 / 50; forward 0 / 0 / 0" in as_markdown(verdict)


def test_forward_and_backward_are_steady_where_both_are() -> None:
    rows = planted.table(seed=5, shapes=10, noise=0.0, phases=("forward", "backward"))
    unsteady = {row.row.key for row in rows if row.row.phase == "backward" and row.row.shape["t"] > 1000}
    assert 0 < len(unsteady) < len(rows) / 2
    rows = [replace(row, high_s=1.2 * row.seconds) if row.row.key in unsteady else row for row in rows]

    class Short(Clairvoyant):
        """Off by a half on what is unsteady, which is known of it."""

        def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
            found = zip(rows, super().predict(rows, device), strict=True)
            return [replace(e, seconds=e.seconds * (1.5 if row.key in unsteady else 1)) for row, e in found]

    split = Split(name="S", held_out="all", fit=(), judge=tuple(range(len(rows))))
    verdict = judge(rows, split, lambda seen, given: {"short": Short(1)})[0]
    assert verdict.training_error and verdict.steady_training_error
    assert verdict.training_error.mean > 0.05
    assert verdict.steady_training_error.largest == pytest.approx(0.0)


def test_what_was_captured_is_asked_of_a_device_that_waits_for_no_host() -> None:
    rows = [replace(row, host_s=5e-6, cuda_graph=n % 2 == 1) for n, row in enumerate(planted.table(seed=5, shapes=4))]
    asked: dict[str, float | None] = {}

    class Asked(Clairvoyant):
        """Notes on which device it was asked of each row."""

        def predict(self, rows: Sequence[CostRow], device: Device) -> list[Estimate]:
            asked.update({device.name + row.key: device.host_s for row in rows})
            return super().predict(rows, device)

    estimates = estimates_of(Asked(1), rows)
    assert [one.seconds for one in estimates] == pytest.approx([planted.truth_s(r.row, r.device) for r in rows])
    assert [asked[r.device.name + r.row.key] for r in rows] == [0.0 if r.cuda_graph else r.device.host_s for r in rows]


def test_a_device_of_which_a_few_rows_are_known_is_calibrated_and_only_the_splits_asked_for_are_judged(
    rows: list[TimedRow],
) -> None:
    verdicts = list(evaluate(rows, ["S6"], trees=SMALL, given_back="16 chosen"))
    assert {verdict.split for verdict in verdicts} == {"S6, 16 chosen per kernel"}
    for held_out in {verdict.held_out for verdict in verdicts}:
        found = by_selector([verdict for verdict in verdicts if verdict.held_out == held_out])
        calibrated, physics = found["calibrated"], found["physics"]
        assert calibrated.error_factor and physics.error_factor
        assert calibrated.error_factor < physics.error_factor, held_out


def test_random_and_always_lose_what_can_be_counted_by_hand() -> None:
    rows = planted.table(seed=1, shapes=20, noise=0.0)
    keys = [(row.device.name, replace(row.row, kernel="").key) for row in rows]
    cells = {
        key: {r.row.kernel: r.seconds for r, of_it in zip(rows, keys, strict=True) if of_it == key} for key in keys
    }
    split = Split(name="S", held_out="all", fit=(), judge=tuple(range(len(rows))))
    found = by_selector(judge(rows, split, lambda seen, given: {}))
    assert set(found) == {"oracle", "random", "always wide", "always narrow"}
    wide = [regret("wide", cell) for cell in cells.values()]
    narrow = [regret("narrow", cell) for cell in cells.values()]
    for name, lost in (("always wide", wide), ("always narrow", narrow)):
        verdict = found[name]
        assert verdict.regret and verdict.cells == len(cells)
        assert verdict.regret.mean == pytest.approx(sum(lost) / len(lost))
    assert found["random"].regret
    assert found["random"].regret.mean == pytest.approx((sum(wide) + sum(narrow)) / 2 / len(cells))
    best_s = sum(min(cell.values()) for cell in cells.values())
    assert found["always wide"].time_regret == pytest.approx(sum(c["wide"] for c in cells.values()) / best_s - 1)


@pytest.fixture(scope="module")
def rows() -> list[TimedRow]:
    mixed = planted.table(seed=2, shapes=90)
    other = [
        planted.timed_row(
            replace(planted.row(r.row.kernel, *(r.row.shape[a] for a in "bth")), operator="other"), r.device
        )
        for r in planted.table(seed=3, shapes=40)
    ]
    return [*mixed, *other, planted.failed(mixed[0])]


@pytest.mark.parametrize("name", SPLITS)
def test_learned_beats_roofline_and_constant_on_every_split(rows: list[TimedRow], name: str) -> None:
    verdicts = list(evaluate(rows, [name], trees=SMALL))
    assert verdicts
    for held_out in {(verdict.split, verdict.held_out) for verdict in verdicts}:
        found = by_selector([verdict for verdict in verdicts if (verdict.split, verdict.held_out) == held_out])
        learned, roofline, constant = found["learned, always"], found["roofline"], found["constant"]
        assert learned.error_factor and roofline.error_factor and constant.error_factor
        assert learned.error_factor < roofline.error_factor, held_out
        assert learned.error_factor < constant.error_factor, held_out
        if learned.regret:  # one kernel held out (S3) leaves no rivals
            assert roofline.regret and constant.regret
            assert learned.regret.mean <= min(roofline.regret.mean, constant.regret.mean), held_out


def test_a_model_is_judged_with_and_without_the_hosts_pace_where_rows_know_it() -> None:
    found = by_selector(list(evaluate(planted.hosted(seed=4, shapes=150), ["S0"], trees=SMALL)))
    own, usual, as_probed = (found[name] for name in ("learned, own pace", "learned, usual host", "learned"))
    assert own.error and usual.error and as_probed.error
    assert own.error.mean < 0.5 * usual.error.mean
    assert usual.error == as_probed.error, "this device's probe knows no pace"
    assert usual.covered is not None
    assert usual.covered > 0.75, "intervals hold for whoever does not know the pace"


def test_an_abstaining_model_says_what_share_it_answered(rows: list[TimedRow]) -> None:
    found = by_selector(list(evaluate(rows, ["S2"], trees=SMALL)))
    assert found["learned, always"].answered == 1
    assert found["roofline"].answered == 0
    only_mix = [row for row in rows if row.row.operator == "mix"]
    verdicts = [v for v in evaluate(rows, ["S4"], trees=SMALL) if v.held_out == "other"]
    unseen, given = (by_selector([v for v in verdicts if v.split == name]) for name in ("S4", "S4, 30 rows"))
    assert unseen["learned"].answered == 0
    assert unseen["learned"].fitted == len([row for row in only_mix if row.status == "ok"])
    assert given["learned"].fitted == unseen["learned"].fitted + 30
    assert given["learned"].error and unseen["learned, always"].error
    assert given["learned"].error.mean < unseen["learned, always"].error.mean
    assert "calibrated" not in given, "the device is known: there is nothing to calibrate"


def test_verdicts_print_as_a_table_and_as_json(rows: list[TimedRow]) -> None:
    found = by_selector(list(evaluate(rows, ["S0"], trees=SMALL)))
    assert "learned, own pace" not in found, "no row knows one"
    verdict = found["learned"]
    line = as_markdown(verdict)
    assert line.count("|") == HEADER.splitlines()[0].count("|")
    assert "S0 | one shape in five" in line
    assert verdict.regret
    assert json.loads(as_line(verdict))["regret"]["mean"] == verdict.regret.mean


def test_the_commands_fit_judge_and_keep(
    rows: list[TimedRow], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, fit = tmp_path / "rows.parquet", tmp_path / "fit"
    write_timed_rows(table, [*rows[:-1], replace(rows[0], host_s=7e-6), rows[-1]])
    small = ["--rounds", "40", "--leaves", "7"]
    assert main(["evaluate", str(table), "--splits", "S0", *small]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| split | held out |") and "| learned, always |" in printed
    assert main(["evaluate", str(table), "--splits", "S0", "--by-kernel", *small]) == 0
    by_kernel = capsys.readouterr().out
    assert "| mix/wide | forward |" in by_kernel and "| mix/narrow | forward |" in by_kernel
    (tmp_path / "figures.md").write_text(printed)
    assert main(["fit", str(table), str(fit), "--figures", str(tmp_path / "figures.md"), *small]) == 0
    assert f"heads forward; {len(rows)} timed rows and 1 others" in capsys.readouterr().out
    assert set(load_fit(fit).heads) == {"forward"}
    card = (fit / "card.md").read_text()
    assert "| mix | forward | Hopper | two |" in card and "one shape in five" in card
    assert "pace on one: 7.0 us a launch in the median of 1 rows" in card


def test_a_command_on_a_wrong_file_says_so_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path / "none.parquet")]) == 2
    assert "there is no table of timed rows at" in capsys.readouterr().err
    assert main(["public", str(tmp_path), str(tmp_path / "rows.parquet")]) == 2
    assert "holds no tables of aiconfigurator-core" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1500)  # usual trees: a fit takes more than a minute of a core
@pytest.mark.parametrize("name", ["S0", "S1", "S2"])
def test_learned_beats_roofline_and_constant_on_recorded_latencies(name: str) -> None:
    """NVIDIA's published tables, which are not ours to ship: SUBQUAD_PUBLIC_TABLES names the unpacked package."""
    folder = os.environ.get("SUBQUAD_PUBLIC_TABLES")
    if folder is None:
        pytest.skip("SUBQUAD_PUBLIC_TABLES is not set")
    path = Path(folder)
    recorded = read_timed_rows(path) if path.suffix == ".parquet" else read_public_tables(path, most_rows=6000)
    found = by_selector(list(evaluate(recorded, [name])))
    learned, roofline, constant = found["learned, always"], found["roofline"], found["constant"]
    for baseline in (roofline, constant):
        assert learned.error_factor and baseline.error_factor and learned.error_factor < baseline.error_factor
        assert learned.regret and baseline.regret and learned.regret.mean < baseline.regret.mean
    assert learned.regret and found["random"].regret
    assert learned.regret.mean < found["random"].regret.mean
