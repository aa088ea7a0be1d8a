"""A quick launch runs what triton compiled for these very arguments, and asks triton for every other list of them."""

from __future__ import annotations

import importlib
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from subquad_kernels import triton_launch
from subquad_kernels.builtin import KERNELS
from subquad_kernels.triton_documents import halvings
from subquad_kernels.triton_launch import QuickLaunch


class Compiled:
    """What triton hands back from a launch: launched with every argument by place, constants included."""

    function, packed_metadata = 17, ("metadata",)

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.heard: list[tuple[int, int, int]] = []

    def run(self, x: int, y: int, z: int, stream: int, function: int, metadata: Any, *rest: Any) -> None:
        assert (stream, function, metadata, *rest[:3]) == (0, 17, ("metadata",), None, None, None)
        self.launches.append(((x, y, z), *rest[3:]))

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *values, stream: self.heard.append(grid)


class Jitted:
    """Stands for a jitted kernel of four arguments, and remembers what it was asked to compile."""

    arg_names = ("x", "t", "WIDTH", "PACKED")

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*values: Any, **constants: Any) -> Compiled:
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return launch


def test_a_list_of_arguments_that_was_seen_goes_to_what_was_compiled_for_it() -> None:
    jitted = Jitted()
    kernel = QuickLaunch(jitted)
    first, second = torch.zeros(32), torch.zeros(32)
    kernel[(5,)](first, 7, WIDTH=4, PACKED=False, num_warps=1)
    kernel[(6,)](second, 7, PACKED=False, WIDTH=4, num_warps=1)  # named in another order: asked again, not confused
    kernel[(8,)](second, 7, WIDTH=4, PACKED=False, num_warps=1)
    assert [len(compiled.launches) for compiled in jitted.compiled] == [1, 0]
    assert jitted.compiled[0].launches == [((8, 1, 1), second.data_ptr(), 7, 4, False)]


def test_programs_are_counted_along_one_to_three_axes() -> None:
    jitted = Jitted()
    kernel = QuickLaunch(jitted)
    x = torch.zeros(32)
    for programs in ((2,), (3,), (3, 4), (3, 4, 5)):
        kernel[programs](x, 7, WIDTH=4, PACKED=False)
    assert len(jitted.compiled) == 1
    assert [grid for grid, *_ in jitted.compiled[0].launches] == [(3, 1, 1), (3, 4, 1), (3, 4, 5)]


def test_a_launch_is_announced_where_somebody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own call of what it compiled names the launch and calls the hooks."""
    jitted = Jitted()
    kernel = QuickLaunch(jitted)
    for _ in range(3):
        kernel[(5,)](torch.zeros(32), 7, WIDTH=4, PACKED=False)
        monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
    assert [len(found) for found in (jitted.compiled[0].launches, jitted.compiled[0].heard)] == [0, 2]


def quick_launches() -> list[Any]:
    modules = {kernel.implementation.partition(":")[0] for kernel in KERNELS if kernel.name in ("fused", "tiled")}
    return [
        pytest.param(value, id=f"{module}.{name}")
        for module in sorted(modules)
        for name, value in vars(importlib.import_module(module)).items()
        if isinstance(value, QuickLaunch)
    ]


@pytest.mark.parametrize("kernel", quick_launches())
def test_what_comes_by_place_comes_before_the_constants(kernel: QuickLaunch) -> None:
    constant = [parameter.annotation == "tl.constexpr" for parameter in signature(kernel.jitted.fn).parameters.values()]
    assert any(constant)
    assert constant == sorted(constant)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(33)[1:]},  # not at a multiple of 16 bytes
        {"x": torch.zeros(32, dtype=torch.bfloat16)},
        {"x": torch.zeros(32, device="meta")},
        {"t": 16},
        {"WIDTH": 8},
        {"PACKED": True},
        {"num_warps": 2},
    ],
    ids=str,
)
def test_any_other_argument_is_left_to_triton(change: dict[str, Any]) -> None:
    jitted = Jitted()
    kernel = QuickLaunch(jitted)
    for values in ({}, change):
        call = {"x": torch.zeros(32), "t": 7, "WIDTH": 4, "PACKED": False, "num_warps": 1} | values
        kernel[(1,)](call.pop("x"), call.pop("t"), **call)
    assert len(jitted.compiled) == 2


def of_sizes(x, c, t, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x + c, t)


SIZED = JITFunction(of_sizes, do_not_specialize=["t"])
VALUES = {
    "x": [torch.zeros(32), torch.zeros(64), torch.zeros(33)[1:], torch.zeros(32, dtype=torch.bfloat16), None],
    "c": [1, 7, 9, 96, 2048, 2**31, 2**40, True, 1.0],
    "t": [1, 7, 16, 2**40],
}


def test_arguments_are_alike_only_if_triton_compiles_once_for_them() -> None:
    """Triton's own: what its binder makes of a list of arguments, for a Hopper GPU."""
    kernel = QuickLaunch(SIZED)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(SIZED.signature, SIZED.params, backend)
    compiled_for: dict[object, set[str]] = {}
    for values in itertools.product(*VALUES.values()):
        alike = tuple(map(kernel._specialization, range(3), values))
        compiled_for.setdefault(alike, set()).add(str(binder(*values, WIDTH=4, debug=False)[1]))
    assert all(len(specializations) == 1 for specializations in compiled_for.values())
    assert len(compiled_for) < math.prod(map(len, VALUES.values()))


class Slow(Jitted):
    """Compiles only while so many others do."""

    params = SIZED.params

    def __init__(self, together: int) -> None:
        super().__init__()
        self.meeting = threading.Barrier(together)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.meeting.wait(timeout=0.5)
        return super().__getitem__(grid)


@pytest.mark.parametrize(("channels", "meet"), [((96, 2048), False), ((96, 97), True)])
def test_threads_compile_what_is_alike_one_after_the_other(channels: tuple[int, int], meet: bool) -> None:
    kernel = QuickLaunch(Slow(together=2))
    kernel._names = [*SIZED.arg_names]
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(kernel[(1,)], torch.zeros(32), c, 7, WIDTH=4) for c in channels]
        met = [call.exception() is None for call in calls]
    assert met == [meet, meet]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_MOST_KNOWN", 8)
    kernel = QuickLaunch(Jitted())
    for t in range(100):
        kernel[(1,)](torch.zeros(32), t, WIDTH=4, PACKED=False)
        assert len(kernel._compiled) <= 8


@pytest.mark.parametrize("documents", [1, 2, 3, 4, 5, 8, 9, 1000])
def test_the_search_for_documents_halves_until_one_is_left(documents: int) -> None:
    left = documents
    for _ in range(halvings(documents)):
        left = -(-left // 2)
    assert left == 1
