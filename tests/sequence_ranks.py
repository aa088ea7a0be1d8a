"""One rank of several that share sequences: run as a script, it compares what it computes with the whole sequence.

    python tests/sequence_ranks.py RANK RANKS STORE_FILE RESULT_JSON [DEVICE]

Writes, for each case, the largest error of outputs and gradients on this rank relative to the largest value. A new case
is a function of `OPERATORS` or `MIXERS`; all run in one process, because starting one costs seconds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from subquad.compiler.capture import capture, install
from subquad.compiler.example import Method
from subquad.compiler.passes.split_sequence import split_sequence
from subquad.contracts import MixerContext
from subquad.parallel.operators import on_part
from subquad.parallel.part import SequencePart
from subquad.registry import load_registry
from subquad_kernels import operators as _operators  # noqa: F401 - fills the catalogue
from subquad_kernels.catalogue import load_attribute

TOKENS = 48
LAYOUTS = {"whole": None, "packed": (0, 5, 5, 16, 40, 47, 48), "packed far": (0, 14, 45, 48)}
"""Documents go over seams of 2 and 3 ranks; one begins at a seam and fills a part, one began just before a part that it
fills, one is empty."""


@dataclass(frozen=True)
class Case:
    """An operator's arguments for whole sequences; those in `parts` have the tokens as their second axis."""

    operator: str
    arguments: dict[str, Any]
    parts: tuple[str, ...]
    outputs: int = 1
    """How many of the results, the first ones, have the tokens as their second axis."""


class Draw:
    """Random arguments, the same on every rank."""

    def __init__(self, device: str) -> None:
        self._generator, self._device = torch.Generator().manual_seed(5), device

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self._device)

    def decays(self, *shape: int) -> Tensor:
        """Log decays, some near 0 and some that forget all at once."""
        return -self(*shape).exp() * 0.2

    def boundaries(self, layout: str) -> Tensor | None:
        documents = LAYOUTS[layout]
        return None if documents is None else torch.tensor(documents, dtype=torch.int32, device=self._device)


def linear_attention(draw: Draw, b: int, packed: Tensor | None, *, plain: bool = False) -> Case:
    arguments = {
        "q": draw(b, TOKENS, 2, 4), "k": draw(b, TOKENS, 2, 4), "v": draw(b, TOKENS, 4, 3),
        "log_decay": None if plain else draw.decays(b, TOKENS, 4),
        "write_gate": None if plain else draw(b, TOKENS, 4), "diagonal": None if plain else draw(b, TOKENS, 4),
        "initial_state": draw(b, 4, 4, 3) if packed is None and not plain else None,
        "cu_seqlens": packed, "scale": 0.5, "kernel": "chunked",
    }  # fmt: skip
    return Case("linear_attention", arguments, ("q", "k", "v", "log_decay", "write_gate", "diagonal"))


def constant_decay(draw: Draw, b: int, packed: Tensor | None) -> Case:
    case = linear_attention(draw, b, packed, plain=True)
    case.arguments["log_decay"] = draw.decays(4)
    return Case("linear_attention", case.arguments, ("q", "k", "v"))


def gated_linear_attention(draw: Draw, b: int, packed: Tensor | None, *, read: str = "after") -> Case:
    arguments = {
        "q": draw(b, TOKENS, 2, 4), "k": draw(b, TOKENS, 2, 4), "v": draw(b, TOKENS, 2, 3),
        "log_decay": draw.decays(b, TOKENS, 2, 4), "bonus": draw(2, 4) if read == "before" else None,
        "initial_state": draw(b, 2, 4, 3) if packed is None else None,
        "cu_seqlens": packed, "scale": 0.5, "read": read, "kernel": "chunked",
    }  # fmt: skip
    return Case("gated_linear_attention", arguments, ("q", "k", "v", "log_decay"))


def delta_rule(draw: Draw, b: int, packed: Tensor | None, *, diagonal: bool = False) -> Case:
    k = torch.nn.functional.normalize(draw(b, TOKENS, 2, 4), dim=-1)
    arguments = {
        "q": draw(b, TOKENS, 2, 4), "k": k, "v": draw(b, TOKENS, 2, 3),
        "log_decay": draw.decays(b, TOKENS, 2, 4) if diagonal else draw.decays(b, TOKENS, 2),
        "write_gate": draw(b, TOKENS, 2).sigmoid(),
        "remove": k * 1.0 if diagonal else None, "insert": -0.5 * k if diagonal else None,
        "initial_state": draw(b, 2, 4, 3) if packed is None else None,
        "cu_seqlens": packed, "scale": 0.5, "kernel": "reference" if diagonal else "chunked",
    }  # fmt: skip
    return Case("delta_rule", arguments, ("q", "k", "v", "log_decay", "write_gate", "remove", "insert"))


def selective_scan(draw: Draw, b: int, packed: Tensor | None, *, softplus: bool = True) -> Case:
    arguments = {
        "x": draw(b, TOKENS, 5), "dt": draw(b, TOKENS, 5) if softplus else draw(b, TOKENS, 5).sigmoid(),
        "A": -draw(5, 3).exp(), "B": draw(b, TOKENS, 3), "C": draw(b, TOKENS, 3), "D": draw(5), "z": draw(b, TOKENS, 5),
        "dt_bias": draw(5) if softplus else None, "initial_state": draw(b, 5, 3) if packed is None else None,
        "cu_seqlens": packed, "softplus": softplus, "reversed": False, "kernel": "chunked",
    }  # fmt: skip
    return Case("selective_scan", arguments, ("x", "dt", "B", "C", "z"))


def causal_conv(draw: Draw, b: int, packed: Tensor | None) -> Case:
    arguments = {
        "x": draw(b, TOKENS, 5), "weight": draw(5, 4), "bias": draw(5),
        "initial_state": draw(b, 3, 5) if packed is None else None,
        "cu_seqlens": packed, "activation": "silu", "kernel": "reference",
    }  # fmt: skip
    return Case("causal_conv", arguments, ("x",))


def rotary(draw: Draw, b: int, packed: Tensor | None) -> Case:
    arguments = {
        "q": draw(b, TOKENS, 2, 6), "k": draw(b, TOKENS, 1, 6), "angles": None, "cu_seqlens": packed, "position": None,
        "start": 0 if packed is not None else 7, "theta": 100.0, "kernel": "reference",
    }  # fmt: skip
    return Case("rotary", arguments, ("q", "k"), outputs=2)


def turned(draw: Draw, b: int, packed: Tensor | None) -> Case:
    arguments = {
        "q": draw(b, TOKENS, 2, 6), "k": draw(b, TOKENS, 2, 6), "angles": draw(b, TOKENS, 2, 2), "cu_seqlens": None,
        "position": None, "start": 0, "theta": 100.0, "kernel": "tables",
    }  # fmt: skip
    return Case("rotary", arguments, ("q", "k", "angles"), outputs=2)


def gated_norm(draw: Draw, b: int, packed: Tensor | None) -> Case:
    arguments = {
        "x": draw(b, TOKENS, 6), "z": draw(b, TOKENS, 6), "weight": draw(6), "bias": draw(6),
        "skip": draw(b, TOKENS, 6), "skip_weight": draw(2), "groups": 3, "gate_first": True, "norm": True,
        "centre": False, "activation": "silu", "eps": 1e-5, "kernel": "composed",
    }  # fmt: skip
    return Case("gated_norm", arguments, ("x", "z", "skip"))


def softmax_attention(draw: Draw, b: int, packed: Tensor | None, *, window: int = 0) -> Case:
    arguments = {
        "q": draw(b, TOKENS, 4, 6), "k": draw(b, TOKENS, 2, 6), "v": draw(b, TOKENS, 2, 5), "cu_seqlens": packed,
        "causal": True, "window": window, "scale": None, "kernel": "reference",
    }  # fmt: skip
    return Case("softmax_attention", arguments, ("q", "k", "v"))


def segment_attention(draw: Draw, b: int, packed: Tensor | None) -> Case:
    arguments = {
        "q": draw(b, TOKENS, 4, 6), "k": draw(b, TOKENS, 2, 6), "v": draw(b, TOKENS, 2, 5), "summary_k": None,
        "summary_v": None, "cu_seqlens": packed, "segment_len": 4, "start": 0, "scale": None, "kernel": "reference",
    }  # fmt: skip
    return Case("segment_attention", arguments, ("q", "k", "v"))


OPERATORS: dict[str, Callable[[Draw, int, Tensor | None], Case]] = {
    "linear_attention": linear_attention,
    "linear_attention, nothing decays": lambda *given: linear_attention(*given, plain=True),
    "linear_attention, constant decays": constant_decay,
    "gated_linear_attention": gated_linear_attention,
    "gated_linear_attention, read before": lambda *given: gated_linear_attention(*given, read="before"),
    "delta_rule": delta_rule,
    "delta_rule, remove and insert": lambda *given: delta_rule(*given, diagonal=True),
    "selective_scan": selective_scan,
    "selective_scan without softplus": lambda *given: selective_scan(*given, softplus=False),
    "causal_conv": causal_conv,
    "rotary": rotary,
    "rotary by given angles": turned,
    "gated_norm": gated_norm,
    "softmax_attention": softmax_attention,
    "window of 1": lambda *given: softmax_attention(*given, window=1),
    "window of 7": lambda *given: softmax_attention(*given, window=7),
    "window over three parts": lambda *given: softmax_attention(*given, window=35),
    "segment_attention": segment_attention,
}


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def compare_operator(case: Case, part: SequencePart, draw: Draw) -> float:
    """The largest relative error of outputs and gradients of this part."""
    t = TOKENS // part.count
    mine = slice(part.index * t, (part.index + 1) * t)
    whole = {
        name: value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.arguments.items()
    }
    local = {
        name: value[:, mine] if name in case.parts and value is not None else value
        for name, value in case.arguments.items()
    }
    local = {
        name: value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in local.items()
    }
    outputs = as_tuple(getattr(torch.ops.subquad, case.operator)(*whole.values()))[: case.outputs]
    found = as_tuple(on_part(part, case.operator, local))[: case.outputs]
    pulls = [draw(*y.shape) for y in outputs]
    torch.autograd.backward(list(outputs), pulls)
    torch.autograd.backward(list(found), [pull[:, mine] for pull in pulls])
    errors = [error(y[:, mine], other) for y, other in zip(outputs, found, strict=True)]
    for name, value in whole.items():
        if isinstance(value, Tensor) and value.requires_grad:
            gradient, expected = local[name].grad, value.grad
            if gradient is None:  # this part does not read it, as later ones do not read an initial state
                gradient = torch.zeros_like(local[name])
            if name in case.parts:
                expected = expected[:, mine]
            else:
                dist.all_reduce(gradient)
            errors.append(error(expected, gradient))
    return max(errors)


MIXERS: dict[str, dict[str, Any]] = {
    "delta_net": {"num_heads": 2},
    "gated_delta_net": {"num_heads": 2},
    "gla": {"num_heads": 2},
    "lightning": {"num_heads": 2},
    "mamba": {"state_dim": 3},
    "mamba2": {"head_dim": 8, "state_dim": 4},
    "mlstm": {"num_heads": 2},
    "retnet": {"num_heads": 2},
    "segment_attention": {"num_heads": 2, "segment_len": 4},
    "short_conv": {},
    "softmax_attention": {"num_heads": 2},
    "window": {"num_heads": 2, "window": 7},
}
D_MODEL = 16


def built_mixer(name: str, settings: dict[str, Any]) -> Any:
    spec = load_registry().mixers[name]
    torch.manual_seed(3)
    context = MixerContext(d_model=D_MODEL, layer_index=1, num_layers=4, context_len=TOKENS)
    mixer: Any = load_attribute(spec.build)(spec.config(**settings), context)  # type: ignore[operator]
    mixer.init_parameters(0.3)
    return mixer.double()


def compare_mixer(name: str, part: SequencePart, draw: Draw, device: str, layout: str) -> float:
    """The largest relative error of the output and of the gradients of the input's part and of all parameters."""
    whole, split = (built_mixer(name, MIXERS[name]).to(device) for _ in range(2))
    bounds = draw.boundaries(layout)
    method: Method = "forward" if bounds is None else "packed"
    install(split, {method: split_sequence(part)(capture(split).graphs[method]).graph})
    t = TOKENS // part.count
    mine = slice(part.index * t, (part.index + 1) * t)
    x = draw(2 if bounds is None else 1, TOKENS, D_MODEL).requires_grad_()
    own = x[:, mine].detach().clone().requires_grad_()
    y, found = whole(x, bounds), split(own, bounds)
    pull = draw(*y.shape)
    y.backward(pull)
    found.backward(pull[:, mine])
    errors = [error(y[:, mine], found), error(x.grad[:, mine], own.grad)]
    for expected, parameter in zip(whole.parameters(), split.parameters(), strict=True):
        dist.all_reduce(parameter.grad)
        errors.append(error(expected.grad, parameter.grad))
    return max(errors)


def error(expected: Tensor, found: Tensor) -> float:
    assert expected.shape == found.shape, f"{tuple(found.shape)}, not {tuple(expected.shape)}"
    difference = (expected.detach() - found.detach()).abs().max() / expected.detach().abs().max().clamp(min=1e-30)
    return float("inf") if difference.isnan() else float(difference)


def main(rank: int, ranks: int, store_file: str, result: str, device: str = "cpu") -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(store_file, ranks)
    if device == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device != "cpu" else "gloo", store=store, rank=rank, world_size=ranks)
    part = SequencePart(ranks)
    part.join(dist.new_group(list(range(ranks))))
    errors: dict[str, float] = {}
    for layout in LAYOUTS:
        for name, build in OPERATORS.items():
            draw = Draw(device)
            bounds = draw.boundaries(layout)
            case = build(draw, 2 if bounds is None else 1, bounds)
            errors[f"{name}, {layout}"] = compare_operator(case, part, draw)
        for name in MIXERS:
            errors[f"mixer {name}, {layout}"] = compare_mixer(name, part, Draw(device), device, layout)
    Path(result).write_text(json.dumps(errors), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
