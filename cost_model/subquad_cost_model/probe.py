"""Measure the ceilings of the machine at hand, in two or three seconds."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from subquad_cost_model.device import Device
from subquad_cost_model.host_pace import HostPace
from subquad_cost_model.measure import fastest_s

if TYPE_CHECKING:
    import torch

MATMUL_DTYPES = ("float32", "float64", "bfloat16", "float16")
# One side of the square products: small ones fit caches, large ones amortise the call. The best rate is the ceiling.
MATMUL_SIDES = {"cpu": (256, 768), "cuda": (2048, 8192)}
EXP_ELEMENTS = (1 << 14, 1 << 18)
STEPS = 1 << 17
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
GRAPH_LAUNCHES = 1000
PACES = 20
"""A millisecond each; their median is the pace of the host, which no ceiling is: kernels meet the usual one."""
# NVIDIA GPUs since Volta, per SM and clock: results of the special-function units, bytes that an SM takes in; and the
# clocks of a dependent fused multiply-add. No torch operation reaches these ceilings, so they are not measured.
EXP_PER_SM_CLOCK = 16
CACHE_BYTES_PER_SM_CLOCK = 64
SERIAL_STEP_CLOCKS = 4

Kind = Literal["cpu", "cuda"]


def probe_device(*, kind: Kind = "cpu", budget_s: float = 2.0) -> Device:
    """The ceilings of this machine, reached with torch just now.

    Measured everywhere: matrix products per dtype (TF32 off), and the faster of a large copy and a large sum for
    memory. Vector arithmetic gets the fp32 product's rate, because without TF32 the same units compute both.
    Measured on a CPU: exponentials and copies within the cache, the call of an operator on one element, and a step of
    a cumulative sum. Its arithmetic and cache are measured on one thread and multiplied by their number: a ceiling,
    and one that stands when other programs run (threads that wait for each other then wait milliseconds).
    Everywhere as well: the host's pace, of which the median is taken.
    On a GPU: the gap between launches in a CUDA graph; its exponentials, cache and serial step are what its SMs do
    per clock, at its highest clock.

    Other figures are the fastest repeat, because a ceiling is asked for. `budget_s` is shared out among about twenty
    timings, each of which takes three calls at least. The name holds a CPU's number of threads, and `versions` those
    of torch, triton and the driver: other figures hold under others.

    Raises: RuntimeError when there is no such device here.
    """
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device here to probe")
    bench = _Bench(kind, budget_s / 20)
    memory_bytes = _memory_bytes(kind)
    cache_bytes = _cache_bytes(kind)
    with _ieee_products(), torch.inference_mode():
        matmul_flops_per_s = {dtype: bench.matmul_flops_per_s(getattr(torch, dtype)) for dtype in MATMUL_DTYPES}
        return Device(
            name=_name(kind),
            kind=kind,
            origin="probed",
            matmul_flops_per_s=matmul_flops_per_s,
            vector_flops_per_s=matmul_flops_per_s["float32"],
            transcendental_per_s=bench.exp_per_s() if kind == "cpu" else EXP_PER_SM_CLOCK * _sm_clocks_per_s(),
            bytes_per_s=bench.bytes_per_s(min(max(COPY_BYTES[kind], 4 * cache_bytes), _free_bytes(kind) // 8)),
            launch_s=bench.call_s() if kind == "cpu" else bench.graph_launch_s(),
            serial_step_s=bench.serial_step_s() if kind == "cpu" else SERIAL_STEP_CLOCKS / _clock_hz(),
            memory_bytes=memory_bytes,
            capability=torch.cuda.get_device_capability() if kind == "cuda" else None,
            versions=_versions(kind),
            cache_bytes=cache_bytes,
            cache_bytes_per_s=(
                bench.cache_bytes_per_s(cache_bytes) if kind == "cpu" else CACHE_BYTES_PER_SM_CLOCK * _sm_clocks_per_s()
            ),
            host_s=_host_s(kind),
            notes=f"probed with {torch.get_num_threads()} threads in a budget of {budget_s:g} s",
        )


class _Bench:
    """Times torch calls on one device, each with its share of the budget."""

    def __init__(self, kind: Kind, share_s: float) -> None:
        import torch

        self.kind = kind
        self.share_s = share_s
        self.threads = torch.get_num_threads() if kind == "cpu" else 1

    def matmul_flops_per_s(self, dtype: torch.dtype) -> float:
        import torch

        rate = 0.0
        for side in MATMUL_SIDES[self.kind]:
            flops = 2 * side**3
            if rate and flops / rate > self.share_s:
                # Without hardware for this dtype the larger product would take many times the budget.
                break
            left, right = (torch.ones(side, side, device=self.kind, dtype=dtype) for _ in range(2))
            out = torch.empty_like(left)
            with _threads(1):
                rate = max(rate, flops / self._fastest_s(partial(torch.mm, left, right, out=out)))
        return rate * self.threads

    def bytes_per_s(self, size_bytes: int) -> float:
        import torch

        source = torch.ones(size_bytes // 4, device=self.kind)
        target = torch.empty_like(source)
        rates = []
        for threads in {1, self.threads}:
            with _threads(threads):
                rates.append(2 * size_bytes / self._fastest_s(partial(target.copy_, source)))
                rates.append(size_bytes / self._fastest_s(source.sum))
        return max(rates)

    def exp_per_s(self) -> float:
        import torch

        rates = []
        for elements in EXP_ELEMENTS:
            x = torch.linspace(-4, 0, elements)
            out = torch.empty_like(x)
            with _threads(1):
                rates.append(elements / self._fastest_s(partial(torch.exp, x, out=out)))
        return max(rates) * self.threads

    def cache_bytes_per_s(self, cache_bytes: int) -> float:
        """The best of copies within the cache; 0 (unknown) when its size is."""
        import torch

        rates = [0.0]
        for size_bytes in {cache_bytes // 64, cache_bytes // 8} - {0}:
            source = torch.ones(size_bytes // 4)
            target = torch.empty_like(source)
            with _threads(1):
                rates.append(2 * size_bytes / self._fastest_s(partial(target.copy_, source)))
        return max(rates) * self.threads

    def call_s(self) -> float:
        import torch

        return self._fastest_s(partial(torch.ones(1).add_, 1))

    def graph_launch_s(self) -> float:
        """From one launch to the next where the host does not hold them up."""
        import torch

        x = torch.ones(1, device=self.kind)
        x.add_(1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_LAUNCHES):
                x.add_(1)
        return self._fastest_s(graph.replay) / GRAPH_LAUNCHES

    def serial_step_s(self) -> float:
        import torch

        x = torch.ones(STEPS)
        out = torch.empty_like(x)
        return self._fastest_s(partial(torch.cumsum, x, 0, out=out)) / STEPS

    def _fastest_s(self, run: Callable[[], object]) -> float:
        import torch

        synchronize = torch.cuda.synchronize if self.kind == "cuda" else None
        return fastest_s(run, synchronize=synchronize, budget_s=self.share_s)


def _host_s(kind: Kind) -> float:
    ask = HostPace(kind)
    return statistics.median(ask() for _ in range(PACES))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _ieee_products() -> Iterator[None]:
    """fp32 products in fp32, not TF32 or bfloat16, whatever the process has asked for."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _name(kind: Kind) -> str:
    import torch

    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _versions(kind: Kind) -> dict[str, str]:
    import torch

    versions = {"torch": str(torch.__version__)}
    try:
        versions["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        versions["triton"] = "absent"
    if kind == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        versions["driver"] = _driver()
    return versions


def _driver() -> str:
    described = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", described.read_text()) if described.exists() else None
    return found.group() if found else "unknown"


def _clock_hz() -> float:
    import torch

    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).clock_rate) * 1e3


def _sm_clocks_per_s() -> float:
    """Clocks per second, over all SMs."""
    import torch

    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count * _clock_hz()


def _memory_bytes(kind: Kind) -> int:
    import torch

    if kind == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_bytes(kind: Kind) -> int:
    import torch

    if kind == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return _memory_bytes(kind) // 4


def _cache_bytes(kind: Kind) -> int:
    """The last-level cache; 0 where the system does not tell."""
    import torch

    if kind == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    sizes = [0]
    for described in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM]?)", described.read_text().strip())
        if found:
            sizes.append(int(found[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[found[2]])
    return max(sizes)
