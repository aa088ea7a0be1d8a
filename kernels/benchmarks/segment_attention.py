"""Check and time the kernels of segment attention on a CUDA device.

    python kernels/benchmarks/segment_attention.py OUT.json [--tune] [--limit-s 120]

Times are device times (median of `triton.testing.do_bench`, L2 cleared between calls) of 32,768 tokens, 16 heads of
width 64 in bfloat16; `called` is the wall time of a forward and backward through the operator and autograd.
With --tune, each Triton kernel is first tried under a grid of launch configurations, one kernel after the other, and
the best stay for the timings; the package itself keeps what `tiled.tiling` says.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from timing import Limit, Record, called_ms, checks, comparison, show_check, surviving
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.operators import segment_attention
from subquad_kernels.segment_attention import tiled, tilings
from subquad_kernels.segment_attention.definition import sample_inputs
from subquad_kernels.workload import Workload

TOKENS, HEADS, WIDTH = 32_768, 16, 64
LENGTHS, SEGMENTS = (2_048, 8_192, 32_768), (10, 64)
OPERATOR = CATALOGUE.operator("segment_attention")

# (tile_t, tile_n, num_warps, num_stages)
GRID: dict[tiled.Stage, tuple[tuple[int, int, int, int], ...]] = {
    "forward": (
        (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (128, 64, 4, 4), (128, 128, 8, 2), (128, 128, 8, 3),
        (64, 64, 4, 3), (64, 128, 4, 3), (128, 32, 4, 4),
    ),
    "query_gradients": (
        (128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 4),
        (64, 128, 4, 2),
    ),
    "summary_gradients": (
        (64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3),
        (32, 128, 4, 3), (128, 64, 8, 2),
    ),
}  # fmt: skip
PROGRAMS = (256, 512, 1024, 2048)


def workload(t: int, segment_len: int, **others: int) -> Workload:
    shape = {"b": TOKENS // t, "t": t, "h": HEADS, "h_kv": HEADS, "k": WIDTH, "v": WIDTH, "m": 0} | others
    return Workload(
        operator="segment_attention", shape=shape, dtype="bfloat16", phase="backward",
        options={"segment_len": segment_len},
    )  # fmt: skip


def inputs(case: Workload) -> dict[str, Any]:
    return sample_inputs(case, seed=0, device="cuda")


def run(kernel: str, arguments: dict[str, Any], pull: Tensor | None) -> list[Tensor]:
    """Output, and gradients of q, k and v if a pull is given, without autograd."""
    functions = CATALOGUE.kernel("segment_attention", kernel).torch_half
    outputs = functions.forward(**arguments)
    if pull is None:
        return [outputs[0]]
    found = functions.backward(arguments, outputs, (pull,))
    return [outputs[0], *(found[name] for name in ("q", "k", "v"))]  # type: ignore[list-item]


def called_milliseconds(arguments: dict[str, Any], pull: Tensor) -> float:
    """Wall time of one forward and backward through the operator, calls back to back."""
    leaves = [arguments[name].detach().requires_grad_() for name in ("q", "k", "v")]

    def step() -> None:
        out = segment_attention(*leaves, segment_len=arguments["segment_len"], kernel="tiled")
        torch.autograd.grad(out, leaves, pull)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(10):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 100


CHECKED = {
    "t=1021 s=10": workload(1021, 10, b=1, h=4, h_kv=4),
    "t=1021 s=1 grouped": workload(1021, 1, b=1, h=4, h_kv=2),
    "t=700 s=10 packed": workload(700, 10, b=1, h=4, h_kv=4, documents=6),
    "t=333 s=10 m=41": workload(333, 10, b=2, h=4, h_kv=2, m=41),
    "t=509 s=7 width 128": workload(509, 7, b=1, h=2, h_kv=2, k=128, v=128),
    "t=509 s=7 width 48": workload(509, 7, b=1, h=2, h_kv=2, k=48, v=48),
}


def check_against_rival(rival: str) -> Iterator[dict[str, Any]]:
    """bfloat16 at full size: against another kernel of the operator, relative to its largest value."""
    for t in (8_192, 32_768):

        def pairs(t: int = t) -> Iterator[tuple[str, Tensor, Tensor]]:
            arguments = inputs(workload(t, 10))
            pull = torch.randn_like(arguments["v"])
            return zip(("out", "d_q", "d_k", "d_v"), run("tiled", arguments, pull), run(rival, arguments, pull))

        yield comparison(f"t={t} s=10", rival, pairs, 3e-2)


def tune(record: Record, limit: Limit) -> None:
    """Try each kernel's configurations at three shapes; the least sum of times relative to the first tried stays."""
    shapes = ((max(LENGTHS), 10), (max(LENGTHS), 64), (min(LENGTHS), 10))
    cases = [inputs(workload(t, segment_len)) for t, segment_len in shapes]

    def time_stage(stage: tiled.Stage, arguments: dict[str, Any]) -> float:
        """The whole backward stands for each of its kernels: the others do not change."""
        if stage == "forward":
            return called_ms(lambda: tiled.forward(**arguments))
        outputs = tiled.forward(**arguments)
        return called_ms(lambda: tiled.backward(arguments, outputs, (outputs[0],)))

    def times(stage: tiled.Stage) -> list[float]:
        return [time_stage(stage, arguments) for arguments in cases]

    for stage, configurations in GRID.items():
        best: tuple[float, tiled.Tiling] | None = None
        first: list[float] | None = None
        for configuration in configurations:
            if limit.over(40):
                print("time is up: the rest is not tuned")
                keep(stage, best)
                return
            tiled.TILINGS[stage] = tiled.Tiling(*configuration)
            row: dict[str, Any] = {"stage": stage, "tiling": configuration}
            with surviving(row):
                row["ms"] = times(stage)
                first = first or row["ms"]
                score = sum(a / b for a, b in zip(row["ms"], first))
                if best is None or score < best[0]:
                    best = score, tiled.TILINGS[stage]
            shown = (f"{value:8.3f}" for value in row.get("ms", ()))
            print(f"{stage:18} {configuration!s:20}", *shown, row.get("failure", "")[:80], flush=True)
            record.add("tuning", row)
        keep(stage, best)
    by_programs = {}
    for programs in PROGRAMS:
        tilings.PROGRAMS = programs
        found = times("summary_gradients")
        by_programs[programs] = found
        record.add("tuning", {"stage": "summary_gradients", "programs": programs, "ms": found})
        print(f"{'PROGRAMS':18} {programs!s:20}", *(f"{value:8.3f}" for value in found), flush=True)
    base = by_programs[PROGRAMS[0]]
    try_compact_copies(record, times)
    tilings.PROGRAMS = min(by_programs, key=lambda p: sum(a / b for a, b in zip(by_programs[p], base)))


def keep(stage: tiled.Stage, best: tuple[float, tiled.Tiling] | None) -> None:
    """Run the best tiling found from now on, or the package's own."""
    tiled.TILINGS.pop(stage, None)
    if best is not None:
        tiled.TILINGS[stage] = best[1]


def try_compact_copies(record: Record, times: Callable[[tiled.Stage], list[float]]) -> None:
    """The same with the summaries copied to consecutive memory first; the package reads them where they stand."""
    stand = tiled._Seen.by_call

    def copy(*call: Any) -> tiled._Seen:
        seen = stand(*call)
        keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (seen.keys, seen.values))
        return replace(seen, keys=keys, values=values)

    tiled._Seen.by_call = copy  # type: ignore[method-assign,assignment]
    stages: tuple[tiled.Stage, ...] = ("forward", "summary_gradients")
    try:
        for stage in stages:
            found = times(stage)
            record.add("tuning", {"stage": stage, "compact": True, "ms": found})
            print(f"{stage:18} {'compact copies':20}", *(f"{value:8.3f}" for value in found), flush=True)
    finally:
        tiled._Seen.by_call = stand  # type: ignore[method-assign]


def time_kernel(kernel: str, t: int, segment_len: int) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": kernel, "t": t, "segment_len": segment_len}
    with surviving(row):
        arguments = inputs(workload(t, segment_len))
        pull = torch.randn_like(arguments["v"])
        row["forward_ms"] = called_ms(lambda: run(kernel, arguments, None))
        row["both_ms"] = called_ms(lambda: run(kernel, arguments, pull))
        if kernel == "tiled":
            row["called_ms"] = called_milliseconds(arguments, pull)
        torch.cuda.reset_peak_memory_stats()
        run(kernel, arguments, pull)
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.empty_cache()
    return row


def time_full_attention(t: int) -> dict[str, Any]:
    """Causal attention over every token, by cuDNN: the scale of things."""
    row: dict[str, Any] = {"kernel": "cuDNN, all tokens", "t": t, "segment_len": 1}
    with surviving(row):
        q, k, v = (
            torch.randn(TOKENS // t, HEADS, t, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        pull = torch.randn_like(q)

        def attend() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v, is_causal=True)

        row["forward_ms"] = called_ms(attend)
        row["both_ms"] = called_ms(lambda: torch.autograd.grad(attend(), (q, k, v), pull))
    return row


def show(row: dict[str, Any]) -> None:
    name = f"{row['kernel']:18} t={row['t']:6} s={row['segment_len']:3}"
    if "failure" in row:
        print(name, row["failure"][:90], flush=True)
    else:
        called = f"   called {row['called_ms']:7.3f}" if "called_ms" in row else ""
        memory = f"   peak {row['peak_mib']:7.0f} MiB" if "peak_mib" in row else ""
        print(f"{name}  forward {row['forward_ms']:7.3f}  both {row['both_ms']:7.3f} ms{called}{memory}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--limit-s", type=float, default=120.0)
    options = parser.parse_args()
    limit, record = Limit(options.limit_s), Record.of("cuda")
    print(record.device, *record.versions, sep=" | ")

    def save() -> None:
        stages = {stage: asdict(value) for stage, value in tiled.TILINGS.items()}
        record.rows["tilings"] = [stages | {"programs": tilings.PROGRAMS}]
        record.save(options.out)

    def check(rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            record.add("checks", row)
            show_check(row)
        save()

    check(checks(OPERATOR, CATALOGUE.kernel("segment_attention", "tiled"), CHECKED, "cuda"))
    check(check_against_rival("sdpa_merge"))
    torch.cuda.empty_cache()
    if options.tune:
        failed: dict[str, Any] = {}
        with surviving(failed):
            tune(record, limit)
        save()
        print("kept:", tiled.TILINGS, "PROGRAMS", tilings.PROGRAMS, failed.get("failure", ""))
        if tiled.TILINGS:
            check(check_against_rival("sdpa_merge"))
    jobs: list[Callable[[], dict[str, Any]]] = [
        *(lambda t=t, s=s: time_kernel("tiled", t, s) for t in LENGTHS for s in SEGMENTS),
        *(lambda t=t: time_full_attention(t) for t in LENGTHS),
        *(lambda t=t, s=s: time_kernel("sdpa_merge", t, s) for t in LENGTHS for s in SEGMENTS),
    ]
    for number, job in enumerate(jobs):
        if limit.over():
            print(f"time is up: {len(jobs) - number} cases are left out")
            break
        row = job()
        record.add("timings", row)
        show(row)
        save()


if __name__ == "__main__":
    main()
