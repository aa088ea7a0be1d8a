"""Devices that need not be present: the files shipped in `devices/`, from NVIDIA's data sheets.

Every figure is a ceiling or a floor, so that `lower_bound_s` stays below what the device can do:
dense rates without sparsity; fp32 with TF32 off; fp64 on tensor cores where they do fp64; exponentials 16 per SM and
clock (special-function units); cache speed 64 bytes per SM and clock (what an SM can take in), at the boost clock;
a serial step 4 clocks (a dependent fused multiply-add); a launch 0.5 us, half of what lies between two kernels of a
CUDA graph (1.02 us for 2000 one-element additions; H100 80GB HBM3, driver 580.159, torch 2.11).

That H100 stays below its file: products of 16384 x 16384 bfloat16 zeros reached 87 % of the peak, of 2048 x 2048 ones
up to 93 %; fp32 78 %, fp64 98 %, a copy of 4 GiB 93 % of the bandwidth.
"""

from __future__ import annotations

import difflib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from subquad_cost_model.device import Device


class UnknownDeviceError(ValueError):
    """No shipped device has this name, and no file lies at this path."""


def shipped_devices() -> tuple[str, ...]:
    """Names that `load_device` knows without a file of the user's, sorted."""
    return tuple(sorted(file.name.removesuffix(".json") for file in _folder().iterdir() if file.name.endswith(".json")))


def load_device(name_or_path: str | Path) -> Device:
    """The shipped device of this name (in any case), or the device file at this path.

    Raises: UnknownDeviceError, naming the known ones; ValueError when the file is not a device file.
    """
    name = str(name_or_path).lower()
    if name in shipped_devices():
        with resources.as_file(_folder() / f"{name}.json") as path:
            return Device.load(path)
    path = Path(name_or_path)
    if path.is_file():
        return Device.load(path)
    close = difflib.get_close_matches(name, shipped_devices(), n=1)
    suggestion = f"; did you mean {close[0]!r}?" if close else ""
    raise UnknownDeviceError(
        f"no device is called {str(name_or_path)!r} and no device file lies there{suggestion} "
        f"(shipped: {', '.join(shipped_devices())})"
    )


def _folder() -> Traversable:
    return resources.files("subquad_cost_model") / "devices"
