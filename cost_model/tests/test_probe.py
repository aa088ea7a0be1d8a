"""A probe finds this machine: every figure positive, in budget, and of a plausible size."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from subquad_cost_model import CostRow, Device, lower_bound_s, probe, probe_device, time_callable
from subquad_cost_model.measure import fastest_s

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def probed() -> Device:
    return probe_device(budget_s=0.4)


def test_every_figure_is_positive_and_finite(probed: Device) -> None:
    figures = [
        *probed.matmul_flops_per_s.values(),
        probed.vector_flops_per_s,
        probed.transcendental_per_s,
        probed.bytes_per_s,
        probed.launch_s,
        probed.serial_step_s,
        probed.memory_bytes,
    ]
    assert all(0 < figure < math.inf for figure in figures)
    assert set(probed.matmul_flops_per_s) == {"float32", "float64", "bfloat16", "float16"}


def test_the_probe_says_what_it_holds_for(probed: Device) -> None:
    assert (probed.kind, probed.origin, probed.capability) == ("cpu", "probed", None)
    assert f"{torch.get_num_threads()} threads" in probed.name
    assert probed.versions["torch"] == str(torch.__version__)


def test_figures_are_of_a_size_that_computers_have(probed: Device) -> None:
    """Between a slow laptop under emulation and a large server; an error of units is a factor of 1000 or more."""
    assert 1e8 < probed.matmul_flops_per_s["float32"] < 1e14
    assert 1e6 < probed.transcendental_per_s < 1e12
    assert 1e8 < probed.bytes_per_s < 1e13
    assert 1e-8 < probed.launch_s < 1e-3
    assert 1e-10 < probed.serial_step_s < 1e-6
    assert probed.host_s is not None
    assert 1e-7 < probed.host_s < 1e-3
    assert probed.memory_bytes > 1 << 28


def test_the_timings_of_a_probe_share_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each does within its share is tested in test_measure.py."""
    shares_s: list[float] = []

    def shared(run: Callable[[], object], *, synchronize: object, budget_s: float) -> float:
        shares_s.append(budget_s)
        return fastest_s(run, budget_s=budget_s)

    monkeypatch.setattr(probe, "fastest_s", shared)
    probe_device(budget_s=0.2)
    assert 10 < len(shares_s) <= 20
    assert sum(shares_s) == pytest.approx(0.2, rel=0.5)


def test_precision_of_products_is_as_it_was_after_the_probe() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        probe_device(budget_s=0.05)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("side", [96, 384])
def test_a_real_product_takes_no_less_than_half_its_bound(probed: Device, side: int) -> None:
    """Half: the room that the roofline estimator leaves for a machine that was busy when it was probed."""
    a = torch.rand(side, side)
    timing = time_callable(lambda: a @ a, min_s=5e-3)
    row = CostRow(
        operator="product",
        kernel="mm",
        phase="forward",
        dtype="float32",
        shape={"n": side},
        matmul_flops=2 * side**3,
        bytes_moved=12 * side**2,
    )
    assert timing.median_s > lower_bound_s(row, probed) / 2


def test_without_a_gpu_the_probe_of_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        probe_device(kind="cuda")


@pytest.mark.gpu
def test_no_probed_figure_of_a_shipped_gpu_exceeds_its_data_sheet() -> None:
    """Last seen on an H100 80GB HBM3."""
    from subquad_cost_model import load_device, shipped_devices

    here = probe_device(kind="cuda")
    sheets = [device for device in map(load_device, shipped_devices()) if device.name == here.name]
    if not sheets:
        pytest.skip(f"no data sheet is shipped for {here.name}")
    (sheet,) = sheets
    for dtype, rate in here.matmul_flops_per_s.items():
        assert rate <= sheet.matmul_flops_per_s[dtype], dtype
    assert here.transcendental_per_s <= sheet.transcendental_per_s
    assert here.bytes_per_s <= sheet.bytes_per_s
    assert here.cache_bytes_per_s <= sheet.cache_bytes_per_s
    assert here.launch_s >= sheet.launch_s
    assert here.serial_step_s == pytest.approx(sheet.serial_step_s, rel=0.01)
    for dtype, rate in here.matmul_flops_per_s.items():
        assert rate > sheet.matmul_flops_per_s[dtype] / 3, dtype
    assert here.bytes_per_s > sheet.bytes_per_s / 2
