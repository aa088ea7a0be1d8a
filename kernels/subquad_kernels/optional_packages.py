"""Other people's packages whose kernels are candidates where they are installed, and what is known to fail in them.

An adapter is a file in its operator's folder. It imports its package when it is first called; whether the package is
there, its metadata says (`Kernel.missing`). The extras of pyproject.toml name the same versions.
"""

from __future__ import annotations

from packaging.version import Version

from subquad_kernels.catalogue import installed_version
from subquad_kernels.workload import DeviceLimits, Workload

FLA = ("fla-core>=0.6,<0.7", "triton>=3.6")
"""flash-linear-attention's operators; the package of that name adds models."""

MAMBA = ("mamba-ssm>=2.3,<2.4", "triton>=3.6")
MAMBA_EXTENSIONS = ("selective_scan_cuda",)
"""2.3 imports it with the package, so that its Triton kernels need it too."""

CAUSAL_CONV1D = ("causal-conv1d>=1.5,<1.7",)
CAUSAL_CONV1D_EXTENSIONS = ("causal_conv1d_cuda",)

FLASH_ATTN = ("flash-attn>=2.8,<2.9",)
FLASH_ATTN_EXTENSIONS = ("flash_attn_2_cuda",)

HALF = ("bfloat16", "float16")


def half_only(workload: Workload) -> str | None:
    """The refusal of kernels whose products are rounded to half precision, or to TF32 where they are given float32."""
    return None if workload.dtype in HALF else f"multiplies in half precision or TF32, not in {workload.dtype}"


def gated_backward_defect(limits: DeviceLimits) -> str | None:
    """fla raises in the backward of a scalar decay where Triton compiled it wrongly: its issue 640."""
    version = installed_version("triton")
    if version is None or limits.capability is None or limits.capability[0] != 9:
        return None
    if Version("3.4") <= Version(version) < Version("3.7.1"):
        return f"has no gradient of a decay per head on Hopper with triton {version}: it needs triton>=3.7.1"
    return None
