"""Kernels of torch's own wait for no size that the device must say: graphs take them.

Of packed documents the first call asks for the boundaries, and the next ones that share them do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subquad_kernels import boundaries
from subquad_kernels.builtin import CATALOGUE
from subquad_kernels.catalogue import Kernel
from subquad_kernels.device_limits import device_limits
from subquad_kernels.workload import Workload

ASKING = frozenset({
    "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::repeat_interleave",
})  # fmt: skip
"""How many values come out depends on those that go in."""
INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})


class Watch(TorchDispatchMode):
    """Names the operations whose results have a size that only the device knows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, _, overload = function.name().partition(".")
        masks = [one for one in args[1] if isinstance(one, Tensor)] if name in INDEXING else []
        by_mask = any(mask.dtype == torch.bool for mask in masks)
        if by_mask or (name in ASKING and (name != "aten::repeat_interleave" or overload == "Tensor")):
            self.found.add(name)
        return function(*args, **(kwargs or {}))


class AskedError(Exception):
    """A tensor's values, or numbers of the host's for the device."""


def refuse(*args: object, **kwargs: object) -> None:
    raise AskedError


def cases(*, packed: bool) -> list[tuple[Kernel, Workload]]:
    return [
        (kernel, workload)
        for operator in CATALOGUE
        for kernel in CATALOGUE.kernels(operator.name)
        if kernel.name != "reference" and kernel.missing() is None and "cpu" in kernel.devices
        for workload in operator.examples
        if ("documents" in workload.shape) == packed and kernel.supports(workload, device_limits("cpu")) is None
    ]


@pytest.mark.parametrize(("kernel", "workload"), cases(packed=False), ids=lambda one: str(getattr(one, "key", one)))
def test_nothing_is_asked_of_the_device_where_nothing_is_packed(kernel: Kernel, workload: Workload) -> None:
    operator = CATALOGUE.operator(kernel.operator)
    arguments = operator.torch_half.sample_inputs(workload, seed=0, device="cpu")
    with torch.no_grad(), Watch() as watch:
        outputs = kernel.torch_half.forward(**arguments)
        if workload.phase != "decode":
            gradients = tuple(torch.randn_like(output) for output in outputs[: len(operator.outputs)])
            kernel.torch_half.backward(arguments, outputs, gradients)
    assert not watch.found


@pytest.mark.parametrize(("kernel", "workload"), cases(packed=True), ids=lambda one: str(getattr(one, "key", one)))
def test_packed_documents_are_asked_for_once(
    kernel: Kernel, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundaries, "_WAITED_FOR", {"cpu", "cuda"})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    boundaries._known.clear()
    operator = CATALOGUE.operator(kernel.operator)
    arguments = operator.torch_half.sample_inputs(workload, seed=0, device="cpu")

    def call() -> list[Tensor | None]:
        with torch.no_grad():
            outputs = kernel.torch_half.forward(**arguments)
            gradients = tuple(torch.ones_like(output) for output in outputs[: len(operator.outputs)])
            found = kernel.torch_half.backward(arguments, outputs, gradients)
        return [*outputs, *found.values()]

    first = call()
    with monkeypatch.context() as context, Watch() as watch:
        for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
            context.setattr(Tensor, name, refuse)
        context.setattr(torch, "tensor", refuse)
        second = call()
    assert not watch.found
    for one, other in zip(first, second, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    boundaries._known.clear()


def test_a_size_that_the_device_must_say_is_seen() -> None:
    with Watch() as watch:
        x = torch.arange(5.0)
        x[x > 2] = 0.0
        torch.tensor([1, 0]).nonzero()
    assert watch.found == {"aten::index_put_", "aten::nonzero"}
