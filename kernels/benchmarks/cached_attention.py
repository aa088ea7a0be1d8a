"""Time attention of one token to a cache, on a CUDA device, and choose how it is launched.

    python kernels/benchmarks/cached_attention.py OUT.json [--limit-s 60] [--tune] [--tiny]

bfloat16, heads of 64; 1, 16, 64, 256 sequences; a full ring of 4,096 or 32,768 places (`cached_attention`) of 16 query
heads over 16, 4 or 1 of keys, and 64 or 2,048 summaries (`segment_attention`), both by the kernel of one token
(`segment_attention/tiled_step.py`). First one sequence of each is held against the reference in float64. `us` is the
time of one call from a CUDA graph of several, each with tensors of its own: together more than twice the L2 cache, so
that every call finds it cold. `share` is the rate at which it reads its bytes, to that of a copy.

--tune times other tiles, warps, stages of loads and numbers of programs as well, compiled beside each other before the
clock, each held against the reference first; what missed is said and left out. The fastest of each case are printed.
With --tiny, or without a GPU (TRITON_INTERPRET=1, float16), sizes are small and calls are simply timed. OUT.json is
written at every row.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from timing import Limit, Record, distance, graph_us, seconds, surviving
from torch import Tensor

from subquad_kernels.cached_attention.declaration import OPERATOR
from subquad_kernels.cached_attention.definition import reference
from subquad_kernels.compile_processes import collecting, compile_in_processes
from subquad_kernels.first_calls import cores
from subquad_kernels.segment_attention.tiled_step import decode
from subquad_kernels.segment_attention.tilings import StepLaunch, step_launch
from subquad_kernels.tile_sizes import ceil_div

HEADS, WIDTH = 16, 64
BATCHES = (1, 16, 64, 256)
SIZES = (
    *((32, warps, stages) for warps, stages in ((1, 3), (1, 4), (2, 4), (4, 4))),
    *((64, warps, stages) for warps, stages in ((1, 3), (1, 4), (2, 3), (2, 4), (4, 2), (4, 3), (4, 4), (4, 6))),
    *((128, warps, stages) for warps, stages in ((2, 3), (4, 2), (4, 3), (4, 4), (8, 3))),
)
"""Tiles, warps, and stages of loads, that are tried."""
PROGRAMS = (256, 512, 1_024, 2_048, 4_096)
"""Into how many programs a cache is split, about."""
LARGEST_TUNED = 5 << 30
"""Bytes of a case whose launch is chosen; longer ones repeat what the others say."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """So many sequences, key heads, and places of a full ring or summaries."""

    b: int
    h_kv: int
    m: int
    ring: bool

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        return self.b * self.m * self.h_kv * 2 * WIDTH * 2

    @property
    def name(self) -> str:
        """As it is printed."""
        return f"{'places' if self.ring else 'summaries'}={self.m:<6} heads={HEADS}/{self.h_kv:<3} b={self.b:<4}"

    def package(self) -> StepLaunch:
        """How the package launches it."""
        return step_launch(self.b, HEADS, self.h_kv, WIDTH, WIDTH, self.m, element_bytes=2)

    def tensors(self, device: str) -> dict[str, Any]:
        """The arguments of a call; a place that is not seen is NaN."""
        # Triton's interpreter computes wrongly in bfloat16.
        draw = partial(torch.randn, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float16)
        q, k, v = (draw(self.b, 1, heads, WIDTH) for heads in (HEADS, self.h_kv, self.h_kv))
        keys, values = (draw(self.b, self.m, self.h_kv, WIDTH) for _ in range(2))
        position = None
        if self.ring:
            position = torch.tensor([self.m + self.m // 3], device=device)
            keys[:, self.m // 3], values[:, self.m // 3] = float("nan"), float("nan")
        return {"q": q, "k": k, "v": v, "keys": keys, "values": values, "position": position}


def call(tensors: dict[str, Any], launch: StepLaunch) -> Tensor:
    """out."""
    q, k, v, keys, values, position = tensors.values()
    return decode(q, k, v, keys, values, WIDTH**-0.5, launch, position)[0]


def expected(tensors: dict[str, Any]) -> Tensor:
    """By the definition in float64; a cache that is no ring has one place more."""
    exact = {name: x.double() if x is not None and name != "position" else x for name, x in tensors.items()}
    if exact["position"] is None:
        spare = torch.full_like(exact["k"], float("nan"))
        exact["keys"], exact["values"] = (torch.cat([exact[name], spare], dim=1) for name in ("keys", "values"))
        exact["position"] = torch.tensor([tensors["keys"].shape[1]], device=spare.device)
    return reference(**exact, segment_len=1, scale=None)[0]


def cases(tiny: bool) -> list[Case]:
    """All that are timed."""
    rings, summaries, batches = ((37,), (5,), (1, 2)) if tiny else ((4_096, 32_768), (64, 2_048), BATCHES)
    found = [Case(b=b, h_kv=h_kv, m=m, ring=True) for m in rings[:1] for h_kv in (16, 4, 1) for b in batches]
    found += [Case(b=b, h_kv=16, m=m, ring=False) for m in summaries for b in batches]
    return found + [Case(b=b, h_kv=h_kv, m=m, ring=True) for m in rings[1:] for h_kv in (16, 4, 1) for b in batches]


def candidates(case: Case) -> Iterator[StepLaunch]:
    """Launches that differ."""
    found = {case.package(): None}
    for (tile_n, warps, stages), programs in product(SIZES, PROGRAMS):
        launch = StepLaunch(tile_n=tile_n, num_warps=warps, num_stages=stages)
        splits = min(256, ceil_div(case.m, tile_n), ceil_div(programs, case.b * case.h_kv))
        splits, _ = replace(launch, splits=splits).parts(case.m)
        found[replace(launch, splits=splits)] = None
    return iter(found)


def compile_all(wanted: Iterable[tuple[Case, StepLaunch]], device: str) -> None:
    """Into Triton's folder, in processes beside each other."""
    with collecting() as collection:
        for case, launch in wanted:
            call(replace(case, b=1).tensors(device), launch)
    compile_in_processes(collection.wanted, cores())


def held(case: Case, launches: Iterable[StepLaunch], device: str, record: Record) -> list[StepLaunch]:
    """Those launches by which one sequence of the case equals the reference."""
    tensors = replace(case, b=1).tensors(device)
    wanted, allowed, kept = expected(tensors), OPERATOR.tolerances["bfloat16"].output, []
    for launch in launches:
        row: dict[str, Any] = {"case": asdict(case), "launch": asdict(launch)}
        with surviving(row):
            row["error"] = distance(call(tensors, launch), wanted)
            if row["error"] <= allowed:
                kept.append(launch)
        if launch not in kept:
            print("MISSED", case.name, launch, row.get("error"), row.get("failure", ""), flush=True)
        record.add("checks", row)
    return kept


def timed(case: Case, launches: Iterable[StepLaunch], device: str, rate: float, record: Record) -> list[dict[str, Any]]:
    """A row of each launch, the fastest first."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0
    sets = [case.tensors(device) for _ in range(max(1, min(256, math.ceil(2 * l2_bytes / case.bytes))))]
    rows = []
    for launch in launches:
        row: dict[str, Any] = {"case": asdict(case), "launch": asdict(launch), "bytes": case.bytes, "sets": len(sets)}
        with surviving(row):
            row["us"] = graph_us([partial(call, tensors, launch) for tensors in sets], device, replays=7)
            row["share"] = case.bytes / row["us"] * 1e6 / rate
        record.add("timings", row)
        rows.append(row)
    return sorted(rows, key=lambda row: float(row.get("us", math.inf)))


def shown(row: dict[str, Any]) -> str:
    """Time, share of a copy's rate, and launch."""
    launch = StepLaunch(**row["launch"])
    how = f"{launch.tile_n}x{launch.num_warps} stages {launch.num_stages} splits {launch.splits}"
    return row.get("failure") or f"{row['us']:8.1f} us {100 * row['share']:5.1f} %  {how}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit-s", type=float, default=60.0)
    parser.add_argument("--tune", action="store_true", help="try other launches than the package's")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiny = options.tiny or device == "cpu"
    limit, record = Limit(options.limit_s), Record.of(device, options.out)
    size = 1 << (20 if tiny else 30)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * size / seconds(lambda: target.copy_(source), device, calls=10)
    record.add("copy", {"gigabytes_per_s": rate / 1e9})
    print(record.device, *record.versions, f"copy {rate / 1e9:.0f} GB/s", sep=" | ", flush=True)

    everything = cases(tiny)
    groups = [case for case in everything if case.b == 1]
    if device == "cuda":
        tried = [(case, case.package()) for case in everything]
        if options.tune:
            tried += [(case, launch) for case in groups for launch in candidates(case)]
        compile_all(tried, device)
    for case in groups:
        held(case, [case.package()], device, record)
    for case in everything:
        if limit.over():
            print("time is up: left out", case.name)
            continue
        print(case.name, shown(timed(case, [case.package()], device, rate, record)[0]), flush=True)
    if not options.tune:
        return
    for case in everything:
        if limit.over():
            print("time is up: not tuned", case.name)
        elif case.bytes <= LARGEST_TUNED:
            rows = timed(case, held(case, candidates(case), device, record), device, rate, record)
            print(case.name, *map(shown, rows[:6]), sep="\n   ", flush=True)


if __name__ == "__main__":
    main()
