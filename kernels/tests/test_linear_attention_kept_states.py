"""A backward whose states lie in memory, a chunk a program: in Triton's interpreter without a GPU, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from on_a_gpu import assert_within_tolerance
from test_linear_attention_fused import CUT, ON_GPU, OPERATOR, assert_exact, bounds, errors_of, sample, workload
from test_linear_attention_shared_keys import Allocations

from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.linear_attention import declaration, fused, kept_states, tiled_states
from subquad_kernels.triton_launch import QuickLaunch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
]

# Chunks of 16 tokens, two of them a segment.
KEPT = replace(CUT, kept=kept_states.Kept())


@pytest.mark.parametrize("t", [2, 16, 17, 71])
def test_all_gradients_equal_the_reference(t: int) -> None:
    assert_exact(sample(workload(t)), KEPT)


@pytest.mark.parametrize("decay", ["head", "none"])
def test_required_tensors_alone_will_do(decay: str) -> None:
    assert_exact(sample(workload(40, decay=decay, full=False)), KEPT)


@pytest.mark.parametrize("gate", ["write_gate", "diagonal", "initial_state"])
def test_each_optional_tensor_may_be_absent(gate: str) -> None:
    assert_exact(sample(workload(40), **{gate: None}), KEPT)


def test_sequences_and_heads_do_not_mix() -> None:
    """Four heads over two of q and k, of two sequences."""
    assert_exact(sample(workload(40, b=2, h=4, h_k=2, n=3, p=17)), KEPT)


@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
def test_packed_documents_have_states_of_their_own(full: bool) -> None:
    """Empty documents, of one token, of one chunk, and some that cross a segment or end at one."""
    lengths = (0, 3, 1, 0, 16, 37, 5, 0)
    case = workload(sum(lengths), full=full, documents=len(lengths))
    assert_exact(sample(case, cu_seqlens=bounds(*lengths)), KEPT)


def test_a_document_that_spans_many_segments_carries_its_state() -> None:
    assert_exact(sample(workload(103, documents=2), cu_seqlens=bounds(3, 100)), KEPT)


TILED = replace(CUT, kept=kept_states.Kept(tile=16))
"""States in tiles of 16 rows and columns."""


@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
@pytest.mark.parametrize(("n", "p", "pairs", "step"), [(20, 40, 2, 64), (12, 20, 1, 16), (33, 9, 1, 16)])
def test_a_state_may_be_several_tiles_and_several_steps_across(
    n: int, p: int, pairs: int, step: int, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads over one of q and k; and two such pairs, of two sequences."""
    monkeypatch.setattr(tiled_states, "_ACROSS", step)
    assert_exact(sample(workload(40, b=pairs, h=2 * pairs, h_k=pairs, n=n, p=p, full=full)), TILED)


def test_packed_states_may_be_several_tiles() -> None:
    lengths = (0, 3, 1, 0, 16, 37, 5, 0)
    case = workload(sum(lengths), n=20, p=40, documents=len(lengths))
    assert_exact(sample(case, cu_seqlens=bounds(*lengths)), TILED)


@pytest.mark.parametrize("gate", ["write_gate", "diagonal", "initial_state"])
def test_each_optional_tensor_may_be_absent_where_a_state_is_several_tiles(gate: str) -> None:
    assert_exact(sample(workload(40, n=20, p=40), **{gate: None}), TILED)


@pytest.mark.parametrize("rate", [-1e-8, -5.0, -1e6, -torch.inf], ids=str)
def test_extreme_decays_neither_overflow_nor_lose_gradients(rate: float) -> None:
    arguments = sample(workload(40))
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], rate)
    assert_exact(arguments, KEPT)


def test_chunks_may_be_longer_than_those_of_the_forward() -> None:
    assert_exact(sample(workload(71)), CUT, replace(KEPT, chunk=32))


def test_a_forward_that_is_not_cut_leaves_what_is_needed() -> None:
    assert_exact(sample(workload(71)), replace(CUT, enough=1), KEPT)


@pytest.mark.parametrize("rate", [None, -1e-8, -0.05, -5.0], ids=str)
def test_rounded_operands_cost_one_rounding_and_the_decays_gradient_no_more(rate: float | None) -> None:
    """float16 stands for bfloat16, which the interpreter cannot compute."""
    arguments = sample(workload(400, full=False, dtype="float16", h=1, n=32, p=32))
    if rate is not None:
        arguments["log_decay"] = torch.full_like(arguments["log_decay"], rate)
    errors = errors_of(arguments, replace(KEPT, chunk=64, segment_len=256))
    assert max(errors.values()) < OPERATOR.tolerances["float16"].output, errors


def test_gradients_are_those_of_a_walk_but_for_the_last_digits() -> None:
    """Both round the same operands: what is left is the order of sums in fp32."""
    arguments = sample(workload(200, dtype="float16", n=32, p=32))
    launch = replace(CUT, tile_p=32, chunk=64, segment_len=64)
    outputs = fused.forward(launch, **arguments)
    walked, kept = (
        fused.backward(arguments, outputs, outputs[:2], which)
        for which in (launch, replace(launch, kept=kept_states.Kept()))
    )
    for name, gradient in walked.items():
        if gradient is not None:
            largest = float(gradient.abs().max())
            torch.testing.assert_close(kept[name], gradient, rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_the_package_keeps_states_of_more_than_64_rows_and_columns_in_half_precision() -> None:
    def kept(n: int, p: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> bool:
        forward, backward = (fused.launch_of(n, p, dtype, backward=back, **options) for back in (False, True))
        assert forward.kept is None
        return backward.kept is not None

    assert kept(128, 128)
    assert kept(128, 128, group=32, packed=True)
    assert kept(80, 96)
    assert not kept(128, 64)
    assert not kept(64, 128)
    assert kept(256, 128)
    assert kept(256, 512)
    assert not kept(128, 128, torch.float32)
    assert not kept(128, 128, room=False)


@pytest.mark.parametrize("documents", [0, 3])
@pytest.mark.parametrize(
    ("n", "p", "decay"),
    [(80, 70, "token"), (80, 70, "head"), (80, 70, "none"), (130, 270, "token"), (130, 270, "none")],
)
def test_declared_scratch_is_what_a_backward_allocates(
    n: int, p: int, decay: str, documents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what it returns, and the table of packed documents' chunks. Nothing is computed."""
    monkeypatch.setattr(QuickLaunch, "_launch", lambda *_, **__: None)
    packed = {"documents": documents} if documents else {}
    case = workload(300, h=1, n=n, p=p, full=False, decay=decay, dtype="float16", **packed)
    arguments = sample(case)
    outputs = fused.forward(**arguments)
    with Allocations() as asked:
        found = fused.backward(arguments, outputs, (torch.ones_like(outputs[0]), None))
    gradients = [found[name] for name in ("q", "k", "v", *(["log_decay"] if decay == "token" else []))]
    returned = sum(gradient.nbytes for gradient in gradients if gradient is not None)
    table = 4 * (4 * (declaration.chunk_slots(300, documents) + 1) + documents + 1) if documents else 0
    declared = CATALOGUE.kernel("linear_attention", "fused").scratch_bytes
    assert declared is not None
    assert asked.bytes - returned - table == declared(replace(case, phase="backward"))


def test_the_same_call_gives_the_same_bits() -> None:
    on_gpu = workload(3000, b=2, h=16, h_k=16, n=128, p=128, dtype="bfloat16")
    arguments = sample(on_gpu if ON_GPU else workload(40))
    launch = None if ON_GPU else KEPT
    outputs = fused.forward(launch, **arguments)
    first, second = (fused.backward(arguments, outputs, outputs[:2], launch) for _ in range(2))
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items() if gradient is not None)


def test_a_missing_gradient_is_zero() -> None:
    arguments = sample(workload(20))
    outputs = fused.forward(KEPT, **arguments)
    pull = torch.ones_like(outputs[0])
    some = fused.backward(arguments, outputs, (pull, None), KEPT)
    same = fused.backward(arguments, outputs, (pull, torch.zeros_like(outputs[1])), KEPT)
    assert all(torch.equal(some[name], same[name]) for name in same if same[name] is not None)
    state_alone = fused.backward(arguments, outputs, (None, torch.ones_like(outputs[1])), KEPT)
    assert state_alone["k"].any()
    assert not state_alone["q"].any()


def test_a_planted_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of a state that does not pass a segment."""
    compose = fused.Call.compose

    def passes(call: Any, *values: Any, reverse: bool, **rest: Any) -> None:
        if not reverse:
            compose(call, *values, reverse=reverse, **rest)

    monkeypatch.setattr(fused.Call, "compose", passes)
    with pytest.raises(AssertionError):
        assert_exact(sample(workload(71)), KEPT)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "decay", "full"),
    [
        (dict(b=2, t=1025, h=16, h_k=16, n=128, p=128), "head", False),
        (dict(b=2, t=700, h=4, h_k=2, n=128, p=128), "token", True),
        (dict(b=1, t=900, h=4, h_k=4, n=128, p=96, documents=9), "token", True),
        (dict(b=1, t=517, h=8, h_k=1, n=80, p=128, documents=5), "none", False),
        (dict(b=3, t=2, h=2, h_k=2, n=128, p=128), "head", True),
        (dict(b=2, t=1025, h=4, h_k=4, n=256, p=512), "head", False),
        (dict(b=1, t=700, h=4, h_k=2, n=256, p=160, documents=6), "token", True),
    ],
    ids=str,
)
def test_on_a_gpu_it_is_within_the_operators_tolerance(
    shape: dict[str, int], decay: str, full: bool, dtype: str
) -> None:
    case = workload(full=full, decay=decay, dtype=dtype, **shape)
    arguments = sample(case, "cuda")
    assert fused.Call(arguments).launch(backward=True).kept is not None
    assert_within_tolerance(CATALOGUE.kernel("linear_attention", "fused"), case, arguments)
