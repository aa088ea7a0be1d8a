"""Compile ahead of time what a kernel's calls launch, without a GPU, and print what each launch takes of the device.

    python kernels/tests/compile_launches.py OPERATOR KERNEL TARGET,... [--sample | --all | --widths TYPE]

Run as a script and not in the interpreter of Triton: forward and backward are called on CPU tensors, and what they
launch is collected (`compile_processes`) and compiled. One JSON line a launch: registers a thread, bytes of memory a
thread that registers spilled to, bytes of shared memory a program, for Hopper the instructions that read a register
which was never set (`unset_registers`), for Blackwell columns of tensor memory a program (more than the 512 there are:
a trap was compiled instead); and what it takes to compile: seconds of CPU, ptxas included (none to speak of where
Triton's folder holds it: TRITON_CACHE_DIR=$(mktemp -d)), and how many products, accesses by tensors of pointers and
scans Triton began with. The calls are those of a training step in bfloat16, for every example of the operator;
with --sample for one that is packed and one of a single token, with --all every case, in float32 as well. With --widths
they are those of a step in that type, packed and not, at every pair of widths of keys and values (--pairs N,P ...: of
these). --heads H,H_K stand for the examples' numbers of heads of values and of
keys. --packed leaves out steps that are not, --launch NAME all other launches.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from unset_registers import unset_registers

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE, Kernel, Operator
from subquad_kernels.compile_processes import collecting
from subquad_kernels.workload import DeviceLimits, DType, Workload

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SIZES = {"t": 4_200, "s": 4_200, "k": 64, "v": 64, "c": 96, "n": 16}
"""Widths of models instead of those of the operators' examples, which are for quick checks; lengths that are cut."""
WIDTHS = (16, 32, 64, 128, 256)
"""Of keys and values: what a tile in shared memory may measure."""


def cases(operator: Operator, everything: bool) -> Iterator[Workload]:
    """The operator's examples at the widths of models; with `everything` also other widths and float32."""
    steps = any(example.phase != "decode" for example in operator.examples)
    for example in operator.examples:
        decode = example.phase == "decode"
        if example.dtype != "float32" or (decode and steps and not everything):
            continue
        sizes = {axis: size for axis, size in SIZES.items() if not (decode and axis in ("t", "s"))}
        if "p" in example.shape:  # a state of matrices has wider keys than one of vectors
            sizes |= {"n": 64, "p": 64}
        shape = {axis: sizes.get(axis, length) for axis, length in example.shape.items()}
        yield replace(example, shape=shape, dtype="bfloat16")
        if everything:
            yield replace(example, shape=shape)
            if "k" in shape:
                for width in (32, 128, 256):
                    yield replace(example, shape=shape | {"k": width, "v": width}, dtype="bfloat16")
                yield replace(example, shape=shape | {"k": 48, "v": 128}, dtype="bfloat16")
            elif "p" in shape:
                for n, p in ((32, 32), (128, 64), (128, 128)):
                    yield replace(example, shape=shape | {"n": n, "p": p}, dtype="bfloat16")
            elif "n" in shape:
                yield replace(example, shape=shape | {"n": 64}, dtype="bfloat16")


def sample(supported: list[Workload]) -> list[Workload]:
    """The first packed case and the first of one token, or the first of all where neither is."""
    packed = [case for case in supported if "documents" in case.shape]
    decodes = [case for case in supported if case.phase == "decode"]
    return [*packed[:1], *decodes[:1]] or supported[:1]


def of_widths(supported: list[Workload], dtype: DType, pairs: list[tuple[int, int]]) -> Iterator[Workload]:
    """The first training step, packed and not, at each pair of widths of keys and values."""
    first = next(case for case in supported if case.phase != "decode" and "documents" not in case.shape)
    for n, p in pairs:
        shape = first.shape | {"n": n, "p": p}  # type: ignore[operator]
        yield replace(first, shape=shape, dtype=dtype)
        yield replace(first, shape=shape | {"b": 1, "documents": 4}, dtype=dtype)


class Device:
    """A driver of triton that only says which it is: launches are collected for its target."""

    def __init__(self, target: str) -> None:
        self.get_current_target = lambda: TARGETS[target]
        self.get_current_device = lambda: list(TARGETS).index(target)
        self.get_current_stream = lambda device: 0


class Compiled:
    """What was compiled for a target, once for every kernel and signature."""

    def __init__(self, target: str, launch: str | None) -> None:
        self._target, self._only, self._seen = target, launch, set[str]()

    def case(self, case: str, call: Callable[[], object]) -> None:
        """Compile what a call launches that no case before it has."""
        driver.set_active(Device(self._target))
        with collecting() as collection:
            call()
        for wanted in collection.wanted:
            if self._only in (None, wanted.kernel) and wanted.key not in self._seen:
                self._seen.add(wanted.key)
                found = {"kernel": wanted.kernel, "target": self._target, "case": case}
                try:
                    began = processor_seconds()
                    kernel = wanted.compile()
                    found |= {"compile_s": round(processor_seconds() - began, 2)} | operations(kernel.asm["ttir"])
                    print(json.dumps(found | resources(kernel, self._target)), flush=True)
                except Exception as error:  # reported, and the rest is compiled all the same
                    print(json.dumps(found | {"failure": f"{type(error).__name__}: {error}"[:500]}), flush=True)


def processor_seconds() -> float:
    """Of this process and those that it ended: ptxas is one."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def operations(ttir: str) -> dict[str, int]:
    """What Triton's passes look from at all that it is connected with, and what is long in machine code."""
    counts = {"dots": r"tt\.dot\b", "accesses": r"tt\.(?:load|store) .*tensor<", "scans": r'"tt\.scan"'}
    return {name: len(re.findall(pattern, ttir)) for name, pattern in counts.items()}


def resources(compiled: Any, target: str) -> dict[str, Any]:
    """Registers, spilled bytes and memory on chip of a compiled kernel, and its instructions for matrix products."""
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spilled = (_number(rf"\.{name}:\s+", text) for name in ("vgpr_count", "vgpr_spill_count"))
        products = text.count("v_mfma_")
        return {"registers": registers, "spilled": 4 * spilled, "shared": shared, "products": products}
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    products = len(re.findall(r"mma\.sync|mma_async|tcgen05\.mma", compiled.asm["ptx"]))
    registers, spilled = (_number(name, usage) for name in ("REG:", "STACK:"))
    found: dict[str, Any] = {"registers": registers, "spilled": spilled, "shared": shared, "products": products}
    if target == "sm_90":
        found["unset"] = unset_registers(sass)
    elif target == "sm_100":
        found["tensor_memory"] = compiled.metadata.tmem_size
    return found


def _number(before: str, text: str) -> int:
    found = re.search(rf"{before}(\d+)", text)
    assert found is not None
    return int(found[1])


def pair(text: str) -> tuple[int, int]:
    n, p = map(int, text.split(","))
    return n, p


def step(operator: Operator, kernel: Kernel, case: Workload) -> None:
    """A forward, and a backward with the gradient of every output."""
    arguments = operator.torch_half.sample_inputs(case, seed=0, device="cpu")
    outputs = kernel.torch_half.forward(**arguments)
    if case.phase != "decode":
        pulls = tuple(torch.zeros_like(output) for output in outputs[: len(operator.outputs)])
        kernel.torch_half.backward(arguments, outputs, pulls)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile ahead of time what a kernel's calls launch.")
    parser.add_argument("operator")
    parser.add_argument("kernel")
    parser.add_argument("targets", type=lambda text: text.split(","))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sample", action="store_true")
    which.add_argument("--all", action="store_true")
    which.add_argument("--widths", metavar="TYPE")
    parser.add_argument("--pairs", metavar="N,P", type=pair, nargs="+", default=list(product(WIDTHS, WIDTHS)))
    parser.add_argument("--heads", metavar="H,H_K", type=pair)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--launch", metavar="NAME")
    told = parser.parse_args()
    operator, kernel = CATALOGUE.operator(told.operator), CATALOGUE.kernel(told.operator, told.kernel)
    if any(TARGETS[name].backend == "hip" for name in told.targets):
        assert all(TARGETS[name].backend == "hip" for name in told.targets), "the targets of one run are of one vendor"
        torch.version.hip = "ahead of time"  # what launches ask for the vendor
    for target in told.targets:
        compiled = Compiled(target, told.launch)
        for case in chosen(operator, kernel, target, told):
            if told.heads is not None:
                case = replace(case, shape=case.shape | dict(zip(("h", "h_k"), told.heads)))  # type: ignore[operator]
            if told.packed and "documents" not in case.shape:
                continue
            compiled.case(f"{case.dtype} {case.phase} {dict(case.shape)}", partial(step, operator, kernel, case))


def chosen(operator: Operator, kernel: Kernel, target: str, told: argparse.Namespace) -> list[Workload]:
    """The cases that are asked for, of those that the kernel supports there; where nothing is known, as on Hopper."""
    there = DeviceLimits(kind="cuda", name="any", capability=(10, 0) if target == "sm_100" else (9, 0))

    def supported(some: Iterable[Workload]) -> list[Workload]:
        return [case for case in some if kernel.supports(case, there) is None]

    found = supported(cases(operator, told.all))
    if told.sample:
        return sample(found)
    return supported(of_widths(found, told.widths, told.pairs)) if told.widths else found


if __name__ == "__main__":
    main()
