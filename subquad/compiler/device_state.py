"""Clock, power, temperature and throttling of a GPU while it is timed, as its driver tells them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch

# Reasons for a lower clock that are no fault of the device or its room: idle, and clocks that somebody set.
HARMLESS = ("GpuIdle", "ApplicationsClocksSetting", "None", "All")
PREFIX = "nvmlClocksThrottleReason"


class DeviceState:
    """Readings between `start` and `stop`; without NVML (pip install nvidia-ml-py) or a CUDA device there are none."""

    def __init__(self, device: str) -> None:
        self._nvml, self._handle = _nvml(device)
        self._clocks: list[int] = []

    def start(self) -> None:
        """Forget earlier readings and take the first."""
        self._clocks = []
        self._read_clock()

    def stop(self) -> Mapping[str, float | str | None]:
        """The fields of a timed row: clocks from the first reading to this one, the others now."""
        if self._nvml is None:
            return {}
        self._read_clock()
        reasons = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
        return {
            "clock_median_mhz": statistics.median(self._clocks),
            "clock_min_mhz": float(min(self._clocks)),
            "power_w": self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3,
            "temperature_c": float(self._nvml.nvmlDeviceGetTemperature(self._handle, self._nvml.NVML_TEMPERATURE_GPU)),
            "throttle": " ".join(name for name, bit in _reasons(self._nvml).items() if reasons & bit),
        }

    def _read_clock(self) -> None:
        if self._nvml is not None:
            self._clocks.append(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))


def _nvml(device: str) -> tuple[Any, Any]:
    if not device.startswith("cuda"):
        return None, None
    try:
        import pynvml
    except ModuleNotFoundError:
        return None, None
    try:
        pynvml.nvmlInit()
        # By its bus, as CUDA_VISIBLE_DEVICES renumbers the devices of CUDA alone.
        found: Any = torch.cuda.get_device_properties(device)
        place = f"{found.pci_domain_id:08X}:{found.pci_bus_id:02X}:{found.pci_device_id:02X}.0"
        return pynvml, pynvml.nvmlDeviceGetHandleByPciBusId(place.encode())
    except (pynvml.NVMLError, AttributeError):  # no permission, or a torch without bus numbers
        return None, None


def _reasons(nvml: Any) -> dict[str, int]:
    names = [name for name in vars(nvml) if name.startswith(PREFIX) and isinstance(getattr(nvml, name), int)]
    return {
        name.removeprefix(PREFIX): getattr(nvml, name) for name in names if name.removeprefix(PREFIX) not in HARMLESS
    }
