"""What the host adds by itself is told from what its pace explains, and rows that wait for it from others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tool import tool

from subquad_cost_model import CostRow, TimedRow, load_device

host_noise = tool("host_noise")
DEVICE = load_device("h200")


def timed(pace_s: float, queued_s: float, *, launches: int = 30, seconds: float = 1e-4) -> TimedRow:
    row = CostRow(
        operator="mix", kernel="composed", phase="forward", dtype="bfloat16", shape={"t": 64}, launches=launches
    )
    return TimedRow(
        row=row, device=DEVICE, status="ok", low_s=seconds, median_s=seconds, high_s=seconds, run_id="one",
        host_s=pace_s, queued_s=queued_s,
    )  # fmt: skip


def test_what_the_hosts_pace_explains_is_no_noise_at_its_pace() -> None:
    paces_s = [1e-5, 1e-5, 2e-5, 2e-5, 2e-5, 4e-5, 4e-5]
    following = host_noise.spreads([timed(pace_s, 30 * pace_s) for pace_s in paces_s])["mix/composed forward"]
    assert (following.rows, following.at_pace) == (7, pytest.approx(0))
    assert following.raw == pytest.approx((0.5 + 0.5 + 1 + 1) / 7)
    steady = [timed(1e-5, 3e-4 * (1.5 if place % 2 else 1)) for place in range(7)]
    other = host_noise.spreads(steady)["all"]
    assert (other.raw, other.at_pace) == pytest.approx((3 * 0.5 / 7, 3 * 0.5 / 7))


def test_other_launches_and_other_runs_are_no_repeats() -> None:
    rows = [timed(1e-5, 3e-4, launches=10 + place) for place in range(9)]
    assert host_noise.spreads(rows) == {}
    many = [timed(1e-5, 1e-5 * launches, launches=launches) for launches in range(200, 207)]
    assert host_noise.spreads(many)["all"].raw == pytest.approx(0), "of many, what one takes"
    assert host_noise.spreads([replace(timed(1e-5, 3e-4), run_id=str(place)) for place in range(9)]) == {}


def test_a_row_waits_where_queueing_took_longer_than_the_head_start() -> None:
    head_start_s = host_noise.head_start_s(DEVICE)
    limits = [
        timed(1e-5, 5e-5, launches=1),
        timed(1e-5, head_start_s / 2),
        timed(1e-5, 3 * head_start_s, seconds=2 * head_start_s),
        timed(1e-5, 9 * head_start_s, seconds=2 * head_start_s),
    ]
    names = host_noise.LIMITS
    assert [*map(host_noise.limit, limits)] == [names[0], names[1], names[2], names[1]]
    assert host_noise.limit(replace(limits[2], queued_s=None)) == names[3]
