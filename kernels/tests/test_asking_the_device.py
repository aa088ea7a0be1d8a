"""Kernels of torch's own wait for no size that the device must say, unless documents are packed: graphs take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


def cases() -> list[tuple[Kernel, Workload]]:
    return [
        (kernel, workload)
        for operator in CATALOGUE
        for kernel in CATALOGUE.kernels(operator.name)
        if kernel.name != "reference" and kernel.missing() is None and "cpu" in kernel.devices
        for workload in operator.examples
        if "documents" not in workload.shape and kernel.supports(workload, device_limits("cpu")) is None
    ]


@pytest.mark.parametrize(("kernel", "workload"), cases(), ids=lambda one: str(getattr(one, "key", one)))
def test_nothing_is_asked_of_the_device_where_nothing_is_packed(kernel: Kernel, workload: Workload) -> None:
    operator = CATALOGUE.operator(kernel.operator)
    arguments = operator.torch_half.sample_inputs(workload, seed=0, device="cpu")
    with torch.no_grad(), Watch() as watch:
        outputs = kernel.torch_half.forward(**arguments)
        if workload.phase != "decode":
            gradients = tuple(torch.randn_like(output) for output in outputs[: len(operator.outputs)])
            kernel.torch_half.backward(arguments, outputs, gradients)
    assert not watch.found


def test_a_size_that_the_device_must_say_is_seen() -> None:
    with Watch() as watch:
        x = torch.arange(5.0)
        x[x > 2] = 0.0
        torch.tensor([1, 0]).nonzero()
    assert watch.found == {"aten::index_put_", "aten::nonzero"}
