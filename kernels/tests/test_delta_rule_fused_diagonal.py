"""The fused delta rule with decays per key channel and free rank-one updates: in Triton's interpreter without a GPU."""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401  (a jitted function wants to see it)
from on_a_gpu import assert_within_tolerance
from torch import Tensor
from torch.nn import functional as F

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.delta_rule import (
    chunked,
    declaration,
    definition,
    diagonal_chunks,
    diagonal_levels,
    fused,
    fused_diagonal,
)
from subquad_kernels.self_check import judge, kernel_errors
from subquad_kernels.workload import DeviceLimits, Workload

# The interpreter computes in numpy: lanes that a mask discards may hold anything. Results are checked, for NaN too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
]

OPERATOR = declaration.OPERATOR
KERNEL = CATALOGUE.kernel("delta_rule", "fused_diagonal")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"  # without a GPU the kernels run in Triton's interpreter
BOTH = pytest.mark.parametrize("free", [False, True], ids=["KDA", "RWKV-7"])


def workload(
    t: int, *, free: bool, dtype: str = "float32", decay: str = "vector", gate: bool = True, state: bool = True,
    **shape: int,
) -> Workload:  # fmt: skip
    """b = 1, h = h_k = 1, n = 5, p = 3 unless told."""
    axes = {"b": 1, "t": t, "h": 1, "h_k": 1, "n": 5, "p": 3} | shape
    options = {"decay": decay, "write_gate": gate, "low_rank": free, "initial_state": state}
    return Workload(operator="delta_rule", shape=axes, dtype=dtype, options=options)  # type: ignore[arg-type]


def sample(case: Workload, device: str = DEVICE, *, seed: int = 0, **changes: Any) -> dict[str, Any]:
    return definition.sample_inputs(case, seed=seed, device=device) | changes


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)


def launched(launch: fused_diagonal.Launch) -> Any:
    """The kernel's record, with its functions bound to a launch."""

    class Bound:
        @staticmethod
        def forward(**arguments: Any) -> tuple[Tensor, ...]:
            return fused_diagonal.forward(launch, **arguments)

        @staticmethod
        def backward(*values: Any) -> dict[str, Tensor | None]:
            return fused_diagonal.backward(*values, launch)

    kernel = replace(KERNEL)
    kernel.__dict__["torch_half"] = Bound
    return kernel


def assert_exact(arguments: dict[str, Any], launch: fused_diagonal.Launch | None = None) -> None:
    """Both outputs and every gradient, with gradients flowing in through both outputs."""
    errors = kernel_errors(OPERATOR, KERNEL if launch is None else launched(launch), arguments, gradients=True)
    given = [name for name in OPERATOR.tensors if arguments[name] is not None and name != "cu_seqlens"]
    assert set(errors) == {"y", "final_state", *(f"d_{name}" for name in given)}
    tolerance = OPERATOR.tolerances["float32"]
    for name, error in errors.items():
        assert error <= (tolerance.gradient if name.startswith("d_") else tolerance.output), f"{name}: {error:.1e}"


@BOTH
@pytest.mark.parametrize("t", [1, 2, 61, 63, 64, 65])
def test_outputs_and_all_gradients_equal_the_reference_at_the_edges_of_a_chunk(t: int, free: bool) -> None:
    assert_exact(sample(workload(t, free=free), seed=t))


@BOTH
def test_states_pass_through_several_chunks(free: bool) -> None:
    assert_exact(sample(workload(193, free=free)))


@pytest.mark.parametrize("t", [1, 67])
@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_optional_tensors_may_be_absent(t: int, decay: str) -> None:
    assert_exact(sample(workload(t, free=True, decay=decay, gate=False, state=False)))
    assert_exact(sample(workload(t, free=True, decay=decay, gate=decay == "none", state=True)))
    if decay == "vector":
        assert_exact(sample(workload(t, free=False, gate=False, state=False)))


@BOTH
def test_sequences_heads_and_tiles_do_not_mix(free: bool) -> None:
    """Two sequences, key heads of two value heads each, widths of several tiles, none a power of two."""
    small = fused_diagonal.Launch(
        relate_tile_n=16, differentiate_tile_n=16, scan_tile_p=16, tile_p=16, decode_tile_p=16
    )
    assert_exact(sample(workload(20, free=free, b=2, h=4, h_k=2, n=19, p=19)), small)
    assert_exact(sample(workload(1, free=free, b=2, h=4, h_k=2, n=17, p=35)), small)


@BOTH
@pytest.mark.parametrize("state", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lengths", [(0, 3, 1, 0, 66, 5, 0), (64, 64)], ids=str)
def test_packed_documents_have_states_of_their_own(lengths: tuple[int, ...], state: bool, free: bool) -> None:
    """Empty documents, documents of one token, one longer than a chunk."""
    case = workload(sum(lengths), free=free, state=state, documents=len(lengths))
    assert_exact(sample(case, cu_seqlens=bounds(*lengths)))


def test_cutting_time_changes_nothing() -> None:
    """Four segments, the last of them short: what enters the fourth went through the maps of the two before it."""
    cut = fused_diagonal.Launch(scan_programs=1_000, segment_chunks=1)
    assert_exact(sample(workload(193, free=True)), cut)


@BOTH
@pytest.mark.parametrize("low", [-50.3, -3e38], ids=["all but nothing stays", "nothing stays"])
def test_channels_that_forget_at_once_beside_slow_ones_keep_every_digit(low: float, free: bool) -> None:
    """Of each token's channels three in four forget all; decays of 0.97 to 1 beside them stay exact. Gates reach 2."""
    arguments = sample(workload(130, free=free, n=16))
    draw = torch.Generator(DEVICE).manual_seed(5)
    arguments["k"] = F.normalize(arguments["k"][:, :1] + 0.1 * arguments["k"], dim=-1)
    arguments["write_gate"] = torch.randint(0, 3, (1, 130, 1), generator=draw, device=DEVICE).float()
    keep = torch.randint(0, 4, (1, 130, 1, 16), generator=draw, device=DEVICE) == 0
    slow = -0.03 * torch.rand(1, 130, 1, 16, generator=draw, device=DEVICE)
    arguments["log_decay"] = torch.where(keep, slow, low)
    assert_exact(arguments)


@BOTH
@pytest.mark.parametrize("log_decay", [-1e-9, -1e4], ids=["decay near 1", "decay underflows"])
def test_extreme_decays_neither_overflow_nor_lose_gradients(log_decay: float, free: bool) -> None:
    arguments = sample(workload(70, free=free))
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], log_decay)
    assert_exact(arguments)


def with_decays_of_every_level(arguments: dict[str, Any]) -> dict[str, Any]:
    """Six heads, one channel of each so fast that its blocks are mild up to another level.

    A block is mild whose log2 decays sum to -60 or more: one of 32 tokens where they are -1.
    """
    log_decay = torch.full_like(arguments["log_decay"], -0.01)
    log_decay[..., 0] = -torch.tensor([40.0, 20.0, 10.0, 5.0, 3.0, 1.0], device=log_decay.device) * log(2)
    return arguments | {"log_decay": log_decay}


def levels_of(arguments: dict[str, Any]) -> list[Any]:
    """The lowest level of each chunk, head and 32 channels, as the kernel finds it."""
    found: list[Any] = fused_diagonal._Call(arguments, None)._relate().lowest.tolist()
    return found


@BOTH
def test_tokens_meet_at_every_level_from_the_lowest_that_is_mild(free: bool) -> None:
    """One product of the whole chunk, to six at powers of two."""
    arguments = with_decays_of_every_level(sample(workload(64, free=free, h=6)))
    assert levels_of(arguments) == [[[level] for level in range(6)]]
    assert_exact(arguments)


@pytest.mark.parametrize("tile_n", [16, 64])
def test_a_tile_of_channels_is_as_mild_as_the_fastest_of_them(tile_n: int) -> None:
    arguments = sample(workload(64, free=False, n=35))
    arguments["log_decay"][..., 33] = -50.3
    assert levels_of(arguments) == [[[5, 0]]]
    assert_exact(arguments, fused_diagonal.Launch(relate_tile_n=tile_n, differentiate_tile_n=tile_n))


@pytest.mark.parametrize(("dtype", "level"), [("float32", 5), ("float16", 3)])
def test_documents_and_chunks_have_levels_of_their_own_and_float16_lower_ones(dtype: str, level: int) -> None:
    arguments = sample(workload(106, free=False, dtype=dtype, documents=2), cu_seqlens=bounds(40, 66))
    arguments["log_decay"].fill_(-0.4)
    arguments["log_decay"][:, 40:104] = -1e4
    assert levels_of(arguments)[:3] == [[[level]], [[0]], [[5]]]


@pytest.mark.skipif(ON_GPU, reason="what is compiled keeps its functions")
@pytest.mark.parametrize("free", [False, True], ids=["KDA", "RWKV-7"])
def test_a_wrong_choice_between_one_product_and_several_is_found(free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Violent decays taken whole overflow; a whole block's own pairs left out are missed."""
    ordinary = sample(workload(20, free=free))
    violent = ordinary | {"log_decay": ordinary["log_decay"] - 30.0}
    with monkeypatch.context() as patch:
        patch.setitem(fused_diagonal._MILD, torch.float32, 10**6)
        with pytest.raises(AssertionError, match="y: "):
            assert_exact(violent)
    with monkeypatch.context() as patch:
        patch.setattr(diagonal_chunks, "reads", reads_of_two_blocks)
        with pytest.raises(AssertionError, match="y: "):
            assert_exact(ordinary)


@triton.jit
def reads_of_two_blocks(token, other, level, lowest):  # type: ignore[no-untyped-def]
    """A planted error: pairs inside a block are forgotten where it is the lowest."""
    return diagonal_levels.reads(token, other, level, -1)


def test_the_same_decay_for_every_channel_is_the_kernel_of_one_decay_per_head() -> None:
    """Two kernels that share no equation for decays agree."""
    scalar = sample(workload(70, free=False, decay="scalar"))
    vector = scalar | {"log_decay": scalar["log_decay"].unsqueeze(-1).repeat(1, 1, 1, 5)}
    expected, found = fused.forward(**scalar), fused_diagonal.forward(**vector)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    pulls = tuple(torch.randn_like(output) for output in expected[:2])
    theirs, mine = fused.backward(scalar, expected, pulls), fused_diagonal.backward(vector, found, pulls)
    for name, gradient in theirs.items():
        if gradient is not None:
            own = mine[name]
            assert own is not None
            own = own.sum(3) if name == "log_decay" else own
            torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-4)


def test_the_delta_rule_is_the_general_transition_that_removes_what_decayed_and_inserts_the_gated_key() -> None:
    delta = sample(workload(70, free=False))
    decayed = delta["log_decay"].exp() * delta["k"]
    free = delta | {"remove": -decayed, "insert": delta["write_gate"].unsqueeze(-1) * delta["k"]}
    for mine, theirs in zip(fused_diagonal.forward(**free)[:2], fused_diagonal.forward(**delta)[:2]):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@BOTH
def test_half_precision_is_within_the_operators_tolerance(free: bool) -> None:
    """In float16: the interpreter multiplies bfloat16 as if its bits were integers."""
    case = workload(130, free=free, dtype="float16", n=32, p=16)
    errors = kernel_errors(OPERATOR, KERNEL, sample(case), gradients=True)
    verdict = judge(OPERATOR, KERNEL, case, errors)
    assert verdict.passed, verdict.reason


@BOTH
def test_residuals_are_those_the_operator_declares(free: bool) -> None:
    arguments = sample(workload(70, free=free, h=2))
    expected, found = chunked.forward(**arguments), fused_diagonal.forward(**arguments)
    for mine, theirs, promised in zip(found, expected, definition.empty_outputs(arguments), strict=True):
        assert (mine.shape, mine.dtype) == (promised.shape, promised.dtype)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@BOTH
def test_the_same_call_gives_the_same_bits(free: bool) -> None:
    arguments = sample(workload(300, free=free, b=2, h=4, n=64, p=64) if ON_GPU else workload(2, free=free))
    outputs = fused_diagonal.forward(**arguments)
    first, second = (fused_diagonal.backward(arguments, outputs, outputs[:2]) for _ in range(2))
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items() if gradient is not None)


@BOTH
def test_a_missing_gradient_is_zero(free: bool) -> None:
    arguments = sample(workload(2, free=free))
    outputs = fused_diagonal.forward(**arguments)
    pull = torch.ones_like(outputs[0])
    some = fused_diagonal.backward(arguments, outputs, (pull, None))
    same = fused_diagonal.backward(arguments, outputs, (pull, torch.zeros_like(outputs[1])))
    assert all(torch.equal(some[name], same[name]) for name in same if same[name] is not None)
    state_alone = fused_diagonal.backward(arguments, outputs, (None, torch.ones_like(outputs[1])))
    assert state_alone["k"].any()
    assert not state_alone["q"].any()


def test_a_planted_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of this file can fail, for one gradient alone."""
    honest = fused_diagonal._Call.backward

    def loses_a_digit(*values: Any) -> dict[str, Tensor | None]:
        found = honest(*values)
        return found | {"remove": found["remove"] * 1.001}

    monkeypatch.setattr(fused_diagonal._Call, "backward", loses_a_digit)
    with pytest.raises(AssertionError, match="d_remove"):
        assert_exact(sample(workload(20, free=True)))


def test_what_it_cannot_compute_is_declined_with_a_reason() -> None:
    h100 = DeviceLimits(kind="cuda", name="H100", capability=(9, 0))
    assert KERNEL.supports(workload(9, free=True, dtype="bfloat16", n=64, p=128), h100) is None
    assert KERNEL.supports(workload(9, free=True, decay="none", dtype="float32"), h100) is None
    assert "fused takes the rest" in str(KERNEL.supports(workload(9, free=False, decay="scalar"), h100))
    assert "float64" in str(KERNEL.supports(workload(9, free=True, dtype="float64"), h100))
    assert "256" in str(KERNEL.supports(workload(9, free=True, n=300), h100))
    v100 = DeviceLimits(kind="cuda", name="V100", capability=(7, 0))
    assert "8.0" in str(KERNEL.supports(workload(9, free=True), v100))
    with pytest.raises(TypeError, match="chunked"):
        fused_diagonal.forward(**sample(workload(2, free=True, dtype="float64")))


def test_a_state_beyond_blackwells_tensor_memory_is_declined_there_and_another_kernel_runs() -> None:
    """In float32 at 64 x 64 it wants 640 columns of the 512 there are, narrower and wider ones none (README)."""

    def declined(n: int, p: int, dtype: str = "float32", phase: str = "forward", capability: int = 10) -> bool:
        limits = DeviceLimits(kind="cuda", name="any", capability=(capability, 0))
        case = replace(workload(64, free=True, n=n, p=p, dtype=dtype), phase=phase)  # type: ignore[arg-type]
        assert CATALOGUE.kernel("delta_rule", "chunked").supports(case, limits) is None
        reason = KERNEL.supports(case, limits)
        assert reason is None or "tensor memory" in reason
        return reason is not None

    assert declined(64, 64)
    assert declined(40, 128, phase="backward")
    assert not declined(64, 32)
    assert not declined(32, 64)
    assert not declined(128, 64)
    assert not declined(64, 64, "bfloat16")
    assert not declined(64, 64, phase="decode")
    assert not declined(64, 64, capability=9)


def test_the_defaults_on_cuda_take_each_transition_to_the_kernel_that_computes_it() -> None:
    h100 = DeviceLimits(kind="cuda", name="H100", capability=(9, 0))
    for decay, free, expected in (
        ("scalar", False, "fused"),
        ("vector", False, "fused_diagonal"),
        ("none", True, "fused_diagonal"),
    ):
        case = workload(9, free=free, decay=decay, dtype="bfloat16", n=64, p=64)
        names = [
            name
            for name in OPERATOR.defaults["cuda"]
            if CATALOGUE.kernel("delta_rule", name).supports(case, h100) is None
        ]
        assert names == [expected, "chunked"]


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (dict(b=2, t=700, h=3, n=64, p=64, h_k=3), {}),
        (dict(b=2, t=333, h=4, n=128, p=128, h_k=2), dict(state=False)),
        (dict(b=1, t=700, h=2, n=64, p=128, h_k=1, documents=9), {}),
        (dict(b=1, t=517, h=2, n=24, p=40, h_k=2, documents=5), dict(gate=False)),
        (dict(b=3, t=1, h=4, n=128, p=64, h_k=2), {}),
        (dict(b=1, t=4_200, h=2, n=64, p=64, h_k=2), {}),  # cut
        (dict(b=1, t=4_300, h=2, n=64, p=64, h_k=2, documents=3), dict(state=False)),
    ],
    ids=str,
)
def test_on_a_gpu_it_is_within_the_operators_tolerance(
    shape: dict[str, int], options: dict[str, Any], dtype: str, free: bool
) -> None:
    case = workload(dtype=dtype, free=free, **options, **shape)
    assert_within_tolerance(KERNEL, case, sample(case, "cuda"))


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("n", [24, 64, 128])
def test_on_a_gpu_every_level_is_within_the_operators_tolerance(n: int, dtype: str, free: bool) -> None:
    case = workload(130, dtype=dtype, free=free, h=6, n=n, p=64)
    assert_within_tolerance(KERNEL, case, with_decays_of_every_level(sample(case, "cuda")))
