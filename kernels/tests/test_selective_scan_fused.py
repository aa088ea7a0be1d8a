"""The fused selective scan: in Triton's interpreter where there is no GPU, against the definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from on_a_gpu import assert_a_graph_replays_with_other_boundaries, assert_within_tolerance
from torch import Tensor

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.selective_scan import chunked, declaration, definition, fused, fused_forward
from subquad_kernels.selective_scan.cuts import cut
from subquad_kernels.self_check import kernel_errors
from subquad_kernels.workload import DeviceLimits, Option, Workload

# The interpreter computes in numpy: lanes that a mask discards may hold anything. Results are checked, for NaN too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
]

OPERATOR = declaration.OPERATOR
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"  # without a GPU the kernels run in Triton's interpreter


def workload(t: int, *, full: bool = True, softplus: bool = True, dtype: str = "float32", **shape: int) -> Workload:
    """b = 1, c = 3, n = 3 unless told; `full` gives every optional tensor."""
    options: dict[str, Option] = dict.fromkeys(("skip", "gate", "dt_bias", "initial_state"), full)
    axes = {"b": 1, "t": t, "c": 3, "n": 3} | shape
    return Workload(operator="selective_scan", shape=axes, dtype=dtype, options={"softplus": softplus} | options)  # type: ignore[arg-type]


def sample(case: Workload, device: str = DEVICE, **changes: Any) -> dict[str, Any]:
    return definition.sample_inputs(case, seed=0, device=device) | changes


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)


def launched(launch: fused.Launch | None) -> Any:
    """The kernel's record, with its functions bound to a launch."""

    class Bound:
        @staticmethod
        def forward(**arguments: Any) -> tuple[Tensor, ...]:
            return fused.forward(launch, **arguments)

        @staticmethod
        def backward(*values: Any) -> dict[str, Tensor | None]:
            return fused.backward(*values, launch)

    kernel = replace(CATALOGUE.kernel("selective_scan", "fused"))
    kernel.__dict__["torch_half"] = Bound
    return kernel


def errors_of(arguments: dict[str, Any], launch: fused.Launch | None = None) -> dict[str, float]:
    """Errors of both outputs and of every gradient, with gradients flowing in through both outputs."""
    found = kernel_errors(OPERATOR, launched(launch), arguments, gradients=True)
    given = [name for name in OPERATOR.tensors if arguments[name] is not None and name != "cu_seqlens"]
    assert set(found) == {"y", "final_state", *(f"d_{name}" for name in given)}
    return found


def assert_exact(arguments: dict[str, Any], launch: fused.Launch | None = None) -> None:
    errors = errors_of(arguments, launch)
    tolerance = OPERATOR.tolerances["float32"]
    for name, error in errors.items():
        assert error <= (tolerance.gradient if name.startswith("d_") else tolerance.output), f"{name}: {error:.1e}"


SMALL = fused.Launch(tile_c=4, group=4, first=1.0)


@pytest.mark.parametrize("t", [1, 15, 16, 17])
def test_outputs_and_all_gradients_equal_the_reference_at_the_edges_of_a_chunk(t: int) -> None:
    assert_exact(sample(workload(t)))


@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
@pytest.mark.parametrize(("b", "c", "n"), [(1, 70, 16), (3, 5, 3), (1, 1, 1)])
def test_one_token_has_a_kernel_of_its_own(b: int, c: int, n: int, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs at the edge of c, states that are no power of two; nothing walks."""
    monkeypatch.setattr(fused, "scan", None)
    assert_exact(sample(workload(1, b=b, c=c, n=n, full=full)))


def test_optional_tensors_may_be_absent() -> None:
    assert_exact(sample(workload(7, full=False, softplus=False)))


def test_tiles_and_sequences_do_not_mix() -> None:
    assert_exact(sample(workload(3, b=2, c=5)), SMALL)


@pytest.mark.parametrize(("tile_c", "n", "group"), [(16, 16, 4), (16, 16, 2), (16, 16, 8), (8, 16, 4), (8, 64, 2)])
def test_folded_sums_go_to_their_channels_and_tokens(tile_c: int, n: int, group: int) -> None:
    """Two parts a tile, one, and four; as many tokens as rows on lanes hold, fewer and more; channels outside."""
    assert_exact(sample(workload(9, c=tile_c - 3, n=n)), fused.Launch(tile_c=tile_c, group=group))


@pytest.mark.parametrize("n", [1, 5])
def test_state_sizes_that_are_not_powers_of_two_are_masked(n: int) -> None:
    assert_exact(sample(workload(3, n=n)), replace(SMALL, group=2))


def test_cutting_time_changes_nothing() -> None:
    """Three segments, the last of them short: states and gradients cross two cuts."""
    assert_exact(sample(workload(37)), fused.with_segments(SMALL, 16))


@pytest.mark.parametrize("first", [0.0, 0.5, 1.5])
def test_the_first_segment_may_have_a_length_of_its_own(first: float) -> None:
    """None, shorter and longer than the others, of which one or two are summarised."""
    arguments = sample(workload(85, c=2))
    found = fused.forward(replace(SMALL, segment_len=32, first=first), **arguments)
    for mine, theirs in zip(found, chunked.forward(**arguments), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("segment_len", "expected"),
    [(None, [(4, 0)]), (32, [(4, 0), (4, 1)]), (16, [(12, 0), (12, 1)])],
    ids=["one segment", "two", "four"],
)
def test_first_and_last_segments_are_not_summarised(
    segment_len: int | None, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs of each launch, four a segment, and how many segments were scanned before it."""
    launches = []

    class Counted:
        def __getitem__(self, programs: tuple[int, ...]) -> Any:
            return lambda *values, **_: launches.append((*programs, values[scanned]))

    scanned = fused_forward.scan.jitted.arg_names.index("scanned")
    monkeypatch.setattr(fused, "scan", Counted())
    fused.forward(fused.with_segments(SMALL, segment_len), **sample(workload(50, b=2, c=5)))
    assert launches == expected


@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
@pytest.mark.parametrize("segment_len", [None, 16], ids=["whole", "cut"])
def test_packed_documents_have_states_of_their_own(full: bool, segment_len: int | None) -> None:
    """Empty documents, documents of one token, one that starts at a cut and one that crosses it."""
    lengths = (0, 3, 1, 0, 12, 5, 0)
    arguments = sample(workload(21, full=full, documents=7), cu_seqlens=bounds(*lengths))
    assert_exact(arguments, fused.with_segments(SMALL, segment_len))


@pytest.mark.parametrize("segment_len", [None, 16], ids=["whole", "cut"])
def test_reversed_scans_from_the_last_token_with_every_gradient(segment_len: int | None) -> None:
    """Two chunks, the second short: which tokens share a chunk is counted from the other end."""
    assert_exact(sample(workload(21, b=2), reversed=True), fused.with_segments(SMALL, segment_len))


@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
def test_reversed_documents_begin_at_their_last_tokens(full: bool) -> None:
    lengths = (0, 3, 1, 0, 12, 5, 0)
    arguments = sample(workload(21, full=full, documents=7), cu_seqlens=bounds(*lengths), reversed=True)
    assert_exact(arguments, fused.with_segments(SMALL, 16))


@pytest.mark.parametrize("step", [1e-8, 50.0], ids=["decay near 1", "decay underflows"])
def test_extreme_decays_neither_overflow_nor_lose_gradients(step: float) -> None:
    arguments = sample(workload(18, softplus=False), dt_bias=None)
    arguments["dt"] = torch.full_like(arguments["dt"], step)
    assert_exact(arguments, fused.with_segments(SMALL, 16))


def test_small_steps_keep_their_precision() -> None:
    """softplus(-12) = 6e-6: the logarithm of 1 + 6e-6 has 2e-2 of its digits left in fp32."""
    arguments = sample(workload(3))
    arguments["dt"] = torch.full_like(arguments["dt"], -12) - arguments["dt_bias"]
    assert_exact(arguments)


@pytest.mark.parametrize("reversed", [False, True])
def test_residuals_are_those_the_operator_declares(reversed: bool) -> None:
    lengths = (13, 4, 16) if reversed else (16, 4, 13)
    arguments = sample(workload(33, c=2, n=2, documents=3), cu_seqlens=bounds(*lengths), reversed=reversed)
    expected, found = chunked.forward(**arguments), fused.forward(SMALL, **arguments)
    assert found[2].shape == (2, 1, 2, 2)
    assert not found[2][0].any()  # a document starts at the scan's token 16
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_slices_of_wider_tensors_are_taken_as_they_are() -> None:
    """x and z are halves of one projection, B and C slices of another: views, with rows further apart."""
    arguments = sample(workload(3, b=2))
    expected = fused.forward(**arguments)
    wide = torch.cat([arguments["x"], arguments["z"]], dim=2)
    maps = torch.cat([arguments["B"], arguments["C"]], dim=2)
    views = dict(zip("xzBC", (*wide.chunk(2, 2), *maps.chunk(2, 2))))
    assert all(torch.equal(a, b) for a, b in zip(fused.forward(**arguments | views), expected))


def test_the_same_call_gives_the_same_bits() -> None:
    arguments = sample(workload(300, b=2, c=96) if ON_GPU else workload(2))
    outputs, again = (fused.forward(**arguments) for _ in range(2))
    assert all(map(torch.equal, outputs, again))
    first, second = (fused.backward(arguments, outputs, outputs[:2]) for _ in range(2))
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items() if gradient is not None)


def test_a_missing_gradient_is_zero() -> None:
    arguments = sample(workload(2))
    outputs = fused.forward(**arguments)
    pull = torch.ones_like(outputs[0])
    some = fused.backward(arguments, outputs, (pull, None))
    same = fused.backward(arguments, outputs, (pull, torch.zeros_like(outputs[1])))
    assert all(torch.equal(some[name], same[name]) for name in same if same[name] is not None)
    state_alone = fused.backward(arguments, outputs, (None, torch.ones_like(outputs[1])))
    assert state_alone["x"].any()
    assert not state_alone["C"].any()


def test_a_planted_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of this file can fail, for one gradient alone and for a state that is not passed on."""
    arguments = sample(workload(17))
    honest = fused._Call.backward

    def loses_a_digit(*values: Any) -> dict[str, Tensor | None]:
        found = honest(*values)
        return found | {"A": found["A"] * 1.001}

    monkeypatch.setattr(fused._Call, "backward", loses_a_digit)
    with pytest.raises(AssertionError, match="d_A"):
        assert_exact(arguments)
    monkeypatch.undo()
    marks = fused._marks
    # No document ever starts.
    monkeypatch.setattr(fused, "_marks", lambda *values, **named: marks(*values, **named) & ~1)
    with pytest.raises(AssertionError):
        assert_exact(sample(workload(4, documents=2), cu_seqlens=bounds(2, 2)))


def test_what_it_cannot_compute_is_declined_with_a_reason() -> None:
    kernel = CATALOGUE.kernel("selective_scan", "fused")
    h100 = DeviceLimits(kind="cuda", name="H100", capability=(9, 0))
    assert kernel.supports(workload(9, dtype="bfloat16"), h100) is None
    assert "float64" in str(kernel.supports(workload(9, dtype="float64"), h100))
    assert "64 states" in str(kernel.supports(workload(9, n=65), h100))
    assert "8.0" in str(kernel.supports(workload(9), DeviceLimits(kind="cuda", name="V100", capability=(7, 0))))
    with pytest.raises(TypeError, match="chunked"):
        fused.forward(**sample(workload(2, dtype="float64")))


def test_time_is_cut_only_where_programs_are_few() -> None:
    launch = fused.launch_of(16, backward=True)

    def segments(b: int, t: int, c: int) -> int:
        return cut(launch, b, t, c).segments

    assert segments(16, 2048, 2048) == 1
    assert segments(1, 32768, 2048) >= 16
    assert segments(1, 1, 2048) == 1
    assert segments(1, 65, 32) == 1 + 1  # no segment is shorter than 64 tokens but the last


def test_a_short_first_segment_leaves_the_others_as_few_programs_and_no_short_one() -> None:
    """Three segments and 0.8 of one: 4 sequences of 128 tiles fill 1,584 programs three times, whole chunks each."""
    found = cut(fused.launch_of(16, backward=False), 4, 8192, 2048)
    assert (found.tiles, found.segments) == (128, 4)
    assert found.segment_len == math.ceil(8192 / 3.8 / 16) * 16


@pytest.mark.parametrize("documents", [0, 3])
@pytest.mark.parametrize(("b", "t", "c"), [(2, 1, 40), (2, 40, 40), (1, 900, 40), (3, 700, 300), (4, 130, 16 * 140)])
def test_declared_steps_are_the_tokens_that_launches_walk(
    b: int, t: int, c: int, documents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take one cut; here the longest walk of every launch is read off the arguments that the kernel is given."""
    if t < documents:
        pytest.skip("no documents of so few tokens")
    case = workload(t, c=c, n=16, b=1 if documents else b, **({"documents": documents} if documents else {}))
    walked: list[int] = []

    def instead(name: str, longest: Callable[[dict[str, Any]], int]) -> None:
        kernel = getattr(fused, name)

        class Walked:
            def __getitem__(self, programs: tuple[int, ...]) -> Callable[..., None]:
                return lambda *values, **_: walked.append(longest(dict(zip(kernel.jitted.arg_names, values))))

        monkeypatch.setattr(fused, name, Walked())

    def scanned(given: dict[str, Any]) -> int:
        behind = max(0, given["t"] - given["first_len"])
        if given["scanned"]:
            return min(given["segment_len"], behind)
        return max(min(given["t"], given["first_len"]), given["segment_len"] if behind > given["segment_len"] else 0)

    instead("scan", scanned)
    instead("step_one", lambda given: 1)
    instead("_mark", lambda given: 0)
    instead("summarise_gradients", lambda given: min(given["t"], given["segment_len"]))
    instead("differentiate", lambda given: 2 * min(given["t"], given["segment_len"]))
    declared = CATALOGUE.kernel("selective_scan", "fused").serial_steps
    assert declared is not None
    arguments = sample(case)
    outputs = fused.forward(**arguments)
    assert sum(walked) == declared(case)
    walked.clear()
    fused.backward(arguments, outputs, outputs[:2])
    assert sum(walked) == declared(replace(case, phase="backward"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("shape", "full"),
    [
        (dict(b=2, t=700, c=96, n=16), True),
        (dict(b=2, t=333, c=256, n=16), False),
        (dict(b=1, t=700, c=160, n=16, documents=9), True),
        (dict(b=1, t=517, c=128, n=8, documents=5), False),
        (dict(b=3, t=1, c=200, n=64), True),
        (dict(b=2, t=129, c=96, n=13), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("reversed", [False, True], ids=["forward", "reversed"])
def test_on_a_gpu_it_is_within_the_operators_tolerance(
    shape: dict[str, int], full: bool, dtype: str, reversed: bool
) -> None:
    case = workload(full=full, dtype=dtype, **shape)
    kernel = CATALOGUE.kernel("selective_scan", "fused")
    for launch in (None, replace(fused.launch_of(shape["n"], backward=True), segment_len=64, first=0.6)):
        assert_within_tolerance(kernel, case, sample(case, "cuda", reversed=reversed), launched(launch))


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_host() -> None:
    arguments = sample(workload(300, c=96, n=16, dtype="bfloat16", documents=4), "cuda")
    assert_a_graph_replays_with_other_boundaries(fused, arguments, 100, 0, 1, 199)
