"""One more kernel for `causal_conv`, which says itself where it applies; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from subquad import hookimpl
from subquad_kernels import DeviceLimits, Kernel, Workload


def supports(workload: Workload, limits: DeviceLimits) -> str | None:
    """None, or the reason why not, which `explain` prints: only for Hopper, and only for the plainest call."""
    if limits.capability is None or limits.capability[0] != 9:
        return "is written for GPUs of compute capability 9"
    if "documents" in workload.shape or workload.options["initial_state"]:
        return "takes neither packed documents nor initial states"
    if workload.dtype == "float64":
        return "computes in float32, not in float64"
    return None


@hookimpl
def subquad_provide_kernels() -> Iterable[Kernel]:
    return [
        Kernel(
            operator="causal_conv",
            name="hopper_tiles",
            implementation="hopper_conv_triton",
            supports=supports,
            devices=frozenset({"cuda"}),
            requires=("triton>=3.6",),
            origin="subquad-hopper-conv",
        )
    ]
