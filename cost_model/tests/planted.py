"""Devices whose truth is known: an operator with counted work, kernels with stated efficiencies, and noise.

    seconds = launch + bound / efficiency(kernel, shape, device) * exp(noise)

An efficiency saturates with parallel work, as real ones do. One kernel wins on short sequences, the other on long.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from subquad_cost_model import CostRow, Device, TimedRow, lower_bound_s
from subquad_cost_model.bound import bound_terms
from subquad_cost_model.terms import CLEARED

KERNELS = ("wide", "narrow")


def row(kernel: str, b: int, t: int, h: int, *, k: int = 64, phase: str = "forward", operator: str = "mix") -> CostRow:
    """A causal operator of quadratic work."""
    pairs = b * h * t * (t + 1) // 2
    moved = 4 * b * t * h * k * 2
    return CostRow(
        operator=operator,
        kernel=kernel,
        phase=phase,
        dtype="bfloat16",
        shape={"b": b, "t": t, "h": h, "k": k},
        options={"causal": True},
        matmul_flops=(4 if phase == "forward" else 10) * pairs * k,
        vector_flops=4 * pairs,
        transcendental_ops=pairs,
        bytes_moved=moved,
        serial_steps=-(-t // 64),
        saved_bytes=moved // 2 if phase == "forward" else 0,
    )


def halvings(of: CostRow) -> list[CostRow]:
    """The rows with b, t or h halved."""
    shape = dict(of.shape)
    halved = [shape | {axis: shape[axis] // 2} for axis in ("b", "t", "h") if shape[axis] % 2 == 0]
    return [row(of.kernel, s["b"], s["t"], s["h"], k=s["k"], phase=of.phase, operator=of.operator) for s in halved]


def device(name: str, capability: tuple[int, int], *, scale: float = 1.0) -> Device:
    """An H100 in the proportions of its ceilings, `scale` times as large."""
    return Device(
        name=name,
        kind="cuda",
        origin="data sheet",
        capability=capability,
        matmul_flops_per_s={"bfloat16": 1e15 * scale},
        vector_flops_per_s=6e13 * scale,
        transcendental_per_s=4e12 * scale,
        bytes_per_s=3e12 * scale,
        launch_s=5e-7,
        serial_step_s=2e-9,
        memory_bytes=10**11,
        cache_bytes=5 * 10**7,
        cache_bytes_per_s=1.6e13 * scale,
    )


DEVICES = (device("one", (8, 0), scale=0.4), device("two", (9, 0)), device("three", (10, 0), scale=2.2))


def truth_s(of: CostRow, on: Device) -> float:
    """The planted seconds, without noise."""
    shape = of.shape
    parallel = shape["b"] * shape["h"] * shape["t"] / 64 * (4 if of.kernel == "wide" else 1)
    units = on.transcendental_per_s * on.serial_step_s / 64
    best, worst = (0.75, 0.2) if of.kernel == "narrow" else (0.5, 0.2)
    efficiency = worst + (best - worst) * parallel / (parallel + units)
    launch_s = 8e-6 if of.kernel == "narrow" else 3e-6
    return launch_s + lower_bound_s(of, on) / efficiency


def table(
    *,
    seed: int,
    shapes: int = 60,
    devices: Sequence[Device] = DEVICES,
    noise: float = 0.03,
    phases: Sequence[str] = ("forward",),
    lengths: Sequence[int] = tuple(range(4, 14)),
) -> list[TimedRow]:
    """Timed rows of all kernels on all devices, for so many shapes drawn at random; t is 2^length, or 3/4 of it."""
    draw = random.Random(seed)
    rows = []
    for _ in range(shapes):
        t = 2 ** draw.choice(lengths)
        b, h, k = 2 ** draw.randrange(6), 2 ** draw.randrange(1, 6), draw.choice([64, 128])
        t = t if draw.random() < 0.5 else t * 3 // 4
        for phase in phases:
            for kernel in KERNELS:
                for on in devices:
                    rows.append(timed_row(row(kernel, b, t, h, k=k, phase=phase), on, draw.gauss(0, noise)))
    return rows


def timed_row(of: CostRow, on: Device, log_noise: float = 0.0) -> TimedRow:
    """What timing would give, with a peak of 1.25 times what is counted."""
    import math

    seconds = truth_s(of, on) * math.exp(log_noise)
    peak = int(1.25 * (of.bytes_moved + of.saved_bytes))
    return TimedRow(
        row=of, device=on, status="ok", low_s=seconds / 1.01, median_s=seconds, high_s=seconds * 1.01, peak_bytes=peak
    )


def hosted(*, seed: int, shapes: int, on: Device = DEVICES[1]) -> list[TimedRow]:
    """Rows of a kernel of many launches, which mostly wait for a host whose pace is another for each.

    seconds = max(device, 4 pace launches - what the device overwrites before)
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(shapes):
        t, pace_s = draw.randint(192, 24_576), 5e-6 * 2 ** draw.uniform(-1, 1)
        composed = replace(row("wide", draw.randint(1, 16), t, 8), launches=1 + 2 * -(-t // 64))
        terms = bound_terms(composed, on)
        head_s = CLEARED * on.cache_bytes / on.bytes_per_s
        seconds = max(4e-6 * composed.launches + 4 * terms.memory_s, 4 * pace_s * composed.launches - head_s)
        rows.append(replace(timed_row(composed, on), low_s=seconds, median_s=seconds, high_s=seconds, host_s=pace_s))
    return rows


def failed(of: TimedRow) -> TimedRow:
    """The same row, out of memory."""
    return replace(of, status="oom", low_s=None, median_s=None, high_s=None, peak_bytes=None)
