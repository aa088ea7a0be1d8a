"""The fused segment attention: on a CPU in Triton's interpreter (float32, tiny tiles), on a GPU as it is.

GPU tests: not yet seen through on a device; the benchmark's checks were, on an H100, 2026-11-24.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from subquad_kernels.builtin import KERNELS
from subquad_kernels.device_limits import device_limits
from subquad_kernels.segment_attention import tiled, tilings
from subquad_kernels.segment_attention.declaration import OPERATOR
from subquad_kernels.segment_attention.definition import sample_inputs
from subquad_kernels.self_check import kernel_errors
from subquad_kernels.workload import DType, Phase, Workload

# The interpreter computes in numpy: lanes that a mask discards may hold anything. Results are checked, for NaN too.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = next(kernel for kernel in KERNELS if kernel.key == "segment_attention/tiled")
SMALL = tiled.Tiling(tile_t=16, tile_n=16, num_warps=4, num_stages=1)
"""The smallest tiles there are: short sequences then cross many edges."""


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("forward", "query_gradients", "summary_gradients"):
        monkeypatch.setitem(tiled.TILINGS, stage, SMALL)


def workload(segment_len: int, dtype: DType = "float32", phase: Phase = "backward", **shape: int) -> Workload:
    axes = {"b": 1, "t": 20, "h": 1, "h_kv": 1, "k": 16, "v": 16, "m": 0} | shape
    return Workload(
        operator="segment_attention", shape=axes, dtype=dtype, phase=phase, options={"segment_len": segment_len}
    )


def inputs(case: Workload, lengths: list[int] | None = None, **others: Any) -> dict[str, Any]:
    """Sample inputs of a workload; `lengths` are those of the documents of a packed sequence."""
    if lengths is not None:
        case = replace(case, shape=case.shape | {"t": sum(lengths)})
    arguments: dict[str, Any] = sample_inputs(case, seed=3, device=DEVICE)
    if lengths is not None:
        arguments["cu_seqlens"] = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    return arguments | others


def assert_equals_reference(arguments: dict[str, Any]) -> None:
    """Output and every gradient, computed on memory full of NaN, against the float64 reference."""
    tolerance = OPERATOR.tolerances[str(arguments["q"].dtype).removeprefix("torch.")]
    errors = kernel_errors(OPERATOR, KERNEL, arguments, gradients=True)
    for name, error in errors.items():
        assert error <= (tolerance.gradient if name.startswith("d_") else tolerance.output), (name, errors)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("t", "segment_len"),
    [(1, 1), (1, 3), (2, 3), (3, 3), (15, 1), (16, 3), (17, 1), (37, 1), (53, 3), (9, 10), (10, 10), (11, 10), (97, 3)],
)
def test_tiled_equals_the_reference_at_any_length(t: int, segment_len: int) -> None:
    assert_equals_reference(inputs(workload(segment_len, t=t)))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "shape",
    [{"h": 2}, {"h": 3, "b": 2}, {"h": 4, "h_kv": 2}, {"k": 16, "v": 32}, {"k": 48, "v": 20}, {"k": 48, "v": 48}],
    ids=str,
)
def test_tiled_equals_the_reference_with_shared_heads_and_any_width(shape: dict[str, int]) -> None:
    assert_equals_reference(inputs(workload(2, t=19, **shape)))


@pytest.mark.usefixtures("small_tiles")
def test_half_precision_stays_within_its_tolerance() -> None:
    # float16 stands for both: the interpreter computes wrongly in bfloat16.
    assert_equals_reference(inputs(workload(2, "float16", t=35)))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("scale", [0.7, 0.0, -0.3])
def test_the_scale_may_have_any_sign(scale: float) -> None:
    assert_equals_reference(inputs(workload(3, t=20), scale=scale))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("lengths", "segment_len"),
    [
        ([33], 4), ([5, 0, 1, 30], 4), ([0, 16, 17, 0], 1), ([1] * 7, 1), ([3, 3, 3], 4), ([2, 40, 3, 9, 21], 2),
        ([0, 0, 1], 3),
    ],
)  # fmt: skip
def test_segments_restart_at_every_document(lengths: list[int], segment_len: int) -> None:
    assert_equals_reference(inputs(workload(segment_len, h=2), lengths))


@pytest.mark.usefixtures("small_tiles")
def test_tokens_after_the_last_boundary_are_a_document_of_their_own() -> None:
    arguments = inputs(workload(3), [10, 7, 15])
    arguments["cu_seqlens"] = arguments["cu_seqlens"][:-1].contiguous()
    assert_equals_reference(arguments)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("t", "m", "into"), [(1, 3, 0), (1, 20, 3), (3, 2, 1), (21, 2, 2), (40, 18, 3), (9, 0, 3)])
def test_known_summaries_are_seen_and_receive_gradients(t: int, m: int, into: int) -> None:
    arguments = inputs(workload(4, t=t, m=m))
    assert_equals_reference(arguments | {"start": 4 * m + into})


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("lengths", [None, [30, 3, 20]])
def test_splitting_the_queries_changes_nothing(lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tilings, "SPLIT_T", 20)
    assert_equals_reference(inputs(workload(2, t=53, h=2), lengths))


@pytest.mark.usefixtures("small_tiles")
def test_memory_of_any_layout_is_read() -> None:
    arguments = inputs(workload(3, t=19, h=4, h_kv=2))
    for name in ("q", "k"):
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    arguments["v"] = arguments["v"].transpose(1, 3).contiguous().transpose(1, 3)
    assert_equals_reference(arguments)


@pytest.mark.usefixtures("small_tiles")
def test_large_scores_do_not_overflow() -> None:
    arguments = inputs(workload(3, t=20))
    arguments["q"], arguments["k"] = 60 * arguments["q"], 60 * arguments["k"]
    out, lse = tiled.forward(**arguments)
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    expected = OPERATOR.torch_half.reference(**exact)
    assert torch.isfinite(lse).all()
    assert (out - expected[0]).abs().max() < 1e-2
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-6, atol=1e-3)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("mistake", "seen_in"),
    [("first", "d_k"), ("low", "out"), ("end", "d_v"), ("keys", "out"), ("unsplit", "d_v")],
)
def test_the_comparison_finds_planted_errors(mistake: str, seen_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = mistake in ("low", "end")
    arguments = inputs(workload(3), [17, 1, 22] if packed else [40])
    if not packed:
        arguments["cu_seqlens"] = None
    make = tiled._Seen.by_call

    def wrong(*call: Any) -> tiled._Seen:
        seen = make(*call)
        if mistake == "first":
            return replace(seen, first=seen.first + 1)
        if mistake == "low":
            return replace(seen, low=torch.zeros_like(seen.low))  # type: ignore[arg-type]
        if mistake == "end":
            return replace(seen, end=torch.full_like(seen.end, 40))  # type: ignore[arg-type]
        return replace(seen, keys=seen.keys.flip(1))

    if mistake == "unsplit":
        monkeypatch.setattr(tiled, "_add_to_tokens_kernel", _Nothing())
    else:
        monkeypatch.setattr(tiled._Seen, "by_call", wrong)
    errors = kernel_errors(OPERATOR, KERNEL, arguments, gradients=True)
    tolerance = OPERATOR.tolerances["float32"]
    assert not errors[seen_in] <= (tolerance.gradient if seen_in.startswith("d_") else tolerance.output)


class _Nothing:
    """A kernel that does nothing when launched."""

    def __getitem__(self, grid: object) -> Any:
        return lambda *args, **options: None


def test_the_kernel_says_where_it_does_not_apply() -> None:
    limits = device_limits("cpu")
    assert KERNEL.supports(workload(3), limits) is None
    assert KERNEL.supports(workload(3, k=48, v=256), limits) is None
    assert KERNEL.supports(workload(3, "float64"), limits) == "does not compute in float64"
    assert "head width 8" in str(KERNEL.supports(workload(3, k=8), limits))
    assert "head width 257" in str(KERNEL.supports(workload(3, v=257), limits))
    assert KERNEL.refusal(workload(3), limits) == "runs on cuda only"
    for arguments in (inputs(workload(3, "float64")), inputs(workload(3, k=8))):
        with pytest.raises(ValueError, match="name another kernel"):
            tiled.forward(**arguments)


COMPILE = '''
"""Compile every launch of a forward and backward ahead of time for compute capability 9.0."""
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from subquad_kernels.segment_attention import tiled

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
compiled = {}


def compile_launch(self, *args, grid, warmup, num_warps=4, num_stages=3, **options):
    """What a launch compiles: types, constants, and which pointers and integers are multiples of 16."""
    arguments = self.signature.bind(*args, **options).arguments
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(self.params):
        value = arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(index,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    key = self.fn.__name__, str((signature, constants, attributes, num_warps, num_stages))
    if key not in compiled:
        source = ASTSource(self, signature, constants, attributes)
        launch = {"num_warps": num_warps, "num_stages": num_stages}
        compiled[key] = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)


JITFunction.run = compile_launch
width = int(sys.argv[1])
for t, segment_len in ((2048, 10), (2049, 10), (333, 7)):
    q, k, v = (torch.zeros(1, t, heads, width, dtype=torch.bfloat16) for heads in (4, 2, 2))
    call = {"q": q, "k": k, "v": v, "summary_k": None, "summary_v": None, "cu_seqlens": None}
    call |= {"segment_len": segment_len, "start": 0, "scale": None}
    outputs = tiled.forward(**call)
    tiled.backward(call, outputs, (torch.zeros_like(outputs[0]),))
for (name, _), kernel in compiled.items():
    print(name, kernel.asm["ptx"].count("wgmma.mma_async"), len(kernel.asm["cubin"]))
'''


@pytest.mark.parametrize("width", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_every_kernel_compiles_for_hopper_once_for_all_lengths(width: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(width)], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert sorted(name for name, _, _ in rows) == [
        "_add_to_tokens_kernel", "_forward_kernel", "_query_gradients_kernel", "_summary_gradients_kernel",
    ]  # fmt: skip
    for name, products, size in rows:
        assert int(size) > 0
        assert name == "_add_to_tokens_kernel" or int(products) > 0, f"{name} does not use the tensor cores of Hopper"


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, [0, 300, 1, 77, 0, 129]], ids=["one", "packed"])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [*product(("bfloat16", "float16", "float32"), (16, 48, 64, 128)), ("bfloat16", 256)],
)
def test_tiled_equals_the_reference_on_cuda(dtype: DType, width: int, lengths: list[int] | None) -> None:
    for segment_len in (1, 10):
        shape = {"b": 2 if lengths is None else 1, "t": 509, "h": 4, "h_kv": 2, "k": width, "v": width}
        assert_equals_reference(inputs(workload(segment_len, dtype, **shape), lengths))


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 5, 130])
def test_tiled_decodes_from_known_summaries_on_cuda(t: int) -> None:
    assert_equals_reference(inputs(workload(10, "bfloat16", b=2, t=t, m=70, h=8, h_kv=2, k=64, v=64)))


@pytest.mark.gpu
def test_equal_inputs_give_equal_bits_on_cuda() -> None:
    arguments = inputs(workload(10, "bfloat16", b=2, t=4099, h=4, h_kv=2, k=64, v=64))

    def run() -> list[Tensor]:
        outputs = tiled.forward(**arguments)
        found = tiled.backward(arguments, outputs, (outputs[0],))
        return [*outputs, *(x for x in found.values() if x is not None)]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_packed_call_does_not_wait_for_the_device() -> None:
    arguments = inputs(workload(10, "bfloat16", h=4, h_kv=2, k=64, v=64), [100, 0, 411])

    def run() -> None:
        outputs = tiled.forward(**arguments)
        tiled.backward(arguments, outputs, (outputs[0],))

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
