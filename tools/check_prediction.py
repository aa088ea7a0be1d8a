"""Whether a training step takes what was predicted, and what the card makes of it.

    python tools/check_prediction.py OUT.json [cells=MODEL-LENGTH,...] [key=value ...]

The arguments are those of `subquad train` and join each cell: four models at four lengths (CELLS, or those that
`cells` names). Every cell is compiled as a run would be, its step is predicted (seconds and peak memory, part by part),
and then taken on random tokens: the median of up to twenty steps after up to five, within ten seconds, the peak of
allocated memory, and on CUDA the device time of its kernels by kind of work. Ratios are measured over predicted;
`host_call_s` is what is left of a step per call, where the device waits for the host; `mfu` is the share of the data
sheet's bf16 peak that 6 FLOPs per parameter and token and the operators' own products make up. A cell that fails or
finds no memory does not stop the others. Record the hardware beside whatever is quoted.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from command_line import OF_TRAIN, refuse, told, words_of
from profile_step import group_of
from torch import nn
from torch.profiler import ProfilerActivity, profile

from subquad import load_config
from subquad.compiler.plan import Plan
from subquad.compiler.predict_step import predict_step
from subquad.compiler.run_shapes import is_packed
from subquad.model.build import build_model
from subquad.schema import RunConfig
from subquad.training.compilation import compiled, device_of, target_of, uses_bfloat16
from subquad.training.fp8 import OFF, check_fp8, convert_to_fp8
from subquad.training.module import summed_loss
from subquad.training.optimizers import build_optimizer
from subquad.training.step_clock import SKIPPED_STEPS, TIMED_STEPS
from subquad.training.utilisation import operator_flops

MODELS = ("scout_mamba_430m", "scout_swa_470m", "transformer_340m", "mamba2_370m")
BATCHES = {2048: 16, 8192: 4, 32_768: 1, 131_072: 1}
"""Sequences of a length: 32,768 tokens a step, or one sequence if that is longer, with activation checkpointing."""
CELLS = {
    f"{model}-{length}": (
        f"model={model}",
        f"trainer.seq_len={length}",
        f"trainer.batch_size={batch}",
        *(("trainer.activation_checkpointing=true",) if length == max(BATCHES) else ()),
    )
    for length, batch in BATCHES.items()
    for model in MODELS
}
PEAK_FLOPS_PER_S = 989e12
"""Dense bf16 of an H100 SXM and an H200 (NVIDIA's data sheets)."""
MOST_S = 10.0
"""Of one cell's steps; a step of 131,072 tokens takes seconds."""


def main(out: Path, overrides: list[str], cells: Sequence[str] = tuple(CELLS)) -> None:
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "overrides": overrides,
    }
    for name in cells:
        try:
            results[name] = checked([*CELLS[name], "compiler.measure_budget_s=3", *overrides])
        except Exception as error:  # one that fails does not stop the others
            results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(name, json.dumps({key: results[name][key] for key in SHOWN if key in results[name]}), flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


SHOWN = ("error", "ratio", "tokens_per_s", "mfu")


def checked(overrides: list[str]) -> dict[str, Any]:
    """Predicted and measured figures of one case."""
    config = load_config(overrides)
    config.model.vocab_size = config.model.vocab_size or 256
    config.model.context_len = config.model.context_len or config.trainer.seq_len
    device = device_of(config)
    model, plan, step = training_step(config)
    predicted = predict_step(config, target_of(config), plan)
    seconds, steps, peak_bytes = _timed(step, device)
    measured: dict[str, Any] = {"seconds": seconds, "steps": steps, "peak_bytes": peak_bytes}
    ratio = {"seconds": seconds / predicted.seconds} if predicted.seconds else {}
    if peak_bytes and predicted.peak_bytes:
        ratio["peak_bytes"] = peak_bytes / predicted.peak_bytes
    if device.type == "cuda":
        measured["groups_s"] = _device_seconds(step)
        measured["host_call_s"] = (seconds - sum(measured["groups_s"].values())) / max(1, predicted.calls)
    b, t = config.trainer.batch_size, config.trainer.seq_len
    rate = b * t / seconds
    parameters = sum(parameter.numel() for parameter in model.parameters())
    products = operator_flops(plan)
    return {
        "parameters": parameters,
        "tokens_per_s": round(rate),
        "mfu": float(f"{(6 * parameters * b * t + products) / seconds / PEAK_FLOPS_PER_S:.3g}"),
        "predicted": asdict(predicted),
        "measured": measured,
        "ratio": {name: round(value, 3) for name, value in ratio.items()},
        "kernels": {f"{choice.operator}/{choice.chosen}": choice.figure.source
                    for choice in plan.choices if choice.used and choice.figure},
    }  # fmt: skip


def training_step(config: RunConfig) -> tuple[nn.Module, Plan, Callable[[], None]]:
    """A model compiled as a run would, its plan, and a step of its optimizer on random tokens."""
    device, packed = device_of(config), is_packed(config)
    torch.manual_seed(config.seed)
    model = build_model(config.model, device=device)
    if config.trainer.fp8 != OFF:
        check_fp8(config, device)
        convert_to_fp8(model, config.trainer.fp8)
    model.activation_checkpointing = config.trainer.activation_checkpointing
    model, plan = compiled(model, config, None, packed=packed)
    if config.compile:
        model.compile()
    optimizer = build_optimizer(config.optimizer, model.parameter_groups)
    b, t = config.trainer.batch_size, config.trainer.seq_len
    tokens = torch.randint(config.model.vocab_size, (b, t), device=device)
    bounds = torch.arange(0, b * t + 1, t, dtype=torch.int32, device=device) if packed else None

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(config)):
            nats, count = summed_loss(model, tokens, bounds, tokens, how=config.trainer.loss)
        (nats / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.trainer.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return model, plan, step


def _timed(step: Callable[[], None], device: torch.device) -> tuple[float, int, int | None]:
    """The median step, each waited for, how many there were, and the peak of allocated memory."""
    cuda = device.type == "cuda"
    found: list[float] = []
    began = time.perf_counter()
    skipped = 0
    while len(found) < TIMED_STEPS and (len(found) < 3 or time.perf_counter() - began < MOST_S):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        if skipped < SKIPPED_STEPS and (skipped < 2 or started - began < MOST_S / 4):
            skipped += 1
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        else:
            found.append(time.perf_counter() - started)
    return statistics.median(found), len(found), torch.cuda.max_memory_allocated() if cuda else None


def _device_seconds(step: Callable[[], None]) -> dict[str, float]:
    """What the device works on in a step, by kind."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    groups: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        if event.self_device_time_total > 0:
            groups[group_of(event.key)] += event.self_device_time_total * 1e-6
    return dict(sorted(groups.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    (place,), words = words_of(__doc__, sys.argv[1:], "OUT.json", keys=OF_TRAIN)
    named = [word.removeprefix("cells=") for word in words if word.startswith("cells=")]
    chosen = named[0].split(",") if named else list(CELLS)
    for name in chosen:
        if name not in CELLS:
            refuse(f"no cell is called '{name}'; there are {', '.join(CELLS)}")
    rest = [word for word in words if not word.startswith("cells=")]
    with told():
        load_config([*CELLS[chosen[0]], *rest])  # else every cell would say that a key is unknown
        main(Path(place), rest, chosen)
