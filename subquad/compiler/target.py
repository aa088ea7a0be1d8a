"""The device that is compiled for: the machine at hand, probed once, or a device file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from filelock import FileLock

from subquad.cache import user_cache
from subquad.errors import ConfigError, NotFoundError
from subquad.log import say
from subquad_cost_model import Device, UnknownDeviceError, load_device, probe_device, shipped_devices
from subquad_kernels.device_limits import device_limits
from subquad_kernels.self_check import stack_versions
from subquad_kernels.workload import DeviceLimits


@dataclass(frozen=True)
class Target:
    """A device as the cost model and as kernels see it; `local` is its torch name here, None when it is not present."""

    device: Device
    limits: DeviceLimits
    local: str | None

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`."""
        return self.limits.kind


def resolve_target(name: str = "auto") -> Target:
    """The target of that name: `auto` (a CUDA device if there is one), `cpu`, `cuda`, a shipped device, or a file.

    Raises: NotFoundError for a device nobody described; ConfigError for a file that is no device file.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" or name.partition(":")[0] == "cuda":
        if name != "cpu" and not torch.cuda.is_available():
            raise NotFoundError(what="this machine has no CUDA device", where="target", mend=_known_targets())
        limits = device_limits(name)
        return Target(_probed(name, limits.name), limits, name)
    try:
        device = load_device(name)
    except UnknownDeviceError as error:
        raise NotFoundError(what=str(error).split(" (")[0], where="target", mend=_known_targets()) from None
    except ValueError as error:
        raise ConfigError(what=str(error), where="target", mend=_known_targets()) from None
    limits = DeviceLimits(
        kind=device.kind, name=device.name, capability=device.capability, memory_bytes=device.memory_bytes
    )
    if device.kind == "cuda" and torch.cuda.is_available() and is_same_model(device.name, torch.cuda.get_device_name()):
        return Target(device, device_limits("cuda"), "cuda")
    return Target(device, limits, None)


def require_local(target: Target, name: str, *, verb: str = "train") -> Target:
    """The target itself, if models can run on it here.  Raises: ConfigError."""
    if target.local is None:
        raise ConfigError(
            what=f"{verb} needs the device itself, and this machine has no {target.device.name}",
            where=f"target={name}",
            mend=f"leave target out to {verb} on this machine, or ask `explain` what would be chosen there",
        )
    return target


def is_same_model(file_name: str, device_name: str) -> bool:
    """Whether a device file's model word (`H100` in `NVIDIA H100 80GB HBM3`) stands in a CUDA device's own name."""
    model = re.search(r"\b[a-z]+\d+[a-z]*\b", file_name.lower())
    return model is not None and model[0] in re.split(r"[^a-z0-9]+", device_name.lower())


def _known_targets() -> str:
    return f"use auto, cpu, cuda, one of {', '.join(shipped_devices())}, or the path of a device file"


@lru_cache(maxsize=4)
def _probed(name: str, full_name: str) -> Device:
    """This machine's device, probed once per versions and kept in the user's cache."""
    folder = user_cache("devices")
    if folder is None:
        return _probe(name)
    readable = "-".join((full_name, *stack_versions()))
    path = folder / f"{re.sub(r'[^A-Za-z0-9.]+', '_', readable)}.json"
    with FileLock(f"{path}.lock"):
        if path.exists():
            try:
                return Device.load(path)
            except ValueError:
                pass  # cut short by a killed process, or of another format: it is measured again
        device = _probe(name)
        device.save(path)
    return device


def _probe(name: str) -> Device:
    say(f"probing {device_limits(name).name} (once)")
    return probe_device(kind="cpu" if name == "cpu" else "cuda")
