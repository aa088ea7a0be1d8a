"""A replayed call does what the host code would have done: the same bits from other tensors, and no more launches.

Triton's interpreter cannot send a kernel to addresses; here it is given tensors that lie at them.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from spread_inputs import LAYOUTS
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import _disable_current_modes

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE, Kernel
from subquad_kernels.device_limits import device_limits
from subquad_kernels.replay import ACTIVE, Recording, Repeated, signature_of
from subquad_kernels.workload import DeviceLimits, Workload

triton_launch = pytest.importorskip("subquad_kernels.triton_launch")
QuickLaunch = triton_launch.QuickLaunch


class Lying(dict[Any, Any]):
    """The memory of a `QuickLaunch` to which every argument list is known: it is interpreted at its addresses."""

    def __init__(self, launch: Any) -> None:
        self._launch = launch

    def get(self, key: Any, default: object = None) -> Any:
        return partial(self._send, [part for part in key if isinstance(part, torch.dtype)], list(key))

    def _send(
        self, dtypes: list[torch.dtype], key: list[Any], programs: tuple[int, ...], stream: int, arguments: list[Any]
    ) -> None:
        places, at = [], 0
        for _ in arguments:  # a tensor takes three parts of the key, everything else one
            tensor = at < len(key) and isinstance(key[at], torch.dtype)
            places.append(tensor)
            at += 3 if tensor else 1
        types = iter(dtypes)
        values = [_at(value, next(types)) if tensor else value for value, tensor in zip(arguments, places)]
        names = self._launch._names
        with _disable_current_modes():
            constants = dict(part for part in key if isinstance(part, tuple))
            given = values[: len(names) - sum(name in names for name in constants)]
            self._launch.jitted[programs](*given, **constants)


def _at(address: int, dtype: torch.dtype) -> Tensor:
    if address == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


REPLAYABLE = [kernel for operator in CATALOGUE for kernel in CATALOGUE.kernels(operator.name) if kernel.replayable]
SMALL = {"b": 2, "h": 1, "h_kv": 1, "h_k": 1, "t": 19, "k": 16, "v": 16, "c": 4, "n": 4, "p": 16}
"""The interpreter's time goes by programs and by chunks of tokens."""
HOPPER = DeviceLimits(kind="cuda", name="any", capability=(9, 0))


def cases() -> Iterator[Any]:
    """A packed example of every kernel, and one token: what else there is launches less."""
    for kernel in REPLAYABLE:
        examples = [
            example
            for example in CATALOGUE.operator(kernel.operator).examples
            if example.dtype == "float32" and kernel.supports(example, HOPPER) is None
        ]
        packed = [example for example in examples if "documents" in example.shape]
        decodes = [example for example in examples if example.phase == "decode"]
        for example in packed[:1] + decodes[:1]:
            shape = {axis: min(length, SMALL.get(axis, length)) for axis, length in example.shape.items()}
            yield pytest.param(kernel, replace(example, shape=shape), id=f"{kernel.key} {example.phase}")


INPUTS = pytest.mark.parametrize("layout", [None, *LAYOUTS], ids=str)
"""How inputs lie, unless close together; those that do not come in inference mode."""


@pytest.fixture
def _sent_to_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in REPLAYABLE:
        kernel.torch_half  # noqa: B018  (imports its module)
    for module in [module for name, module in sys.modules.items() if name.startswith("subquad_kernels.")]:
        for launch in [value for value in vars(module).values() if isinstance(value, QuickLaunch)]:
            monkeypatch.setattr(launch, "_compiled", Lying(launch))


class Work:
    """A direction of a kernel as a function of one list of values, and how often its host code ran."""

    def __init__(self, kernel: Kernel, names: list[str], outputs: int | None) -> None:
        self._functions, self._names, self._outputs = kernel.torch_half, names, outputs
        self.calls = 0

    def __call__(self, values: Sequence[Any]) -> Sequence[Tensor]:
        self.calls += 1
        arguments = dict(zip(self._names, values))
        if self._outputs is None:
            return [result.contiguous() for result in self._functions.forward(**arguments)]
        rest = values[len(self._names) :]
        found = self._functions.backward(arguments, tuple(rest[: -self._outputs]), tuple(rest[-self._outputs :]))
        return [gradient.contiguous() for gradient in found.values() if gradient is not None]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="addresses are given to Triton's interpreter")
@pytest.mark.usefixtures("_sent_to_addresses", "fresh_memory_is_nan")
@INPUTS
@pytest.mark.parametrize(("kernel", "example"), list(cases()))
def test_a_replay_gives_the_bits_of_the_host_code(kernel: Kernel, example: Workload, layout: str | None) -> None:
    with torch.inference_mode(layout is not None):
        check_a_replay(kernel, example, layout)


def check_a_replay(kernel: Kernel, example: Workload, layout: str | None) -> None:
    operator = CATALOGUE.operator(kernel.operator)
    first, other = (operator.torch_half.sample_inputs(example, seed=seed, device="cpu") for seed in (1, 2))
    other = {name: value if isinstance(value, Tensor) else first[name] for name, value in other.items()}
    if layout is not None:
        first, other = LAYOUTS[layout](first), LAYOUTS[layout](other)
    plain = [
        value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
        for value in other.values()
    ]
    assert signature_of(first.values()) == signature_of(other.values())
    names, count = list(first), len(operator.outputs)
    forward, backward = Work(kernel, names, None), Work(kernel, names, count)
    again, back = Repeated(forward, replayable=True), Repeated(backward, replayable=True)
    outputs = again.record(list(first.values()))
    pulls = [torch.randn_like(output) for output in outputs[:count]]
    if example.phase != "decode":
        back.record([*first.values(), *outputs, *pulls])

    outputs = again(list(other.values()))
    assert forward.calls == 1
    for found, expected in zip(outputs, forward(plain), strict=True):
        assert_close(found, expected, rtol=0, atol=0, equal_nan=True)  # a residual has room that nobody fills
    if example.phase != "decode":
        gradients = back([*other.values(), *outputs, *pulls])
        assert backward.calls == 1
        for found, expected in zip(gradients, backward([*plain, *outputs, *pulls]), strict=True):
            assert_close(found, expected, rtol=0, atol=0)


def repeated(work: Callable[..., Sequence[Tensor]]) -> tuple[Repeated, list[int]]:
    """It, and a list that grows with every time that its host code runs."""
    ran: list[int] = []

    def counting(values: Sequence[Any]) -> Sequence[Tensor]:
        ran.append(1)
        return work(*values)

    return Repeated(counting, replayable=True), ran


def three_calls(work: Callable[..., Sequence[Tensor]], *draw: Callable[[], Any]) -> tuple[list[int], Sequence[Tensor]]:
    """What ran of the host code of three calls, and how far the last one's results are from it."""
    call, ran = repeated(work)
    for _ in range(3):
        values = [draw_one() for draw_one in draw]
        found = call(values)
    for result, expected in zip(found, work(*values), strict=True):
        assert_close(result, expected, rtol=0, atol=0)
    return ran, found


def test_the_host_code_runs_twice() -> None:
    ran, _ = three_calls(lambda x, factor: [factor * x.new_ones(3), x.sum(0)], lambda: torch.randn(5, 3), lambda: 2.0)
    assert len(ran) == 2


def test_views_are_taken_of_the_calls_own_tensors() -> None:
    """Of an argument, of new memory and of a result, with offsets, and where one tensor stands in two places."""

    def work(x: Tensor, y: Tensor) -> list[Tensor]:
        new = torch.empty(4, 3)
        new[1:].copy_(x[:, 2:5])
        new[0] = y[1, :3]
        both = torch.cat([new.T, x[:, :4]])
        return [both[1:], both.unbind()[2] + x.view(-1)[9:13]]

    whole = torch.randn(9, 8)
    ran, _ = three_calls(work, lambda: torch.randn(9, 8)[2:5], lambda: whole)
    assert len(ran) == 2
    call, _ = repeated(lambda x, y: [x + 2 * y])
    for _ in range(3):
        x = torch.randn(3)
        assert_close(call([x, x])[0], 3 * x)


@pytest.mark.parametrize("inference", [False, True])
def test_what_copies_where_a_view_will_not_do_is_made_again(inference: bool) -> None:
    """In inference mode torch says `contiguous`, `reshape` and `to` for them, which elsewhere are views."""

    def work(x: Tensor, rows: Tensor) -> list[Tensor]:
        wide = rows.expand(3, -1)
        return [torch.stack([wide.contiguous().view(-1), x.T.reshape(-1), x.to(torch.float64).view(-1)]).float()]

    with torch.inference_mode(inference):
        ran, _ = three_calls(work, lambda: torch.randn(4, 3), lambda: torch.randn(1, 4))
    assert len(ran) == 2


COMPOSED: dict[str, Callable[[Tensor, Tensor], list[Tensor]]] = {
    "matmul": lambda x, y: [torch.matmul(x[:, None], y).squeeze(1), x.mT.matmul(y.mT.mT)],
    "einsum": lambda x, y: [torch.einsum("ij->ji", x) + 1, torch.einsum("ij,ik->kj", x, y)],
    "pad": lambda x, y: [torch.nn.functional.pad(x, (0, 0)) * 2, torch.nn.functional.pad(y, (1, 2))],
    "chunk": lambda x, y: [torch.cat([*x.chunk(2), *y.tensor_split(2)[0].split(1)])],
    "a view that is itself": lambda x, y: [x.contiguous().view_as(x).detach().to(x.dtype).flatten(1).expand_as(x) - y],
    "in place on a view": lambda x, y: [(z := torch.zeros_like(x), z[1:].add_(y[1:]).mul_(x[1:]), z.T[0].fill_(3))[0]],
    "copies in a format": lambda x, y: [x[None, None].clone(memory_format=torch.channels_last).double().mT + y],
    "repeats": lambda x, y: [x.repeat_interleave(2, 0), y.tile(2, 1), torch.broadcast_tensors(x[:1], y)[0] * 1],
    "numbers": lambda x, y: [torch.full((2,), float(x.shape[0])) * x[0, 0], torch.arange(4.0) + y, 2 ** x],
    "two results": lambda x, y: [*torch.sort(x), *x.max(1), torch.std_mean(y)[1]],
}  # fmt: skip


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("work", COMPOSED.values(), ids=COMPOSED)
def test_operations_that_consist_of_others_are_made_again(
    work: Callable[[Tensor, Tensor], list[Tensor]], inference: bool
) -> None:
    """In inference mode torch says their names, not what they come down to, and some of that are views."""
    with torch.inference_mode(inference):
        ran, _ = three_calls(work, lambda: torch.randn(8, 4).T[:, ::2], lambda: torch.randn(4, 4))
    assert len(ran) == 2


def test_random_numbers_are_drawn_anew() -> None:
    call, ran = repeated(lambda x: [x + torch.rand(3), torch.empty(3).uniform_()])
    drawn = [[part.clone() for part in call([torch.zeros(3)])] for _ in range(4)]
    assert len(ran) == 2
    assert not torch.equal(drawn[2][0], drawn[3][0])
    assert not torch.equal(drawn[2][1], drawn[3][1])


def test_autocast_does_not_reach_what_is_made_again() -> None:
    """As it does not reach the host code (`torch_operator`)."""

    def work(x: Tensor) -> list[Tensor]:
        with torch._C._DisableAutocast():
            return [x @ x, x.bfloat16().cumsum(0)]

    with torch.autocast("cpu", torch.bfloat16):
        ran, found = three_calls(work, lambda: torch.randn(4, 4))
    assert len(ran) == 2
    assert [value.dtype for value in found] == [torch.float32, torch.bfloat16]


@torch.library.custom_op("subquad_test::launches", mutates_args=("x",), device_types="cpu")
def launches(x: Tensor) -> None:
    x += 1
    if ACTIVE.recording is not None:
        ACTIVE.recording.launch(lambda programs, stream, given: _at(given[0], torch.float32).add_(1), (1, 1, 1), [x])


def test_what_an_operation_launches_is_not_made_twice() -> None:
    def work(x: Tensor) -> list[Tensor]:
        y = x.clone()
        launches(y)
        return [y]

    ran, _ = three_calls(work, lambda: torch.randn(3))
    assert len(ran) == 2


def test_a_launch_is_sent_to_the_places_of_the_calls_own_tensors() -> None:
    """An argument that is a part of a wider one, a part of it, and a part of scratch memory behind other scratch."""
    sent: list[Sequence[Any]] = []

    def work(values: Sequence[Any]) -> list[Tensor]:
        (x,) = values
        first, second, y = torch.empty(100), torch.empty(4, 3), torch.empty(2, dtype=torch.float64)
        if ACTIVE.recording is not None:
            parts = [x, x[1, 2:], first, second[2], y[1:], 7]
            ACTIVE.recording.launch(lambda programs, stream, given: sent.append(given), (1, 1, 1), parts)
        return [y]

    again = Repeated(work, replayable=True)
    again.record([torch.zeros(5, 4)[1:]])
    x = torch.zeros(9, 4)[3:7]
    (y,) = again([x])
    ((whole, part, first, second, result, number),) = sent
    assert (whole, part, result, number) == (x.data_ptr(), x[1, 2:].data_ptr(), y[1:].data_ptr(), 7)
    assert second - first == 512 + 2 * 3 * 4  # 400 bytes, rounded up, and two rows of three


def test_nothing_of_the_recorded_call_stays_alive() -> None:
    """A launch is remembered by the places of its tensors, not by the tensors."""

    def work(values: Sequence[Any]) -> list[Tensor]:
        y = torch.empty_like(values[0])
        if ACTIVE.recording is not None:
            ACTIVE.recording.launch(lambda *sent: None, (1, 1, 1), [values[0], y, 3])
        return [y]

    memory = np.ones(3, dtype=np.float32)
    alive, x = weakref.ref(memory), torch.from_numpy(memory)
    repeated = Repeated(work, replayable=True)
    repeated.record([x])
    assert alive() is not None
    del memory, x
    gc.collect()
    assert alive() is None
    assert len(repeated([torch.zeros(3)])) == 1


def test_scratch_memory_is_one_allocation_and_results_are_not_in_it() -> None:
    call, _ = repeated(lambda x: [torch.empty(7), torch.empty_like(x)])
    for _ in range(2):
        call([torch.zeros(3)])
    a, b = call([torch.zeros(3)])
    assert a.untyped_storage().nbytes() == 28
    assert b.untyped_storage().nbytes() == 12


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda x: [x.new_zeros(1 + int(x.sum() > 0))], "reads values on the host"),
        (lambda x: [x[x > 0].clone()], "reads values on the host"),
        (lambda x: [x + HIDDEN], "of unknown origin"),
        (lambda x: [x.view(-1)], "not of the call's own memory"),
        (lambda x: [torch.empty(3, device="meta")], "another device"),
        (lambda x: [x.new_zeros(1 + bool(x[0] > 0))], "reads values on the host"),
        (lambda x: [torch.where(x > 0)[0]], "reads values on the host"),
        (lambda x: [x * torch.tensor([2.0, 3.0, 4.0])], "of unknown origin"),
        (lambda x: [torch.add(x, 1, out=torch.empty(3))], "names a tensor"),
        (lambda x: foreach_add([x], 1), "names a tensor"),
        (lambda x: [torch.empty(3).copy_(x).view(torch.int32)], "as another type"),
        (lambda x: [x.clone().unsqueeze_(0)], "changes the shape"),
        (lambda x: [torch.empty(2, 3).copy_(x).t_().contiguous()], "changes the shape"),
    ],
    ids=[
        "item", "mask", "global", "alias", "device", "branch", "where", "constant", "out", "outs", "type",
        "in place", "in place on a view",
    ],
)  # fmt: skip
@pytest.mark.parametrize("inference", [False, True])
def test_what_cannot_be_repeated_is_refused(
    work: Callable[[Tensor], list[Tensor]], reason: str, inference: bool
) -> None:
    with torch.inference_mode(inference):
        with Recording([x := torch.ones(3)]) as recording:
            results = work(x)
        assert recording.replay(results) is None
        assert recording.refusal is not None
        assert reason in recording.refusal
        call, ran = repeated(work)
        for _ in range(4):
            call([torch.ones(3)])
    assert len(ran) == 4


HIDDEN = torch.ones(3)


def foreach_add(values: list[Tensor], number: int) -> list[Tensor]:
    out = [torch.empty_like(value) for value in values]
    torch.ops.aten._foreach_add.Scalar_out(values, number, out=out)
    return out


def test_a_kernel_that_promises_nothing_is_not_recorded() -> None:
    ran: list[int] = []
    call = Repeated(lambda values: ran.append(1) or [values[0] + 1], replayable=False)
    for _ in range(4):
        call([torch.ones(3)])
    assert len(ran) == 4


def test_the_signature_has_all_that_host_code_can_know_of_a_tensor() -> None:
    x = torch.zeros(8, 8)
    others = [x.double(), x[:4], x.T, torch.zeros(65)[1:].view(8, 8), x.to("meta"), 8]
    signatures = {signature_of([value]) for value in (x, torch.ones(8, 8), *others)}
    assert len(signatures) == 1 + len(others)


@pytest.mark.gpu
@INPUTS
@pytest.mark.parametrize(("kernel", "example"), list(cases()))
def test_on_a_gpu_a_replay_gives_the_bits_of_the_host_code(
    kernel: Kernel, example: Workload, layout: str | None
) -> None:
    """In bfloat16, from tensors of its own each time, and in a CUDA graph; forward and backward."""
    with torch.inference_mode(layout is not None):
        check_a_replay_on_a_gpu(kernel, example, layout)


def check_a_replay_on_a_gpu(kernel: Kernel, example: Workload, layout: str | None) -> None:
    operator = CATALOGUE.operator(kernel.operator)
    case = replace(example, dtype="bfloat16")
    if (refusal := kernel.refusal(case, device_limits("cuda"))) is not None:
        pytest.skip(refusal)
    draws = [operator.torch_half.sample_inputs(case, seed=seed, device="cuda") for seed in (1, 2, 3, 4)]
    draws = [
        {name: value if isinstance(value, Tensor) else draws[0][name] for name, value in draw.items()} for draw in draws
    ]
    given = draws
    if layout is not None:
        given = [LAYOUTS[layout](draw) for draw in draws]
        draws = [
            {
                name: value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
                for name, value in draw.items()
            }
            for draw in given
        ]
    count = len(operator.outputs)
    forward, backward = (Work(kernel, list(draws[0]), outputs) for outputs in (None, count))
    again, back = Repeated(forward, replayable=True), Repeated(backward, replayable=True)
    for draw, values in zip(draws, given):
        plain = list(draw.values())
        outputs = again(list(values.values()))
        for found, expected in zip(outputs[:count], Work(kernel, list(draw), None)(plain)):
            assert_close(found, expected, rtol=0, atol=0)
        if case.phase == "decode":
            continue
        rest = [*outputs, *(torch.randn_like(output) for output in outputs[:count])]
        gradients = Work(kernel, list(draw), count)([*plain, *rest])
        for found, expected in zip(back([*values.values(), *rest]), gradients, strict=True):
            assert_close(found, expected, rtol=0, atol=0)
    assert forward.calls == 2
    assert backward.calls == (0 if case.phase == "decode" else 2)
    values = list(given[0].values())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = again(values)
    graph.replay()
    for found, expected in zip(captured[:count], forward(list(draws[0].values()))):
        assert_close(found, expected, rtol=0, atol=0)
