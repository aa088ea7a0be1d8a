"""Time one decoded token of every operator: what the device takes, beside the bytes that it cannot do without.

    python kernels/benchmarks/decode.py OUT.json [--limit-s 60] [--only OPERATOR ...] [--tiny]

bfloat16, states in float32; sequences 1, 16, 64, 256 at once; 16 heads of 64, 2048 channels, 4096 tokens before.
`us` is the time of one call through the operator, from a CUDA graph of many calls one after the other, each with
tensors of its own: `sets` of them, together more than twice the L2 cache, so that every call finds it cold. `bytes` are
those of every input and output once, `floor_us` what a copy of as many takes. `error` (one sequence) is the largest
distance of an output from the reference's. Without a GPU, or with --tiny, widths are small and calls are simply timed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Limit, Record, distance, graph_us, seconds, surviving
from torch import Tensor

import subquad_kernels.operators
from subquad_kernels.builtin import OPERATORS
from subquad_kernels.catalogue import CATALOGUE, Operator
from subquad_kernels.device_limits import device_limits
from subquad_kernels.torch_operator import default_kernels
from subquad_kernels.workload import Workload

BATCHES = (1, 16, 64, 256)
WIDTHS = {"h": 16, "h_kv": 16, "h_k": 16, "k": 64, "v": 64, "n": 64, "p": 64, "c": 2_048, "w": 4, "s": 4_096, "m": 64}
VECTOR_STATE = 16
"""Numbers of a channel's state, where states are vectors."""
MOST_SETS = 512


def workloads(operator: Operator, tiny: bool) -> Iterator[Workload]:
    """The operator's decode, at the widths of models."""
    for example in operator.examples:
        if example.phase != "decode":
            continue
        widths = {} if tiny else WIDTHS | ({} if "p" in example.shape else {"n": VECTOR_STATE})
        shape = {axis: widths.get(axis, length) for axis, length in example.shape.items()}
        if operator.name == "cached_attention" and example.options["segment_len"] == 1 and not tiny:
            shape["m"] = WIDTHS["s"]  # of all tokens, not of segments
        for b in (1, 2) if tiny else BATCHES:
            yield replace(example, shape=shape | {"b": b}, dtype="bfloat16")


def kernels(operator: Operator, case: Workload, device: str) -> list[str]:
    """The default, and the Triton kernel where that is none."""
    wanted = (*default_kernels(operator, device), "fused")
    found = {kernel.name: kernel for kernel in CATALOGUE.kernels(operator.name)}
    limits = device_limits(device)
    taken = [name for name in wanted if name in found and found[name].refusal(case, limits) is None]
    return list(dict.fromkeys([*taken[:1], *(name for name in taken if name == "fused")]))


def copy_bytes_per_s(device: str, size: int) -> float:
    """Bytes read and written a second by a copy."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, calls=10)


def own_tensors(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def tensors(results: object) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)  # type: ignore[call-overload]


def time_decode(operator: Operator, case: Workload, kernel: str, device: str, rate: float) -> dict[str, Any]:
    """One row: a kernel through the operator."""
    work = operator.work(case)
    row: dict[str, Any] = {"operator": operator.name, "kernel": kernel, "b": case.shape["b"], "shape": dict(case.shape)}
    row |= {"bytes": work.bytes_moved, "floor_us": 1e6 * work.bytes_moved / rate}
    with surviving(row), torch.no_grad():
        arguments = operator.torch_half.sample_inputs(case, seed=0, device=device)
        op = getattr(subquad_kernels.operators, operator.name)
        call = partial(op, kernel=kernel)
        if case.shape["b"] == 1:
            pairs = zip(tensors(call(**arguments)), tensors(op(**arguments, kernel="reference")))
            row["error"] = max(distance(found, expected) for found, expected in pairs)
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0
        row["sets"] = max(1, min(MOST_SETS, math.ceil(2 * l2_bytes / work.bytes_moved)))
        sets = [arguments, *(own_tensors(arguments) for _ in range(row["sets"] - 1))]
        row["us"] = graph_us([partial(call, **values) for values in sets], device)
        row["gigabytes_per_s"] = work.bytes_moved / row["us"] / 1e3
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit-s", type=float, default=60.0)
    parser.add_argument("--only", nargs="*", default=None, help="names of operators; all unless given")
    parser.add_argument("--tiny", action="store_true", help="small widths, to see that it runs")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiny = options.tiny or device == "cpu"
    limit, record = Limit(options.limit_s), Record.of(device)
    rate = copy_bytes_per_s(device, 1 << (20 if tiny else 30))
    record.add("copy", {"gigabytes_per_s": rate / 1e9})
    print(record.device, *record.versions, f"copy {rate / 1e9:.0f} GB/s", sep=" | ", flush=True)

    def report(operator: Operator, case: Workload, name: str) -> None:
        if limit.over():
            print("time is up: left out", operator.name, name, case.shape)
            return
        row = time_decode(operator, case, name, device, rate)
        record.add("decode", row)
        shown = {name: row[name] for name in ("us", "floor_us", "gigabytes_per_s", "error") if name in row}
        print(
            f"{operator.name:24}{name:18} b={row['b']:<4}",
            *(f"{name} {value:.4g}" for name, value in shown.items()), row.get("failure", ""),
            flush=True,
        )  # fmt: skip
        record.save(options.out)

    for operator in OPERATORS:
        if options.only is not None and operator.name not in options.only:
            continue
        cases = list(workloads(operator, tiny))
        for case in cases:
            for kernel in kernels(operator, case, device):
                report(operator, case, kernel)
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
