"""Each mixer as one layer on a GPU, beside the layers and the kernels of others that are installed.

    python plugins/benchmarks/mixers.py OUT.json [--limit-s 230] [--only gla retnet] [--device cuda] [--tokens 32768]

A layer has the width and the sizes of a recipe of about 340 million parameters (`RECIPES`). 32,768 tokens as 4 x 8,192
and as 16 x 2,048, inputs in bfloat16, parameters in float32 under autocast to bfloat16, as models are trained. Device
time is the sum of all kernels of a call under the profiler; `called` is the median of `triton.testing.do_bench` (L2
cleared between calls), host included; `peak_bytes` is what a forward and backward allocate beyond what was there.
Rivals: the layer of flash-linear-attention or mamba-ssm of the same sizes, and our layer around another package's
kernel. One that is absent, or fails, is a row that says so. Rows that OUT.json holds are not made again, but for those
that failed: the command goes on where its limit stopped it. It takes 4 x 8,192 of ours first, then of the rivals, then
16 x 2,048.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "kernels" / "benchmarks"))

from timing import Limit, Record, called_ms, device_parts, seconds, surviving  # noqa: E402

import subquad_kernels.operators  # noqa: E402, F401  (fills the catalogue)
from subquad import MixerContext, load_config  # noqa: E402
from subquad.compiler.capture import capture, install, operator_nodes, set_kernel  # noqa: E402
from subquad.model.build import check_mixers  # noqa: E402
from subquad_kernels.catalogue import CATALOGUE, Kernel, load_attribute  # noqa: E402

RECIPES: Mapping[str, str] = {
    "softmax_attention": "transformer_340m", "window": "scout_swa_470m", "segment_attention": "scout_mamba_430m",
    "mamba": "scout_mamba_430m", "mamba2": "mamba2_370m", "mamba3": "mamba3_440m",
    "log_linear_mamba2": "log_linear_mamba2_825m", "retnet": "retnet_340m", "gla": "gla_340m",
    "lightning": "lightning_340m", "mlstm": "mlstm_340m", "slstm": "xlstm_340m", "delta_net": "delta_net_340m",
    "gated_delta_net": "gated_delta_net_340m", "rwkv6": "rwkv6_470m", "rwkv7": "rwkv7_450m",
    "rwkv_channel_mix": "rwkv7_450m", "log_linear": "log_linear_340m", "ttt_linear": "ttt_linear_350m",
    "ttt_mlp": "ttt_mlp_350m",
}  # fmt: skip
SEQUENCES = (4, 16)
PACKAGES = {"fla-core": "fla", "mamba-ssm": "mamba_ssm", "flash-attn": "flash_attn"}
"""Distributions of rivals, and what rows call them."""
DROPPED = ("fla_recurrent", "mamba_step")
"""Kernels for one token, not for sequences."""
CALLS = 5


@dataclass(frozen=True)
class Layer:
    """What a recipe says of a mixer."""

    mixer: str
    recipe: str
    d_model: int
    num_layers: int
    config: Any
    build: str

    def make(self) -> nn.Module:
        """Ours, as the first layer of its model."""
        context = MixerContext(
            d_model=self.d_model, layer_index=0, num_layers=self.num_layers, context_len=8192, published={}
        )
        make: Any = load_attribute(self.build)
        mixer: nn.Module = make(self.config, context)
        mixer.init_parameters(0.02)  # type: ignore[operator]
        return mixer


def layer_of(mixer: str) -> Layer:
    """The mixer as its recipe has it; raises KeyError for one that stands in none."""
    model = load_config([f"model={RECIPES[mixer]}"]).model
    entry = next(entry for entry in check_mixers(model).values() if entry.spec.name == mixer)
    return Layer(mixer, RECIPES[mixer], model.d_model, model.num_layers, entry.config, entry.spec.build)


def _fla(name: str, *, fast_with: str | None = None, **sizes: Any) -> nn.Module:
    """A layer of flash-linear-attention; without the package that its fast path needs it would run a naive one."""
    layers = importlib.import_module("fla.layers")
    if fast_with is not None:
        importlib.import_module(fast_with)
    return getattr(layers, name)(**sizes)  # type: ignore[no-any-return]


def _mamba_ssm(module: str, name: str, **sizes: Any) -> nn.Module:
    return getattr(importlib.import_module(f"mamba_ssm.modules.{module}"), name)(**sizes)  # type: ignore[no-any-return]


def their_layers(layer: Layer) -> dict[str, Callable[[], nn.Module]]:
    """Layers of the same sizes, by the package that has them; each is imported when it is called."""
    d, c = layer.d_model, layer.config
    makers: dict[str, dict[str, Callable[[], nn.Module]]] = {
        "softmax_attention": {
            "fla": lambda: _fla("Attention", hidden_size=d, num_heads=c.num_heads, num_kv_heads=c.num_kv_heads or None)
        },
        "window": {
            "fla": lambda: _fla("Attention", hidden_size=d, num_heads=c.num_heads, window_size=c.window)
        },
        "retnet": {
            "fla": lambda: _fla("MultiScaleRetention", hidden_size=d, num_heads=c.num_heads, expand_v=c.expand_v)
        },
        "gla": {
            "fla": lambda: _fla(
                "GatedLinearAttention", hidden_size=d, num_heads=c.num_heads, expand_k=c.expand_k, expand_v=c.expand_v
            )
        },
        "delta_net": {"fla": lambda: _fla("DeltaNet", hidden_size=d, num_heads=c.num_heads, conv_size=c.conv_width)},
        "gated_delta_net": {
            "fla": lambda: _fla(
                "GatedDeltaNet", hidden_size=d, num_heads=c.num_heads, expand_v=c.expand_v, conv_size=c.conv_width,
                head_dim=c.key_dim or int(0.75 * d) // c.num_heads,
            )
        },
        "rwkv6": {"fla": lambda: _fla("RWKV6Attention", hidden_size=d, num_heads=c.num_heads, expand_k=1.0)},
        "rwkv7": {
            "fla": lambda: _fla(
                "RWKV7Attention", hidden_size=d, head_dim=d // c.num_heads, layer_idx=0,
                num_hidden_layers=layer.num_layers,
            )
        },
        "mamba": {
            "fla": lambda: _fla(
                "Mamba", fast_with="mamba_ssm", hidden_size=d, state_size=c.state_dim, intermediate_size=c.expand * d
            ),
            "mamba_ssm": lambda: _mamba_ssm(
                "mamba_simple", "Mamba", d_model=d, d_state=c.state_dim, d_conv=c.conv_width, expand=c.expand
            ),
        },
        "mamba2": {
            "fla": lambda: _fla(
                "Mamba2", fast_with="mamba_ssm", hidden_size=d, head_dim=c.head_dim, state_size=c.state_dim,
                expand=c.expand, n_groups=c.num_groups,
            ),
            "mamba_ssm": lambda: _mamba_ssm(
                "mamba2", "Mamba2", d_model=d, d_state=c.state_dim, headdim=c.head_dim, expand=c.expand,
                ngroups=c.num_groups,
            ),
        },
        "mamba3": {
            "fla": lambda: _fla(
                "Mamba3", fast_with="mamba_ssm", hidden_size=d, head_dim=c.head_dim, state_size=c.state_dim,
                expand=c.expand, n_groups=c.num_groups, is_mimo=c.mimo_rank > 1, mimo_rank=c.mimo_rank,
            )
        },
        "log_linear_mamba2": {
            "fla": lambda: _fla(
                "LogLinearMamba2", num_heads=c.expand * d // c.head_dim, head_dim=c.head_dim, hidden_size=d,
                state_size=c.state_dim, expand=c.expand, n_groups=c.num_groups, use_bias=False, use_conv_bias=True,
            )
        },
    }  # fmt: skip
    return makers.get(layer.mixer, {})


def their_kernels(layer: Layer) -> list[Kernel]:
    """Other packages' kernels of the operators that the mixer calls, installed or not."""
    names = {operator.name for _, operator in operator_nodes(capture(layer.make()).graphs["forward"].graph)}
    return [
        kernel
        for name in sorted(names)
        for kernel in CATALOGUE.kernels(name)
        if kernel.requires and kernel.name not in DROPPED and _package(kernel) in PACKAGES
    ]


def _package(kernel: Kernel) -> str:
    return kernel.requires[0].partition(">")[0]


def around(layer: Layer, kernel: Kernel) -> nn.Module:
    """Ours, with this kernel for its operator; raises where the kernel is not installed."""
    missing = kernel.missing()
    if missing is not None:
        raise ImportError(missing)
    mixer = layer.make()
    graphs = capture(mixer).graphs
    for node, operator in operator_nodes(graphs["forward"].graph):
        if operator.name == kernel.operator:
            set_kernel(node, kernel.name)
    graphs["forward"].recompile()
    install(mixer, graphs)
    return mixer


def contestants(layer: Layer) -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """Package, what of it, and how to make it; ours first."""
    yield "subquad", "layer", layer.make
    for package, make in their_layers(layer).items():
        yield package, "layer", make
    for kernel in their_kernels(layer):
        yield PACKAGES[_package(kernel)], kernel.key, lambda kernel=kernel: around(layer, kernel)


def measured(module: nn.Module, b: int, t: int, d_model: int, device: str) -> Iterator[tuple[str, Any]]:
    """Parameters, peak of memory and times, of the forward and of both; of a CPU what a caller waits for alone."""
    module = module.to(device)
    x = torch.randn(b, t, d_model, device=device, dtype=torch.bfloat16, requires_grad=True)
    wanted = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    yield "parameters", sum(parameter.numel() for parameter in module.parameters())

    def output() -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            y = module(x)
        return y[0] if isinstance(y, tuple) else y  # type: ignore[no-any-return]

    def forward() -> Tensor:
        with torch.no_grad():
            return output()

    pull = torch.randn_like(forward())

    def both() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(output(), wanted, pull, allow_unused=True)

    if device == "cuda":
        both()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        torch.cuda.synchronize()
        yield "peak_bytes", torch.cuda.max_memory_allocated() - before
    for name, call in (("forward", forward), ("both", both)):
        if device == "cuda":
            yield f"{name}_device_ms", sum(device_parts(call, CALLS).values())
            yield f"{name}_called_ms", called_ms(call)
        else:
            yield f"{name}_called_ms", 1e3 * seconds(call, device, 1)


def main() -> int:
    """Make the rows that are missing, best known first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit-s", type=float, default=230.0)
    parser.add_argument("--only", nargs="+", choices=[*RECIPES], default=[*RECIPES])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=32_768)
    chosen = parser.parse_args()
    limit, record = Limit(chosen.limit_s), Record.of(chosen.device, chosen.out)
    if chosen.out.is_file():
        rows = json.loads(chosen.out.read_text(encoding="utf-8"))["layers"]
        record.rows["layers"] = [row for row in rows if "failure" not in row]
    layers = [layer_of(name) for name in chosen.only]
    found = {layer.mixer: list(contestants(layer)) for layer in layers}
    done = {(row["mixer"], row["package"], row["what"], row["b"]) for row in record.rows.get("layers", ())}
    for b in SEQUENCES:
        for ours in (True, False):
            for layer in layers:
                for package, what, make in found[layer.mixer]:
                    if (package == "subquad") is not ours or (layer.mixer, package, what, b) in done:
                        continue
                    if limit.over():
                        print("time is up: run it again to go on", flush=True)
                        return 1
                    t = chosen.tokens // b
                    row: dict[str, Any] = {
                        "mixer": layer.mixer, "recipe": layer.recipe, "d_model": layer.d_model, "b": b, "t": t,
                        "package": package, "what": what,
                    }  # fmt: skip
                    with surviving(row):
                        torch.manual_seed(0)
                        for key, value in measured(make(), b, t, layer.d_model, chosen.device):
                            row[key] = value
                    record.add("layers", row)
                    shown = {key: round(value, 3) for key, value in row.items() if key.endswith("_ms")}
                    print(layer.mixer, f"{b} x {t}", package, what, shown, row.get("failure", ""), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
