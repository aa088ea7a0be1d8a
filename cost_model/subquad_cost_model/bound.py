"""The least time that a row can take on a device: the analytic bound under every estimate."""

from __future__ import annotations

from typing import NamedTuple

from subquad_cost_model.device import Device
from subquad_cost_model.rows import CostRow

# Dtypes that hold every value of the key's.
WIDER = {"bfloat16": ("float32", "float64"), "float16": ("float32", "float64"), "float32": ("float64",)}


class BoundTerms(NamedTuple):
    """Seconds that each unit of the device works at least."""

    matmul_s: float
    vector_s: float
    transcendental_s: float
    memory_s: float
    serial_s: float


def lower_bound_s(row: CostRow, device: Device) -> float:
    """Seconds below which the row cannot finish, as far as the device's ceilings are its ceilings.

        t = launch + max(F_matmul / P_matmul(dtype), F_vector / P_vector, X / P_exp, t_memory, steps * tau,
                         (launches - 1) launch)
        t_memory = max(B / BW_cache, (B - C) / BW)

    F are FLOPs, X exponentials, B bytes moved (each input read once, each output written once), C the cache: at most
    C of the B bytes can be in the cache already, or stay there, so at least B - C cross the memory bus. The maximum,
    and not the sum, because the units work at the same time, and the work of a launch hides what it costs to start it.

    Figures of a data sheet cannot be exceeded. Those of a probe are what this machine reached when it was asked, and
    a quieter machine may reach more: `RooflineEstimator` leaves room for that.
    """
    return device.launch_s + max(*bound_terms(row, device), launches_s(row, device))


def launches_s(row: CostRow, device: Device) -> float:
    """What the launches after the first take at least: one follows the other."""
    return (row.launches - 1) * device.launch_s


def bound_terms(row: CostRow, device: Device) -> BoundTerms:
    """The terms of the bound's maximum."""
    return BoundTerms(
        matmul_s=row.matmul_flops / matmul_ceiling(row.dtype, device),
        vector_s=row.vector_flops / device.vector_flops_per_s,
        transcendental_s=row.transcendental_ops / device.transcendental_per_s,
        memory_s=_memory_s(row.bytes_moved, device),
        serial_s=row.serial_steps * device.serial_step_s,
    )


def matmul_ceiling(dtype: str, device: Device) -> float:
    """FLOP/s of matrix products in this dtype: the faster of its own rate and that of a wider dtype.

    A kernel may convert 16-bit inputs and multiply in fp32 (CPUs without 16-bit units are faster so). Where the
    device lists no rate for the dtype, the fastest it lists: a bound from too high a rate is still a bound.
    """
    rates = device.matmul_flops_per_s
    if dtype not in rates:
        return max(rates.values())
    return max(rates[wide] for wide in (dtype, *WIDER.get(dtype, ())) if wide in rates)


def _memory_s(bytes_moved: int, device: Device) -> float:
    beyond_cache_s = max(0, bytes_moved - device.cache_bytes) / device.bytes_per_s
    if device.cache_bytes_per_s == 0:
        return beyond_cache_s
    return max(bytes_moved / device.cache_bytes_per_s, beyond_cache_s)
