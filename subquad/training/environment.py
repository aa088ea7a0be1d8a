"""What a run ran on: versions, device and source revision, as a record for its folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = (
    "subquad", "subquad-kernels", "subquad-cost-model", "subquad-scout", "subquad-ssm", "subquad-linear",
    "torch", "triton", "lightning", "numpy", "hydra-core", "omegaconf", "safetensors", "tokenizers", "wandb",
)  # fmt: skip


def environment_record(device: torch.device) -> dict[str, object]:
    """Versions, device, threads and git revision; what is not there is None."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": device_name(device),
        "cuda": torch.version.cuda,
        "driver": _driver() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "git_revision": _git_revision(Path(__file__).resolve().parent),
        "command": sys.argv,
        "working_folder": os.getcwd(),
    }


def device_name(device: torch.device) -> str:
    """The device as people know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({_processor()}, {os.cpu_count()} cores)"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def _git_revision(folder: Path) -> str | None:
    """The commit of the checkout that this package runs from, marked if files were changed; None if installed."""
    revision = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    tracked = _output(["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__])
    if revision is None or tracked is None:  # a virtual environment inside somebody else's checkout
        return None
    changed = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return f"{revision} with changes" if changed else revision


def _output(command: list[str]) -> str | None:
    """The first line that a program prints; None if it fails, is missing, or takes long. Empty if it prints nothing."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (result.stdout.splitlines() or [""])[0].strip()
