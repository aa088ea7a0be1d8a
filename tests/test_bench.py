"""bench: every kernel at every length, its times beside the floor, or the reason why it was left out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from subquad.__main__ import main
from subquad.commands.bench import as_text, bench_config
from subquad.compiler import bench as bench_module
from subquad.compiler.bench import Bench, Case, bench_workloads
from subquad.compiler.measure_kernels import Call, CudaClock, Effort
from subquad.errors import ConfigError
from subquad.schema import BenchConfig
from subquad_kernels.builtin import CATALOGUE, OPERATORS
from subquad_kernels.catalogue import Operator

SCAN, SEGMENTS = CATALOGUE.operator("selective_scan"), CATALOGUE.operator("segment_attention")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is not how long to measure."""
    monkeypatch.setattr(bench_module, "THOROUGH", Effort(min_s=1e-3, repeats=3, warm_up_s=0.0))


def cases(**request: Any) -> list[Case]:
    return list(Bench(BenchConfig(**request)).cases())


# --- what is measured ---------------------------------------------------------------


@pytest.mark.parametrize(
    "operator", [operator for operator in OPERATORS if operator.takes_sequences], ids=lambda operator: operator.name
)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_an_operator_has_a_series_in_which_the_length_doubles(operator: Operator, kind: str) -> None:
    series = bench_workloads(operator, kind, BenchConfig(operator=operator.name))
    lengths = [workload.shape["t"] for workload in series]
    assert lengths == [lengths[0] * 2**doubling for doubling in range(bench_module.LENGTHS[kind])]
    assert all(workload.shape.get("s", workload.shape["t"]) == workload.shape["t"] for workload in series)
    assert {workload.dtype for workload in series} == {"float32" if kind == "cpu" else "bfloat16"}


def test_an_operator_of_single_tokens_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="cached_attention takes one token"):
        bench_workloads(CATALOGUE.operator("cached_attention"), "cpu", BenchConfig(operator="cached_attention"))


def test_an_operator_without_a_series_grows_from_its_first_example() -> None:
    bare = replace(SEGMENTS, benchmarks={})
    series = bench_workloads(bare, "cpu", BenchConfig(operator=bare.name))
    assert [workload.shape["t"] for workload in series] == [37, 74, 148, 296]


def test_shapes_options_and_dtype_replace_those_of_the_series() -> None:
    request = BenchConfig(
        operator="segment_attention", dtype="bfloat16", options={"segment_len": 7},
        shapes=[{"t": 64}, {"t": 48, "documents": 3}, {"t": 32, "b": 2, "k": 16}],
    )  # fmt: skip
    found = bench_workloads(SEGMENTS, "cpu", request)
    assert [(w.shape["b"], w.shape["t"], w.shape["k"], w.shape.get("documents")) for w in found] == [
        (1, 64, 64, None), (1, 48, 64, 3), (2, 32, 16, None),
    ]  # fmt: skip
    assert {(workload.dtype, workload.options["segment_len"]) for workload in found} == {("bfloat16", 7)}


def test_every_kernel_is_timed_checked_and_recorded_or_says_why_not() -> None:
    (case,) = cases(operator="segment_attention", shapes=[{"t": 40, "h": 2, "h_kv": 2, "k": 8, "v": 8}])
    rows = {row.kernel: row for row in case.rows}
    assert set(rows) == {"compacted", "sdpa_merge", "tiled"}
    for name in ("compacted", "sdpa_merge"):
        assert rows[name].why_not is None
        assert 0 < rows[name].forward_s < rows[name].both_s
        assert rows[name].called_s > 0
        assert rows[name].error is not None
        assert rows[name].error < 1e-4
    assert rows["tiled"].why_not == "runs on cuda only"
    assert case.best_s == min(rows[name].both_s for name in ("compacted", "sdpa_merge"))
    assert case.floor_s > 0
    lines = (Path(os.environ["SUBQUAD_CACHE"]) / "measurements" / "kernels.jsonl").read_text().splitlines()
    keys = [json.loads(json.loads(line)["row_key"]) for line in lines]
    of_case = [(key["kernel"], key["phase"]) for key in keys if key["shape"] == dict(case.workload.shape)]
    assert set(of_case) == {(name, phase) for name in ("compacted", "sdpa_merge") for phase in ("forward", "backward")}


def test_the_reference_is_timed_when_it_is_named() -> None:
    (case,) = cases(operator="causal_conv", kernels=["reference"], shapes=[{"t": 16, "c": 8}])
    assert [row.kernel for row in case.rows] == ["reference"]
    assert case.rows[0].both_s > 0


def add_kernel(monkeypatch: pytest.MonkeyPatch, half: object) -> None:
    kernel = replace(CATALOGUE.kernel("causal_conv", "taps"), name="odd", origin="a test")
    kernel.__dict__["torch_half"] = half
    monkeypatch.setitem(CATALOGUE._kernels["causal_conv"], "odd", kernel)


def test_a_kernel_that_fails_its_check_or_at_this_size_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    taps = CATALOGUE.kernel("causal_conv", "taps").torch_half

    class Odd:
        @staticmethod
        def forward(**arguments: Any) -> Any:
            if arguments["x"].shape[1] > 100:
                raise RuntimeError("too long for me")
            return taps.forward(**arguments)

        backward = staticmethod(taps.backward)

    add_kernel(monkeypatch, Odd)
    request = {"operator": "causal_conv", "kernels": ["odd", "taps"], "shapes": [{"t": 16, "c": 8}, {"t": 128, "c": 8}]}
    short, long = cases(**request)
    assert [row.why_not for row in short.rows] == [None, None]
    assert [row.why_not for row in long.rows] == ["failed at this size: RuntimeError: too long for me", None]
    assert long.best_s == long.rows[1].both_s


def test_a_kernel_that_fails_when_it_is_called_through_the_operator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(operator: Operator, kernel: str, arguments: Any) -> object:
        if kernel == "conv1d":
            raise RuntimeError("no memory left")
        return None

    monkeypatch.setattr(bench_module, "_train", breaks)
    (case,) = cases(operator="causal_conv", kernels=["taps", "conv1d"], shapes=[{"t": 16, "c": 8}])
    assert [row.why_not for row in case.rows] == [None, "failed when called: RuntimeError: no memory left"]
    assert case.best_s == case.rows[0].both_s


def test_a_wrong_kernel_is_named_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    taps = CATALOGUE.kernel("causal_conv", "taps").torch_half

    class Doubled:
        @staticmethod
        def forward(**arguments: Any) -> Any:
            y, state = taps.forward(**arguments)
            return 2 * y, state

        backward = staticmethod(taps.backward)

    add_kernel(monkeypatch, Doubled)
    (case,) = cases(operator="causal_conv", kernels=["odd"], shapes=[{"t": 17, "c": 8}])
    assert str(case.rows[0].why_not).startswith("failed its self-check: y is off by")
    assert "failed its self-check" in as_text(case)
    assert "nan" not in as_text(case)


def test_rivals_share_their_arguments_and_a_call_holds_what_it_reads() -> None:
    workload = replace(SCAN.examples[0], phase="backward")
    arguments = SCAN.torch_half.sample_inputs(workload, seed=0, device="cpu")
    chunked = CATALOGUE.kernel("selective_scan", "chunked")
    forward = Call.of(SCAN, chunked, SCAN.examples[0], "cpu", arguments)
    backward = Call.of(SCAN, chunked, workload, "cpu", arguments)
    given = sum(value.nbytes for value in arguments.values() if isinstance(value, torch.Tensor))
    assert forward.held_bytes == given < backward.held_bytes
    assert set(backward.run()) >= {"x", "dt", "A"}  # type: ignore[call-overload]


@pytest.mark.parametrize("key", ["causal_conv/conv1d", "linear_attention/chunked", "selective_scan/chunked"])
def test_a_kernel_of_another_layout_is_timed_with_the_copies_that_the_operator_makes(key: str) -> None:
    name, kernel_name = key.split("/")
    operator, kernel = CATALOGUE.operator(name), CATALOGUE.kernel(name, kernel_name)
    example = operator.examples[0]
    arguments = operator.torch_half.sample_inputs(example, seed=3, device="cpu")
    raw = kernel.torch_half.forward(**arguments)
    laid_out: Any = Call.of(operator, kernel, example, "cpu", arguments).run()
    pulled: Any = Call.of(operator, kernel, replace(example, phase="backward"), "cpu", arguments).run()
    copied = [output for output in raw if not output.is_contiguous()]
    assert copied or key == "selective_scan/chunked"  # whose gradients alone are laid otherwise
    for output, as_handed_on in zip(raw, laid_out, strict=True):
        assert as_handed_on.is_contiguous()
        torch.testing.assert_close(as_handed_on, output, rtol=0, atol=0)
    for given, gradient in pulled.items():
        assert gradient.is_contiguous()
        assert gradient.dtype == arguments[given].dtype


# --- the command ----------------------------------------------------------------------


def test_the_command_prints_a_table_a_length_and_where_measurements_went(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "operator=causal_conv", "kernels=taps", "shapes=[{t: 16, c: 8}, {t: 32, c: 8}]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("b=1 ")] == ["t=16", "t=32"]
    assert sum(line.split()[:1] == ["taps"] for line in lines) == 2
    assert lines[-1] == f"measurements: {os.environ['SUBQUAD_CACHE']}/measurements/kernels.jsonl"


def test_a_plot_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["operator=causal_conv", "kernels=[taps, conv1d]", "shapes=[{t: 16, c: 8}, {t: 32, c: 8}]"]
    assert main(["bench", *arguments, "plot=true"]) == 0
    picture = Path("bench-causal_conv.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture.absolute()) in capsys.readouterr().out


def test_a_plot_without_matplotlib_says_what_to_install_before_it_measures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "operator=causal_conv", "plot=true"]) == 2
    shown = capsys.readouterr()
    assert "pip install 'subquad[plot]'" in shown.err
    assert shown.out == ""


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {key} " in shown for key in BenchConfig.__dataclass_fields__)
    assert "'shapes=[{t: 4096}" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "bench operator=NAME"),
        (["operator=selective_scam"], "did you mean 'selective_scan'?"),
        (["operator=causal_conv", "kernels=[tabs]"], "did you mean 'taps'?"),
        (["operator=causal_conv", "kernel=taps"], "did you mean 'kernels'?"),
        (["operator=causal_conv", "dtype=float8"], "bench.dtype"),
        (["operator=causal_conv", "shapes=[{tt: 8}]"], "there are b, t, c, w, documents"),
        (["operator=causal_conv", "shapes=[{t: 0}]"], "t is 0"),
        (["operator=causal_conv", "shapes=[{t: many}]"], "bench.shapes"),
        (["operator=causal_conv", "shapes=[{t: 8"], "is not YAML"),
        (["operator=causal_conv", "options={silu: true}"], "bench.options"),
        (["operator=causal_conv", "target=h100"], "bench needs the device itself"),
        (["causal_conv"], "key=value"),
    ],
)
def test_it_says_what_is_wrong(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    shown = capsys.readouterr().err
    assert expected in shown
    assert len(shown.splitlines()) == 3


def test_values_are_yaml() -> None:
    config = bench_config(["operator=x", "kernels=[a, b]", "shapes=[{t: 8}]", "options={causal: false}", "plot=true"])
    assert (config.kernels, config.shapes, config.options, config.plot) == (
        ["a", "b"],
        [{"t": 8}],
        {"causal": False},
        True,
    )
    with pytest.raises(ConfigError):
        bench_config(["operator=x", "plot=perhaps"])


# --- the clock of CUDA devices ------------------------------------------------------------


class FakeDevice:
    """A host that takes time to queue, and a device that begins what is queued when it has ended what came before."""

    CLEAR_S = 5e-5

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host_s = self.free_s = 0.0
        self.clears = 0
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at_s = 0.0

            def record(self) -> None:
                self.at_s = max(device.host_s, device.free_s)

            def elapsed_time(self, end: Event) -> float:
                return (end.at_s - self.at_s) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self._wait)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda name: SimpleNamespace(L2_cache_size=8))
        monkeypatch.setattr(time, "perf_counter", lambda: self.host_s)
        monkeypatch.setattr(torch, "empty", lambda *size, **others: SimpleNamespace(zero_=self._clear))

    def launch(self, host_s: float, device_s: float) -> None:
        self.host_s += host_s
        self.free_s = max(self.host_s, self.free_s) + device_s

    def _clear(self) -> None:
        self.clears += 1
        self.launch(2e-6, self.CLEAR_S)

    def _wait(self) -> None:
        self.host_s = max(self.host_s, self.free_s)


def test_the_devices_clock_leaves_out_gaps_that_the_host_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch)
    clock = CudaClock("cuda", most_clears=32, most_calls=100)

    def run() -> None:
        device.launch(4e-5, 1e-5)
        device.launch(4e-5, 1e-5)

    assert clock(run, 10) == pytest.approx(10 * 2e-5)
    assert clock.queued_s(run) == pytest.approx(8e-5)
    before = device.clears
    assert clock(run, 10) == pytest.approx(10 * 2e-5)
    assert device.clears - before == 10 * 5, "80 us to queue, twice as long, in clears of 50 us, and one"


def test_the_devices_clock_is_ahead_of_a_host_that_slows_by_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop at the slower of a host's two paces gets head start enough from those at the faster."""
    device = FakeDevice(monkeypatch)
    clock = CudaClock("cuda", most_clears=96, most_calls=100)
    pace_s = [9e-4]

    def run() -> None:
        device.launch(pace_s[0], 1e-5)
        device.launch(pace_s[0], 1e-5)

    for pace_s[0] in (9e-4, 9e-4, 14.5e-4):
        assert clock(run, 10) == pytest.approx(10 * 2e-5)


def test_the_devices_clock_neither_waits_for_slow_hosts_nor_makes_more_calls_than_a_median_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = FakeDevice(monkeypatch)
    clock = CudaClock("cuda", most_clears=32, most_calls=100)
    made: list[int] = []

    def slow() -> None:
        made.append(1)
        device.launch(1e-2, 1e-5)

    assert clock(slow, 1000) > 1000 * 1e-5  # with its gaps
    assert len(made) == 100
    assert device.clears <= 5 + 100 * 32


@pytest.mark.gpu
def test_the_devices_clock_does_not_count_what_the_host_takes_to_queue() -> None:
    clock, x = CudaClock("cuda"), torch.randn(2048, 2048, device="cuda")

    def small() -> None:
        x.mul_(1.0)

    def late() -> None:
        end = time.perf_counter() + 4e-4
        while time.perf_counter() < end:
            pass
        small()

    prompt_s, late_s = (clock(run, 50) / 50 for run in (small, late))
    assert late_s < prompt_s + 1e-4


@pytest.mark.gpu
def test_the_devices_clock_grows_with_the_work() -> None:
    clock = CudaClock("cuda", most_clears=32, most_calls=100)
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def times(n: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(n):
                torch.mm(a, a)

        return run

    once_s, thrice_s = (clock(times(n), 20) / 20 for n in (1, 3))
    assert 2.0 < thrice_s / once_s < 4.0
