"""Compile for sm_90 every Triton launch that an operator's fused kernel makes, without a GPU: python THIS OPERATOR.

Run as a script and not in the interpreter of Triton: forward and backward are called on CPU tensors in bfloat16, and
in place of each launch its kernel is compiled with the types, constants and alignments of the arguments.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.workload import Workload

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
SCAN = dict.fromkeys(("softplus", "skip", "gate", "dt_bias", "initial_state"), True)
DELTA = {"decay": "scalar", "write_gate": True, "low_rank": False, "initial_state": True}
CASES: dict[str, list[tuple[dict[str, int], dict[str, Any]]]] = {
    "selective_scan": [
        (dict(b=2, t=60, c=64, n=16), dict.fromkeys(SCAN, False) | {"gate": True}),
        (dict(b=1, t=300, c=96, n=16, documents=3), SCAN),
    ],
    "causal_conv": [
        (dict(b=2, t=300, c=128, w=4), {"activation": "none", "bias": False, "initial_state": False}),
        (dict(b=1, t=300, c=96, w=4, documents=3), {"activation": "silu", "bias": True, "initial_state": True}),
        (dict(b=1, t=300, c=96, w=1), {"activation": "silu", "bias": True, "initial_state": True}),
    ],
    "delta_rule": [
        (dict(b=1, t=300, h=2, h_k=1, n=64, p=64, documents=3), DELTA),
        (dict(b=2, t=70, h=1, h_k=1, n=32, p=48), DELTA | {"decay": "none", "write_gate": False}),
        (dict(b=2, t=1, h=2, h_k=2, n=64, p=64), DELTA),
    ],
}

LAUNCHED = {
    "selective_scan": ("_summarise", "_scan", "_summarise_gradients", "_differentiate"),
    "causal_conv": ("_convolve", "_differentiate", "_differentiate_initial"),
    "delta_rule": (
        "_tabulate",
        "_invert",
        "_scan",
        "_read",
        "_read_back",
        "_scan_back",
        "_differentiate",
        "_decode",
    ),
}


class Compiles:
    """Stands where a jitted kernel stood: a launch compiles it."""

    def __init__(self, name: str, function: Any) -> None:
        self.name, self.function = name, function

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert grid[0] > 0
        return self.launch

    def launch(self, *args: Any, num_warps: int, **constants: Any) -> None:
        values = dict(zip(self.function.arg_names, args)) | constants
        signature, constexprs, attributes = {}, {}, {}
        for index, name in enumerate(self.function.arg_names):
            value = values[name]
            if name in constants or value is None:
                signature[name], constexprs[(index,)] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name], attributes[(index,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.function, signature=signature, constexprs=constexprs, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        assert len(compiled.asm["cubin"]) > 0
        print(f"compiled {self.name}")


def main(operator: str) -> None:
    fused = importlib.import_module(f"subquad_kernels.{operator}.fused")
    definition = importlib.import_module(f"subquad_kernels.{operator}.definition")
    for name in LAUNCHED[operator]:
        setattr(fused, name, Compiles(name, getattr(fused, name)))
    for shape, options in CASES[operator]:
        case = Workload(operator=operator, shape=shape, dtype="bfloat16", options=options)
        arguments = definition.sample_inputs(case, seed=0, device="cpu")
        outputs = fused.forward(**arguments)
        fused.backward(arguments, outputs, (outputs[0], outputs[1]))


if __name__ == "__main__":
    main(sys.argv[1])
