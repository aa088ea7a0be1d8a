"""The fused causal convolution: in Triton's interpreter where there is no GPU, against the definition in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from on_a_gpu import assert_a_graph_replays_with_other_boundaries, assert_within_tolerance
from torch import Tensor

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.causal_conv import declaration, definition, fused
from subquad_kernels.self_check import kernel_errors
from subquad_kernels.workload import DeviceLimits, Workload

# The interpreter computes in numpy: lanes that a mask discards may hold anything. Results are checked, for NaN too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
]

OPERATOR = declaration.OPERATOR
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"  # without a GPU the kernels run in Triton's interpreter
SMALL = fused.Launch(tile_c=4, stretch=8)


def workload(
    t: int, *, w: int = 4, full: bool = True, activation: str = "silu", dtype: str = "float32", **shape: int
) -> Workload:
    """b = 1, c = 3 unless told; `full` gives bias and initial state."""
    options = {"activation": activation, "bias": full, "initial_state": full}
    axes = {"b": 1, "t": t, "c": 3, "w": w} | shape
    return Workload(operator="causal_conv", shape=axes, dtype=dtype, options=options)  # type: ignore[arg-type]


def sample(case: Workload, device: str = DEVICE, **changes: Any) -> dict[str, Any]:
    return definition.sample_inputs(case, seed=0, device=device) | changes


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)


def launched(launch: fused.Launch | None) -> Any:
    """The kernel's record, with its functions bound to a launch."""

    class Bound:
        @staticmethod
        def forward(**arguments: Any) -> tuple[Tensor, ...]:
            return fused.forward(**arguments, launch=launch)

        @staticmethod
        def backward(*values: Any) -> dict[str, Tensor | None]:
            return fused.backward(*values, launch)

    kernel = replace(CATALOGUE.kernel("causal_conv", "fused"))
    kernel.__dict__["torch_half"] = Bound
    return kernel


def assert_exact(arguments: dict[str, Any], launch: fused.Launch | None = None) -> None:
    """Both outputs and every gradient, with gradients flowing in through both outputs."""
    errors = kernel_errors(OPERATOR, launched(launch), arguments, gradients=True)
    given = [name for name in OPERATOR.tensors if arguments[name] is not None and name != "cu_seqlens"]
    assert set(errors) == {"y", "final_state", *(f"d_{name}" for name in given)}
    tolerance = OPERATOR.tolerances["float32"]
    for name, error in errors.items():
        assert error <= (tolerance.gradient if name.startswith("d_") else tolerance.output), f"{name}: {error:.1e}"


@pytest.mark.parametrize("w", [1, 2, 4, 8])
@pytest.mark.parametrize("t", [1, 2, 7, 8, 9, 19])
def test_outputs_and_all_gradients_equal_the_reference(t: int, w: int) -> None:
    """Stretches are 8 tokens: shorter than a stretch, one stretch, one token more, three stretches."""
    assert_exact(sample(workload(t, w=w)), SMALL)


@pytest.mark.parametrize("t", [2, 9])
def test_optional_tensors_and_the_activation_may_be_absent(t: int) -> None:
    assert_exact(sample(workload(t, full=False, activation="none")), SMALL)


def test_tiles_and_sequences_do_not_mix() -> None:
    assert_exact(sample(workload(9, b=2, c=5)), SMALL)


@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
@pytest.mark.parametrize(("lengths", "w"), [((0, 5, 1, 0, 2, 9, 0), 4), ((1,) * 6, 8), ((8, 1, 7), 2)], ids=str)
def test_packed_documents_see_only_themselves(lengths: tuple[int, ...], w: int, full: bool) -> None:
    """Empty documents, documents of one token, and boundaries on, before and after the edge of a stretch."""
    case = workload(sum(lengths), w=w, full=full, documents=len(lengths))
    assert_exact(sample(case, cu_seqlens=bounds(*lengths)), SMALL)


@pytest.mark.parametrize(("b", "c", "w"), [(66, 70, 4), (3, 5, 2), (2, 3, 1)])
def test_one_token_steps_the_state_of_every_sequence(b: int, c: int, w: int) -> None:
    """Sequences that share a program, some of them past the last one; a slice as x; all tensors, and no others."""
    for full in (True, False):
        arguments = sample(workload(1, b=b, c=c, w=w, full=full))
        wide = torch.cat([arguments["x"], arguments["x"]], dim=2)[..., c - 1 :]
        found = fused.forward(**arguments | {"x": wide[..., 1:]})
        expected = definition.reference(**arguments)
        for result, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(result, exact, rtol=0, atol=2e-6)


def test_the_launch_that_is_chosen_is_exact_too() -> None:
    assert_exact(sample(workload(18)))


def test_slices_of_wider_tensors_are_taken_as_they_are() -> None:
    arguments = sample(workload(5, b=2, full=False))
    wide = torch.cat([arguments["x"], arguments["x"]], dim=2)
    expected = fused.forward(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(fused.forward(**arguments | {"x": wide[..., 3:]}), expected))


def test_the_same_call_gives_the_same_bits() -> None:
    arguments = sample(workload(700, b=2, c=96) if ON_GPU else workload(10))
    outputs = fused.forward(**arguments)
    first, second = (fused.backward(arguments, outputs, outputs) for _ in range(2))
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items() if gradient is not None)


def test_a_missing_gradient_is_zero() -> None:
    arguments = sample(workload(5))
    outputs = fused.forward(**arguments)
    pull, none = torch.ones_like(outputs[0]), torch.zeros_like(outputs[1])
    some, same = (fused.backward(arguments, outputs, (pull, state)) for state in (None, none))
    assert all(torch.equal(some[name], same[name]) for name in same if same[name] is not None)
    state_alone = fused.backward(arguments, outputs, (None, torch.ones_like(outputs[1])))
    assert state_alone["x"][:, -3:].eq(1).all()
    assert not state_alone["x"][:, :-3].any()
    assert not state_alone["weight"].any()


def test_a_planted_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tap that reaches into the document before, and one gradient that is a little off."""
    packed = sample(workload(9, full=False, documents=2), cu_seqlens=bounds(4, 5))
    marks = fused._marks
    monkeypatch.setattr(fused, "_marks", lambda *values: marks(*values) | 15)
    with pytest.raises(AssertionError, match="y:"):
        assert_exact(packed)
    monkeypatch.undo()
    honest = fused._Call.backward

    def loses_a_digit(*values: Any) -> dict[str, Tensor | None]:
        found = honest(*values)
        return found | {"weight": found["weight"] * 1.001}

    monkeypatch.setattr(fused._Call, "backward", loses_a_digit)
    with pytest.raises(AssertionError, match="d_weight"):
        assert_exact(packed)


def test_what_it_cannot_compute_is_declined_with_a_reason() -> None:
    kernel = CATALOGUE.kernel("causal_conv", "fused")
    h100 = DeviceLimits(kind="cuda", name="H100", capability=(9, 0))
    assert kernel.supports(workload(9, dtype="bfloat16"), h100) is None
    assert "float64" in str(kernel.supports(workload(9, dtype="float64"), h100))
    assert "8 taps" in str(kernel.supports(workload(9, w=9), h100))
    assert "8.0" in str(kernel.supports(workload(9), DeviceLimits(kind="cuda", name="V100", capability=(7, 0))))
    with pytest.raises(TypeError, match="conv1d"):
        fused.forward(**sample(workload(2, dtype="float64")))
    with pytest.raises(ValueError, match="conv1d"):
        fused.forward(**sample(workload(2, w=9)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("shape", "full"),
    [
        (dict(b=2, t=700, c=96, w=4), True),
        (dict(b=2, t=333, c=256, w=4), False),
        (dict(b=1, t=700, c=160, w=4, documents=9), True),
        (dict(b=1, t=517, c=128, w=8, documents=5), False),
        (dict(b=3, t=1, c=200, w=4), True),
        (dict(b=130, t=1, c=2048, w=4), True),
        (dict(b=2, t=129, c=77, w=3), True),
    ],
    ids=str,
)
def test_on_a_gpu_it_is_within_the_operators_tolerance(shape: dict[str, int], full: bool, dtype: str) -> None:
    case = workload(full=full, dtype=dtype, activation="silu" if full else "none", **shape)
    kernel = CATALOGUE.kernel("causal_conv", "fused")
    for launch in (None, fused.Launch(tile_c=64, stretch=32, group=8)):
        assert_within_tolerance(kernel, case, sample(case, "cuda"), launched(launch))


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_host() -> None:
    arguments = sample(workload(300, c=96, dtype="bfloat16", documents=4), "cuda")
    assert_a_graph_replays_with_other_boundaries(fused, arguments, 100, 0, 1, 199)
