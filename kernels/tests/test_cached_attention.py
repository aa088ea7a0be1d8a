"""Attention of a token to a ring: kernels against its definition, and that against those of whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import symbolic_trace
from torch.testing import assert_close

pytest.importorskip("triton")

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.cached_attention.declaration import OPERATOR
from subquad_kernels.cached_attention.definition import reference, sample_inputs, scale_of
from subquad_kernels.operators import cached_attention, segment_attention, softmax_attention
from subquad_kernels.ring import Rings, attend, cache_of, places_for, rings_of
from subquad_kernels.segment_attention import tiled_step
from subquad_kernels.segment_attention.tilings import StepLaunch, step_launch
from subquad_kernels.triton_ring import write
from subquad_kernels.workload import DType, Workload

# The interpreter computes in numpy: lanes that a mask discards may hold anything. Results are checked, for NaN too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"), pytest.mark.usefixtures("fresh_memory_is_nan")
]  # fmt: skip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FILLINGS = {"all but full": 0, "turned over": 1, "full": 2, "empty": 3, "half": 4}
"""Seeds of `sample_inputs` by how full the ring is."""


def inputs(filling: str, dtype: DType = "float32", segment_len: int = 1, **shape: int) -> dict[str, Any]:
    axes = {"b": 2, "t": 1, "h": 2, "h_kv": 2, "k": 16, "v": 16, "m": 37} | shape
    options = {"segment_len": segment_len}
    case = Workload(operator="cached_attention", shape=axes, dtype=dtype, phase="decode", options=options)
    return dict(sample_inputs(case, seed=FILLINGS[filling], device=DEVICE))


def assert_equals_reference(arguments: dict[str, Any], launch: StepLaunch | None = None) -> Tensor:
    tensors = (arguments[name] for name in ("q", "k", "v", "keys", "values"))
    out, _ = tiled_step.decode(
        *tensors, scale_of(arguments["q"], arguments["scale"]), launch,
        position=arguments["position"], segment_len=arguments["segment_len"],
    )  # fmt: skip
    exact = {name: x.double() if isinstance(x, Tensor) and name != "position" else x for name, x in arguments.items()}
    (expected,) = reference(**exact)
    tolerance = OPERATOR.tolerances[str(out.dtype).removeprefix("torch.")].output
    assert_close(out.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    return out


@pytest.mark.parametrize(
    "launch", [None, StepLaunch(tile_n=16), StepLaunch(tile_n=16, splits=2), StepLaunch(tile_n=16, splits=5)], ids=str
)
@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize(("m", "segment_len"), [(1, 1), (16, 1), (37, 1), (100, 1), (20, 4)])
def test_a_token_equals_the_reference_for_any_filling_tile_and_split(
    m: int, segment_len: int, filling: str, launch: StepLaunch | None
) -> None:
    """What is not seen is NaN, and splits of a ring that has little are empty."""
    assert_equals_reference(inputs(filling, segment_len=segment_len, m=m), launch)


@pytest.mark.parametrize(
    "shape",
    [{"h": 3, "h_kv": 3}, {"h": 4, "h_kv": 2}, {"h": 4, "h_kv": 1}, {"v": 32}, {"k": 48, "v": 20}, {"k": 20, "v": 128}],
    ids=str,
)
def test_heads_may_be_shared_and_of_any_width(shape: dict[str, int]) -> None:
    assert_equals_reference(inputs("turned over", **shape), StepLaunch(tile_n=16, splits=3))


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("splits", [1, 2])
def test_query_heads_of_a_group_may_be_more_than_a_program_takes(rows: int, splits: int) -> None:
    """17 of each key head, in two blocks or one."""
    arguments = inputs("turned over", h=34, h_kv=2)
    assert_equals_reference(arguments, StepLaunch(tile_n=16, rows=rows, splits=splits))


@pytest.mark.parametrize(("h", "h_kv"), [(16, 16), (16, 4), (16, 1), (100, 1)])
@pytest.mark.parametrize("m", [1, 64, 512, 4_096, 32_768])
@pytest.mark.parametrize("b", [1, 16, 256])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_parts_cover_a_cache_and_none_is_empty(h: int, h_kv: int, m: int, b: int, element_bytes: int) -> None:
    launch = step_launch(b, h, h_kv, 64, 64, m, element_bytes=element_bytes)
    splits, span = launch.parts(m)
    assert (splits - 1) * span < m <= splits * span
    assert span % launch.tile_n == 0 and launch.rows >= min(16, h // h_kv)


@pytest.mark.parametrize("filling", FILLINGS)
def test_half_precision_stays_within_its_tolerance(filling: str) -> None:
    # float16 stands for both: the interpreter computes wrongly in bfloat16.
    assert_equals_reference(inputs(filling, "float16"), StepLaunch(tile_n=16))


@pytest.mark.parametrize("of", ["own", "ring"])
def test_scores_far_apart_do_not_overflow(of: str) -> None:
    arguments = inputs("half")
    for name in ("k",) if of == "own" else ("keys",):
        arguments[name] = 300 * arguments[name]
    assert_equals_reference(arguments, StepLaunch(tile_n=16, splits=3))


def drawn(t: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    heads = (4, 2, 2)
    q, k, v = (torch.randn(3, t, h, 16, generator=generator, device=DEVICE, dtype=dtype) for h in heads)
    return q, k, v


def decoded(
    q: Tensor, k: Tensor, v: Tensor, begun: int, places: int, *, segment_len: int = 1
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The tokens from `begun` on, one after the other, and the ring of keys afterwards."""
    kept = [x[:, segment_len - 1 : begun : segment_len] for x in (k, v)]
    rings, out = rings_of(kept[0], kept[1], begun, places, segment_len), []
    given = rings
    for token in range(begun, q.shape[1]):
        y, rings = attend(*(x[:, token : token + 1] for x in (q, k, v)), rings, segment_len=segment_len)
        out.append(y)
    assert all(one is other for one, other in zip(rings, given)), "memory was exchanged"
    assert int(rings.position) == q.shape[1]
    return torch.cat(out, dim=1), rings.keys


@pytest.mark.parametrize("begun", [0, 1, 5])
def test_with_room_it_is_causal_attention(begun: int) -> None:
    q, k, v = drawn(12)
    out, ring = decoded(q, k, v, begun, places_for(begun, 12 - begun))
    assert_close(out, softmax_attention(q, k, v, kernel="reference")[:, begun:])
    assert torch.equal(cache_of(ring, 12), k)


@pytest.mark.parametrize("begun", [0, 3, 7, 13])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_ring_as_long_as_a_window_is_attention_in_the_window(window: int, begun: int) -> None:
    q, k, v = drawn(15)
    out, ring = decoded(q, k, v, begun, window)
    assert_close(out, softmax_attention(q, k, v, window=window, kernel="reference")[:, begun:])
    assert torch.equal(cache_of(ring, 15), k[:, -window:])


@pytest.mark.parametrize("begun", [0, 2, 3, 4, 9])
@pytest.mark.parametrize("segment_len", [1, 4])
def test_with_segments_it_is_segment_attention(segment_len: int, begun: int) -> None:
    q, k, v = drawn(17)
    out, ring = decoded(q, k, v, begun, places_for(begun, 17 - begun, segment_len), segment_len=segment_len)
    assert_close(out, segment_attention(q, k, v, segment_len=segment_len, kernel="reference")[:, begun:])
    assert torch.equal(cache_of(ring, 17, segment_len), k[:, segment_len - 1 :: segment_len])


@pytest.mark.parametrize("segment_len", [1, 4])
@pytest.mark.parametrize("position", [0, 5, 23, 100])
@pytest.mark.parametrize(("h_kv", "k", "v"), [(2, 16, 16), (19, 20, 48)])
def test_a_launch_writes_a_token_where_torch_does(
    h_kv: int, k: int, v: int, position: int, segment_len: int
) -> None:  # fmt: skip
    """And nothing else, from memory of any layout."""
    given = [torch.randn(2, w, h_kv, 1, device=DEVICE).transpose(1, 3) for w in (k, v)]
    rings = Rings(
        *(torch.randn(2, 7, h_kv, w, device=DEVICE) for w in (k, v)), torch.tensor([position], device=DEVICE)
    )  # fmt: skip
    place = torch.tensor([position // segment_len % 7], device=DEVICE)
    expected = [ring.index_copy(1, place, x) for ring, x in zip(rings, given)]
    write(rings.keys, rings.values, rings.position, *given, segment_len)
    assert torch.equal(rings.keys, expected[0]) and torch.equal(rings.values, expected[1])
    assert int(rings.position) == position


@pytest.mark.parametrize("segment_len", [1, 4])
def test_traced_by_fx_it_writes_the_token_as_well(segment_len: int) -> None:
    """Also where nodes that nobody uses are removed."""

    def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        out, rings = attend(q, k, v, Rings(keys, values, position), segment_len=segment_len)
        return out, rings.position

    traced = symbolic_trace(step)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    results = []
    for function in (step, traced):
        given = inputs("half", segment_len=segment_len)
        tensors = [given[name] for name in ("q", "k", "v", "keys", "values", "position")]
        before = tensors[3].clone()
        results.append((*function(*tensors), *tensors[3:]))
        assert not torch.equal(tensors[3].nan_to_num(), before.nan_to_num())
    assert_close(results[1], results[0], rtol=0, atol=0, equal_nan=True)


def test_the_write_keeps_the_rules_of_torch_library() -> None:
    given = inputs("turned over")
    tensors = [given[name].nan_to_num() for name in ("keys", "values", "position", "k", "v")]
    torch.library.opcheck(torch.ops.subquad_kernels.write_rings.default, (*tensors, 1))


@pytest.mark.parametrize("held", [3, 4, 6])
def test_a_ring_holds_what_of_a_cache_it_has_places_for(held: int) -> None:
    _, k, v = drawn(9)
    rings = rings_of(k[:, 9 - held :], v[:, 9 - held :], 9, 4)
    assert torch.equal(cache_of(rings.keys, 9)[:, -held:], k[:, -min(held, 4) :])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": torch.zeros(2, 2, 2, 16)}, "2 tokens a sequence"),
        ({"keys": torch.zeros(2, 37, 1, 16)}, "shapes do not fit"),
        ({"keys": torch.zeros(2, 0, 2, 16), "values": torch.zeros(2, 0, 2, 16)}, "there is no place"),
        ({"position": torch.tensor(3)}, "not one int64"),
        ({"position": torch.tensor([3], dtype=torch.int32)}, "not one int64"),
        ({"segment_len": 0}, "segment_len is 0"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    arguments = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in (inputs("half") | change).items()}
    with pytest.raises(ValueError, match=said):
        cached_attention(**arguments)


@pytest.mark.parametrize("filling", FILLINGS)
def test_the_op_keeps_the_rules_of_torch_library(filling: str) -> None:
    arguments = {name: x.nan_to_num() if isinstance(x, Tensor) else x for name, x in inputs(filling).items()}
    for name in ("q", "k", "v", "keys", "values"):
        arguments[name].requires_grad_()
    torch.library.opcheck(torch.ops.subquad.cached_attention.default, (*arguments.values(), "reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("m", [1, 64, 100, 3_000, 40_000])
@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("shape", [{}, {"h": 8, "h_kv": 2}, {"k": 128, "v": 128}, {"k": 48, "v": 256}], ids=str)
def test_a_token_equals_the_reference_on_cuda(dtype: DType, m: int, filling: str, shape: dict[str, int]) -> None:
    arguments = inputs(filling, dtype, **({"k": 64, "v": 64, "m": m} | shape))
    assert torch.equal(assert_equals_reference(arguments), assert_equals_reference(arguments))


@pytest.mark.gpu
@pytest.mark.parametrize(("places", "segment_len"), [(200, 1), (7, 1), (50, 4)])
def test_tokens_on_cuda_are_those_of_the_reference(places: int, segment_len: int) -> None:
    """In float64 the default is the reference, which is the only one that computes it."""
    inputs = drawn(150)
    found, _ = decoded(*(x.float() for x in inputs), 90, places, segment_len=segment_len)
    expected, _ = decoded(*inputs, 90, places, segment_len=segment_len)
    assert_close(found.double(), expected, rtol=0, atol=1e-5)
