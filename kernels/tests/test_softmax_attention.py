"""Softmax attention: definition, fast kernels, and the torch operator around them."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from subquad_kernels.builtin import OPERATORS
from subquad_kernels.catalogue import CATALOGUE, CatalogueError
from subquad_kernels.device_limits import device_limits
from subquad_kernels.operators import softmax_attention
from subquad_kernels.softmax_attention import windowed
from subquad_kernels.softmax_attention.declaration import OPERATOR, visible_pairs
from subquad_kernels.softmax_attention.definition import visible
from subquad_kernels.softmax_attention.flex import mask_function
from subquad_kernels.softmax_attention.operator import OP
from subquad_kernels.softmax_attention.sdpa_efficient import LSE_ALIGNMENT, aligned_rows
from subquad_kernels.workload import Workload

KERNELS = ("sdpa_flash", "windowed")


def draw(t: int, s: int, *, b: int = 2, h: int = 4, h_kv: int = 2, k: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(b, length, heads, k, generator=generator, dtype=torch.float64).requires_grad_()
        for length, heads in ((t, h), (s, h_kv), (s, h_kv))
    ]


def run(inputs: list[Tensor], cu_seqlens: Tensor | None = None, **options: Any) -> list[Tensor]:
    out = softmax_attention(*inputs, cu_seqlens, **options)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return [out, *torch.autograd.grad((out * pull).sum(), inputs)]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).detach().abs().max() <= tolerance * max(float(b.detach().abs().max()), 1e-2)


@pytest.mark.parametrize("window", [0, 1, 5, 17, 100])
@pytest.mark.parametrize("t", [1, 2, 17, 33])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "to both sides"])
def test_kernels_equal_the_reference_at_any_length_and_window(kernel: str, t: int, window: int, causal: bool) -> None:
    if kernel == "windowed" and not window:
        return
    inputs, options = draw(t, t), {"window": window, "causal": causal}
    close(run(inputs, **options, kernel=kernel), run(inputs, **options, kernel="reference"))


@pytest.mark.parametrize("lengths", [[33], [5, 0, 1, 27], [0, 16, 17, 0], [1] * 7])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "to both sides"])
def test_packed_documents_equal_separate_calls(kernel: str, window: int, lengths: list[int], causal: bool) -> None:
    if kernel == "windowed" and not window:
        return
    inputs = draw(sum(lengths), sum(lengths), b=1)
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = softmax_attention(*inputs, boundaries, window=window, causal=causal, kernel=kernel)
    parts = [
        softmax_attention(*document, window=window, causal=causal, kernel="reference")
        for document in zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
        if document[0].shape[1]
    ]
    close([packed], [torch.cat(parts, dim=1)])
    close(
        run(inputs, boundaries, window=window, causal=causal, kernel=kernel),
        run(inputs, boundaries, window=window, causal=causal, kernel="reference"),
    )


@pytest.mark.parametrize("kernel", ["reference", "sdpa_flash"])
def test_bidirectional_attention_sees_the_whole_document(kernel: str) -> None:
    inputs = draw(9, 9, b=1)
    boundaries = torch.tensor([0, 4, 9], dtype=torch.int32)
    out = softmax_attention(*inputs, boundaries, causal=False, kernel=kernel)
    (gradient,) = torch.autograd.grad(out[:, 0].sum(), inputs[2])
    assert (gradient[0].abs().amax(dim=(1, 2)) > 0).tolist() == [True] * 4 + [False] * 5
    expected = run(inputs, boundaries, causal=False, kernel="reference")
    close(run(inputs, boundaries, causal=False, kernel=kernel), expected)


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_a_window_to_both_sides_is_attention_over_a_slice_of_the_keys(kernel: str) -> None:
    q, k, v = draw(40, 40)
    out = softmax_attention(q, k, v, causal=False, window=18, kernel=kernel)
    for token in (0, 3, 20, 39):
        near = slice(max(0, token - 17), token + 18)
        alone = softmax_attention(q[:, token : token + 1], k[:, near], v[:, near], causal=False, kernel="reference")
        close([out[:, token : token + 1]], [alone])


@pytest.mark.parametrize("t", [1, 3, 16])
@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "to both sides"])
def test_the_queries_are_the_last_of_the_keys(t: int, window: int, causal: bool) -> None:
    inputs, options = draw(16, 16), {"window": window, "causal": causal}
    whole = softmax_attention(*inputs, **options, kernel="reference")
    for kernel in ("reference", "sdpa_flash"):
        tail = softmax_attention(inputs[0][:, -t:], *inputs[1:], **options, kernel=kernel)
        close([tail], [whole[:, -t:]])


def test_the_reference_equals_torchs_own_attention() -> None:
    q, k, v = draw(14, 14, h_kv=4)
    theirs = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=0.3)
    close([softmax_attention(q, k, v, scale=0.3, kernel="reference")], [theirs.transpose(1, 2)])


def test_gradients_pass_gradcheck() -> None:
    inputs = draw(5, 7, b=1, h=2, h_kv=1, k=2)
    for kernel in ("reference", "sdpa_flash"):
        assert torch.autograd.gradcheck(lambda *x: softmax_attention(*x, kernel=kernel), inputs)  # noqa: B023


def test_long_windows_need_no_square_matrix() -> None:
    q, k, v = (x.detach().float() for x in draw(700, 700, b=1, h=2, h_kv=2))
    shapes = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                shapes.append(result.numel())
            return result

    with Largest():
        windowed.forward(q, k, v, None, True, 20, None)
    assert max(shapes) < 700 * 700 / 4


def test_flex_masks_say_what_the_definition_says() -> None:
    boundaries = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    for t, s, bounds, causal, window in (
        (8, 8, None, True, 0), (8, 8, boundaries, True, 0), (8, 8, None, True, 3), (3, 8, None, True, 4),
        (8, 8, boundaries, False, 0), (8, 8, boundaries, False, 2), (3, 8, None, False, 4),
    ):  # fmt: skip
        seen = mask_function(t, s, bounds, causal, window)
        query, key = torch.arange(t)[:, None].expand(t, s), torch.arange(s)[None].expand(t, s)
        zero = torch.tensor(0)
        assert torch.equal(seen(zero, zero, query, key), visible(t, s, bounds, causal, window, torch.device("cpu")))


@pytest.mark.parametrize(
    ("t", "s", "causal", "window"),
    [
        (7, 7, True, 0), (7, 7, False, 0), (3, 9, True, 0), (9, 9, True, 4), (3, 9, True, 8),
        (9, 9, False, 1), (9, 9, False, 4), (9, 9, False, 30), (3, 9, False, 8),
    ],
)
def test_work_counts_the_visible_pairs(t: int, s: int, causal: bool, window: int) -> None:
    seen = visible(t, s, None, causal, window, torch.device("cpu"))
    shape = {"b": 2, "t": t, "s": s, "h": 4, "h_kv": 2, "k": 8, "v": 8}
    options = {"causal": causal, "window": window}
    workload = Workload(operator="softmax_attention", shape=shape, dtype="float32", options=options)
    assert visible_pairs(workload) == int(seen.sum())
    if t == s:
        lengths = (5, 0, 1, t - 6)
        bounds = torch.tensor([0, 5, 5, 6, t], dtype=torch.int32)
        packed = replace(workload, shape={**shape, "b": 1, "documents": 4}, document_lengths=lengths)
        of_documents = visible(t, t, bounds, causal, window, torch.device("cpu"))
        assert visible_pairs(packed) == int(of_documents.sum())
    work = OPERATOR.work(workload)
    assert work.matmul_flops == 2 * 2 * 4 * int(seen.sum()) * (8 + 8)
    assert work.bytes_moved == 4 * (2 * t * 4 * 8 + 2 * s * 2 * 16 + 2 * t * 4 * 8) + 4 * 2 * 4 * t
    backward = OPERATOR.work(replace(workload, phase="backward"))
    assert backward.matmul_flops == work.matmul_flops * 5 // 2


@pytest.mark.parametrize(
    ("t", "window", "causal"), [(300, 64, True), (50, 2048, True), (33, 4, True), (300, 64, False)]
)
def test_a_window_computes_the_pairs_that_its_padding_says(t: int, window: int, causal: bool) -> None:
    shape = {"b": 1, "t": t, "s": t, "h": 2, "h_kv": 1, "k": 8, "v": 8}
    options = {"causal": causal, "window": window}
    workload = Workload(operator="softmax_attention", shape=shape, dtype="float32", options=options)
    kernel = CATALOGUE.kernel("softmax_attention", "windowed")
    arguments = OPERATOR.torch_half.sample_inputs(workload, seed=0, device="cpu")
    with FlopCounterMode(display=False) as counter:
        kernel.torch_half.forward(**arguments)
    assert kernel.padding(workload) * OPERATOR.work(workload).matmul_flops == counter.get_total_flops()


def test_flop_counters_count_the_operator() -> None:
    inputs = [x.detach().requires_grad_() for x in draw(16, 16)]
    with FlopCounterMode(display=False) as counter:
        softmax_attention(*inputs).sum().backward()
    arguments = dict(zip(("q", "k", "v"), inputs, strict=True)) | {"cu_seqlens": None, "causal": True, "window": 0}
    forward = OPERATOR.torch_half.workload_of(arguments, "forward")
    expected = OPERATOR.work(forward).flops + OPERATOR.work(replace(forward, phase="backward")).flops
    assert counter.get_total_flops() == expected


def test_the_operator_keeps_torchs_rules() -> None:
    inputs = [x.detach().requires_grad_() for x in draw(9, 9)]
    torch.library.opcheck(OP, (*inputs, None, True, 0, None, "default"))
    torch.library.opcheck(OP, (*inputs, None, True, 3, None, "windowed"))
    torch.library.opcheck(OP, (*inputs, None, False, 3, None, "windowed"))


def test_it_stays_one_node_under_export_and_compile() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return softmax_attention(q, k, v)

    inputs = tuple(x.detach() for x in draw(9, 9))
    exported = torch.export.export(Attend(), inputs)
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert names.count("subquad.softmax_attention.default") == 1


def test_a_table_looks_the_kernel_up_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in ("sdpa_flash", "reference"):
        half = CATALOGUE.kernel("softmax_attention", name).torch_half

        def forward(name: str = name, half: Any = half, **arguments: Any) -> Any:
            ran.append(name)
            return half.forward(**arguments)

        fake = type("Half", (), {"forward": staticmethod(forward)})
        monkeypatch.setitem(CATALOGUE.kernel("softmax_attention", name).__dict__, "torch_half", fake)
    table = "b<=2,t<=4: sdpa_flash; reference"
    for t in (4, 5):
        softmax_attention(*(x.detach() for x in draw(t, t)), kernel=table)
    assert ran == ["sdpa_flash", "reference"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda q, k, v: (q, k[:, :3], v[:, :3], None), "at most as many as keys"),
        (lambda q, k, v: (q[:, :, :3], k, v, None), "multiple"),
        (lambda q, k, v: (q, k, v[:, :4], None), "do not fit"),
        (lambda q, k, v: (q, k, v, torch.tensor([0, 5], dtype=torch.int32)), "batch 1"),
        (lambda q, k, v: (q[:1], k[:1], v[:1], torch.tensor([0, 5])), "int32"),
        (lambda q, k, v: (q[0], k, v, None), "axes"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: Any, word: str) -> None:
    inputs = change(*(x.detach() for x in draw(5, 5)))
    with pytest.raises(ValueError, match=word):
        softmax_attention(*inputs)


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(CatalogueError, match="no kernel called 'flsh'"):
        softmax_attention(*(x.detach() for x in draw(5, 5)), kernel="flsh")


def test_kernels_say_why_they_do_not_apply() -> None:
    workload = OPERATORS[0].examples[0]
    cuda = replace(device_limits("cpu"), kind="cuda", capability=(9, 0))
    half = replace(workload, dtype="bfloat16")
    assert "float32" in str(CATALOGUE.kernel("softmax_attention", "sdpa_flash").refusal(workload, cuda))
    assert CATALOGUE.kernel("softmax_attention", "sdpa_flash").refusal(half, cuda) is None
    assert CATALOGUE.kernel("softmax_attention", "sdpa_cudnn").refusal(half, cuda) is None
    near = replace(half, options={"causal": False, "window": 7})
    assert "windows" in str(CATALOGUE.kernel("softmax_attention", "sdpa_cudnn").refusal(near, cuda))
    assert "windows" in str(CATALOGUE.kernel("softmax_attention", "sdpa_efficient").refusal(near, cuda))
    packed = replace(half, shape={**half.shape, "documents": 3})
    assert "packed" in str(CATALOGUE.kernel("softmax_attention", "sdpa_cudnn").refusal(packed, cuda))
    assert "cuda" in str(CATALOGUE.kernel("softmax_attention", "sdpa_cudnn").refusal(half, device_limits("cpu")))


@pytest.mark.parametrize("t", [1, 31, 32, 64, 65])
@pytest.mark.parametrize("by_token", [False, True], ids=["by head", "by token"])
def test_rows_handed_to_the_efficient_backward_are_aligned_whatever_their_strides(t: int, by_token: bool) -> None:
    whole = torch.randn(2, t + 5, 3).transpose(1, 2) if by_token else torch.randn(2, 3, t + 5)
    lse = whole[:, :, 5:]
    rows = aligned_rows(lse)
    assert rows.is_contiguous() and rows.shape[2] % LSE_ALIGNMENT == 0
    assert torch.equal(rows[:, :, :t], lse)
    assert bool(rows[:, :, t:].isinf().all())


@pytest.mark.parametrize(("t", "s"), [(1, 50), (7, 50), (50, 50)])
@pytest.mark.parametrize("window", [0, 1, 8, 49, 60])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "to both sides"])
def test_keys_that_no_query_sees_are_not_counted_as_moved(t: int, s: int, window: int, causal: bool) -> None:
    seen = visible(t, s, None, causal, window, torch.device("cpu"))
    shape = {"b": 2, "t": t, "s": s, "h": 4, "h_kv": 2, "k": 16, "v": 8}
    workload = Workload(
        operator="softmax_attention", shape=shape, dtype="float32", phase="forward",
        options={"causal": causal, "window": window},
    )  # fmt: skip
    queries, outputs, lse = t * 4 * 16, t * 4 * 8, t * 4
    keys = int(seen.any(0).sum()) * 2 * (16 + 8)
    assert OPERATOR.work(workload).bytes_moved == 2 * 4 * (queries + keys + outputs + lse)


@pytest.mark.parametrize("h_kv", [1, 2, 4])
def test_one_query_reads_a_cache_where_it_lies(h_kv: int) -> None:
    """Of memory with room behind it, without a copy of the keys."""
    q, k, v = (x.detach() for x in draw(1, 40, h_kv=h_kv))
    room = [torch.full((2, 64, *x.shape[2:]), float("nan"), dtype=x.dtype) for x in (k, v)]
    for memory, x in zip(room, (k, v)):
        memory[:, :40] = x
    written = []

    class Written(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = func(*args, **(kwargs or {}))
            for result in results if isinstance(results, tuple) else [results]:
                if isinstance(result, Tensor) and not func.is_view:
                    written.append(result.numel())
            return results

    expected = softmax_attention(q, k, v, kernel="reference")
    for name in ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn"):
        with pytest.MonkeyPatch.context() as patch:
            if name != "sdpa_flash":
                patch.setattr(f"subquad_kernels.softmax_attention.{name}._aten", _StandIn())
            module = importlib.import_module(f"subquad_kernels.softmax_attention.{name}")
            written.clear()
            with Written():
                out, lse = module.forward(q, room[0][:, :40], room[1][:, :40], None, True, 0, None)
        close([out], [expected])
        assert lse.shape == (2, 4, 1)
        assert max(written) <= max(out.numel(), lse.numel() * 32), name


class _StandIn:
    """Torch's fused operators of CUDA, by the one of the CPU; log-sum-exps have the layout of theirs."""

    def _scaled_dot_product_efficient_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: None, lse: bool, dropout: float, causal: bool, *, scale: float
    ) -> tuple[Any, ...]:
        assert q.shape[:2] == k.shape[:2] == v.shape[:2]
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, torch.nn.functional.pad(sums, (0, -q.shape[2] % 32)), None, None

    def _scaled_dot_product_cudnn_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: None, lse: bool, dropout: float, causal: bool, debug: bool, *,
        scale: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert q.shape[:2] == k.shape[:2] == v.shape[:2]
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, sums.unsqueeze(-1)
