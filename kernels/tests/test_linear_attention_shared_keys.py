"""Heads that share keys, several a program: in Triton's interpreter where there is no GPU, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from on_a_gpu import assert_within_tolerance
from test_linear_attention_fused import (
    ON_GPU,
    OPERATOR,
    assert_exact,
    bounds,
    errors_of,
    sample,
    workload,
)
from torch.utils._python_dispatch import TorchDispatchMode

from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.linear_attention import fused
from subquad_kernels.linear_attention.declaration import heads_of
from subquad_kernels.linear_attention.shared_keys import Shared
from subquad_kernels.triton_launch import QuickLaunch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
]

# Chunks of 16 tokens, two of them a segment, two heads a program.
PAIRS = fused.Launch(tile_p=16, chunk=16, segment_len=32, shared=Shared(heads=2))


@pytest.mark.parametrize("t", [2, 16, 17, 71])
def test_outputs_and_all_gradients_equal_the_reference(t: int) -> None:
    assert_exact(sample(workload(t, h=4)), PAIRS)


@pytest.mark.parametrize("decay", ["head", "none"])
def test_required_tensors_alone_will_do(decay: str) -> None:
    assert_exact(sample(workload(40, h=2, decay=decay, full=False)), PAIRS)


@pytest.mark.parametrize("gate", ["write_gate", "diagonal", "initial_state"])
def test_each_optional_tensor_may_be_absent(gate: str) -> None:
    assert_exact(sample(workload(40), **{gate: None}), PAIRS)


def test_sequences_groups_and_programs_do_not_mix() -> None:
    """Two groups of four heads, two programs each, of two sequences."""
    assert_exact(sample(workload(40, b=2, h=8, h_k=2, n=3, p=17)), PAIRS)


@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
def test_packed_documents_have_states_of_their_own(full: bool) -> None:
    """Empty documents, of one token, of one chunk, and some that cross a segment or end at one."""
    lengths = (0, 3, 1, 0, 16, 37, 5, 0)
    case = workload(sum(lengths), full=full, documents=len(lengths))
    assert_exact(sample(case, cu_seqlens=bounds(*lengths)), PAIRS)


def test_a_document_that_spans_many_segments_carries_its_state() -> None:
    assert_exact(sample(workload(103, documents=2), cu_seqlens=bounds(3, 100)), PAIRS)


@pytest.mark.parametrize("rate", [-1e-8, -5.0, -1e6, -torch.inf], ids=str)
def test_extreme_decays_neither_overflow_nor_lose_gradients(rate: float) -> None:
    arguments = sample(workload(40))
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], rate)
    assert_exact(arguments, PAIRS)


@pytest.mark.parametrize("directions", [(PAIRS, None), (None, PAIRS)], ids=["forward", "backward"])
def test_either_direction_may_take_heads_one_by_one(directions: tuple[fused.Launch | None, ...]) -> None:
    """Their residuals are the same."""
    alone = replace(PAIRS, shared=None)
    assert_exact(sample(workload(71)), *(launch or alone for launch in directions))


def test_chunks_of_a_forward_may_be_longer_than_those_of_its_backward() -> None:
    assert_exact(sample(workload(71)), replace(PAIRS, chunk=32), PAIRS)


@pytest.mark.parametrize("rate", [None, -1e-8, -0.05, -5.0], ids=str)
def test_rounded_operands_cost_one_rounding_and_the_decays_gradient_no_more(rate: float | None) -> None:
    """float16 stands for bfloat16, which the interpreter cannot compute."""
    arguments = sample(workload(400, full=False, dtype="float16", n=32, p=32))
    if rate is not None:
        arguments["log_decay"] = torch.full_like(arguments["log_decay"], rate)
    errors = errors_of(arguments, replace(PAIRS, chunk=64, segment_len=256))
    assert max(errors.values()) < OPERATOR.tolerances["float16"].output, errors


def test_the_package_takes_several_heads_where_eight_share_keys_of_fitting_widths() -> None:
    def shared(n: int, p: int, group: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        launches = [
            fused.launch_of(n, p, dtype, backward=back, group=group, packed=packed)
            for back in (False, True)
            for packed in (False, True)
        ]
        assert len({launch.shared is None for launch in launches}) == 1
        return launches[0].shared is not None

    assert shared(128, 64, 32)
    assert shared(64, 48, 8)
    assert not shared(128, 64, 4)
    assert not shared(128, 64, 12)
    assert not shared(128, 128, 32)
    assert not shared(64, 32, 32)
    assert not shared(128, 64, 32, torch.float32)


def test_the_residual_has_the_shape_that_the_operator_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of 128 too, and of 64 where documents are packed."""
    monkeypatch.setattr(fused, "has_room", lambda device: True)
    halves = {"dtype": "float16", "h": 8, "n": 64, "p": 64, "full": False}
    for case in (workload(300, **halves), workload(90, documents=3, **halves)):  # type: ignore[arg-type]
        arguments = sample(case)
        assert fused.Call(arguments).launch(backward=False).shared is not None
        promised = OPERATOR.torch_half.empty_outputs(arguments)
        for expected, result in zip(promised, fused.forward(**arguments), strict=True):
            assert (expected.shape, expected.dtype) == (result.shape, result.dtype)


def test_the_same_call_gives_the_same_bits() -> None:
    on_gpu = workload(3000, b=2, h=32, n=128, p=64, dtype="bfloat16")
    arguments = sample(on_gpu if ON_GPU else workload(40))
    launch = None if ON_GPU else PAIRS
    outputs = fused.forward(launch, **arguments)
    first, second = (fused.backward(arguments, outputs, outputs[:2], launch) for _ in range(2))
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items() if gradient is not None)


def test_every_launch_begins_with_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says on which device: whatever a call leaves out."""
    launch, launched = QuickLaunch._launch, []

    def asserting(kernel: QuickLaunch, programs: tuple[int, ...], /, *values: Any, **constants: Any) -> None:
        assert isinstance(values[0], torch.Tensor), kernel.jitted
        launched.append(kernel)
        launch(kernel, programs, *values, **constants)

    monkeypatch.setattr(QuickLaunch, "_launch", asserting)
    assert_exact(sample(workload(40, full=False)), PAIRS)
    assert len(set(launched)) == 9


def test_a_missing_gradient_is_zero() -> None:
    arguments = sample(workload(40))
    outputs = fused.forward(PAIRS, **arguments)
    pull = torch.ones_like(outputs[0])
    some = fused.backward(arguments, outputs, (pull, None), PAIRS)
    same = fused.backward(arguments, outputs, (pull, torch.zeros_like(outputs[1])), PAIRS)
    for name, gradient in same.items():
        if gradient is not None:
            torch.testing.assert_close(some[name], gradient)
    state_alone = fused.backward(arguments, outputs, (None, torch.ones_like(outputs[1])), PAIRS)
    assert state_alone["k"].any()
    assert not state_alone["q"].any()


class Allocations(TorchDispatchMode):
    """Bytes that are asked for."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("empty", "new_empty", "empty_like"):
            self.bytes += result.nbytes
        return result


@pytest.mark.parametrize("h", [8, 16])
def test_declared_scratch_is_what_a_backward_allocates(h: int) -> None:
    """Beside what it returns, one program a chunk and two."""
    case = workload(70, h=h, h_k=1, n=64, p=64, full=False, dtype="float16")
    arguments = sample(case)
    outputs = fused.forward(**arguments)
    with Allocations() as asked:
        found = fused.backward(arguments, outputs, (torch.ones_like(outputs[0]), None))
    returned = sum(gradient.nbytes for gradient in found.values() if gradient is not None)
    declared = CATALOGUE.kernel("linear_attention", "fused").scratch_bytes
    assert declared is not None
    assert asked.bytes - returned == declared(replace(case, phase="backward"))


@pytest.mark.parametrize(("group", "pairs", "heads"), [(32, 2**14, 32), (32, 2**12, 16), (32, 64, 8), (24, 2**14, 8)])
def test_a_program_takes_as_many_heads_as_leave_the_device_full(group: int, pairs: int, heads: int) -> None:
    assert heads_of(group, pairs) == heads


def test_a_planted_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that does not pass a segment: of the forward, and of the gradients alone."""
    compose = fused.Call.compose
    for broken in (False, True):

        def passes(call: Any, *values: Any, reverse: bool, broken: bool = broken, **rest: Any) -> None:
            if reverse is not broken:
                compose(call, *values, reverse=reverse, **rest)

        monkeypatch.setattr(fused.Call, "compose", passes)
        with pytest.raises(AssertionError):
            assert_exact(sample(workload(71)), PAIRS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "decay", "full"),
    [
        (dict(b=2, t=1025, h=32, h_k=1, n=128, p=64), "token", False),
        (dict(b=2, t=1025, h=8, h_k=1, n=128, p=64), "token", True),
        (dict(b=1, t=900, h=16, h_k=2, n=128, p=48, documents=9), "token", True),
        (dict(b=1, t=517, h=8, h_k=1, n=64, p=64, documents=5), "none", False),
        (dict(b=2, t=300, h=8, h_k=1, n=70, p=64), "head", True),
        (dict(b=3, t=2, h=8, h_k=1, n=64, p=64), "head", False),
    ],
    ids=str,
)
def test_on_a_gpu_it_is_within_the_operators_tolerance(
    shape: dict[str, int], decay: str, full: bool, dtype: str
) -> None:
    case = workload(full=full, decay=decay, dtype=dtype, **shape)
    arguments = sample(case, "cuda")
    assert fused.Call(arguments).launch(backward=True).shared is not None
    assert_within_tolerance(CATALOGUE.kernel("linear_attention", "fused"), case, arguments)
