"""doctor: versions, devices, caches, and whether every usable kernel agrees with its reference on this machine."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass

from subquad.cache import user_cache
from subquad.commands.flags import flags
from subquad.commands.table import table
from subquad.registry import Registry, load_registry
from subquad_kernels.catalogue import Kernel

PACKAGES = (
    "subquad", "subquad-kernels", "subquad-cost-model", "torch", "triton", "lightning", "wandb", "hydra-core",
    "omegaconf", "numpy", "safetensors", "tokenizers", "datasets", "fla-core", "mamba-ssm", "causal-conv1d",
    "flash-attn",
)  # fmt: skip
HELP = """Show versions, devices and caches, and hold every usable kernel against its reference on this machine.

  python -m subquad doctor [--no-checks]

  --no-checks  leave the self-checks of kernels out; they take about half a minute

The exit code is 0 when all is well, 1 when a kernel failed its check."""
CACHES = ("verdicts", "measurements", "devices", "tokens")


@dataclass(frozen=True, kw_only=True)
class KernelHealth:
    """What the self-checks of one kernel found on one device; `failures` holds the reasons of those it failed."""

    kernel: str
    device: str
    passed: int
    failures: tuple[str, ...]
    unchecked: str | None  # why nothing could be checked
    seconds: float


def run(arguments: list[str]) -> int:
    """Print the findings; the exit code is 1 if a kernel failed its check."""
    if any(argument in ("--help", "-h") for argument in arguments):
        print(HELP)
        return 0
    wants_checks = not flags("doctor", arguments, ["--no-checks"])
    registry = load_registry()
    print(table("Versions", ("package", "version"), [("python", platform.python_version()), *_versions(registry)]))
    devices = _devices()
    print(table("Devices", ("name", "what it is", "memory"), devices))
    print(table("Caches", ("for", "folder"), [(name, str(user_cache(name) or "none")) for name in CACHES]))
    if registry.problems:
        rows = [(problem.name, problem.reason, problem.mend) for problem in registry.problems]
        print(table("Skipped plugins", ("name", "why", "mend"), rows))
    if not wants_checks:
        return 0
    checked = list(check_kernels(registry, [name for name, *_ in devices]))
    print(table("Self-checks", ("kernel", "device", "verdict", "seconds"), [_row(health) for health in checked]))
    failing = [health.kernel for health in checked if health.failures]
    print(f"{len(failing)} kernels failed and will not be chosen: {', '.join(failing)}" if failing else "all is well")
    return 1 if failing else 0


def check_kernels(registry: Registry, devices: list[str]) -> Iterator[KernelHealth]:
    """Check every kernel on every device that it can run on, over its operator's sample workloads."""
    from subquad_kernels.device_limits import device_limits
    from subquad_kernels.first_calls import first_calls
    from subquad_kernels.self_check import sample_workloads

    for device in devices:
        limits = device_limits(device)
        jobs = (
            (kernel, workload)
            for kernel in registry.kernels.values()
            for workload in sample_workloads(registry.operators[kernel.operator])
            if kernel.refusal(workload, limits) is None
        )
        first_calls(jobs, device)  # compiles all at once what the checks would compile one after the other
        for kernel in registry.kernels.values():
            yield _check(registry, kernel, device)


def _check(registry: Registry, kernel: Kernel, device: str) -> KernelHealth:
    from subquad_kernels.device_limits import device_limits
    from subquad_kernels.self_check import check_kernel, sample_workloads

    limits, started, passed = device_limits(device), time.perf_counter(), 0
    failures, refusals = [], []
    for workload in sample_workloads(registry.operators[kernel.operator]):
        refusal = kernel.refusal(workload, limits)
        if refusal is not None:
            refusals.append(refusal)
            continue
        verdict = check_kernel(kernel, workload, device)
        if verdict.passed:
            passed += 1
        else:
            failures.append(f"{workload.dtype} {workload.phase}: {verdict.reason}")
    ran = passed or failures
    return KernelHealth(
        kernel=kernel.key,
        device=device,
        passed=passed,
        failures=tuple(failures),
        unchecked=None if ran else (refusals or ["its operator has no sample workloads"])[0],
        seconds=time.perf_counter() - started,
    )


def _row(health: KernelHealth) -> tuple[str, str, str, str]:
    if health.unchecked is not None:
        return health.kernel, health.device, f"not checked: {health.unchecked}", ""
    verdict = "; ".join(health.failures) or f"passed {health.passed}"
    return health.kernel, health.device, f"FAILED {verdict}" if health.failures else verdict, f"{health.seconds:.2f}"


def _versions(registry: Registry) -> list[tuple[str, str]]:
    distributions = [*PACKAGES, *(plugin.distribution for plugin in registry.plugins)]
    return [(name, _version(name)) for name in dict.fromkeys(distributions)]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str, str]]:
    import torch

    from subquad_kernels.device_limits import device_limits

    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    found = [(name, device_limits(name)) for name in names]
    return [(name, limits.name, f"{limits.memory_bytes / 2**30:.0f} GiB") for name, limits in found]
