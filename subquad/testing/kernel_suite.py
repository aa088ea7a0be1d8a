"""What every kernel promises, as tests: subclass `KernelSuite` and name the operator and the kernel.

    class TestMyScan(KernelSuite):
        operator, kernel = "selective_scan", "my_scan"
        workloads = OPERATOR.examples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from subquad_kernels.catalogue import CATALOGUE, Kernel, Operator
from subquad_kernels.device_limits import device_limits
from subquad_kernels.self_check import judge, kernel_errors, shape_class
from subquad_kernels.workload import DeviceLimits, Workload


class KernelSuite:
    """The conformance suite of a kernel, on `device`. `workloads` default to the operator's examples.

    `limits` are those that the kernel is asked about, the device's own by default: Triton's interpreter runs a kernel
    for CUDA on a CPU, `limits = DeviceLimits(kind="cuda", name="interpreter", capability=(9, 0))`.
    """

    operator: ClassVar[str]
    kernel: ClassVar[str]
    device: ClassVar[str] = "cpu"
    workloads: ClassVar[Sequence[Workload]] = ()
    limits: ClassVar[DeviceLimits | None] = None

    @property
    def operator_record(self) -> Operator:
        """The operator's declaration."""
        return CATALOGUE.operator(self.operator)

    @property
    def kernel_record(self) -> Kernel:
        """The kernel's declaration."""
        return CATALOGUE.kernel(self.operator, self.kernel)

    def supported(self) -> list[Workload]:
        """The workloads that the kernel says it supports on this device."""
        workloads = self.workloads or self.operator_record.examples
        return [workload for workload in workloads if self._supports(workload)]

    def inapplicable(self) -> dict[str, str]:
        """Promises about workloads that the kernel does not support: why, by name.  `plugins check` counts them not."""
        reasons = {}
        small = [shape_class(workload, self.device) for workload in self.supported()]
        if small and not any(self._supports(replace(workload, dtype="float64")) for workload in small):
            reasons["agrees_in_float64_to_rounding_where_it_computes_in_float64"] = "it does not compute in float64"
        if small and not any(_shows_causality(workload) for workload in small):
            reasons["is_exact_about_causality"] = "no workload of it shows causality"
        return reasons

    def test_supports_at_least_one_workload(self) -> None:
        assert self.supported(), f"{self.kernel_record.key} supports none of the workloads it is tested on"

    def test_agrees_with_the_reference_on_outputs_and_every_gradient(self) -> None:
        for workload in self.supported():
            for seed in (0, 1):
                small = shape_class(workload, self.device)
                arguments = self._arguments(small, seed)
                errors = kernel_errors(
                    self.operator_record, self.kernel_record, arguments, gradients=small.phase != "decode", seed=seed
                )
                verdict = judge(self.operator_record, self.kernel_record, small, errors)
                assert verdict.passed, f"{small.key}: {verdict.reason}"

    def test_agrees_in_float64_to_rounding_where_it_computes_in_float64(self) -> None:
        for workload in self.supported():
            exact = replace(shape_class(workload, self.device), dtype="float64")
            if not self._supports(exact):
                continue
            errors = kernel_errors(
                self.operator_record, self.kernel_record, self._arguments(exact, 2), gradients=exact.phase != "decode"
            )
            assert max(errors.values()) < 1e-9, f"{exact.key}: {errors}"

    def test_is_exact_about_causality(self) -> None:
        """No output before the last token changes with it, not even by rounding."""
        for workload in self.supported():
            small = shape_class(workload, self.device)
            if not _shows_causality(small):
                continue
            arguments = self._arguments(small, 3)
            before = self.kernel_record.torch_half.forward(**arguments)[0]
            changed = {
                name: _last_changed(value) if _runs_over_time(value, small) else value
                for name, value in arguments.items()
            }
            after = self.kernel_record.torch_half.forward(**changed)[0]
            assert torch.equal(before[:, :-1], after[:, :-1]), f"{small.key}: an output depends on a later token"
            assert not torch.equal(before[:, -1], after[:, -1]), f"{small.key}: the last token is ignored"

    def test_hands_back_new_memory(self) -> None:
        for workload in self.supported():
            arguments = self._arguments(shape_class(workload, self.device), 4)
            inputs = {value.data_ptr() for value in arguments.values() if isinstance(value, Tensor) and value.numel()}
            for result in self.kernel_record.torch_half.forward(**arguments):
                assert not result.numel() or result.data_ptr() not in inputs, "an output is one of the inputs"

    def _supports(self, workload: Workload) -> bool:
        return self.kernel_record.refusal(workload, self.limits or device_limits(self.device)) is None

    def _arguments(self, workload: Workload, seed: int) -> dict[str, Any]:
        return self.operator_record.torch_half.sample_inputs(workload, seed=seed, device=self.device)


def _shows_causality(workload: Workload) -> bool:
    """Whether an earlier output must not change with the last token, which is not alone in its sequence."""
    shape = workload.shape
    return shape["t"] > 1 and workload.options.get("causal") is not False and "documents" not in shape


def _runs_over_time(value: object, workload: Workload) -> bool:
    lengths = {workload.shape["t"], workload.shape.get("s", 0)}
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() >= 3
        and value.shape[0] == workload.shape["b"]
        and value.shape[1] in lengths
    )


def _last_changed(value: Any) -> Any:
    changed = value.clone()
    changed[:, -1] += 1
    return changed
