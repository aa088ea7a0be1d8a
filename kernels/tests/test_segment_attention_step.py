"""One decoded token of segment attention: on a CPU in Triton's interpreter, on a GPU as it is (not yet seen there)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("triton")

from subquad_kernels.segment_attention import tiled, tiled_step
from subquad_kernels.segment_attention.declaration import OPERATOR
from subquad_kernels.segment_attention.definition import reference, sample_inputs, scale_of
from subquad_kernels.segment_attention.tilings import StepLaunch
from subquad_kernels.workload import DType, Workload

# The interpreter computes in numpy: lanes that a mask discards may hold anything. Results are checked, for NaN too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"), pytest.mark.usefixtures("fresh_memory_is_nan")
]  # fmt: skip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(m: int, dtype: DType = "float32", *, start: int | None = None, **shape: int) -> dict[str, Any]:
    axes = {"b": 2, "t": 1, "h": 2, "h_kv": 2, "k": 16, "v": 16, "m": m} | shape
    case = Workload(
        operator="segment_attention", shape=axes, dtype=dtype, phase="decode", options={"segment_len": 4}
    )  # fmt: skip
    arguments: dict[str, Any] = sample_inputs(case, seed=3, device=DEVICE)
    return arguments if start is None else arguments | {"start": start}


def decoded(arguments: dict[str, Any], launch: StepLaunch | None) -> tuple[Tensor, ...]:
    tensors = (arguments[name] for name in ("q", "k", "v", "summary_k", "summary_v"))
    return tiled_step.decode(*tensors, scale_of(arguments["q"], arguments["scale"]), launch)


def assert_equals_reference(arguments: dict[str, Any], launch: StepLaunch | None) -> None:
    out, lse = decoded(arguments, launch)
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    expected, expected_lse = reference(**exact)
    tolerance = OPERATOR.tolerances[str(out.dtype).removeprefix("torch.")].output
    assert_close(out.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    assert_close(lse.double(), expected_lse, rtol=0, atol=max(1e-5, tolerance * float(expected_lse.abs().max())))


@pytest.mark.parametrize(
    "launch", [None, StepLaunch(tile_n=16), StepLaunch(tile_n=16, splits=2), StepLaunch(tile_n=16, splits=5)], ids=str
)
@pytest.mark.parametrize("m", [0, 1, 8, 9, 37])
def test_a_token_equals_the_reference_for_any_cache_tile_and_split(m: int, launch: StepLaunch | None) -> None:
    assert_equals_reference(inputs(m), launch)


@pytest.mark.parametrize(
    "shape",
    [{"h": 3, "h_kv": 3}, {"h": 4, "h_kv": 2}, {"h": 4, "h_kv": 1}, {"v": 32}, {"k": 48, "v": 20}, {"k": 20, "v": 128}],
    ids=str,
)
@pytest.mark.parametrize("splits", [1, 3])
def test_heads_may_be_shared_and_of_any_width(shape: dict[str, int], splits: int | None) -> None:
    assert_equals_reference(inputs(21, **shape), StepLaunch(tile_n=16, splits=splits))


@pytest.mark.parametrize("m", [3, 40])
def test_half_precision_stays_within_its_tolerance(m: int) -> None:
    # float16 stands for both: the interpreter computes wrongly in bfloat16.
    assert_equals_reference(inputs(m, "float16"), StepLaunch(tile_n=16))


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.3])
def test_the_scale_may_have_any_sign(scale: float) -> None:
    assert_equals_reference(inputs(19) | {"scale": scale}, StepLaunch(tile_n=16, splits=2))


def test_memory_of_any_layout_is_read() -> None:
    arguments = inputs(19, h=4)
    for name in ("q", "k", "summary_k"):
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    for name in ("v", "summary_v"):
        arguments[name] = arguments[name].transpose(1, 3).contiguous().transpose(1, 3)
    assert_equals_reference(arguments, StepLaunch(tile_n=16))


@pytest.mark.parametrize("of", ["own", "summaries"])
@pytest.mark.parametrize("splits", [1, 3])
def test_scores_far_apart_do_not_overflow(of: str, splits: int) -> None:
    """The token's own term so far above all others, or below, that exponentials of differences are 0 in fp32."""
    arguments = inputs(19)
    for name in ("k",) if of == "own" else ("summary_k",):
        arguments[name] = 300 * arguments[name]
    out, lse = decoded(arguments, StepLaunch(tile_n=16, splits=splits))
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    expected, expected_lse = reference(**exact)
    assert_close(out.double(), expected, rtol=0, atol=1e-2)
    assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("begun", [0, 3, 4, 9])
def test_a_prefill_and_its_tokens_equal_the_forward(begun: int) -> None:
    """Segments of four: a token that ends one is a summary to the next."""
    t = 14
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (torch.randn(2, t, 2, 16, generator=generator, device=DEVICE) for _ in range(3))

    def call(first: int, last: int) -> Tensor:
        known = first // 4
        summaries = [x[:, 3:first:4] if known else None for x in (k, v)]
        rest = [x[:, first:last] for x in (q, k, v)]
        return tiled.forward(*rest, *summaries, None, 4, first, None)[0]  # type: ignore[arg-type]

    parts = [call(0, begun)] if begun else []
    parts += [call(token, token + 1) for token in range(begun, t)]
    assert_close(torch.cat(parts, dim=1), call(0, t), rtol=0, atol=1e-5)


def test_a_split_cache_without_its_second_launch_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def __getitem__(self, grid: object) -> Any:
            return lambda *args, **options: None

    monkeypatch.setattr(tiled_step, "_weigh", Nothing())
    with pytest.raises(AssertionError):
        assert_equals_reference(inputs(19), StepLaunch(tile_n=16, splits=2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("m", [0, 5, 64, 100, 3_000])
@pytest.mark.parametrize("shape", [{}, {"h": 8, "h_kv": 2}, {"k": 128, "v": 128}, {"k": 48, "v": 256}], ids=str)
def test_a_token_equals_the_reference_on_cuda(dtype: DType, m: int, shape: dict[str, int]) -> None:
    arguments = inputs(m, dtype, **({"k": 64, "v": 64} | shape))
    assert_equals_reference(arguments, None)
    first = decoded(arguments, None)
    assert all(torch.equal(a, b) for a, b in zip(first, decoded(arguments, None), strict=True))
