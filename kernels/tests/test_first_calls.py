"""First calls are made in threads, in every way that checks and training call; what they raise is noted."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from subquad_kernels import catalogue
from subquad_kernels.builtin import CATALOGUE
from subquad_kernels.catalogue import Kernel
from subquad_kernels.first_calls import cores, first_calls
from subquad_kernels.selective_scan.declaration import OPERATOR
from subquad_kernels.self_check import run_class, shape_class
from subquad_kernels.workload import Workload

WORKLOAD = replace(OPERATOR.examples[0], phase="backward")
CHUNKED = CATALOGUE.kernel("selective_scan", "chunked")


class Recorded:
    """The chunked scan, which remembers how it was called, and meets all its callers before it answers."""

    def __init__(self, together: int = 1) -> None:
        self.backward_gradients: list[tuple[bool, ...]] = []
        self.threads: set[int] = set()
        self._meeting = threading.Barrier(together, timeout=60)

    def forward(self, **arguments: Any) -> Any:
        self._meet()
        return CHUNKED.torch_half.forward(**arguments)

    def backward(self, arguments: Any, outputs: Any, gradients: Any) -> Any:
        self._meet()
        self.backward_gradients.append(tuple(gradient is not None for gradient in gradients))
        return CHUNKED.torch_half.backward(arguments, outputs, gradients)

    def _meet(self) -> None:
        assert not torch.is_grad_enabled()
        self._meeting.wait()
        self.threads.add(threading.get_ident())


def kernel(functions: object, **others: Any) -> Kernel:
    made = Kernel(
        operator="selective_scan", name="recorded", implementation="nowhere", supports=lambda workload, limits: None,
        devices=frozenset({"cpu"}), requires=("triton",), **others,
    )  # fmt: skip
    made.__dict__["torch_half"] = functions
    return made


def test_every_direction_is_called_at_the_same_time() -> None:
    functions = Recorded(together=3)  # each waits for the others: one thread would never end
    calls = first_calls([(kernel(functions), WORKLOAD)], "cpu", threads=3)
    assert [call.part for call in calls] == ["forward", "backward", "backward of the first output"]
    assert [call.failure for call in calls] == [None] * 3
    assert len(functions.threads) == 3
    assert threading.get_ident() not in functions.threads


def test_a_backward_is_called_as_checks_and_as_training_call_it() -> None:
    functions = Recorded()
    first_calls([(kernel(functions), WORKLOAD)], "cpu", threads=1)
    assert functions.backward_gradients == [(True, True), (True, False)]


def test_shapes_are_those_of_the_check_and_equal_ones_are_called_once() -> None:
    functions = Recorded()
    recorded = kernel(functions)
    longer = [replace(WORKLOAD, shape={**WORKLOAD.shape, "t": t}) for t in (500, 4000)]
    calls = first_calls([(recorded, workload) for workload in longer], "cpu", threads=1)
    assert len(calls) == 3
    assert {call.workload for call in calls} == {shape_class(longer[0], "cpu")}


def test_a_decode_has_no_backward() -> None:
    decode = next(example for example in OPERATOR.examples if example.phase == "decode")
    (call,) = first_calls([(kernel(Recorded()), decode)], "cpu")
    assert call.part == "forward"


def test_kernels_that_compile_nothing_or_must_be_alone_are_left_out() -> None:
    alone = kernel(Recorded(), first_calls_in_threads=False)
    assert first_calls([(CHUNKED, WORKLOAD), (alone, WORKLOAD)], "cpu") == []
    flex = CATALOGUE.kernel("softmax_attention", "flex_attention")
    assert flex.compiles
    assert not flex.first_calls_in_threads


def test_what_a_kernel_raises_is_noted_and_the_others_are_called() -> None:
    class Broken(Recorded):
        def forward(self, **arguments: Any) -> Any:
            raise RuntimeError("no such instruction\nmore")

    calls = first_calls([(kernel(Broken()), WORKLOAD)], "cpu")
    assert [call.failure for call in calls] == ["RuntimeError: no such instruction", None, None]
    assert all(call.seconds >= 0 for call in calls)


def test_a_kernel_that_cannot_be_imported_is_noted() -> None:
    missing = kernel(None)
    del missing.__dict__["torch_half"]
    (call,) = first_calls([(missing, WORKLOAD)], "cpu")
    assert call.failure == "ModuleNotFoundError: No module named 'nowhere'"


def test_there_is_a_core() -> None:
    assert cores() >= 1


# --- what checks compile is what runs call ------------------------------------------


SCAN = {"softplus": True, "skip": True, "gate": True, "dt_bias": True, "initial_state": False}
RUNS = {
    "causal_conv/fused": Workload(
        operator="causal_conv", dtype="bfloat16", phase="backward",
        options={"activation": "silu", "bias": True, "initial_state": False},
        shape={"b": 1, "t": 2048, "c": 2048, "w": 4, "documents": 16},
    ),
    "rotary/fused": Workload(
        operator="rotary", dtype="bfloat16", phase="backward", options={"theta": 1e6},
        shape={"b": 1, "t": 2048, "h": 16, "h_kv": 16, "k": 64, "documents": 16},
    ),
    "selective_scan/fused": Workload(
        operator="selective_scan", dtype="bfloat16", phase="backward", options=SCAN,
        shape={"b": 1, "t": 2048, "c": 2048, "n": 16, "documents": 16},
    ),
    "segment_attention/tiled": Workload(
        operator="segment_attention", dtype="bfloat16", phase="backward", options={"segment_len": 10},
        shape={"b": 1, "t": 2048, "h": 16, "h_kv": 16, "k": 64, "v": 64, "m": 0, "documents": 16},
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", RUNS)
def test_a_training_run_calls_no_kernel_that_first_calls_have_not_compiled(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton compiles anew for types, absent tensors, constants, and integers that are 1 or a multiple of 16."""
    seen = noted_launches(key, monkeypatch)
    run, fused = RUNS[key], CATALOGUE.kernel(*key.split("/"))
    operator = CATALOGUE.operator(fused.operator)
    monkeypatch.setattr("subquad_kernels.first_calls.shape_class", lambda workload, kind: shape_class(workload, "cuda"))
    monkeypatch.setattr("subquad_kernels.first_calls.run_class", lambda workload, kind: run_class(workload, "cuda"))
    assert {call.failure for call in first_calls([(fused, run)], "cpu", threads=1)} == {None}
    compiled = set(seen)
    seen.clear()
    arguments = operator.torch_half.sample_inputs(run, seed=0, device="cpu")
    outputs = tuple(torch.zeros_like(output) for output in operator.torch_half.empty_outputs(arguments))
    fused.torch_half.forward(**arguments)
    fused.torch_half.backward(arguments, outputs, (outputs[0], *[None] * (len(operator.outputs) - 1)))
    assert seen
    assert seen <= compiled


def of_heads(key: str, **shape: int) -> Workload:
    example = CATALOGUE.operator(key.partition("/")[0]).examples[0]
    return replace(example, dtype="bfloat16", phase="backward", shape={"b": 1, "t": 300, "n": 64, "p": 64} | shape)


MATRICES = {
    "linear_attention/fused": of_heads("linear_attention/fused", h=16, h_k=16),
    "gated_linear_attention/fused": of_heads("gated_linear_attention/fused", h=16),
}


@pytest.mark.parametrize("key", MATRICES)
def test_to_triton_any_number_of_heads_is_one_kernel(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same instructions come of it for sm_90, and a check's two heads and a run's sixteen are compiled once."""
    seen, kernel = noted_launches(key, monkeypatch), CATALOGUE.kernel(*key.split("/"))
    found = []
    for small in (shape_class(MATRICES[key], "cuda"), run_class(MATRICES[key], "cuda")):
        monkeypatch.setattr("subquad_kernels.first_calls.shape_class", lambda workload, kind, small=small: small)
        monkeypatch.setattr("subquad_kernels.first_calls.run_class", lambda workload, kind, small=small: small)
        assert {call.failure for call in first_calls([(kernel, small)], "cpu", threads=1)} == {None}
        found.append(set(seen))
        seen.clear()
    assert len(found[0]) > 4
    assert found[0] == found[1]


def test_to_triton_unpacked_scans_are_one_kernel_with_and_without_the_gradient_of_final_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, kernel = noted_launches("selective_scan/fused", monkeypatch), CATALOGUE.kernel("selective_scan", "fused")
    unpacked = replace(RUNS["selective_scan/fused"], shape={"b": 1, "t": 300, "c": 16, "n": 16})
    assert {call.failure for call in first_calls([(kernel, unpacked)], "cpu", threads=1)} == {None}
    launched = sorted(name for name, _ in seen)  # type: ignore[misc]
    assert launched == ["differentiate", "scan", "summarise_gradients"]


def noted_launches(key: str, monkeypatch: pytest.MonkeyPatch) -> set[object]:
    """For what Triton would compile launches from now on, which are not made."""
    seen: set[object] = set()
    catalogue.load_attribute(CATALOGUE.kernel(*key.split("/")).implementation)
    room = f"subquad_kernels.{key.partition('/')[0]}."
    for module in [module for name, module in sys.modules.items() if name.startswith(room)]:
        for name, function in list(vars(module).items()):
            jitted = getattr(function, "jitted", function)
            if hasattr(jitted, "arg_names") and hasattr(jitted, "__getitem__"):
                monkeypatch.setattr(module, name, Notes(jitted, seen))
    return seen


class Notes:
    """Stands where a jitted kernel stood: a launch notes for what Triton would compile it."""

    def __init__(self, function: Any, seen: set[object]) -> None:
        self._function, self._seen = function, seen

    def __getitem__(self, grid: object) -> Any:
        return self._launch

    def _launch(self, *args: Any, **named: Any) -> None:
        values = dict(zip(self._function.arg_names, args)) | named
        general = _not_specialized(self._function)
        facts = {name: _fact(value, name in named, name in general) for name, value in values.items()}
        self._seen.add((self._function.__name__, tuple(sorted(facts.items()))))


def _not_specialized(function: Any) -> list[str]:
    interpreted = getattr(function, "kwargs", {})
    return interpreted.get("do_not_specialize") or getattr(function, "do_not_specialize", None) or []


def _fact(value: Any, constant: bool, general: bool) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}, aligned {value.storage_offset() * value.element_size() % 16 == 0}"
    if constant or value is None:
        return str(value)
    if isinstance(value, int) and not general:
        return f"1 {value == 1}, divisible {value % 16 == 0}"
    return type(value).__name__
