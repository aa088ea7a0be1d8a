"""Show how an operator's time and memory grow with the sequence, up to a million tokens on one card.

    python kernels/benchmarks/growth.py OUT.json [--limit-s 60] [--only OPERATOR ...] [--tiny]

bfloat16, one sequence, 8 heads of 64 or 512 channels. Operators whose work grows with t go from 32,768 to 1,048,576
tokens, slstm_scan and ttt_scan, which launch kernels for every token or few, to 8,192; segment_attention, whose work
grows with t^2 / segment_len, to 262,144 with segments of 64 and of 10. `seconds` is one forward and backward through
the operator (the least of three, each waited for); `peak_bytes` what it allocates at most beyond its inputs; `growth`
the ratios of both to the row before, at half as many tokens. Without a GPU, or with --tiny, widths and lengths are
small, and memory is not measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import Limit, Record, Timed, seconds, surviving

import subquad_kernels.operators
from subquad_kernels.builtin import OPERATORS
from subquad_kernels.catalogue import CATALOGUE, Operator
from subquad_kernels.device_limits import device_limits
from subquad_kernels.torch_operator import default_kernels
from subquad_kernels.workload import Workload

WIDTHS = {"b": 1, "h": 8, "h_kv": 8, "h_k": 8, "k": 64, "v": 64, "n": 64, "p": 64, "c": 512, "w": 4}
VECTOR_STATE = 16
LENGTHS = tuple(32_768 << doubling for doubling in range(6))
STEPWISE = ("slstm_scan", "ttt_scan")
STEPWISE_LENGTHS = (2_048, 4_096, 8_192)
SEGMENTS = (64, 10)
SEGMENT_LENGTHS = tuple(32_768 << doubling for doubling in range(4))
TINY_LENGTHS = (64, 128, 256)


def linear_operators() -> list[Operator]:
    """Those whose work at twice the tokens is at most twice as much, a part in a hundred aside."""
    found = []
    for operator in (operator for operator in OPERATORS if operator.takes_sequences):
        case = workload(operator, 1 << 16, tiny=False)
        longer = replace(case, shape=dict(case.shape) | dict.fromkeys({"t", "s"} & set(case.shape), 1 << 17))
        if operator.work(longer).flops <= 2.02 * operator.work(case).flops:
            found.append(operator)
    return found


def workload(operator: Operator, t: int, *, tiny: bool) -> Workload:
    """A training call of t tokens."""
    case = operator.benchmarks["cuda"]
    widths = {"b": 1, "h": 1, "h_kv": 1, "h_k": 1, "c": 16} if tiny else WIDTHS
    if not tiny and "p" not in case.shape:
        widths = widths | {"n": VECTOR_STATE}
    shape = {axis: widths.get(axis, length) for axis, length in case.shape.items()}
    return replace(case, shape=shape | dict.fromkeys({"t", "s"} & set(shape), t), phase="backward")


def kernel_of(operator: Operator, case: Workload, device: str) -> str:
    """The Triton kernel where there is one for the device, else the default."""
    found = {kernel.name: kernel for kernel in CATALOGUE.kernels(operator.name)}
    wanted = ("fused", *default_kernels(operator, device))
    limits = device_limits(device)
    return next(name for name in wanted if name in found and found[name].refusal(case, limits) is None)


def measure(operator: Operator, case: Workload, device: str) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"operator": operator.name, "t": case.shape["t"], "options": dict(case.options)}
    with surviving(row):
        row["kernel"] = kernel = kernel_of(operator, case, device)
        inputs = operator.torch_half.sample_inputs(case, seed=0, device=device)
        function = getattr(subquad_kernels.operators, operator.name)

        def call(arguments: dict[str, Any]) -> Any:
            found = function(**arguments, kernel=kernel)
            return found if isinstance(found, torch.Tensor) else found[0]

        timed = Timed(call, inputs)
        row["seconds"] = seconds(timed.both, device)
        if device == "cuda":
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            timed.both()
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - held
    return row


def series(tiny: bool) -> Iterator[tuple[Operator, dict[str, Any], tuple[int, ...]]]:
    """Operators, what their options are changed to, and lengths."""
    for operator in linear_operators():
        lengths = STEPWISE_LENGTHS if operator.name in STEPWISE else LENGTHS
        yield operator, {}, TINY_LENGTHS if tiny else lengths
    for segment_len in SEGMENTS:
        operator = CATALOGUE.operator("segment_attention")
        yield operator, {"segment_len": segment_len}, TINY_LENGTHS if tiny else SEGMENT_LENGTHS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit-s", type=float, default=60.0)
    parser.add_argument("--only", nargs="*", default=None, help="names of operators; all unless given")
    parser.add_argument("--tiny", action="store_true", help="small widths and lengths, to see that it runs")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiny = options.tiny or device == "cpu"
    limit, record = Limit(options.limit_s), Record.of(device)
    print(record.device, *record.versions, sep=" | ", flush=True)
    for operator, changed, lengths in series(tiny):
        if options.only is not None and operator.name not in options.only:
            continue
        before: dict[str, Any] = {}
        for t in lengths:
            if limit.over():
                print("time is up: left out", operator.name, changed, t)
                continue
            case = workload(operator, t, tiny=tiny)
            row = measure(operator, replace(case, options=dict(case.options) | changed), device)
            measured = [name for name in ("seconds", "peak_bytes") if name in row and name in before]
            row["growth"] = {name: row[name] / before[name] for name in measured}
            record.add("growth", row)
            shown = {name: row[name] for name in ("seconds", "peak_bytes") if name in row}
            print(
                f"{operator.name:24}{row.get('kernel', ''):12}{changed!s:22}{t:>9}",
                *(f"{name} {value:.4g}" for name, value in shown.items()),
                *(f"x{value:.2f}" for value in row["growth"].values()), row.get("failure", ""), flush=True,
            )  # fmt: skip
            before = row
            record.save(options.out)
            if device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
