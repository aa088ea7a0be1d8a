"""Check and time the fused delta rules on a CUDA device.

    python kernels/benchmarks/delta_rule.py OUT.json [--tune [CHOICE ...]] [--limit-s 100] [--only gated kda rwkv7]
        [--skip checks timings rivals]

32,768 tokens of 16 heads (n = p = 64 or 128) in bfloat16, with decay and write gate: one decay per head (`gated`,
kernel `fused`), one per key channel (`kda`), that with `remove` and `insert` (`rwkv7`; kernel `fused_diagonal`). Device
time is the sum of all kernels of a call under the profiler; `called` is the median of `triton.testing.do_bench` (L2
cleared between calls), host included; `parts` are the kernels of one forward and backward. Rivals, fla's functions of
the same forms, are timed afterwards where fla can be imported. Nothing new begins after --limit-s seconds. With --tune,
launches that differ from the package's own in one choice or pair of them (of those whose names begin with a CHOICE, if
some are told) are compiled beside each other, held against float64 on a small size and timed; the fastest that is right
is named. The package itself keeps what each file's `launch_of` says.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timing import Limit, Record, called_ms, checks, device_parts, show_check, show_parts, surviving

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.delta_rule import fused, fused_diagonal
from subquad_kernels.delta_rule.definition import sample_inputs
from subquad_kernels.first_calls import cores
from subquad_kernels.operators import delta_rule
from subquad_kernels.self_check import judge, kernel_errors
from subquad_kernels.workload import Workload

TOKENS, HEADS = 32_768, 16
OPERATOR = CATALOGUE.operator("delta_rule")


@dataclass(frozen=True)
class Form:
    """A transition, the kernel that computes it, and what is timed: sequences and width, t = 32,768 / b."""

    kernel: str
    module: Any
    decay: str
    free: bool
    shapes: tuple[tuple[int, int], ...]


FORMS = {
    "gated": Form("fused", fused, "scalar", False, ((16, 64), (4, 64), (4, 128), (1, 64), (1, 128), (4, 32))),
    "kda": Form("fused_diagonal", fused_diagonal, "vector", False, ((16, 64), (4, 64), (4, 128), (1, 64), (1, 128))),
    "rwkv7": Form("fused_diagonal", fused_diagonal, "vector", True, ((16, 64), (4, 64), (1, 64))),
}

CHOICES: dict[str, tuple[Any, ...]] = {
    "scan_tile_p": (16, 32, 64, 128),
    "scan_warps": (1, 2, 4, 8),
    "scan_stages": (1, 2, 3, 4),
    "scan_back_stages": (1, 2, 3),
    "scan_programs": (1, 128, 256, 384, 512),
    "segment_chunks": (8, 16, 32),
    "read_tile_p": (32, 64, 128),
    "read_warps": (2, 4, 8),
    "invert_warps": (1, 2, 4),
    "differentiate_tile_p": (32, 64, 128),
    "differentiate_warps": (4, 8),
    "differentiate_together": (True, False),
}
PAIRS: tuple[dict[str, int], ...] = (
    {"scan_tile_p": 16, "scan_warps": 1},
    {"scan_tile_p": 32, "scan_warps": 2},
    {"scan_tile_p": 32, "scan_warps": 1},
    {"scan_tile_p": 128, "scan_warps": 8},
    {"scan_tile_p": 64, "scan_warps": 8},
    {"differentiate_tile_p": 128, "differentiate_warps": 8},
    {"differentiate_together": False, "differentiate_warps": 8},
    {"differentiate_together": False, "differentiate_warps": 4},
)
DIAGONAL_CHOICES: dict[str, tuple[Any, ...]] = {
    "scan_tile_p": (16, 32, 64),
    "scan_warps": (1, 2, 4, 8),
    "scan_stages": (1, 2, 3),
    "scan_programs": (1, 128, 256, 384, 512),
    "segment_chunks": (8, 16, 32),
    "tile_p": (32, 64),
    "warps": (4, 8),
}
DIAGONAL_PAIRS: tuple[dict[str, int], ...] = (
    *({"relate_tile_n": n, "relate_warps": warps} for n, warps in ((64, 8), (64, 4), (32, 8), (32, 4))),
    *(
        {"differentiate_tile_n": n, "differentiate_warps": warps}
        for n, warps in ((64, 8), (32, 8), (16, 8), (64, 4), (32, 4), (16, 4))
    ),
    *(
        {"differentiate_tile_n": n, "differentiate_warps": warps, "differentiate_registers": 128}
        for n, warps in ((64, 8), (32, 8), (16, 8), (16, 4))
    ),
)


def workload(form: Form, b: int, t: int, width: int, *, dtype: str = "bfloat16", **others: int) -> Workload:
    shape = {"b": b, "t": t, "h": HEADS, "h_k": HEADS, "n": width, "p": width} | others
    options = {"decay": form.decay, "write_gate": True, "low_rank": form.free, "initial_state": t == 1}
    return Workload(operator="delta_rule", shape=shape, dtype=dtype, phase="backward", options=options)  # type: ignore[arg-type]


def checked(form: Form) -> dict[str, Workload]:
    """Small sizes to hold against float64."""
    cases = {
        "t=509 n=p=64": workload(form, 2, 509, 64, h=2, h_k=2),
        "t=509 n=p=128 grouped": workload(form, 1, 509, 128, h=4, h_k=2),
        "t=300 n=p=64 packed": workload(form, 1, 300, 64, h=2, h_k=1, documents=6),
        "t=4201 n=p=64 cut": workload(form, 1, 4_201, 64, h=2, h_k=2),
        "t=4201 n=p=64 packed and cut": workload(form, 1, 4_201, 64, h=2, h_k=2, documents=2),
        "t=4201 n=p=128 cut": workload(form, 1, 4_201, 128, h=2, h_k=2),
        "t=4201 n=p=64 cut fp32": workload(form, 1, 4_201, 64, dtype="float32", h=2, h_k=2),
        "t=1 n=p=64": workload(form, 4, 1, 64, h=2, h_k=2),
        "t=300 n=p=64 fp16": workload(form, 1, 300, 64, dtype="float16", h=2, h_k=2),
        "t=300 n=p=64 fp32": workload(form, 1, 300, 64, dtype="float32", h=2, h_k=2),
        "t=300 n=p=128 fp32": workload(form, 1, 300, 128, dtype="float32", h=2, h_k=2),
    }
    if form.module is fused_diagonal:
        cases["t=300 n=24 p=40"] = workload(form, 1, 300, 24, p=40, h=2, h_k=2)
    return cases


class Call:
    """One call, as kernels alone and as a user makes it."""

    def __init__(self, form: Form, b: int, width: int, launch: Any = None) -> None:
        self.arguments = sample_inputs(workload(form, b, TOKENS // b, width), seed=0, device="cuda")
        self.form, self.launch = form, launch
        self.outputs = form.module.forward(launch, **self.arguments)
        self.pull = torch.randn_like(self.outputs[0])

    def forward(self) -> None:
        self.form.module.forward(self.launch, **self.arguments)

    def both(self) -> None:
        outputs = self.form.module.forward(self.launch, **self.arguments)
        self.form.module.backward(self.arguments, outputs, (self.pull, None), self.launch)

    def as_called(self) -> tuple[float, float]:
        """Forward, and forward with backward, through the operator and autograd."""
        arguments, leaves = differentiable(self.arguments)
        kernel = self.form.kernel
        with torch.no_grad():
            forward = called_ms(lambda: delta_rule(**arguments, kernel=kernel))
        both = called_ms(lambda: torch.autograd.grad(delta_rule(**arguments, kernel=kernel)[0], leaves, self.pull))
        return forward, both


def differentiable(arguments: dict[str, Any]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    wanted = ("q", "k", "v", "log_decay", "write_gate", "remove", "insert")
    names = [name for name in wanted if arguments[name] is not None]
    leaves = [arguments[name].clone().requires_grad_() for name in names]
    return arguments | dict(zip(names, leaves)), leaves


def rival(record: Record) -> bool:
    """Whether fla can be imported, and which it is."""
    row: dict[str, Any] = {"name": "fla"}
    record.add("rivals", row)
    with surviving(row):  # whatever an import of a stranger's package raises
        importlib.import_module("fla.ops.gated_delta_rule")
        row["version"] = str(importlib.import_module("fla").__version__)
    return "version" in row


def fla_result(arguments: dict[str, Any]) -> torch.Tensor:
    """The result of fla's function of the same form, differentiable by its own autograd."""
    q, k, v, decay, gate = (arguments[name] for name in ("q", "k", "v", "log_decay", "write_gate"))
    scale: float = arguments["scale"]
    if arguments["remove"] is not None:
        dplr = importlib.import_module("fla.ops.generalized_delta_rule").chunk_dplr_delta_rule
        values = (gate.unsqueeze(-1) * v).to(v.dtype)
        return dplr(q, k, values, arguments["remove"], arguments["insert"], decay, scale=scale)[0]  # type: ignore[no-any-return]
    if decay.dim() == 4:
        return importlib.import_module("fla.ops.kda").chunk_kda(q, k, v, decay, gate, scale=scale)[0]  # type: ignore[no-any-return]
    gated = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    return gated(q, k, v, decay, gate, scale=scale)[0]  # type: ignore[no-any-return]


def time_rival(call: Call) -> dict[str, Any]:
    arguments, leaves = differentiable(call.arguments)

    def forward() -> torch.Tensor:
        return fla_result(arguments)

    row: dict[str, Any] = {}
    for name, run in (("forward", forward), ("both", lambda: torch.autograd.grad(forward(), leaves, call.pull))):
        failed: dict[str, Any] = {}
        with surviving(failed):  # fla refuses its backward under some versions of triton
            row[f"{name}_ms"] = sum(device_parts(run).values())
            row[f"{name}_called_ms"] = called_ms(run)
        row |= {f"{name}_{key}": value for key, value in failed.items()}
    return row


def time_all(record: Record, forms: Sequence[str], over: Callable[[], bool]) -> None:
    for name, b, width in ((each, *shape) for each in forms for shape in FORMS[each].shapes):
        if over():
            print("time is up: the rest is not timed")
            return
        row: dict[str, Any] = {"form": name, "b": b, "t": TOKENS // b, "n": width, "p": width}
        record.add("timings", row)
        with surviving(row):
            call = Call(FORMS[name], b, width)
            row["launch"] = asdict(FORMS[name].module.launch_of(width, 2))
            row["forward_ms"] = sum(device_parts(call.forward).values())
            row["parts"] = device_parts(call.both)
            row["both_ms"] = sum(row["parts"].values())
            row["forward_called_ms"], row["both_called_ms"] = call.as_called()
        print(name, {part: round(value, 3) for part, value in row.items() if isinstance(value, (int, float))})
        print("     ", row.get("failure", ""))
        show_parts(row.get("parts", {}), most=12)


def time_rivals(record: Record, over: Callable[[], bool]) -> None:
    """Last, as what tunes itself takes its time."""
    if not rival(record):
        return
    for row in record.rows.get("timings", ()):
        if over():
            print("time is up: the rest of the rivals is not timed")
            return
        found: dict[str, Any] = {}
        with surviving(found):
            found |= time_rival(Call(FORMS[row["form"]], row["b"], row["n"]))
        row["fla"] = found
        print(f"{row['form']} b={row['b']} n={row['n']} fla:", found, flush=True)


def launches(form: Form, base: Any, wanted: Sequence[str]) -> dict[Any, dict[str, Any]]:
    """The package's launch and those one choice or pair away from it, each with what differs."""
    diagonal = form.module is fused_diagonal
    single = [{name: value} for name, values in (DIAGONAL_CHOICES if diagonal else CHOICES).items() for value in values]
    tried = [*single, *(DIAGONAL_PAIRS if diagonal else PAIRS)]
    if wanted:
        tried = [each for each in tried if all(name.startswith(tuple(wanted)) for name in each)]
    found = [base, *(replace(base, **each) for each in tried)]
    return {each: {k: v for k, v in asdict(each).items() if v != getattr(base, k)} for each in found}


def judged(form: Form, width: int, launch: Any) -> str:
    """What is wrong with a launch's results, or nothing; whatever it raises is wrong as well."""
    kernel = replace(CATALOGUE.kernel("delta_rule", form.kernel))
    kernel.__dict__["torch_half"] = SimpleNamespace(
        forward=lambda **arguments: form.module.forward(launch, **arguments),
        backward=lambda *values: form.module.backward(*values, launch),
    )
    case = workload(form, 1, 130, width, h=2, h_k=2)
    arguments = sample_inputs(case, seed=0, device="cuda")
    arguments["log_decay"][:, :, 1] *= 100  # one head's decays are ordinary, the other's violent
    try:
        errors = kernel_errors(OPERATOR, kernel, arguments, gradients=True)
        verdict = judge(OPERATOR, kernel, case, errors)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "" if verdict.passed else verdict.reason


def tune(record: Record, forms: Sequence[str], wanted: Sequence[str], over: Callable[[], bool]) -> None:
    """Forward and forward with backward, device time, of launches near the package's, and which are wrong."""
    jobs = [
        (name, b, width, launch, changed)
        for shape in range(1, 5)
        for name in forms
        for b, width in FORMS[name].shapes[shape : shape + 1]
        for launch, changed in launches(FORMS[name], FORMS[name].module.launch_of(width, 2), wanted).items()
    ]
    small = dict.fromkeys((name, width, launch) for name, _, width, launch, _ in jobs)
    package = dict.fromkeys((name, width, launch) for name, _, width, launch, changed in jobs if not changed)
    wrong: dict[tuple[str, int, Any], str] = {}
    with ThreadPoolExecutor(cores()) as pool:  # compilation leaves Python's lock to others
        # The package's own first: the others compile what differs, and find the rest.
        for part in (list(package), [job for job in small if job not in package]):
            wrong |= zip(part, pool.map(lambda job: judged(FORMS[job[0]], job[1], job[2]), part), strict=True)
    best: dict[tuple[str, int, int], tuple[float, dict[str, Any]]] = {}
    for name, b, width, launch, changed in jobs:
        if over():
            print("time is up: the rest is not tuned")
            break
        row: dict[str, Any] = {"form": name, "b": b, "width": width, "changed": changed}
        row["wrong"] = wrong[name, width, launch]
        with surviving(row):
            call = Call(FORMS[name], b, width, launch)
            row["forward_ms"] = sum(device_parts(call.forward).values())
            row["parts"] = device_parts(call.both)
            row["both_ms"] = sum(row["parts"].values())
            if not row["wrong"]:
                best[name, b, width] = min(best.get((name, b, width), (math.inf, {})), (row["both_ms"], changed),
                                           key=lambda timed: timed[0])  # fmt: skip
        shown = (f"{row[part]:8.3f}" for part in ("forward_ms", "both_ms") if part in row)
        parts = {part: round(ms, 3) for part, ms in row.get("parts", {}).items() if part in ("relate", "differentiate")}
        print(f"{name} b={b} n={width}", *shown, changed, parts, row["wrong"], row.get("failure", "")[:90], flush=True)
        record.add("tuning", row)
    for shape, fastest in best.items():
        print("fastest:", *shape, *fastest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tune", nargs="*", metavar="CHOICE")
    parser.add_argument("--skip", nargs="+", choices=("checks", "timings", "rivals"), default=[])
    parser.add_argument("--limit-s", type=float, default=100.0)
    parser.add_argument("--only", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args()
    limit, record = Limit(options.limit_s), Record.of("cuda", options.out)
    try:
        for form in (FORMS[name] for name in options.only if "checks" not in options.skip):
            for row in checks(OPERATOR, CATALOGUE.kernel("delta_rule", form.kernel), checked(form), "cuda"):
                record.add("checks", row | {"kernel": form.kernel, "decay": form.decay, "free": form.free})
                show_check(row)
                if limit.over():
                    print("time is up: the rest is not checked")
                    break
        if "timings" not in options.skip:
            time_all(record, options.only, limit.over)
        if "rivals" not in options.skip:
            time_rivals(record, limit.over)
        if options.tune is not None:
            tune(record, options.only, options.tune, limit.over)
    finally:
        record.save(options.out)


if __name__ == "__main__":
    main()
