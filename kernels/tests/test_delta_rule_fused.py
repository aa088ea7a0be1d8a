"""The fused delta rule: in Triton's interpreter where there is no GPU, against the definition in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from on_a_gpu import assert_a_graph_replays_with_other_boundaries, assert_within_tolerance
from torch import Tensor
from torch.nn import functional as F

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.delta_rule import chunked, declaration, definition, fused
from subquad_kernels.self_check import judge, kernel_errors
from subquad_kernels.workload import DeviceLimits, Workload

# The interpreter computes in numpy: lanes that a mask discards may hold anything. Results are checked, for NaN too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
]

OPERATOR = declaration.OPERATOR
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"  # without a GPU the kernels run in Triton's interpreter


def workload(
    t: int, *, dtype: str = "float32", decay: str = "scalar", gate: bool = True, state: bool = True, **shape: int
) -> Workload:
    """b = 1, h = h_k = 1, n = 5, p = 3 unless told."""
    axes = {"b": 1, "t": t, "h": 1, "h_k": 1, "n": 5, "p": 3} | shape
    options = {"decay": decay, "write_gate": gate, "low_rank": False, "initial_state": state}
    return Workload(operator="delta_rule", shape=axes, dtype=dtype, options=options)  # type: ignore[arg-type]


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

    kernel = replace(CATALOGUE.kernel("delta_rule", "fused"))
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


@pytest.mark.parametrize("t", [1, 2, 63, 64, 65])
def test_outputs_and_all_gradients_equal_the_reference_at_the_edges_of_a_chunk(t: int) -> None:
    assert_exact(sample(workload(t)))


@pytest.mark.parametrize("decay", ["none", "scalar"])
@pytest.mark.parametrize("t", [1, 67])
def test_optional_tensors_may_be_absent(t: int, decay: str) -> None:
    assert_exact(sample(workload(t, decay=decay, gate=False, state=False)))
    assert_exact(sample(workload(t, decay=decay, gate=decay == "none", state=True)))


def test_states_pass_through_several_chunks() -> None:
    assert_exact(sample(workload(193)))


def test_sequences_heads_and_tiles_do_not_mix() -> None:
    """Two sequences, key heads of two value heads each, widths of several tiles, none a power of two."""
    small = fused.Launch(scan_tile_p=16, read_tile_p=16, differentiate_tile_p=16, decode_tile_p=16)
    assert_exact(sample(workload(20, b=2, h=2, n=17, p=19)), small)
    assert_exact(sample(workload(1, b=2, h=4, h_k=2, n=17, p=35)), small)


@pytest.mark.parametrize(("n", "p"), [(70, 3), (16, 130)])
def test_widths_may_pass_a_tile(n: int, p: int) -> None:
    assert_exact(sample(workload(20, n=n, p=p)))


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("lengths", [(0, 3, 1, 0, 66, 5, 0), (1, 1, 1), (64, 64)], ids=str)
def test_packed_documents_have_states_of_their_own(lengths: tuple[int, ...], state: bool) -> None:
    """Empty documents, documents of one token, one longer than a chunk."""
    case = workload(sum(lengths), state=state, documents=len(lengths))
    assert_exact(sample(case, cu_seqlens=bounds(*lengths)))


CUT = fused.Launch(scan_programs=1_000, segment_chunks=1)
"""Every chunk a segment of its own."""


def test_cutting_time_changes_nothing() -> None:
    """Four segments, the last of them short: what enters the fourth went through the maps of the two before it."""
    assert_exact(sample(workload(193, n=17)), replace(CUT, scan_tile_p=16))


def test_documents_are_cut_by_themselves() -> None:
    """Empty documents, one that is cut in three, and one of a single token after it."""
    lengths = (0, 129, 0, 1)
    assert_exact(sample(workload(sum(lengths), documents=len(lengths)), cu_seqlens=bounds(*lengths)), CUT)


@pytest.mark.parametrize(("decay", "gate"), [("scalar", True), ("none", False)])
def test_gradients_by_key_are_the_same_in_one_launch(decay: str, gate: bool) -> None:
    together = fused.Launch(differentiate_together=True, differentiate_tile_p=16)
    assert_exact(sample(workload(67, h=2, n=17, p=19, decay=decay, gate=gate)), together)


def test_time_is_cut_where_programs_are_few_and_sequences_long() -> None:
    """16 heads, of one tile of values at a width of 64 and of two at 128."""

    def longest(b: int, t: int, n: int, *, packed: bool = False) -> int:
        lines, programs = 16 * (n // 64), declaration.segment_programs(n)
        return declaration.chunks_a_segment(b, t, lines, packed=packed, programs=programs)

    assert longest(16, 2_048, 64) == 32  # whole
    assert longest(8, 4_096, 64) == 64  # in two halves it would take as long
    assert longest(4, 8_192, 64) == 32  # of 128
    assert longest(1, 32_768, 64) == longest(1, 32_768, 64, packed=True) == 32  # of 512
    assert longest(1, 4_096, 64) == 16
    assert longest(1, 4_000, 64) == 63  # in segments of less than 16 chunks otherwise
    assert longest(4, 8_192, 128) == 128
    assert longest(1, 32_768, 128) == 128  # of 512


def test_declared_steps_count_what_is_walked_twice() -> None:
    declared = CATALOGUE.kernel("delta_rule", "fused").serial_steps
    assert declared is not None
    case = workload(8_192, b=4, h=16, n=64, p=64)
    assert declared(case) == 64
    assert declared(replace(case, phase="backward")) == 128
    assert declared(workload(8_192, b=4, h=16, n=128, p=128)) == 128


def test_packed_equals_each_document_by_itself() -> None:
    arguments = sample(workload(80, documents=2), cu_seqlens=bounds(67, 13))
    y, final, *_ = fused.forward(**arguments)
    for document, (start, stop) in enumerate(((0, 67), (67, 80))):
        alone = {name: arguments[name][:, start:stop] for name in ("q", "k", "v", "log_decay", "write_gate")}
        state = arguments["initial_state"][document : document + 1]
        own_y, own_final, *_ = fused.forward(**arguments | alone | {"initial_state": state, "cu_seqlens": None})
        torch.testing.assert_close(y[:, start:stop], own_y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(final[document : document + 1], own_final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("low", [-50.3, -3e38], ids=["all but nothing stays", "nothing stays"])
def test_mixed_decays_gates_up_to_two_and_repeating_keys_stay_exact(low: float) -> None:
    """Three tokens in four forget everything; decays of 0.97 to 1 between them keep their digits."""
    arguments = sample(workload(130, n=16))
    draw = torch.Generator(DEVICE).manual_seed(5)
    arguments["k"] = F.normalize(arguments["k"][:, :1] + 0.1 * arguments["k"], dim=-1)
    arguments["write_gate"] = torch.randint(0, 3, (1, 130, 1), generator=draw, device=DEVICE).float()
    keep = torch.randint(0, 4, (1, 130, 1), generator=draw, device=DEVICE) == 0
    slow = -0.03 * torch.rand(1, 130, 1, generator=draw, device=DEVICE)
    arguments["log_decay"] = torch.where(keep, slow, low)
    assert_exact(arguments)


@pytest.mark.parametrize("log_decay", [-1e-9, -1e4], ids=["decay near 1", "decay underflows"])
def test_extreme_decays_neither_overflow_nor_lose_gradients(log_decay: float) -> None:
    arguments = sample(workload(70))
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], log_decay)
    assert_exact(arguments)


def test_orthonormal_keys_recall_exactly_and_a_second_write_replaces_the_first() -> None:
    keys, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))
    k = keys[:4][None, :, None].to(DEVICE)
    v = torch.arange(12.0, device=DEVICE).reshape(1, 4, 1, 3)
    twice = torch.cat([k, k], dim=1)
    arguments = dict.fromkeys(OPERATOR.tensors) | {"q": twice, "k": twice, "v": torch.cat([v, -v], dim=1)}
    y, final, *_ = fused.forward(**arguments, scale=1.0)
    torch.testing.assert_close(y, arguments["v"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.einsum("bhnp,bthn->bthp", final, k), -v, rtol=1e-5, atol=1e-5)


def test_the_inverse_of_a_chunk_times_its_matrix_is_the_identity() -> None:
    """T (I + A) = I with gates of 2 and keys that all but repeat, where powers of A reach 1e18."""
    arguments = sample(workload(64, n=16, decay="none", state=False))
    arguments["k"] = F.normalize(arguments["k"][:, :1] + 0.1 * arguments["k"], dim=-1)
    arguments["write_gate"] = torch.full_like(arguments["write_gate"], 2.0)
    _, inverse = fused._Call(arguments, None)._invert()
    keys = arguments["k"][0, :, 0].double()
    matrix = torch.eye(64, device=DEVICE) + 2 * (keys @ keys.T).tril(-1)
    assert (inverse[0, 0].double() @ matrix - torch.eye(64, device=DEVICE)).abs().max() < 1e-3


def assert_cancelling(case: Workload, device: str) -> None:
    """Within the type's tolerance where (I + A)^-1 cancels most: gates of 1.9, keys that repeat but for a fifth."""
    arguments = sample(case, device)
    keys = arguments["k"].float()
    arguments["k"] = F.normalize(keys[:, :1] + 0.2 * keys, dim=-1).to(arguments["k"].dtype)
    arguments["write_gate"] = torch.full_like(arguments["write_gate"], 1.9)
    kernel = CATALOGUE.kernel("delta_rule", "fused")
    errors = kernel_errors(OPERATOR, kernel, arguments, gradients=True)
    verdict = judge(OPERATOR, kernel, case, errors)
    assert verdict.passed, verdict.reason


def test_half_precision_keeps_what_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inverse is applied in two terms; with one, this misses the tolerance, which is how much the second gives."""
    case = workload(300, n=64, p=64, h=2, h_k=2, decay="none", dtype="float16")
    assert_cancelling(case, DEVICE)
    begin = fused._Call.__init__

    def with_one_term(call: fused._Call, *values: Any) -> None:
        begin(call, *values)
        call._terms = 1

    monkeypatch.setattr(fused._Call, "__init__", with_one_term)
    with pytest.raises(AssertionError, match="is off by"):
        assert_cancelling(case, DEVICE)


def test_half_precision_takes_narrow_keys() -> None:
    """Gradients have tiles of 64 columns there, whatever the widths."""
    case = workload(66, n=20, p=40, dtype="float16")
    errors = kernel_errors(OPERATOR, launched(None), sample(case), gradients=True)
    verdict = judge(OPERATOR, launched(None), case, errors)
    assert verdict.passed, verdict.reason


def test_residuals_are_those_the_operator_declares() -> None:
    arguments = sample(workload(70, h=2))
    expected, found = chunked.forward(**arguments), fused.forward(**arguments)
    for mine, theirs, promised in zip(found, expected, definition.empty_outputs(arguments), strict=True):
        assert (mine.shape, mine.dtype) == (promised.shape, promised.dtype)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_slices_of_wider_tensors_are_taken_as_they_are() -> None:
    """q and k are halves of one projection: views, with rows further apart."""
    arguments = sample(workload(3, b=2, h=2, h_k=2))
    expected = fused.forward(**arguments)
    wide = torch.cat([arguments["q"], arguments["k"]], dim=2)
    views = dict(zip("qk", wide.chunk(2, 2)))
    assert all(torch.equal(a, b) for a, b in zip(fused.forward(**arguments | views), expected))


def test_the_same_call_gives_the_same_bits() -> None:
    arguments = sample(workload(300, b=2, h=4, n=64, p=64) if ON_GPU else workload(2))
    outputs = fused.forward(**arguments)
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
    assert state_alone["k"].any()
    assert not state_alone["q"].any()


def test_a_planted_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of this file can fail, for one gradient alone and for a state that is not passed on."""
    arguments = sample(workload(66))
    honest = fused._Call.backward

    def loses_a_digit(*values: Any) -> dict[str, Tensor | None]:
        found = honest(*values)
        return found | {"log_decay": found["log_decay"] * 1.001}

    monkeypatch.setattr(fused._Call, "backward", loses_a_digit)
    with pytest.raises(AssertionError, match="d_log_decay"):
        assert_exact(arguments)
    monkeypatch.undo()
    boundaries = fused.forward(**arguments)[3]
    boundaries[1] = 0  # the state that enters the second chunk
    forget = fused._Call.backward
    monkeypatch.setattr(fused._Call, "backward", lambda self, writes, _, *rest: forget(self, writes, boundaries, *rest))
    with pytest.raises(AssertionError, match="d_"):
        assert_exact(arguments)


def test_what_it_cannot_compute_is_declined_with_a_reason() -> None:
    kernel = CATALOGUE.kernel("delta_rule", "fused")
    h100 = DeviceLimits(kind="cuda", name="H100", capability=(9, 0))
    assert kernel.supports(workload(9, dtype="bfloat16", n=64, p=128), h100) is None
    assert kernel.supports(workload(9, n=24, p=40), h100) is None
    assert "float64" in str(kernel.supports(workload(9, dtype="float64"), h100))
    assert kernel.supports(workload(9, dtype="bfloat16", n=16, p=64), h100) is None
    assert "256 x 256" in str(kernel.supports(workload(9, n=64, p=300), h100))
    case = workload(9, dtype="bfloat16", n=64, p=64)
    assert "per head" in str(kernel.supports(workload(9, dtype="bfloat16", decay="vector"), h100))
    free = replace(case, options=case.options | {"low_rank": True})
    assert "remove and insert" in str(kernel.supports(free, h100))
    assert "8.0" in str(kernel.supports(case, DeviceLimits(kind="cuda", name="V100", capability=(7, 0))))
    with pytest.raises(TypeError, match="chunked"):
        fused.forward(**sample(workload(2, dtype="float64")))
    with pytest.raises(TypeError, match="chunked"):
        fused.forward(**sample(workload(2, decay="vector")))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (dict(b=1, t=300, h=4, n=48, p=48, h_k=2), {}),
        (dict(b=1, t=300, h=4, n=64, p=16, h_k=2), {}),
        (dict(b=1, t=300, h=4, n=16, p=16, h_k=2), {}),
        (dict(b=2, t=300, h=4, n=32, p=32, h_k=4), dict(decay="none")),
        (dict(b=1, t=517, h=4, n=32, p=64, h_k=2, documents=5), {}),
        (dict(b=1, t=517, h=2, n=16, p=128, h_k=1, documents=5), {}),
        (dict(b=1, t=300, h=2, n=64, p=32, h_k=2), {}),
        (dict(b=1, t=300, h=4, n=256, p=256, h_k=2), {}),
        (dict(b=2, t=700, h=3, n=64, p=64, h_k=3), {}),
        (dict(b=2, t=333, h=4, n=128, p=128, h_k=2), dict(state=False)),
        (dict(b=1, t=700, h=2, n=64, p=128, h_k=1, documents=9), {}),
        (dict(b=1, t=517, h=2, n=128, p=64, h_k=2, documents=5), dict(decay="none", gate=False)),
        (dict(b=3, t=1, h=4, n=128, p=64, h_k=2), {}),
        (dict(b=2, t=129, h=2, n=64, p=64, h_k=2), dict(decay="none")),
        (dict(b=1, t=4_200, h=2, n=64, p=64, h_k=2), {}),  # cut
        (dict(b=1, t=4_200, h=2, n=128, p=64, h_k=2), {}),
        (dict(b=1, t=4_300, h=2, n=64, p=128, h_k=2, documents=3), dict(state=False)),
    ],
    ids=str,
)
def test_on_a_gpu_it_is_within_the_operators_tolerance(
    shape: dict[str, int], options: dict[str, Any], dtype: str
) -> None:
    case = workload(dtype=dtype, **options, **shape)
    assert_within_tolerance(CATALOGUE.kernel("delta_rule", "fused"), case, sample(case, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_on_a_gpu_gates_near_two_and_repeating_keys_stay_within_tolerance(dtype: str) -> None:
    case = workload(300, n=64, p=64, h=2, h_k=2, decay="none", dtype=dtype)
    assert_cancelling(case, "cuda")


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_host() -> None:
    arguments = sample(workload(300, h=2, h_k=2, n=64, p=64, dtype="bfloat16", documents=4), "cuda")
    assert_a_graph_replays_with_other_boundaries(fused, arguments, 100, 0, 1, 199)
