"""Each linear mixer on a GPU: how far it is from float64 on the CPU, and what a forward and backward take.

    python plugins/subquad-linear/benchmarks/mixers.py OUT.json [--device cuda] [--d-model 1024]

Errors: the largest difference over the largest value, outputs and every gradient, of a packed sequence. Times: the
median of ten, of 4 x 4096 tokens in bfloat16 autocast. A mixer that fails is recorded and the next one tried.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import traceback
from typing import Any

import torch
from torch import Tensor, nn

from subquad import MixerContext
from subquad.registry import load_registry
from subquad_kernels.catalogue import load_attribute

NAMES = (
    "retnet", "gla", "lightning", "mlstm", "slstm", "delta_net", "gated_delta_net", "rwkv6", "rwkv7", "log_linear",
    "log_linear_gated_delta_net", "ttt_linear", "ttt_mlp", "ttt_linear_mamba", "ttt_mlp_mamba", "mamba2", "mamba3",
    "log_linear_mamba2",
)  # fmt: skip
LENGTHS = (100, 1, 0, 411)


def build(name: str, d_model: int) -> nn.Module:
    """A mixer of a paper's shape with parameters drawn wide enough to see them."""
    spec = load_registry().mixer(name)
    torch.manual_seed(0)
    context = MixerContext(d_model=d_model, layer_index=1, num_layers=24, context_len=4096)
    make: Any = load_attribute(spec.build)
    heads = {"num_heads": d_model // 64} if name.startswith("rwkv") else {}  # the authors' width
    mixer = make(spec.config(**heads), context)
    mixer.init_parameters(0.02)
    assert isinstance(mixer, nn.Module)
    with torch.no_grad():
        for parameter in mixer.parameters():
            if not parameter.any():  # what a paper starts at zero would hide the rest
                parameter.normal_(std=0.02)
    return mixer


def results(mixer: nn.Module, x: Tensor, pull: Tensor, bounds: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of sum(y pull), by name."""
    x = x.clone().requires_grad_()
    y = mixer(x, bounds)
    names, parameters = zip(*mixer.named_parameters())
    gradients = torch.autograd.grad((y * pull).sum(), [x, *parameters])
    return {"y": y.detach(), "x": gradients[0], **dict(zip(names, gradients[1:]))}


def errors(mixer: nn.Module, device: str, d_model: int) -> dict[str, dict[str, float]]:
    """Per dtype and value, the largest difference to float64 on the CPU over the largest value there."""
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    x, pull = (torch.randn(1, sum(LENGTHS), d_model) for _ in range(2))
    exact = results(copy.deepcopy(mixer).double(), x.double(), pull.double(), bounds)
    there = copy.deepcopy(mixer).to(device)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            values = results(there, x.to(device), pull.to(device), bounds.to(device))
        found[str(dtype)] = {
            name: float((value.double().cpu() - exact[name]).abs().max() / exact[name].abs().max())
            for name, value in values.items()
        }
    return found


def milliseconds(mixer: nn.Module, device: str, d_model: int, tokens: tuple[int, int]) -> float:
    """The median of ten forwards and backwards in bfloat16 autocast, after two."""
    mixer = copy.deepcopy(mixer).to(device)
    x = torch.randn(*tokens, d_model, device=device, requires_grad=True)
    taken = []
    for _ in range(12):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            y = mixer(x)
        y.sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - start))
    return sorted(taken[2:])[5]


def main() -> None:
    """Measure every mixer and write the record after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs=2, default=(4, 4096))
    chosen = parser.parse_args()
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if chosen.device == "cuda" else chosen.device,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "tokens": list(chosen.tokens),
        "d_model": chosen.d_model,
        "mixers": {},
    }
    for name in NAMES:
        entry: dict[str, Any] = {}
        record["mixers"][name] = entry
        try:
            mixer = build(name, chosen.d_model)
            entry["errors"] = errors(mixer, chosen.device, chosen.d_model)
            entry["milliseconds"] = milliseconds(mixer, chosen.device, chosen.d_model, tuple(chosen.tokens))
        except Exception:  # whatever one mixer meets, the others are still measured
            entry["failed"] = traceback.format_exc()
        with open(chosen.out, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
        worst = {dtype: max(values.values()) for dtype, values in entry.get("errors", {}).items()}
        print(name, worst, entry.get("milliseconds"), entry.get("failed", "").splitlines()[-1:], flush=True)


if __name__ == "__main__":
    main()
