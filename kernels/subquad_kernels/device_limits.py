"""What this machine's devices may do, as kernels ask for it."""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from subquad_kernels.workload import DeviceLimits


def device_limits(device: str = "cpu") -> DeviceLimits:
    """The limits of a device of this machine: `cpu`, `cuda` or `cuda:1`."""
    kind = torch.device(device).type
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return DeviceLimits(
            kind="cuda",
            name=properties.name,
            capability=(properties.major, properties.minor),
            memory_bytes=properties.total_memory,
            shared_memory_bytes=getattr(properties, "shared_memory_per_block_optin", 0),
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceLimits(kind="cpu", name=cpu_name(), memory_bytes=memory)


def cpu_name() -> str:
    """The processor's own name and the number of threads torch uses, which decides its speed as much."""
    return f"{_processor()}, {torch.get_num_threads()} threads"


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")
    except OSError:
        return "cpu"  # not Linux: the name is only shown, and tells caches apart
