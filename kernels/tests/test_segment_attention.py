"""Segment attention: definition, fast kernels, and the torch operator around them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.operators import segment_attention, softmax_attention
from subquad_kernels.segment_attention import compacted, sdpa_merge
from subquad_kernels.segment_attention.declaration import OPERATOR, visible_pairs
from subquad_kernels.segment_attention.operator import OP
from subquad_kernels.segment_attention.summaries import Summaries
from subquad_kernels.segment_attention.tilings import parts_of, tiling, walks
from subquad_kernels.self_check import kernel_errors
from subquad_kernels.workload import Phase, Workload

KERNELS = ("compacted", "sdpa_merge")


def draw(t: int, *, m: int = 0, b: int = 2, h: int = 4, h_kv: int = 2, k: int = 8, seed: int = 0) -> list[Tensor]:
    """q, k, v, and the summaries handed in if there are any."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(t, h), (t, h_kv), (t, h_kv)] + ([(m, h_kv), (m, h_kv)] if m else [])
    return [
        torch.randn(b, length, heads, k, generator=generator, dtype=torch.float64).requires_grad_()
        for length, heads in sizes
    ]


def run(inputs: list[Tensor], cu_seqlens: Tensor | None = None, **options: Any) -> list[Tensor]:
    summaries = inputs[3:] or [None, None]
    out = segment_attention(*inputs[:3], *summaries, cu_seqlens, **options)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return [out, *torch.autograd.grad((out * pull).sum(), inputs, allow_unused=True, materialize_grads=True)]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).detach().abs().max() <= tolerance * max(float(b.detach().abs().max()), 1e-2)


def by_the_definition(q: Tensor, k: Tensor, v: Tensor, segment_len: int) -> Tensor:
    """One token at a time, one head, no grouped queries.  Shapes: t h k  ->  t h k"""
    out = []
    for g in range(q.shape[0]):
        visible = [g, *range(segment_len - 1, g, segment_len)]
        scores = torch.stack([(q[g] * k[j]).sum(-1) * q.shape[-1] ** -0.5 for j in visible])
        out.append((scores.softmax(0)[..., None] * torch.stack([v[j] for j in visible])).sum(0))
    return torch.stack(out)


@pytest.mark.parametrize("segment_len", [1, 3, 10, 50])
def test_the_reference_equals_the_definition_token_by_token(segment_len: int) -> None:
    q, k, v = draw(23, h=2)
    found = segment_attention(q, k, v, segment_len=segment_len, kernel="reference")
    for row in range(2):
        close([found[row]], [by_the_definition(q[row], k[row], v[row], segment_len)])


@pytest.mark.parametrize("segment_len", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("t", [1, 2, 16, 33])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_equal_the_reference_at_any_length(kernel: str, t: int, segment_len: int) -> None:
    inputs = draw(t)
    options = {"segment_len": segment_len}
    close(run(inputs, kernel=kernel, **options), run(inputs, kernel="reference", **options))


@pytest.mark.parametrize("tile", [1, 7, 16, 1000])
def test_compacted_equals_itself_for_any_tile(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(33, m=2)
    expected = run(inputs, segment_len=4, start=9, kernel="reference")
    monkeypatch.setattr(compacted, "TILE_T", tile)
    close(run(inputs, segment_len=4, start=9, kernel="compacted"), expected)


@pytest.mark.parametrize("start", range(9))
@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_splitting_the_sequence_and_handing_summaries_on_changes_nothing(kernel: str, start: int) -> None:
    segment_len = 4
    q, k, v = draw(21)
    whole = segment_attention(q, k, v, segment_len=segment_len, kernel="reference")
    summaries = [x[:, :start][:, segment_len - 1 :: segment_len] for x in (k, v)]
    rest = [x[:, start:] for x in (q, k, v)]
    tail = segment_attention(*rest, *summaries, segment_len=segment_len, start=start, kernel=kernel)
    close([tail], [whole[:, start:]])


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_reach_the_summaries_handed_in(kernel: str) -> None:
    inputs = draw(10, m=3)
    found = run(inputs, segment_len=4, start=14, kernel=kernel)
    close(found, run(inputs, segment_len=4, start=14, kernel="reference"))
    assert found[4].abs().max() > 0


@pytest.mark.parametrize("lengths", [[33], [5, 0, 1, 27], [0, 16, 17, 0], [1] * 7, [4, 4, 4]])
@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_segments_restart_at_every_document(kernel: str, lengths: list[int]) -> None:
    inputs = draw(sum(lengths), b=1)
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = run(inputs, boundaries, segment_len=4, kernel=kernel)
    parts = [
        segment_attention(*document, segment_len=4, kernel="reference")
        for document in zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
        if document[0].shape[1]
    ]
    close(packed[:1], [torch.cat(parts, dim=1)])
    close(packed, run(inputs, boundaries, segment_len=4, kernel="reference"))


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_segments_of_one_token_are_causal_attention(kernel: str) -> None:
    q, k, v = draw(13)
    close([segment_attention(q, k, v, segment_len=1, kernel=kernel)], [softmax_attention(q, k, v, kernel="reference")])


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_a_key_that_is_no_summary_matters_to_its_own_token_alone(kernel: str) -> None:
    q, k, v = draw(15)
    out = segment_attention(q, k, v, segment_len=4, kernel=kernel)
    for t in range(15):
        found = torch.autograd.grad(out[:, t].sum(), (k, v), retain_graph=True)
        for gradient in found:
            for j in range(15):
                if j != t and (j > t or j % 4 != 3):
                    assert (gradient[:, j] == 0).all(), f"token {t} sees token {j}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_pass_gradcheck(kernel: str) -> None:
    q, k, v, summary_k, summary_v = draw(6, m=1, b=1, h=2, h_kv=1, k=2)
    assert torch.autograd.gradcheck(
        lambda *x: segment_attention(*x, segment_len=3, start=4, kernel=kernel), (q, k, v, summary_k, summary_v)
    )


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("seed", range(4))
def test_gradients_of_peaked_weights_keep_what_rounded_outputs_would_lose(name: str, seed: int) -> None:
    """Where one key has nearly all the weight the gradient of its score is a small difference of large sums."""
    shape = {"b": 2, "t": 32, "h": 2, "h_kv": 2, "k": 16, "v": 16, "m": 0}
    workload = Workload(
        operator="segment_attention", shape=shape, dtype="bfloat16", phase="backward", options={"segment_len": 16}
    )
    arguments = OPERATOR.torch_half.sample_inputs(workload, seed=seed, device="cpu")
    kernel = CATALOGUE.kernel("segment_attention", name)
    errors = kernel_errors(OPERATOR, kernel, arguments, gradients=True, seed=seed)
    assert max(errors["d_q"], errors["d_k"]) < 0.005, errors


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_scores_do_not_overflow(kernel: str) -> None:
    q, k, v = (x.detach().float() for x in draw(20))
    q, k = 60 * q, 60 * k
    found = segment_attention(q, k, v, segment_len=3, kernel=kernel)
    expected = segment_attention(q.double(), k.double(), v.double(), segment_len=3, kernel="reference")
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() < 1e-2


@pytest.mark.parametrize(("t", "m", "segment_len"), [(13, 0, 4), (1, 3, 4), (8, 2, 4), (3, 0, 10), (9, 0, 1)])
def test_work_counts_the_visible_pairs(t: int, m: int, segment_len: int) -> None:
    seen = sum(1 + g // segment_len for g in range(m * segment_len, m * segment_len + t))
    shape = {"b": 2, "t": t, "h": 4, "h_kv": 2, "k": 8, "v": 8, "m": m}
    workload = Workload(
        operator="segment_attention", shape=shape, dtype="float32", options={"segment_len": segment_len}
    )
    assert visible_pairs(workload) == seen
    work = OPERATOR.work(workload)
    assert work.matmul_flops == 2 * 2 * 4 * seen * 16
    assert OPERATOR.work(replace(workload, phase="backward")).matmul_flops == work.matmul_flops * 5 // 2
    tensors = 2 * t * 4 * 8 + 2 * (t + m) * 2 * 16 + 2 * t * 4 * 8 + 2 * 4 * t
    assert work.bytes_moved == 4 * tensors


def test_known_documents_are_counted_one_by_one_and_padding_to_powers_of_two() -> None:
    shape = {"b": 1, "t": 41, "h": 4, "h_kv": 2, "k": 8, "v": 8, "m": 0, "documents": 4}
    workload = Workload(
        operator="segment_attention", shape=shape, dtype="float32", options={"segment_len": 4},
        document_lengths=(13, 0, 1, 27),
    )  # fmt: skip
    assert visible_pairs(workload) == sum(1 + g // 4 for length in (13, 1, 27) for g in range(length))
    padding = {kernel.name: kernel.padding(workload) for kernel in CATALOGUE.kernels("segment_attention")}
    assert padding["sdpa_merge"] * visible_pairs(workload) == pytest.approx(16 * (1 + 3) + 1 + 32 * (1 + 7))
    assert padding["compacted"] == padding["sdpa_merge"], "one tile holds each"
    assert padding["reference"] == 1


def ranges_of(
    t: int, lengths: tuple[int, ...], segment_len: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Which summaries each token sees, and which tokens each summary is seen by, token by token as the kernels say it:
    `_mark` and `_find_kernel` where documents are packed (each stretch has room for a summary), else by counting.
    """
    if not lengths:
        seen_by = [((j + 1) * segment_len, t) for j in range((t - 1) // segment_len)]
        return [(0, token // segment_len) for token in range(t)], seen_by
    begins = [sum(lengths[:place]) for place, length in enumerate(lengths) for _ in range(length)]
    ends = [begin + length for begin, length in zip(begins, [n for n in lengths for _ in range(n)], strict=True)]
    low = [-(-begin // segment_len) for begin in begins]
    sees = [(low[token], low[token] + (token - begins[token]) // segment_len) for token in range(t)]
    seen_by = []
    for first in range(0, t, segment_len):
        position = first + segment_len - 1 - (first - begins[first]) % segment_len
        seen_by.append((position + 1, ends[first]) if position < ends[first] else (t + 1, 0))
    return sees, seen_by


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("segment_len", [10, 256])
@pytest.mark.parametrize(
    ("t", "lengths"),
    [(700, ()), (600, (250, 0, 1, 349)), (90, ()), (256, (59, 197)), (2900, (5, 1200, 40, 0, 255, 1400)), (64, (64,))],
)
def test_tiled_computes_the_tiles_that_its_walks_count(
    phase: Phase, segment_len: int, t: int, lengths: tuple[int, ...]
) -> None:
    """Rows of several documents in a tile walk the summaries of all; documents shorter than a segment have none."""
    shape = {"b": 1, "t": t, "h": 4, "h_kv": 2, "k": 64, "v": 64, "m": 0}
    shape |= {"documents": len(lengths)} if lengths else {}
    workload = Workload(
        operator="segment_attention", shape=shape, dtype="bfloat16", phase=phase,
        options={"segment_len": segment_len}, document_lengths=lengths,
    )  # fmt: skip
    sees, seen_by = ranges_of(t, lengths, segment_len)
    tiles = tiling("forward" if phase == "forward" else "query_gradients", False, 64, t)
    tails = [min(begin + tiles.tile_t, t) - 1 for begin in range(0, t, tiles.tile_t)]
    steps = [-(-max(0, sees[last][1] - sees[last - last % tiles.tile_t][0]) // tiles.tile_n) for last in tails]
    queries, *summaries = walks(workload)
    products = 2 * 64 if phase == "forward" else 3 * 64
    assert queries.flops == 4 * sum(steps) * 2 * tiles.tile_t * tiles.tile_n * products
    assert queries.longest == max(steps)
    if phase == "backward" and seen_by:
        tiles = tiling("summary_gradients", False, 64, t)
        of_tiles = [seen_by[first : first + tiles.tile_n] for first in range(0, len(seen_by), tiles.tile_n)]
        spans = [(min(first for first, _ in tile), max(end for _, end in tile)) for tile in of_tiles]
        met = [max(0, -(-end // tiles.tile_t) - first // tiles.tile_t) for first, end in spans]
        assert summaries[0].flops == 4 * sum(met) * 2 * tiles.tile_t * tiles.tile_n * 2 * 128
        parts = parts_of(len(of_tiles) * 2, t)
        assert summaries[0].longest == 2 * min(max(met), -(-t // (parts * tiles.tile_t)))
    kernel = CATALOGUE.kernel("segment_attention", "tiled")
    assert kernel.serial_steps and kernel.serial_steps(workload) == 1 + sum(walk.longest for walk in walks(workload))
    assert kernel.padding(workload) >= 1


def test_a_kernel_computes_the_pairs_that_its_padding_says() -> None:
    shape = {"b": 1, "t": 700, "h": 2, "h_kv": 2, "k": 8, "v": 8, "m": 0}
    options = {"segment_len": 10}
    workload = Workload(operator="segment_attention", shape=shape, dtype="float32", options=options)
    kernel = CATALOGUE.kernel("segment_attention", "compacted")
    arguments = OPERATOR.torch_half.sample_inputs(workload, seed=0, device="cpu")
    with FlopCounterMode(display=False) as counter:
        kernel.torch_half.forward(**arguments)
    counted = kernel.padding(workload) * OPERATOR.work(workload).matmul_flops
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.05), "but for a token's product with itself"


def test_work_falls_with_longer_segments_and_grows_with_the_square_of_length() -> None:
    def pairs(t: int, segment_len: int) -> int:
        shape = {"b": 1, "t": t, "h": 1, "h_kv": 1, "k": 1, "v": 1, "m": 0}
        options = {"segment_len": segment_len}
        return visible_pairs(Workload(operator="segment_attention", shape=shape, dtype="float32", options=options))

    assert pairs(4096, 64) / pairs(2048, 64) == pytest.approx(4, rel=0.05)
    assert pairs(4096, 8) / pairs(4096, 64) == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("start", range(7))
def test_summaries_are_where_the_definition_puts_them(start: int) -> None:
    segment_len, t = 3, 11
    summaries = Summaries.of_call(start, segment_len)
    ends = [p for p in range(start + t) if (p + 1) % segment_len == 0]
    assert summaries.known == sum(p < start for p in ends)
    positions = summaries.positions(len(ends), torch.device("cpu")).tolist()
    assert [p + start for p in positions] == ends
    for index in range(t):
        assert summaries.visible(index) == sum(p < start + index for p in ends)


def test_the_operator_keeps_torchs_rules() -> None:
    inputs = [x.detach().requires_grad_() for x in draw(9, m=2)]
    for kernel in KERNELS:
        torch.library.opcheck(OP, (*inputs, None, 4, 9, None, kernel))
        torch.library.opcheck(OP, (*inputs[:3], None, None, None, 4, 0, None, kernel))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"segment_len": 0}, "segment_len is 0"),
        ({"segment_len": 4, "start": -1}, "start is -1"),
        ({"segment_len": 4, "start": 9}, "2 are needed"),
        ({"segment_len": 4, "cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "batch 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        segment_attention(*(x.detach() for x in draw(9)), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("t", [128, 130, 192, 320])
def test_on_a_gpu_the_merge_differentiates_any_number_of_queries(t: int) -> None:
    """Segments of 64 leave a multiple of 32 queries with summaries, whose log-sum-exp the fused backward wants aligned.

    The residual comes as the kernel left it, not made contiguous by the operator.
    """
    q, k, v = (x.detach().cuda() for x in draw(t, k=64))
    exact = {"q": q, "k": k, "v": v, "summary_k": None, "summary_v": None, "cu_seqlens": None}
    exact |= {"segment_len": 64, "start": 0, "scale": None}
    single = {name: value.float() if isinstance(value, Tensor) else value for name, value in exact.items()}
    pull = torch.randn_like(q)
    expected = OPERATOR.torch_half.reference(**exact)
    wanted = compacted.backward(exact, expected, (pull,))
    outputs = sdpa_merge.forward(**single)
    found = sdpa_merge.backward(single, outputs, (pull.float(),))
    close([outputs[0].double()], [expected[0]], OPERATOR.tolerances["float32"].output)
    for name in "qkv":
        close([found[name].double()], [wanted[name]], OPERATOR.tolerances["float32"].gradient)
