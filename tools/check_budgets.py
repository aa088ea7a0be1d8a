"""Whether what a budget is charged is what a step takes: python tools/check_budgets.py OUT.json [key=value ...].

The arguments are those of `subquad train`, for a schedule with open layers (model=auto_hybrid). For every candidate a
model of that mixer alone, and then the schedule that the budgets give, is trained for a few steps on random tokens.
Predicted: the sum of the blocks' latencies, and the memory of a step. Measured: forward and backward through all blocks
(the median of five), and the peak of allocated memory over a whole step with AdamW (CUDA only). Ratios are measured
over predicted. One model that fails does not stop the others. Record the hardware beside whatever is quoted.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from command_line import OF_TRAIN, told, words_of

from subquad import load_config
from subquad.compiler.assign_mixers import assign_mixers
from subquad.compiler.run_shapes import is_packed
from subquad.model.build import build_model
from subquad.schema import BudgetConfig, RunConfig
from subquad.training.compilation import compiled, device_of, target_of, uses_bfloat16
from subquad.training.module import summed_cross_entropy
from subquad.training.optimizers import build_optimizer


def main(out: Path, overrides: list[str]) -> None:
    asked = load_config(overrides)
    asked.model.vocab_size = asked.model.vocab_size or 256
    asked.model.context_len = asked.model.context_len or asked.trainer.seq_len
    device = device_of(asked)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "overrides": overrides,
    }
    candidates = asked.model.candidates or list(asked.model.mixers)
    for name, keys in [*((key, [key]) for key in candidates), ("chosen", candidates)]:
        config = copy.deepcopy(asked)
        config.model.candidates = keys
        if name != "chosen":
            config.budget = BudgetConfig(alternatives=0)
        try:
            results[name] = checked(config)
        except Exception as error:  # one that fails does not stop the others
            results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(name, json.dumps(results[name]), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def checked(config: RunConfig) -> dict[str, Any]:
    """Predicted and measured figures of the schedule that is chosen."""
    started = time.perf_counter()
    config, assignment = assign_mixers(config, target_of(config))
    assign_s = time.perf_counter() - started
    if assignment is None:
        raise SystemExit("the schedule has no open layers: model=auto_hybrid has")
    measured = measured_step(config)
    predicted = {name: assignment.totals[name] for name in measured}
    sources = {assignment.candidates[key].source for key in assignment.schedule}
    return {
        "schedule": list(assignment.schedule),
        "sources": sorted(sources),
        "assign_s": round(assign_s, 2),
        "predicted": predicted,
        "measured": measured,
        "ratio": {name: round(measured[name] / predicted[name], 3) for name in measured},
        "budgets": dict(assignment.budgets),
    }


def measured_step(config: RunConfig) -> dict[str, float]:
    """Seconds of forward and backward through all blocks, and on CUDA the peak of memory over a whole step.

    The schedule is closed. Random tokens, in equal documents where the run's are packed.
    """
    device = device_of(config)
    torch.manual_seed(config.seed)
    model = build_model(config.model, device=device)
    model.activation_checkpointing = config.trainer.activation_checkpointing
    packed = is_packed(config)
    model, _ = compiled(model, config, None, packed=packed)
    optimizer = build_optimizer(config.optimizer, model.parameter_groups)
    b, t = config.trainer.batch_size, config.trainer.seq_len
    tokens = torch.randint(config.model.vocab_size, (b, t), device=device)
    bounds = torch.arange(0, b * t + 1, t, dtype=torch.int32, device=device) if packed else None

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(config)):
            logits = model(tokens, bounds)
            nats, count = summed_cross_entropy(logits, tokens)
        (nats / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    def blocks() -> float:
        """Seconds of forward and backward through the blocks, without embedding, head, loss and optimizer."""
        shape = (1, b * t, config.model.d_model) if packed else (b, t, config.model.d_model)
        x = torch.randn(shape, device=device, requires_grad=True)
        _wait(device)
        begun = time.perf_counter()
        y = x
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(config)):
            for block in model.blocks:
                if model.activation_checkpointing:
                    y = torch.utils.checkpoint.checkpoint(block, y, bounds, use_reentrant=False)
                else:
                    y = block(y, bounds)
        y.sum().backward()
        _wait(device)
        model.zero_grad()
        return time.perf_counter() - begun

    for _ in range(2):
        step()
        blocks()
    measured: dict[str, float] = {"latency_s": sorted(blocks() for _ in range(5))[2]}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        _wait(device)
        measured["memory_bytes"] = torch.cuda.max_memory_allocated()
    return measured


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    (place,), words = words_of(__doc__, sys.argv[1:], "OUT.json", keys=OF_TRAIN)
    with told():
        main(Path(place), words)
