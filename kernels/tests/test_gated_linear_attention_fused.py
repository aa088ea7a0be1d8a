"""Fused gated linear attention: in Triton's interpreter where there is no GPU, against the definition in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from on_a_gpu import assert_a_graph_replays_with_other_boundaries, assert_within_tolerance
from torch import Tensor

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.gated_linear_attention import declaration, definition, fused
from subquad_kernels.self_check import judge, kernel_errors
from subquad_kernels.workload import DeviceLimits, Workload

# The interpreter computes in numpy: lanes that a mask discards may hold anything. Results are checked, for NaN too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
]

OPERATOR = declaration.OPERATOR
KERNEL = CATALOGUE.kernel("gated_linear_attention", "fused")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"  # without a GPU the kernels run in Triton's interpreter
BY_TOKEN = ("q", "k", "v", "log_decay")


def launch(*, chunk: int = 16, tile: int = 16, stretch: int | None = None) -> fused.Launch:
    """Stretches other than the operator's have another residual: for calls of the kernel alone."""
    tiles = fused.Tiles(width=tile)
    return fused.Launch(summarise=tiles, read=tiles, differentiate=tiles, violent=tiles, chunk=chunk, stretch=stretch)


# Two chunks a stretch and two tiles of a state: every seam of the kernels within 40 tokens.
CUT = launch(stretch=32)


def workload(t: int, *, read: str = "before", full: bool = True, dtype: str = "float32", **shape: int) -> Workload:
    """b = 1, h = 1, n = 5, p = 20 unless told; `full` gives every optional tensor that `read` allows."""
    axes = {"b": 1, "t": t, "h": 1, "n": 5, "p": 20} | shape
    options: dict[str, Any] = {"read": read, "bonus": full and read == "before", "initial_state": full}
    options["decay_dtype"] = "float32"
    return Workload(operator="gated_linear_attention", shape=axes, dtype=dtype, options=options)  # type: ignore[arg-type]


def sample(case: Workload, device: str = DEVICE, **changes: Any) -> dict[str, Any]:
    return definition.sample_inputs(case, seed=0, device=device) | changes


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)


def errors_of(arguments: dict[str, Any], launch: fused.Launch | None = CUT) -> dict[str, float]:
    """Errors of both outputs and of every gradient, with gradients flowing in through both outputs."""

    class Bound:
        forward = staticmethod(partial(fused.forward, launch))
        backward = staticmethod(partial(fused.backward, launch=launch))

    kernel = replace(KERNEL)
    kernel.__dict__["torch_half"] = Bound
    found = kernel_errors(OPERATOR, kernel, arguments, gradients=True)
    given = [name for name in OPERATOR.tensors if arguments[name] is not None and name != "cu_seqlens"]
    assert set(found) == {"y", "final_state", *(f"d_{name}" for name in given)}
    return found


def assert_exact(arguments: dict[str, Any], launch: fused.Launch | None = CUT) -> None:
    tolerance = OPERATOR.tolerances["float32"]
    for name, error in errors_of(arguments, launch).items():
        assert error <= (tolerance.gradient if name.startswith("d_") else tolerance.output), f"{name}: {error:.1e}"


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("t", [1, 15, 16, 17, 37])
def test_outputs_and_all_gradients_equal_the_reference_at_the_edges_of_a_chunk(t: int, read: str) -> None:
    assert_exact(sample(workload(t, read=read)))


@pytest.mark.parametrize(("read", "full"), [("after", False), ("before", True)])
def test_states_and_gradients_cross_two_cuts(read: str, full: bool) -> None:
    """Three stretches, the last of them short."""
    assert_exact(sample(workload(71, read=read, full=full)))


def test_many_stretches_are_passed_on_in_groups() -> None:
    """More cuts than `_compose` loads together."""
    assert_exact(sample(workload(16 * 10 + 3, n=2, p=3)), launch(stretch=16))


@pytest.mark.parametrize("absent", ["bonus", "initial_state"])
def test_each_optional_tensor_may_be_absent(absent: str) -> None:
    assert_exact(sample(workload(20), **{absent: None}))


def test_sequences_heads_and_tiles_do_not_mix() -> None:
    assert_exact(sample(workload(17, b=2, h=2, n=17, p=17)))


@pytest.mark.parametrize(("n", "p"), [(1, 1), (16, 16), (33, 17)])
def test_widths_that_are_not_powers_of_two_are_masked(n: int, p: int) -> None:
    assert_exact(sample(workload(18, n=n, p=p)))


def test_chunks_of_other_lengths_agree() -> None:
    assert_exact(sample(workload(70)), launch(chunk=32, tile=32, stretch=64))
    assert_exact(sample(workload(135)), launch(chunk=64, tile=32, stretch=128))


def test_the_sizes_it_chooses_itself_agree_too() -> None:
    """A stretch of the operator's own length, and one that it is followed by."""
    assert_exact(sample(workload(declaration.stretch_len(5, 20) + 3)), None)


@pytest.mark.parametrize(("read", "full"), [("after", False), ("before", True)])
def test_packed_documents_have_states_of_their_own(full: bool, read: str) -> None:
    """Empty documents at the start, inside and at the end, and documents of one token, of one stretch and of more."""
    lengths = (0, 3, 1, 0, 32, 37, 0)
    case = workload(sum(lengths), read=read, full=full, documents=len(lengths))
    assert_exact(sample(case, cu_seqlens=bounds(*lengths)))


@pytest.mark.parametrize("lengths", [(0, 0, 70), (70, 0, 0), (0, 33, 0, 33), (1,) * 5], ids=str)
def test_empty_documents_do_not_shift_the_cuts(lengths: tuple[int, ...]) -> None:
    case = workload(sum(lengths), n=3, p=3, full=False, documents=len(lengths))
    assert_exact(sample(case, cu_seqlens=bounds(*lengths)))


@pytest.mark.parametrize("rate", [0.0, -1e-8, -5.0, -50.0, -1e4], ids=str)
def test_extreme_decays_neither_overflow_nor_lose_gradients(rate: float) -> None:
    arguments = sample(workload(40))
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], rate)
    assert_exact(arguments)


@pytest.mark.parametrize("read", ["after", "before"])
def test_mild_and_violent_chunks_stand_side_by_side(read: str) -> None:
    """Blocks of 16 tokens are whole in the first chunk, of 4 and of 8 in the two that follow."""
    arguments = sample(workload(48, read=read))
    least = arguments["log_decay"].amin()
    arguments["log_decay"][:, 16:32] *= -14 / least
    arguments["log_decay"][:, 32:] *= -7 / least
    assert_exact(arguments)


@pytest.mark.parametrize("read", ["after", "before"])
def test_a_channel_that_forgets_everything_leaves_the_others_their_precision(read: str) -> None:
    arguments = sample(workload(40, read=read))
    arguments["log_decay"][:, :, :, 2] = -1e4
    arguments["log_decay"][:, 7] = -1e4
    assert_exact(arguments)


def test_rounded_operands_stay_within_the_tolerance() -> None:
    """float16 stands for bfloat16, which the interpreter cannot compute."""
    errors = errors_of(sample(workload(40, dtype="float16")))
    tolerance = OPERATOR.tolerances["float16"]
    assert max(errors.values()) < tolerance.gradient


def test_slices_of_wider_tensors_are_taken_as_they_are() -> None:
    """q, k and log_decay are slices of one projection: views, with rows further apart."""
    arguments = sample(workload(20, b=2, h=2))
    expected = fused.forward(CUT, **arguments)
    wide = torch.cat([arguments[name].flatten(2) for name in ("q", "k", "log_decay")], dim=2)
    views = {name: part.unflatten(2, (2, 5)) for name, part in zip(("q", "k", "log_decay"), wide.split(10, dim=2))}
    assert fused._Call(arguments | views, CUT).q.data_ptr() == wide.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(fused.forward(CUT, **arguments | views), expected))


@pytest.mark.parametrize("read", ["after", "before"])
def test_one_token_takes_a_kernel_of_its_own(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = sample(workload(1, b=3, h=2, read=read))
    twice = arguments | {name: torch.cat([arguments[name]] * 2, dim=1) for name in BY_TOKEN}
    expected = fused.forward(CUT, **twice)
    exact = {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    after = definition.reference(**exact)[1].float()
    monkeypatch.setattr(fused._Call, "_plan", None)  # nothing of the walk is needed
    y, final, boundaries = fused.forward(CUT, **arguments)
    torch.testing.assert_close(y, expected[0][:, :1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final, after, rtol=1e-5, atol=1e-5)
    assert boundaries.shape == (0, 2, 5, 20)


def test_the_same_call_gives_the_same_bits() -> None:
    arguments = sample(workload(3000, b=2, h=8, n=64, p=64) if ON_GPU else workload(40))
    chosen = None if ON_GPU else CUT
    outputs = fused.forward(chosen, **arguments)
    first, second = (fused.backward(arguments, outputs, outputs[:2], chosen) for _ in range(2))
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items() if gradient is not None)


def test_a_missing_gradient_is_zero() -> None:
    arguments = sample(workload(20))
    outputs = fused.forward(CUT, **arguments)
    pull = torch.ones_like(outputs[0])
    some = fused.backward(arguments, outputs, (pull, None), CUT)
    same = fused.backward(arguments, outputs, (pull, torch.zeros_like(outputs[1])), CUT)
    assert all(torch.equal(some[name], same[name]) for name in same if same[name] is not None)
    state_alone = fused.backward(arguments, outputs, (None, torch.ones_like(outputs[1])), CUT)
    assert state_alone["k"].any()
    assert not state_alone["q"].any()


def test_a_planted_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of this file can fail, for one gradient alone and for a state that does not cross a cut."""
    arguments = sample(workload(40))
    honest = fused._Call.backward

    def loses_a_digit(*values: Any) -> dict[str, Tensor | None]:
        found = honest(*values)
        return found | {"bonus": found["bonus"] * 1.001}

    monkeypatch.setattr(fused._Call, "backward", loses_a_digit)
    with pytest.raises(AssertionError, match="d_bonus"):
        assert_exact(arguments)
    monkeypatch.undo()
    honest_pass = fused._Call._pass

    def forgets(*values: Any, **named: Any) -> fused._Passed:
        passed = honest_pass(*values, **named)
        return replace(passed, crossing=torch.zeros_like(passed.crossing))

    monkeypatch.setattr(fused._Call, "_pass", forgets)
    with pytest.raises(AssertionError):
        assert_exact(arguments)


def test_what_it_cannot_compute_is_declined_with_a_reason() -> None:
    h100 = DeviceLimits(kind="cuda", name="H100", capability=(9, 0))
    assert KERNEL.supports(workload(9, dtype="bfloat16"), h100) is None
    assert "float64" in str(KERNEL.supports(workload(9, dtype="float64"), h100))
    assert "n = 257" in str(KERNEL.supports(workload(9, n=257), h100))
    assert "8.0" in str(KERNEL.supports(workload(9), DeviceLimits(kind="cuda", name="V100", capability=(7, 0))))
    with pytest.raises(TypeError, match="chunked"):
        fused.forward(**sample(workload(2, dtype="float64")))


def test_the_residual_has_the_shape_that_the_operator_declares() -> None:
    for case in (workload(300, n=2, p=2), workload(300, n=2, p=2, documents=5)):
        arguments = sample(case)
        for promised, result in zip(definition.empty_outputs(arguments), fused.forward(**arguments), strict=True):
            assert (promised.shape, promised.dtype) == (result.shape, result.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("shape", "read", "full"),
    [
        (dict(b=2, t=700, h=4, n=64, p=64), "after", False),
        (dict(b=2, t=333, h=4, n=64, p=64), "before", True),
        (dict(b=2, t=1025, h=2, n=128, p=128), "after", True),
        (dict(b=1, t=1025, h=2, n=128, p=128), "before", True),
        (dict(b=1, t=900, h=4, n=64, p=64, documents=9), "before", True),
        (dict(b=1, t=1500, h=2, n=128, p=64, documents=5), "after", False),
        (dict(b=1, t=300, h=2, n=64, p=128), "after", True),
        (dict(b=3, t=1, h=6, n=128, p=64), "before", True),
        (dict(b=2, t=129, h=2, n=20, p=13), "before", True),
        (dict(b=1, t=300, h=2, n=256, p=256), "after", True),
    ],
    ids=str,
)
def test_on_a_gpu_it_is_within_the_operators_tolerance(
    shape: dict[str, int], read: str, full: bool, dtype: str
) -> None:
    case = workload(read=read, full=full, dtype=dtype, **shape)
    assert_within_tolerance(KERNEL, case, sample(case, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [0.0, -0.5, -50.0, -1e4])
def test_on_a_gpu_extreme_decays_neither_overflow_nor_lose_gradients(rate: float) -> None:
    case = workload(600, dtype="bfloat16", n=64, p=64)
    arguments = sample(case, "cuda")
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], rate)
    verdict = judge(OPERATOR, KERNEL, case, errors_of(arguments, None))
    assert verdict.passed, verdict.reason


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_host() -> None:
    arguments = sample(workload(300, n=64, p=64, dtype="bfloat16", documents=4), "cuda")
    assert_a_graph_replays_with_other_boundaries(fused, arguments, 100, 0, 1, 199)
