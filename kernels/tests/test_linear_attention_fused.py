"""The fused linear attention: in Triton's interpreter where there is no GPU, against the definition in float64."""

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
from subquad_kernels.linear_attention import declaration, definition, fused
from subquad_kernels.self_check import check_kernel, judge, kernel_errors
from subquad_kernels.workload import DeviceLimits, Option, Workload

# The interpreter computes in numpy: lanes that a mask discards may hold anything. Results are checked, for NaN too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
]

OPERATOR = declaration.OPERATOR
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"  # without a GPU the kernels run in Triton's interpreter

# Chunks of 16 tokens, two of them a segment, two tiles of values: every seam of the kernels within 40 tokens.
CUT = fused.Launch(tile_p=16, chunk=16, segment_len=32)
WHOLE = replace(CUT, enough=1)


def workload(
    t: int, *, full: bool = True, decay: str = "token", dtype: str = "float32", **shape: int
) -> Workload:  # fmt: skip
    """b = 1, two heads over one of q and k, n = 5, p = 20 unless told; `full` gives every optional tensor."""
    options: dict[str, Option] = {"decay": decay} | dict.fromkeys(("write_gate", "diagonal", "initial_state"), full)
    axes = {"b": 1, "t": t, "h": 2, "h_k": 1, "n": 5, "p": 20} | shape
    return Workload(operator="linear_attention", shape=axes, dtype=dtype, options=options)  # type: ignore[arg-type]


def sample(case: Workload, device: str = DEVICE, **changes: Any) -> dict[str, Any]:
    return definition.sample_inputs(case, seed=0, device=device) | changes


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)


def launched(forward: fused.Launch | None, backward: fused.Launch | None = None) -> Any:
    """The kernel's record, with its functions bound to launches; the backward's is the forward's unless given."""
    both = backward or forward

    class Bound:
        forward = staticmethod(partial(fused.forward, None))

        @staticmethod
        def backward(*values: Any) -> dict[str, Tensor | None]:
            return fused.backward(*values, both)

    Bound.forward = staticmethod(partial(fused.forward, forward))
    kernel = replace(CATALOGUE.kernel("linear_attention", "fused"))
    kernel.__dict__["torch_half"] = Bound
    return kernel


def errors_of(
    arguments: dict[str, Any], launch: fused.Launch | None = CUT, backward: fused.Launch | None = None
) -> dict[str, float]:
    """Errors of both outputs and of every gradient, with gradients flowing in through both outputs."""
    found = kernel_errors(OPERATOR, launched(launch, backward), arguments, gradients=True)
    given = [name for name in OPERATOR.tensors if arguments[name] is not None and name != "cu_seqlens"]
    assert set(found) == {"y", "final_state", *(f"d_{name}" for name in given)}
    return found


def assert_exact(
    arguments: dict[str, Any], launch: fused.Launch | None = CUT, backward: fused.Launch | None = None
) -> None:
    tolerance = OPERATOR.tolerances["float32"]
    for name, error in errors_of(arguments, launch, backward).items():
        assert error <= (tolerance.gradient if name.startswith("d_") else tolerance.output), f"{name}: {error:.1e}"


@pytest.mark.parametrize("t", [1, 15, 16, 17, 37])
def test_outputs_and_all_gradients_equal_the_reference_at_the_edges_of_a_chunk(t: int) -> None:
    assert_exact(sample(workload(t)))


@pytest.mark.parametrize("decay", ["token", "head", "none"])
@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
@pytest.mark.parametrize("launch", [CUT, WHOLE], ids=["cut", "whole"])
def test_time_may_be_cut_or_walked_whole(decay: str, full: bool, launch: fused.Launch) -> None:
    """Three segments, the last of them short: states, gradients and their sums cross two cuts."""
    assert_exact(sample(workload(71, decay=decay, full=full)), launch)


def test_forward_and_backward_may_be_laid_out_differently() -> None:
    arguments = sample(workload(71))
    assert_exact(arguments, CUT, replace(WHOLE, tile_p=32))
    assert_exact(arguments, replace(WHOLE, tile_p=32), CUT)


@pytest.mark.parametrize("gate", ["write_gate", "diagonal", "initial_state"])
def test_each_optional_tensor_may_be_absent(gate: str) -> None:
    assert_exact(sample(workload(20), **{gate: None}))


def test_sequences_heads_and_tiles_do_not_mix() -> None:
    assert_exact(sample(workload(40, b=2, h=4, h_k=2, n=3, p=17)))


@pytest.mark.parametrize(("n", "p"), [(1, 1), (16, 16), (17, 33)])
def test_widths_that_are_not_powers_of_two_are_masked(n: int, p: int) -> None:
    assert_exact(sample(workload(18, n=n, p=p)), replace(CUT, tile_p=32))


def test_the_sizes_it_chooses_itself_agree_too() -> None:
    assert_exact(sample(workload(300, h=1)), None)


@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
@pytest.mark.parametrize("launch", [CUT, WHOLE], ids=["cut", "whole"])
def test_packed_documents_have_states_of_their_own(full: bool, launch: fused.Launch) -> None:
    """Empty documents, documents of one token, of one chunk, and some that cross a cut or end at one."""
    lengths = (0, 3, 1, 0, 16, 37, 5, 0)
    arguments = sample(workload(sum(lengths), full=full, documents=len(lengths)), cu_seqlens=bounds(*lengths))
    assert_exact(arguments, launch)


def test_a_document_that_spans_many_segments_carries_its_state() -> None:
    arguments = sample(workload(103, full=False, documents=2), cu_seqlens=bounds(3, 100))
    assert_exact(arguments)


@pytest.mark.parametrize("rate", [-1e-8, -5.0, -1e6, -torch.inf], ids=str)
def test_extreme_decays_neither_overflow_nor_lose_gradients(rate: float) -> None:
    arguments = sample(workload(40))
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], rate)
    assert_exact(arguments)


def test_a_token_that_forgets_everything_leaves_its_neighbours_their_precision() -> None:
    arguments = sample(workload(40, full=False))
    arguments["log_decay"][:, 7] = -1e6
    assert_exact(arguments)


@pytest.mark.parametrize("rate", [None, -1e-8, -0.05, -5.0], ids=str)
def test_rounded_operands_cost_one_rounding_and_the_decays_gradient_no_more(rate: float | None) -> None:
    """float16 stands for bfloat16, which the interpreter cannot compute: the same roundings, three bits later."""
    arguments = sample(workload(400, full=False, dtype="float16", h=1, n=32, p=32))
    if rate is not None:
        arguments["log_decay"] = torch.full_like(arguments["log_decay"], rate)
    errors = errors_of(arguments, None)
    assert errors["y"] < OPERATOR.tolerances["float16"].output
    assert max(errors.values()) < OPERATOR.tolerances["float16"].output  # half of what gradients are allowed


def test_values_narrower_than_keys_take_tiles_of_one_width_in_half_precision() -> None:
    n, p = 70, 20
    half, whole = (fused.launch_of(n, p, dtype, backward=True).tile_p for dtype in (torch.float16, torch.float32))
    assert (half, whole) == (64, 32)
    lengths = (0, 66, 1, 13)
    case = workload(sum(lengths), dtype="float16", h=1, n=n, p=p, documents=len(lengths))
    verdict = judge(OPERATOR, launched(None), case, errors_of(sample(case, cu_seqlens=bounds(*lengths)), None))
    assert verdict.passed, verdict.reason


def test_slices_of_wider_tensors_are_taken_as_they_are() -> None:
    """q, k and v are slices of one projection: views, with rows and heads further apart."""
    arguments = sample(workload(20, b=2, h_k=2, p=5))
    expected = fused.forward(CUT, **arguments)
    wide = torch.cat([arguments[name] for name in "qkv"], dim=3)
    views = dict(zip("qkv", wide.split(5, dim=3)))
    assert fused.Call(arguments | views).q.data_ptr() == wide.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(fused.forward(CUT, **arguments | views), expected))


def test_one_token_takes_a_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = sample(workload(1, b=3))
    by_token = ("q", "k", "v", "log_decay", "write_gate", "diagonal")
    twice = arguments | {name: torch.cat([arguments[name]] * 2, dim=1) for name in by_token}
    expected = fused.forward(CUT, **twice)
    monkeypatch.setattr(fused.Call, "cut", None)  # nothing of the walk is needed
    y, _, boundaries = fused.forward(CUT, **arguments)
    torch.testing.assert_close(y, expected[0][:, :1], rtol=1e-5, atol=1e-5)
    assert boundaries.shape == (0, 3, 2, 5, 20)


def test_the_same_call_gives_the_same_bits() -> None:
    arguments = sample(workload(3000, b=2, h=8, n=64, p=64) if ON_GPU else workload(40))
    launch = None if ON_GPU else CUT
    outputs = fused.forward(launch, **arguments)
    first, second = (fused.backward(arguments, outputs, outputs[:2], launch) for _ in range(2))
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
    """The comparison of this file can fail, for one gradient alone and for a state that is not passed on."""
    arguments = sample(workload(40))
    honest = fused.Call.backward

    def loses_a_digit(*values: Any) -> dict[str, Tensor | None]:
        found = honest(*values)
        return found | {"write_gate": found["write_gate"] * 1.001}

    monkeypatch.setattr(fused.Call, "backward", loses_a_digit)
    with pytest.raises(AssertionError, match="d_write_gate"):
        assert_exact(arguments)
    monkeypatch.undo()
    monkeypatch.setattr(fused.Call, "compose", lambda *_, **__: None)  # a segment knows only the one before it
    with pytest.raises(AssertionError):
        assert_exact(sample(workload(71)))


def test_what_it_cannot_compute_is_declined_with_a_reason() -> None:
    kernel = CATALOGUE.kernel("linear_attention", "fused")
    h100 = DeviceLimits(kind="cuda", name="H100", capability=(9, 0))
    assert kernel.supports(workload(9, dtype="bfloat16"), h100) is None
    assert "float64" in str(kernel.supports(workload(9, dtype="float64"), h100))
    assert "256 rows" in str(kernel.supports(workload(9, n=257), h100))
    assert "8.0" in str(kernel.supports(workload(9), DeviceLimits(kind="cuda", name="V100", capability=(7, 0))))
    with pytest.raises(TypeError, match="chunked"):
        fused.forward(**sample(workload(2, dtype="float64")))


def test_a_backward_beyond_blackwells_tensor_memory_is_declined_there_and_another_kernel_runs() -> None:
    """In float32 it wants 576 columns at 32 x 64, in half precision 544 at 256 x 64; there are 512."""
    b200 = DeviceLimits(kind="cuda", name="B200", capability=(10, 0))
    h200 = DeviceLimits(kind="cuda", name="H200", capability=(9, 0))
    kernel, other = (CATALOGUE.kernel("linear_attention", name) for name in ("fused", "chunked"))

    def declined(n: int, p: int, dtype: str, phase: str = "backward", limits: DeviceLimits = b200) -> bool:
        case = replace(workload(64, n=n, p=p, dtype=dtype), phase=phase)  # type: ignore[arg-type]
        assert other.supports(case, limits) is None
        reason = kernel.supports(case, limits)
        assert reason is None or "tensor memory" in reason
        return reason is not None

    assert declined(64, 64, "float32")
    assert declined(32, 64, "float32")
    assert declined(40, 24, "float32")
    assert declined(256, 512, "float32")
    assert declined(256, 64, "bfloat16")
    assert declined(200, 32, "float16")
    assert not declined(256, 512, "bfloat16")
    assert not declined(128, 128, "bfloat16")
    assert not declined(32, 32, "float32")
    assert not declined(64, 64, "float32", "forward")
    assert not declined(256, 64, "bfloat16", limits=h200)


def test_the_residual_has_the_shape_that_the_operator_declares() -> None:
    for case in (workload(300, h=1, n=2, p=2), workload(90, h=1, n=2, p=2, documents=5)):
        arguments = sample(case)
        for promised, result in zip(definition.empty_outputs(arguments), fused.forward(**arguments), strict=True):
            assert (promised.shape, promised.dtype) == (result.shape, result.dtype)


def test_time_is_cut_only_where_programs_are_few() -> None:
    def walks(b: int, t: int, h: int) -> int:
        call = fused.Call.__new__(fused.Call)
        call.b, call.t, call.h, call.n, call.p, call.documents, call.cu_seqlens = b, t, h, 64, 64, 0, None
        call.cut(fused.launch_of(64, 64, torch.bfloat16, backward=False))
        return call.walks

    assert walks(16, 2048, 16) == 1
    assert walks(4, 8192, 16) == 8
    assert walks(1, 32768, 16) == 32
    assert walks(1, 256, 1) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("shape", "decay", "full"),
    [
        (dict(b=2, t=700, h=4, h_k=4, n=64, p=64), "head", False),
        (dict(b=2, t=333, h=4, h_k=4, n=64, p=64), "token", True),
        (dict(b=2, t=1025, h=8, h_k=1, n=128, p=64), "token", True),
        (dict(b=1, t=900, h=4, h_k=2, n=64, p=128, documents=9), "token", True),
        (dict(b=1, t=517, h=2, h_k=2, n=32, p=48, documents=5), "none", False),
        (dict(b=1, t=517, h=4, h_k=1, n=64, p=32, documents=5), "token", True),
        (dict(b=2, t=300, h=4, h_k=1, n=128, p=32), "token", True),
        (dict(b=1, t=517, h=4, h_k=4, n=32, p=64, documents=5), "head", False),
        (dict(b=3, t=1, h=6, h_k=2, n=128, p=64), "token", True),
        (dict(b=2, t=129, h=2, h_k=1, n=20, p=13), "head", True),
        (dict(b=1, t=300, h=2, h_k=2, n=128, p=128), "token", False),
        (dict(b=1, t=300, h=2, h_k=2, n=256, p=256), "token", True),
        (dict(b=2, t=300, h=2, h_k=2, n=64, p=1), "token", True),
    ],
    ids=str,
)
def test_on_a_gpu_it_is_within_the_operators_tolerance(
    shape: dict[str, int], decay: str, full: bool, dtype: str
) -> None:
    case = workload(full=full, decay=decay, dtype=dtype, **shape)
    for enough in (1, 10**9):  # walked whole, and cut
        launches = (
            replace(fused.launch_of(shape["n"], shape["p"], getattr(torch, dtype), backward=back), enough=enough)
            for back in (False, True)
        )
        kernel = CATALOGUE.kernel("linear_attention", "fused")
        assert_within_tolerance(kernel, case, sample(case, "cuda"), launched(*launches))


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "p"), [(32, 64), (64, 32), (256, 256)])
def test_on_a_gpu_a_decay_per_head_passes_its_check_whatever_is_drawn(n: int, p: int) -> None:
    case = workload(299, full=False, decay="head", dtype="bfloat16", h_k=2, n=n, p=p, documents=5)
    kernel = CATALOGUE.kernel("linear_attention", "fused")
    for seed in range(10):
        verdict = check_kernel(kernel, case, "cuda", seed=seed)
        print(seed, verdict.reason)
        assert verdict.passed, f"seed {seed}: {verdict.reason}"


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [-1e-8, -0.5, -5.0])
@pytest.mark.parametrize(("h", "h_k"), [(2, 2), (8, 1)])
def test_on_a_gpu_the_decays_gradient_stays_exact_over_long_sequences(h: int, h_k: int, rate: float) -> None:
    """The sums behind it start anew at every segment: over 8192 tokens rounding adds up within one of them only."""
    arguments = sample(workload(8192, full=False, dtype="bfloat16", b=1, h=h, h_k=h_k, n=64, p=64), "cuda")
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], rate)
    exact = {k: v.float() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    pull = torch.randn_like(arguments["v"])
    outputs = fused.forward(**arguments)
    found = fused.backward(arguments, outputs, (pull, None))["log_decay"]
    chunked = CATALOGUE.kernel("linear_attention", "chunked").torch_half
    expected = chunked.backward(exact, (), (pull.float(), None))["log_decay"]
    assert found is not None
    assert expected is not None
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < OPERATOR.tolerances["bfloat16"].gradient


@pytest.mark.gpu
@pytest.mark.parametrize("h", [2, 8])
def test_on_a_gpu_nothing_waits_for_the_host(h: int) -> None:
    arguments = sample(workload(300, h=h, n=64, p=64, dtype="bfloat16", documents=4), "cuda")
    assert_a_graph_replays_with_other_boundaries(fused, arguments, 100, 0, 1, 199)
