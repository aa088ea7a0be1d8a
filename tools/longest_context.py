"""The longest sequence that a model trains on in so much memory.

    python tools/longest_context.py OUT.json limit_gib=80 models=[scout_mamba_430m,mamba2_370m] trainer.recompute=cheap

One sequence a step, activation checkpointing, the loss in chunks, AdamW; its length doubles from `from` (131,072) until
a step finds no memory, or is predicted to take more than `most_s` (60) seconds. `limit_gib` bounds what the process may
take of the device (0: all of it). Of every length: the seconds of a step (the second of two), the peak of allocated
memory, and what both were predicted to be. Further arguments are those of `subquad train`.
Record the hardware beside whatever is quoted.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from check_prediction import MODELS, training_step
from command_line import OF_TRAIN, told, words_of

from subquad import load_config
from subquad.compiler.predict_step import predict_step
from subquad.training.compilation import target_of

DEFAULTS: dict[str, Any] = {"limit_gib": 0, "from": 131_072, "most_s": 60.0, "models": list(MODELS)}
LONG = (
    "trainer.batch_size=1", "trainer.activation_checkpointing=true", "trainer.loss=chunked", "compiler.measure=false",
    "calibrate=never",
)  # fmt: skip


def main(out: Path, asked: dict[str, Any], overrides: list[str]) -> None:
    """Write what is found of each model as soon as it is there."""
    cuda = torch.cuda.is_available()
    if asked["limit_gib"] and cuda:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, asked["limit_gib"] * 2**30 / whole))
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "asked": asked,
        "overrides": overrides,
    }
    for model in asked["models"]:
        results[model] = {}
        for t, figures in lengths(model, asked, overrides):
            results[model][t] = figures
            print(model, t, json.dumps(figures), flush=True)
            out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def lengths(model: str, asked: dict[str, Any], overrides: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each length that was tried, until the first that fails."""
    t = asked["from"]
    while True:
        try:
            figures = tried([f"model={model}", f"trainer.seq_len={t}", *LONG, *overrides], asked["most_s"])
        except Exception as error:  # out of memory among them; the next model is tried all the same
            figures = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        yield t, figures
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if "seconds" not in figures:
            return
        t *= 2


def tried(overrides: list[str], most_s: float) -> dict[str, Any]:
    """Figures of two steps; without `seconds` if they were predicted to take too long."""
    config = load_config(overrides)
    config.model.vocab_size = config.model.vocab_size or 256
    config.model.context_len = config.model.context_len or config.trainer.seq_len
    _, plan, step = training_step(config)
    predicted = predict_step(config, target_of(config), plan)
    figures: dict[str, Any] = {"predicted_s": predicted.seconds, "predicted_peak_bytes": predicted.peak_bytes}
    if predicted.seconds is not None and predicted.seconds > most_s:
        return figures | {"left_out": f"a step is predicted to take more than {most_s:g} s"}
    cuda = torch.cuda.is_available()
    for _ in range(2):
        started = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        figures["seconds"] = time.perf_counter() - started
    figures["tokens_per_s"] = round(config.trainer.seq_len / figures["seconds"])
    return figures | {"peak_bytes": torch.cuda.max_memory_allocated() if cuda else None}


def parsed(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Keys of DEFAULTS, and what is left for `load_config`."""
    asked, rest = dict(DEFAULTS), []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in DEFAULTS:
            asked[key] = yaml.safe_load(value)
        else:
            rest.append(argument)
    return asked, rest


if __name__ == "__main__":
    (place,), words = words_of(__doc__, sys.argv[1:], "OUT.json", keys=OF_TRAIN)
    settings, rest = parsed(words)
    with told():
        load_config([f"model={settings['models'][0]}", *LONG, *rest])  # else every length would say what is unknown
        main(Path(place), settings, rest)
