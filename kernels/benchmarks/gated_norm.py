"""Check and time the gated norm on a CUDA device, fused and of torch's own operations.

    python kernels/benchmarks/gated_norm.py OUT.json [--tune] [--limit-s 60]

Device times (median of `triton.testing.do_bench`, L2 cleared between calls) of 32,768 tokens of 2,048 channels in
bfloat16, as Mamba-2 calls it (one group, gate first, a skip) and as Gated DeltaNet does (16 heads, gate last). `floor`:
each tensor read or written once at the rate of a copy on this device. With --tune, launches are tried as well; the
package keeps `fused.FORWARD` and `fused.BACKWARD`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from timing import Limit, Record, called_ms, checks, show_check, surviving

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.gated_norm import composed, fused
from subquad_kernels.gated_norm.definition import sample_inputs
from subquad_kernels.workload import Workload

TOKENS, CHANNELS = 32_768, 2_048
OPERATOR = CATALOGUE.operator("gated_norm")
KERNEL = CATALOGUE.kernel("gated_norm", "fused")


def workload(*, b: int = 4, t: int = TOKENS // 4, c: int = CHANNELS, g: int, **options: Any) -> Workload:
    every = {"gate_first": False, "activation": "silu", "weight": True, "shared": False, "skip": False, "eps": 1e-5}
    shape = {"b": b, "t": t, "c": c, "g": g}
    return Workload(operator="gated_norm", shape=shape, dtype="bfloat16", phase="backward", options=every | options)


CASES: dict[str, dict[str, Any]] = {
    "Mamba-2": {"g": 1, "gate_first": True, "skip": True},
    "Gated DeltaNet": {"g": 16, "shared": True},
}
CHECKED = {
    f"{name} t={t}": workload(b=2, t=t, c=c, **case)
    for name, case in CASES.items()
    for t, c in ((509, 1024), (1, 256), (37, 6144))
}


class Directions:
    """Forward and backward of one call."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.arguments = sample_inputs(workload(**case), seed=0, device="cuda")
        self.pull = torch.randn_like(self.arguments["x"])
        self.outputs = fused.forward(**self.arguments)

    def time(self, direction: str, kernel: Any, **launch: Any) -> float:
        if direction == "forward":
            return called_ms(lambda: kernel.forward(**self.arguments, **launch))
        return called_ms(lambda: kernel.backward(self.arguments, self.outputs, (self.pull,), **launch))


def copy_rate() -> float:
    """Bytes a second that a copy of a gigabyte moves."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / (1e-3 * called_ms(lambda: target.copy_(source)))


def launches() -> Iterator[fused.Launch]:
    for tile, warp, programs in product((1024, 2048, 4096), (256, 512, 1024), (1056, 2112, 4224)):
        yield fused.Launch(tile=tile, warp=warp, programs=programs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--limit-s", type=float, default=60.0)
    options = parser.parse_args()
    limit, record = Limit(options.limit_s), Record.of("cuda", options.out)
    for row in checks(OPERATOR, KERNEL, CHECKED, "cuda"):
        record.add("checks", row)
        show_check(row)
    rate = copy_rate()
    record.add("copy", {"bytes_per_s": rate})
    for name, case in CASES.items():
        directions, channels = Directions(case), TOKENS * CHANNELS * 2
        for direction, tensors in (("forward", 3 + case.get("skip", 0)), ("backward", 5 + 2 * case.get("skip", 0))):
            row: dict[str, Any] = {"case": name, "direction": direction, "floor_ms": 1e3 * tensors * channels / rate}
            with surviving(row):
                row["fused_ms"] = directions.time(direction, fused)
                row["composed_ms"] = directions.time(direction, composed)
            record.add("timings", row)
            print(row, flush=True)
            for launch in launches() if options.tune else ():
                if limit.over(2):
                    break
                tried: dict[str, Any] = {"case": name, "direction": direction, "launch": asdict(launch)}
                with surviving(tried):
                    tried["ms"] = directions.time(direction, fused, launch=launch)
                record.add("tuning", tried)
                print(direction, launch, f"{tried.get('ms', -1):.3f}", tried.get("failure", "")[:80], flush=True)


if __name__ == "__main__":
    main()
