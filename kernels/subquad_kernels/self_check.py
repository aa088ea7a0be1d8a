"""No kernel is chosen before it agreed with its operator's reference on this machine: outputs and every gradient."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subquad_kernels.catalogue import CATALOGUE, Kernel, Operator
from subquad_kernels.device_limits import device_limits
from subquad_kernels.workload import Phase, Workload

FORMAT_VERSION = 1
_LIMITS: Mapping[str, Mapping[str, int]] = {
    # A reference loops over time on some operators; a GPU kernel must be tried beyond its largest tile.
    # Widths of heads and states stay as they are. Four documents are the least with an empty one and one of one token.
    "cpu": {"b": 2, "t": 70, "c": 24, "documents": 4, "m": 9, "h": 2, "h_kv": 2, "h_k": 2},
    "cuda": {"b": 2, "t": 300, "c": 96, "documents": 5, "m": 40, "h": 2, "h_kv": 2, "h_k": 2},
}
_SMALLEST = 1e-2
"""Below this largest reference value an error is absolute: a gradient may be zero but for rounding."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a check found: the largest error of each output and gradient, relative as `kernel_errors` says."""

    kernel: str
    workload: str
    passed: bool
    reason: str
    errors: Mapping[str, float] = field(default_factory=dict)


def shape_class(workload: Workload, device_kind: str) -> Workload:
    """The small workload that stands for all of its kind: same dtype, options and widths, short and odd lengths."""
    limits = _LIMITS[device_kind]
    shape = {axis: min(length, limits.get(axis, length)) for axis, length in workload.shape.items()}
    for shared in {"h_kv", "h_k"} & set(shape):  # as many heads to a key head as there were
        shape["h"] = shape[shared] * (workload.shape["h"] // workload.shape[shared])
    if "s" in shape:
        earlier = workload.shape["s"] - workload.shape["t"]
        shape["s"] = shape["t"] + min(earlier, limits["t"])
    # Odd lengths find the mistakes at a tile's edge that even ones hide.
    if shape.get("t", 0) == limits["t"]:
        shape["t"] -= 1
        if "s" in shape:
            shape["s"] -= 1
    phase: Phase = "decode" if workload.phase == "decode" else "backward"
    return replace(workload, shape=shape, phase=phase)


def run_class(workload: Workload, device_kind: str) -> Workload:
    """The workload with its own heads and channels over few and short sequences: Triton compiles for it what a run
    calls, where kernels choose tiles by channels and addresses are multiples of what heads and channels make of them.
    """
    small = shape_class(workload, device_kind)
    widths = {axis: workload.shape[axis] for axis in ("c", "h", "h_kv", "h_k") if axis in workload.shape}
    return replace(small, shape=dict(small.shape) | widths)


def verdict_key(kernel: Kernel, workload: Workload, device: str = "cpu") -> str:
    """What a verdict holds for: the kernel and its code, the shape class, the device and the versions beneath it."""
    small = shape_class(workload, torch.device(device).type)
    return "|".join([kernel.key, kernel.version, small.key, device_limits(device).name, *stack_versions()])


def check_kernel(kernel: Kernel, workload: Workload, device: str = "cpu", *, seed: int | None = None) -> Verdict:
    """Run a kernel beside its operator's float64 reference on the workload's shape class.

    Forward always; every gradient unless the workload is a decode. An exception in the kernel is a failed check.
    Without `seed` the draw is that of the verdict's key: another for every shape class, the same each time.
    """
    if seed is None:
        seed = int(hashlib.sha256(verdict_key(kernel, workload, device).encode()).hexdigest()[:8], 16)
    operator = CATALOGUE.operator(kernel.operator)
    small = shape_class(workload, torch.device(device).type)
    arguments = operator.torch_half.sample_inputs(small, seed=seed, device=device)
    try:
        errors = kernel_errors(operator, kernel, arguments, gradients=small.phase != "decode", seed=seed)
    except Exception as error:  # whatever a kernel raises here it would raise in the run
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Verdict(kernel=kernel.key, workload=small.key, passed=False, reason=reason)
    return judge(operator, kernel, small, errors)


def judge(operator: Operator, kernel: Kernel, workload: Workload, errors: Mapping[str, float]) -> Verdict:
    """Hold errors against the operator's tolerance for the workload's dtype."""
    tolerance = operator.tolerances[workload.dtype]
    for name, error in errors.items():
        allowed = tolerance.gradient if name.startswith("d_") else tolerance.output
        if not error <= allowed:  # a NaN is no pass
            reason = f"{name} is off by {error:.1e}, {allowed:.1e} is allowed"
            return Verdict(kernel=kernel.key, workload=workload.key, passed=False, reason=reason, errors=dict(errors))
    worst = max(errors.values(), default=0.0)
    return Verdict(
        kernel=kernel.key, workload=workload.key, passed=True, reason=f"largest error {worst:.1e}", errors=dict(errors)
    )


def kernel_errors(
    operator: Operator, kernel: Kernel, arguments: Mapping[str, Any], *, gradients: bool, seed: int = 0
) -> dict[str, float]:
    """The error of each output, and of each gradient as `d_NAME`, against the float64 reference.

    error = max |kernel - reference| / max( max |reference|, 1e-2 )

    Rounding goes with the terms of a sum, not with what is left when they cancel: the gradient of a tensor that tokens
    share (`Operator.spread`) is held against max sum |terms|, which is as large as a sum of these terms can be.
    """
    exact = {
        name: value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    wanted = {
        name: exact[name].requires_grad_()
        for name in operator.tensors
        if isinstance(exact[name], Tensor) and exact[name].is_floating_point()
    }
    terms = {name: value.detach().requires_grad_() for name, value in operator.spread(exact).items()}
    expected = operator.torch_half.reference(**exact | terms)
    with _poisoned(operator.torch_half.empty_outputs(arguments)):
        found = tuple(result.contiguous() for result in kernel.torch_half.forward(**arguments))
    names = operator.outputs + operator.residuals
    count = len(operator.outputs)
    # Residuals are between a kernel's forward and its own backward; only outputs are promised.
    errors = {name: _error(a, b) for name, a, b in zip(names[:count], found, expected)}
    if not gradients:
        return errors
    generator = torch.Generator(found[0].device).manual_seed(seed + 1)
    pulls = [torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype) for out in found[:count]]
    reference = torch.autograd.grad(
        [out for out in expected[:count] if out.requires_grad],
        list((wanted | terms).values()),
        [pull.double() for pull, out in zip(pulls, expected) if out.requires_grad],
        allow_unused=True,
    )
    with _poisoned(tuple(arguments[name] for name in wanted)):
        computed = kernel.torch_half.backward(arguments, found, tuple(pulls))
    for name, gradient in zip(wanted, reference):
        mine = computed.get(name)
        if gradient is None:
            gradient = torch.zeros_like(wanted[name])
        size = gradient
        if name in terms:
            gradient, size = (part.sum_to_size(wanted[name].shape) for part in (gradient, gradient.abs()))
        errors[f"d_{name}"] = _error(torch.zeros_like(gradient) if mine is None else mine, gradient, size)
    return errors


def _error(found: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    """The largest difference, relative to the largest finite value of `size` (None: of what is expected)."""
    if found.shape != expected.shape:
        raise ValueError(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    if found.numel() == 0:
        return 0.0
    expected = expected.detach()
    size = expected if size is None else size
    scale = max(float(size.where(size.isfinite(), 0).abs().max()), _SMALLEST)
    # Infinities that agree, as logarithms of nothing, are no error.
    off = torch.where(found.double() == expected, 0.0, found.double() - expected)
    return float(off.abs().max()) / scale


@contextmanager
def _poisoned(like: tuple[Tensor, ...]) -> Iterator[None]:
    """A kernel is handed NaN as empty memory: an unwritten output shows."""
    if any(tensor.device.type != "cpu" for tensor in like):
        # Three of each: the kernel's own scratch may take the first.
        rubbish = [torch.full_like(tensor, float("nan")) for tensor in like for _ in range(3)]
        del rubbish
        yield
        return
    # On a CPU the allocator may hand out other memory than what was freed last, but torch can fill it.
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about operations that have no deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


class VerdictStore:
    """Verdicts of earlier runs, one JSON line each; those of other code, versions or devices are not found.

    Several processes may append at once: a line is written in one call.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Verdict] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # a line cut short by a killed process; it is checked again
                if isinstance(record, dict) and record.get("format_version") == FORMAT_VERSION:
                    self._known[record["key"]] = Verdict(**record["verdict"])

    def knows(self, kernel: Kernel, workload: Workload, device: str = "cpu") -> bool:
        """Whether a check would be answered without running the kernel."""
        return verdict_key(kernel, workload, device) in self._known

    def check(self, kernel: Kernel, workload: Workload, device: str = "cpu") -> Verdict:
        """The stored verdict, or a new one, which is stored."""
        key = verdict_key(kernel, workload, device)
        if key not in self._known:
            verdict = check_kernel(kernel, workload, device)
            self._known[key] = verdict
            if self._path is not None:
                record = {"format_version": FORMAT_VERSION, "key": key, "verdict": asdict(verdict)}
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
        return self._known[key]


def stack_versions() -> tuple[str, ...]:
    """The versions on which a verdict depends: Python, torch, CUDA, the device's driver and triton."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return (
        f"python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"cuda {torch.version.cuda}",
        f"driver {driver_version()}",
        f"triton {triton}",
    )


@lru_cache(maxsize=1)
def driver_version() -> str:
    """The version of the NVIDIA kernel driver, or of the CUDA it serves where Linux does not say; none without one."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "none"
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[0] if found is not None else str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]


def sample_workloads(operator: Operator) -> tuple[Workload, ...]:
    """The operator's own examples."""
    return operator.examples
