"""The released rows of our kernels can be read, and a model fitted to a part of them beats the bounds elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from subquad_cost_model import Trees
from subquad_cost_model.evaluate import evaluate
from subquad_cost_model.timed_rows import read_timed_rows, timed

ROWS = Path(__file__).parents[1] / "data"


def test_released_rows_hold_every_phase_of_every_operator_on_a_probed_device() -> None:
    rows = timed(read_timed_rows(ROWS))
    phases = {(row.row.operator, row.row.phase) for row in rows}
    operators = {operator for operator, _ in phases}
    assert {"softmax_attention", "segment_attention", "selective_scan", "linear_attention", "delta_rule"} <= operators
    assert phases == {(operator, phase) for operator in operators for phase in ("forward", "backward", "decode")}
    assert all(row.device.origin == "probed" and row.device.versions["triton"] for row in rows)


@pytest.mark.parametrize("split", ["S0", "S1", "S2"])
def test_the_learned_model_beats_roofline_and_constant_on_what_it_did_not_see(split: str) -> None:
    small = Trees(rounds=60, spread_rounds=20, leaves=15)
    found = {verdict.selector: verdict for verdict in evaluate(read_timed_rows(ROWS), [split], trees=small)}
    regret = {name: verdict.regret.mean for name, verdict in found.items() if verdict.regret is not None}
    error = {name: verdict.error.median for name, verdict in found.items() if verdict.error is not None}
    assert found["learned"].cells > 50
    assert regret["learned"] < min(regret["roofline"], regret["constant"], regret["random"]) / 10
    assert error["learned"] < min(error["roofline"], error["constant"])
