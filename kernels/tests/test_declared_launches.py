"""The launches that kernels declare are those that a call makes: to within a third those composed of torch's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

import subquad_kernels.operators  # noqa: F401  (registers what is declared)
from subquad_kernels.catalogue import CATALOGUE, Kernel, one_launch
from subquad_kernels.samples import draw_boundaries
from subquad_kernels.softmax_attention.flex import mask_function
from subquad_kernels.workload import DeviceLimits, Phase, Workload, document_sizes, longest_document

NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_local_scalar_dense"}
SIZES = {"t": 300, "h": 1, "h_k": 1, "h_kv": 1, "k": 4, "v": 4, "n": 4, "p": 4, "c": 4, "b": 1}
COMPILED = "flex_attention"
"""Compiled whole on a GPU, but for its mask: counted apart."""
COMPOSED = [
    kernel
    for operator in CATALOGUE
    for kernel in CATALOGUE.kernels(operator.name)
    if kernel.launches is not one_launch and not kernel.compiles
]

TRITON = [
    kernel
    for operator in CATALOGUE
    for kernel in CATALOGUE.kernels(operator.name)
    if kernel.replayable  # ours in Triton: their launches are `QuickLaunch`'s and torch's
]
A_FEW = 16
"""Launches that `one_launch` may stand for: as many as the backward of the delta rule with decays per channel makes."""


def takes_documents(kernel: Kernel) -> bool:
    examples = CATALOGUE.operator(kernel.operator).examples
    return any("documents" in example.shape for example in examples)


class Counting(TorchDispatchMode):
    """Counts calls of aten that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += not func.is_view and func._schema.name.split("::")[1] not in NOTHING
        return func(*args, **(kwargs or {}))


def counted(kernel: Kernel, workload: Workload, before: Callable[[], None] = lambda: None) -> int:
    operator = CATALOGUE.operator(kernel.operator)
    with torch.no_grad():
        arguments = operator.torch_half.sample_inputs(workload, seed=0, device="cpu")
        outputs = kernel.torch_half.forward(**arguments)
        gradients = tuple(torch.randn_like(output) for output in outputs[: len(operator.outputs)])
        before()
        with Counting() as mode:
            if workload.phase == "backward":
                kernel.torch_half.backward(arguments, outputs, gradients)
            else:
                kernel.torch_half.forward(**arguments)
    return mode.count


def workload_of(kernel: Kernel, phase: Phase, t: int) -> Workload:
    """The operator's first example of this phase at a length, narrow: widths change no count."""
    examples = CATALOGUE.operator(kernel.operator).examples
    example = next(e for e in examples if (e.phase == "decode") == (phase == "decode") and "documents" not in e.shape)
    shape = {axis: SIZES.get(axis, size) for axis, size in example.shape.items()}
    options = dict(example.options) | ({"window": 64} if kernel.name == "windowed" else {})
    if phase != "decode":
        shape |= {axis: t for axis in ("t", "s") if axis in shape}
        shape |= {"m": 0} if "m" in shape else {}
    else:
        shape["t"] = 1
    return Workload(operator=kernel.operator, shape=shape, dtype="float32", phase=phase, options=options)


@pytest.mark.parametrize("kernel", COMPOSED, ids=lambda kernel: kernel.key)
@pytest.mark.parametrize("phase", ["forward", "backward", "decode"])
def test_declared_launches_are_those_of_a_call(kernel: Kernel, phase: Phase) -> None:
    if phase == "decode" and kernel.name == "windowed":
        pytest.skip("a window's decode is not its own")
    for t in (300, 900):
        workload = workload_of(kernel, phase, t)
        assert kernel.launches(workload) == pytest.approx(counted(kernel, workload), rel=0.34), (workload.shape, phase)


def packed(kernel: Kernel, phase: Phase, t: int, documents: int) -> Workload:
    """The workload of this length, packed with the documents that `sample_inputs` draws."""
    workload = workload_of(kernel, phase, t)
    shape = {**workload.shape, "b": 1, "documents": documents}
    boundaries = draw_boundaries(shape, 0, "cpu")
    assert boundaries is not None
    return replace(workload, shape=shape, document_lengths=tuple(boundaries.diff().tolist()))


@pytest.mark.parametrize("kernel", [kernel for kernel in COMPOSED if takes_documents(kernel)], ids=lambda one: one.key)
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize(("t", "documents"), [(300, 2), (500, 24)])
def test_launches_of_packed_documents_are_declared(kernel: Kernel, phase: Phase, t: int, documents: int) -> None:
    """Of every size of documents, and for what each leaves: 40 times as many as of one sequence, in places."""
    workload = packed(kernel, phase, t, documents)
    assert kernel.launches(workload) == pytest.approx(counted(kernel, workload), rel=0.34)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_launches_of_decays_per_channel_are_declared(low_rank: bool, phase: Phase) -> None:
    """A chunk's last tokens take fewer steps of sixteen; transitions by vectors of their own take more each."""
    kernel = CATALOGUE.kernel("delta_rule", "chunked")
    for workload in (workload_of(kernel, phase, 201), packed(kernel, phase, 201, 3)):
        asked = replace(workload, options={**workload.options, "decay": "vector", "low_rank": low_rank})
        assert kernel.launches(asked) == pytest.approx(counted(kernel, asked), rel=0.15), asked.shape


def counted_of_triton(kernel: Kernel, workload: Workload, monkeypatch: pytest.MonkeyPatch) -> int:
    """Launches of a call, none of which is made."""
    quick = pytest.importorskip("subquad_kernels.triton_launch").QuickLaunch
    launched: list[object] = []
    monkeypatch.setattr(quick, "_launch", lambda launch, *values, **constants: launched.append(launch))
    calls = counted(kernel, workload, before=launched.clear)
    return calls + len(launched)


H200 = DeviceLimits(
    kind="cuda", name="H200", capability=(9, 0), memory_bytes=140 << 30, shared_memory_bytes=227 << 10
)  # fmt: skip
LENGTHS = (40, 700, 3000)


OF_ONE_TOKEN = ("cached_attention",)
"""Operators that know no other call."""
WIDER = {"linear_attention": ({"n": 128, "p": 128}, {"n": 160, "p": 128}, {"h": 8, "h_k": 1, "n": 128, "p": 64})}
"""Heads of a layout that the kernel computes in another way (in half precision)."""


def workloads_of(kernel: Kernel) -> list[Workload]:
    """The operator's examples, at several lengths both ways, and as one token; where it takes no more, behind them."""
    found: list[Workload] = []
    for example in CATALOGUE.operator(kernel.operator).examples:
        widths = WIDER.get(kernel.operator, ()) if example.dtype == "bfloat16" else ()
        for changes in ({}, *widths):
            case = replace(example, shape={**example.shape, **changes})
            if "documents" not in case.shape:
                found.append(replace(case, shape={**case.shape, "t": 1}, phase="decode"))
            if example.phase != "decode":
                longer = [replace(case, shape={**case.shape, "t": t}) for t in LENGTHS]
                found += [replace(each, phase=phase) for each in longer for phase in ("forward", "backward")]
            elif kernel.operator in OF_ONE_TOKEN:
                found += [replace(case, shape={**case.shape, "m": t}) for t in LENGTHS]
    return [workload for workload in found if kernel.supports(workload, H200) is None]


@pytest.mark.parametrize("kernel", TRITON, ids=lambda kernel: kernel.key)
def test_a_triton_kernel_launches_as_declared(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly so often; or a few times, which it declares as one."""
    cases = workloads_of(kernel)
    known = {"decode"} if kernel.operator in OF_ONE_TOKEN else {"forward", "backward", "decode"}
    assert {workload.phase for workload in cases} == known
    for workload in cases:
        number = counted_of_triton(kernel, workload, monkeypatch)
        if kernel.launches is one_launch:
            assert 1 <= number <= A_FEW, workload
        else:
            assert kernel.launches(workload) == number, workload


@pytest.mark.parametrize("changes", [{}, *WIDER["linear_attention"]], ids=str)
@pytest.mark.parametrize("documents", [0, 3])
@pytest.mark.parametrize("decay", ["none", "token", "head"])
def test_linear_attention_launches_as_declared_whatever_its_gates(
    changes: dict[str, int], documents: int, decay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision, where a form keeps states, where one takes several heads, and where neither."""
    kernel = CATALOGUE.kernel("linear_attention", "fused")
    shape = {"b": 1, "t": 700, "h": 4, "h_k": 2, "n": 16, "p": 80, **changes}
    shape |= {"documents": documents} if documents else {}
    for phase, gated in product(("forward", "backward"), (False, True)):
        options = {"decay": decay} | dict.fromkeys(("write_gate", "diagonal", "initial_state"), gated)
        workload = Workload(
            operator="linear_attention", shape=shape, dtype="bfloat16", phase=phase, options=options  # type: ignore[arg-type]
        )  # fmt: skip
        assert kernel.launches(workload) == counted_of_triton(kernel, workload, monkeypatch), workload


@pytest.mark.parametrize(("m", "launches"), [(0, 1), (64, 1), (448, 1), (449, 2), (10_000, 2)])
def test_a_split_cache_takes_a_second_launch(m: int, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight tiles on."""
    kernel = CATALOGUE.kernel("segment_attention", "tiled")
    shape = {"b": 1, "t": 1, "h": 2, "h_kv": 1, "k": 16, "v": 16, "m": m}
    options = {"segment_len": 4}
    for phase in ("decode", "forward"):
        workload = Workload(
            operator="segment_attention", shape=shape, dtype="float32", phase=phase, options=options  # type: ignore[arg-type]
        )  # fmt: skip
        assert counted_of_triton(kernel, workload, monkeypatch) == kernel.launches(workload) == launches
    # Key heads that fill the device alone are not split.
    filled = Workload(
        operator="segment_attention", shape={**shape, "b": 256}, dtype="float32", phase="decode", options=options
    )
    assert kernel.launches(filled) == 1


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_window_to_both_sides_launches_as_declared(phase: Phase) -> None:
    kernel = CATALOGUE.kernel("softmax_attention", "windowed")
    workload = replace(workload_of(kernel, phase, 300), options={"causal": False, "window": 64})
    assert kernel.launches(workload) == pytest.approx(counted(kernel, workload), rel=0.1)


@pytest.mark.parametrize("documents", [None, 4])
def test_declared_launches_of_flex_attention_are_those_of_its_mask(documents: int | None) -> None:
    kernel = CATALOGUE.kernel("softmax_attention", COMPILED)
    workload = workload_of(kernel, "forward", 300)
    if documents:
        workload = replace(workload, shape={**workload.shape, "documents": documents})
    boundaries = draw_boundaries(workload.shape, 0, "cpu")
    with torch.no_grad(), Counting() as mode:
        seen = mask_function(300, 300, boundaries, True, 0)
        create_block_mask(seen, None, None, 300, 300, device="cpu")
    assert kernel.launches(workload) == pytest.approx(mode.count + 1, rel=0.1)


def test_known_documents_are_counted_as_they_are() -> None:
    unknown = Workload(operator="delta_rule", shape={"t": 300, "documents": 5}, dtype="float32")
    known = replace(unknown, document_lengths=(1, 0, 130, 5, 164))
    assert longest_document(known) == 164
    assert document_sizes(known) == 3, "1, 5 of up to 8, and two of up to 256"
    assert known.key == unknown.key
    assert known == unknown


def test_the_longest_of_drawn_documents_is_what_is_expected() -> None:
    draw = torch.Generator().manual_seed(0)
    t, documents = 10_000, 8
    cuts = torch.randint(0, t + 1, (4000, documents - 1), generator=draw).sort(dim=1).values
    ends = torch.cat([torch.zeros(4000, 1), cuts, torch.full((4000, 1), t)], dim=1)
    longest = ends.diff(dim=1).max(dim=1).values.mean().item()
    packed = Workload(operator="delta_rule", shape={"t": t, "documents": documents}, dtype="float32")
    assert longest_document(packed) == pytest.approx(longest, rel=0.02)
    assert longest_document(replace(packed, shape={"t": 7})) == 7


@pytest.mark.parametrize("operator", ["linear_attention", "gated_linear_attention"])
def test_a_recurrent_kernel_goes_from_token_to_token_of_the_longest_document(operator: str) -> None:
    steps = CATALOGUE.kernel(operator, "fla_recurrent").serial_steps
    assert steps is not None
    packed = Workload(
        operator=operator, shape={"t": 300, "documents": 3}, dtype="bfloat16", document_lengths=(40, 250, 10)
    )
    alone = Workload(operator=operator, shape={"t": 300}, dtype="bfloat16")
    assert (steps(packed), steps(replace(packed, phase="backward"))) == (250, 500)
    assert (steps(alone), steps(replace(alone, phase="decode"))) == (300, 1)
