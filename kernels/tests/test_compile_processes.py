"""What first calls compile is compiled beforehand, in processes: the same as without, found by the calls, none lost."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
from forked_scripts import FORKS

pytest.importorskip("triton")

from subquad_kernels.builtin import CATALOGUE, KERNELS
from subquad_kernels.catalogue import Kernel
from subquad_kernels.compilations import compilations
from subquad_kernels.device_limits import device_limits
from subquad_kernels.first_calls import cores, first_calls
from subquad_kernels.triton_launch import QuickLaunch

NO_INDEX = {
    "_to_copy", "alias", "copy_", "detach", "empty", "empty_like", "expand", "new_empty", "permute", "select", "slice",
    "sum", "unbind", "view", "zero_", "zeros_like",
}  # fmt: skip
"""Operations that do no harm on memory with anything in it."""

REPLAYABLE = [kernel for kernel in KERNELS if kernel.replayable and kernel.compiles]
QUICK = ("rotary/fused", "gated_norm/fused")
ALONE = ("cached_attention/tiled",)
"""Those whose check launches a single kernel, which its call compiles."""


def made(*scenarios: str) -> dict[str, dict[str, Any]]:
    printed = FORKS.run(Path(__file__).with_name("first_calls_without_device.py"), *scenarios)
    return {found["scenario"]: found for found in map(json.loads, printed.splitlines())}


@pytest.fixture(scope="module")
def scenarios() -> dict[str, dict[str, Any]]:
    return made(
        "well", "alone", "killed", "hangs", "interrupted", "asks for the device", "no forks", "foreign", "broken",
        "launcher first", "prepared",
    )  # fmt: skip


BOTH = ["add_one", "add_two"]


def test_calls_compile_nothing_that_was_compiled_beforehand(scenarios: dict[str, dict[str, Any]]) -> None:
    well = scenarios["well"]
    assert well["here"] == []
    assert well["launched"] == BOTH
    assert [name for name, _, cached in well["compiled"] if not cached] == BOTH
    assert well["stages"], "the seconds of a call are at least those of what was compiled for it"
    assert well["warnings"] == []


def test_what_launches_a_kernel_is_built_while_that_is_compiled(scenarios: dict[str, dict[str, Any]]) -> None:
    found = scenarios["launcher first"]
    assert found["warnings"] == []
    assert found["here"] == []
    assert found["launched"] == BOTH


def test_what_triton_does_at_its_first_use_it_does_while_operands_are_drawn(
    scenarios: dict[str, dict[str, Any]],
) -> None:
    assert scenarios["prepared"] == {"scenario": "prepared", "asked": ["driver"], "hashed": 1}


@pytest.mark.parametrize(
    ("scenario", "why"),
    [
        ("killed", "exit code -9"),
        ("hangs", "not done after 10 s"),
        ("asks for the device", "AttributeError"),
    ],
)
def test_what_a_process_did_not_compile_its_call_does(
    scenarios: dict[str, dict[str, Any]], scenario: str, why: str
) -> None:
    found = scenarios[scenario]
    assert found["here"] == ["add_two"]
    assert found["failures"] == [None, None, None]
    assert found["launched"] == BOTH
    (warning,) = found["warnings"]
    assert f"the process that compiled add_two failed ({why}" in warning


def test_what_does_not_compile_is_raised_by_its_call_as_without_processes(
    scenarios: dict[str, dict[str, Any]],
) -> None:
    broken = scenarios["broken"]
    assert {failure.partition(":")[0] for failure in broken["failures"]} == {"CompileTimeAssertionFailure"}
    assert broken["launched"] == BOTH
    assert "never_compiles" in broken["warnings"][0]


def test_no_process_outlives_ctrl_c(scenarios: dict[str, dict[str, Any]]) -> None:
    assert scenarios["interrupted"] == {"scenario": "interrupted", "interrupted": True, "children": 0}


@pytest.mark.parametrize(
    ("scenario", "compiled"), [("alone", ["add_one"]), ("no forks", BOTH), ("foreign", BOTH)], ids=str
)
def test_one_kernel_one_core_and_kernels_that_promise_nothing_are_compiled_by_their_calls(
    scenarios: dict[str, dict[str, Any]], scenario: str, compiled: list[str]
) -> None:
    assert scenarios[scenario]["here"] == compiled
    assert scenarios[scenario]["launched"] == compiled
    assert scenarios[scenario]["warnings"] == []


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(kernel, id=kernel.key, marks=() if kernel.key in QUICK else pytest.mark.slow)
        for kernel in REPLAYABLE
    ],
)
def test_what_is_collected_is_what_triton_would_compile(kernel: Kernel) -> None:
    """The hashes are triton's: of source, types, constants, alignments, options, versions and environment."""
    found = made(kernel.key)[kernel.key]
    threads, processes = found["threads"], found["processes"]
    assert threads["failures"] == processes["failures"] == [None] * len(threads["failures"])
    assert processes["compiled"] == threads["compiled"]
    assert (len(processes["compiled"]) == 1) == (kernel.key in ALONE)
    assert processes["here"] == (threads["here"] if kernel.key in ALONE else [])
    assert processes["launched"] == threads["launched"]
    assert set(found["operations"]) <= NO_INDEX


@pytest.mark.gpu
@pytest.mark.skipif(cores() < 2, reason="processes are for several cores")
@pytest.mark.parametrize("kernel", [pytest.param(one, id=one.key) for one in REPLAYABLE if one.key not in ALONE])
def test_first_calls_on_a_device_compile_nothing_themselves(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is known to Triton: its folder is empty, and what this process has compiled before is forgotten."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel.torch_half  # noqa: B018  (imports its launches)
    for launch in [one for one in gc.get_objects() if type(one) is QuickLaunch]:
        launch._compiled.clear()
        launch.jitted.device_caches.clear()
    limits = device_limits("cuda")
    examples = CATALOGUE.operator(kernel.operator).examples
    steps = [one for one in examples if one.phase != "decode"] or examples
    workload = next((one for one in steps if kernel.refusal(one, limits) is None), None)
    if workload is None:
        pytest.skip("this device cannot run it")
    with compilations() as here:
        calls = first_calls([(kernel, workload)], "cuda")
    assert [call.failure for call in calls] == [None] * len(calls)
    assert [one.kernel for one in here if not one.cached] == []
    assert any(not one.cached for call in calls for one in call.compiled)
