"""Whether ranks train as one device does, how well they scale, and how a run ends when one dies.

    python tools/check_ranks.py OUT.json losses|throughput|faults|all [key=value ...]

losses      a small model at an equal global batch on one device and on two (DDP, FSDP, and each sequence shared by
            both), float32 and bfloat16: the largest relative difference of a step's loss and of its gradient norm from
            the one device's.
throughput  model=scout_mamba_430m, 32,768 tokens per device and step, of 2,048 and of 8,192: tokens/s, scaling
            efficiency (tokens/s of two devices over twice that of one), peak of allocated memory of rank 0.
faults      rank 1 is killed in mid-run: seconds until rank 0 has ended, and with which words.

Further arguments are those of `subquad train`, for all runs. With trainer.precision=float32 or bfloat16 losses are of
that one alone; with trainer.accelerator=cpu everything runs over gloo on tiny models. Every figure is written as soon
as it is there; a run that fails does not stop the others.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast, which not every host lends
os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from command_line import OF_TRAIN, refuse, told, words_of

from subquad import load_config
from subquad.training.fit import train
from subquad.training.metrics import read_metrics
from subquad.training.run_folder import RunFolder, read_json

Overrides = list[str]
Record = Callable[[str, dict[str, Any]], None]

PARTS = ("losses", "throughput", "faults")
WAYS = {
    "one device": [],
    "ddp": ["trainer.devices=2", "trainer.strategy=ddp"],
    "fsdp": ["trainer.devices=2", "trainer.strategy=fsdp"],
}
SHARED = ["trainer.devices=2", "trainer.context_parallel=2"]
PRECISION = "trainer.precision"
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}
"""Relative, of a step's loss: gradients are summed in another order, in bfloat16 after rounding to 8 bits."""
COMMON = [
    "compiler.measure=false", "calibrate=never", "trainer.progress_bar=false", "tracking=none", "checkpoint.keep=1",
]  # fmt: skip
EVERY_ROW_PREDICTS_EQUALLY = ["data=synthetic", "data.vocab_size=256", "data.sizes=[8]"]
"""So that a mean of two ranks' means is the mean of all."""
TOKENS_PER_DEVICE = 32_768
SMALL = ["model=scout_mamba", "model.d_model=32", "model.num_layers=2", "model.channel_mixer.d_hidden=48"]
"""For a dry run."""
BOUND_S = 90.0
"""Within which a run must have ended after one of its ranks was killed."""


def main(out: Path, part: str, overrides: Overrides) -> None:
    results: dict[str, Any] = {
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%d"),
        "overrides": overrides,
    }

    def record(name: str, figures: dict[str, Any]) -> None:
        results.setdefault(name.split("/")[0], {})[name.partition("/")[2]] = figures
        print(name, json.dumps(figures), flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    chosen = PARTS if part == "all" else (part,)
    if "losses" in chosen:
        check_losses(record, overrides)
    if "throughput" in chosen:
        check_throughput(record, overrides)
    if "faults" in chosen:
        check_faults(record, overrides)


def check_losses(record: Record, overrides: Overrides) -> None:
    """Two devices of four rows, one of eight, and two that share the rows of eight, in steps of the same samples."""
    settings = [
        *(SMALL if on_cpu(overrides) else ["model=scout_mamba"]), "trainer.seq_len=320", "trainer.max_steps=20",
        "trainer.log_every_n_steps=1", "trainer.validate_every_n_steps=0", *EVERY_ROW_PREDICTS_EQUALLY,
    ]  # fmt: skip
    asked_precisions = [value for key, _, value in (text.partition("=") for text in overrides) if key == PRECISION]
    for precision in asked_precisions or TOLERANCES:
        tolerance = TOLERANCES[precision]
        alone: list[dict[str, float]] = []
        for way, asked in {"one device": [], "context parallel": SHARED, **WAYS}.items():
            rows = "trainer.batch_size=4" if way in ("ddp", "fsdp") else "trainer.batch_size=8"
            run = [*settings, f"{PRECISION}={precision}", rows, *asked, *overrides]
            name = f"losses/{precision}, {way}"
            try:
                with finished_run(run) as folder:
                    metrics = read_metrics(folder.metrics)
            except Exception as error:  # one that fails does not stop the others
                record(name, failed(error))
                continue
            alone = alone or metrics
            figures: dict[str, Any] = {"first": metrics[0]["train/loss"], "last": metrics[-1]["train/loss"]}
            if way != "one device":
                worst = largest_difference(metrics, alone, "train/loss")
                norms = largest_difference(metrics, alone, "gradient_norm")
                figures |= {"loss": worst, "gradient_norm": norms, "tolerance": tolerance, "within": worst <= tolerance}
            record(name, figures)


def check_throughput(record: Record, overrides: Overrides) -> None:
    """The median step of each way, after five that are not counted."""
    tiny = on_cpu(overrides)
    for seq_len in (64, 128) if tiny else (2048, 8192):
        batch_size = (256 if tiny else TOKENS_PER_DEVICE) // seq_len
        alone: float | None = None
        for way, asked in WAYS.items():
            run = [
                *(SMALL if tiny else ["model=scout_mamba_430m"]), f"trainer.seq_len={seq_len}",
                f"trainer.batch_size={batch_size}", "trainer.max_steps=20", "trainer.validate_every_n_steps=0",
                "trainer.validation_batches=1", *asked, *overrides,
            ]  # fmt: skip
            name = f"throughput/{seq_len} tokens, {way}"
            try:
                with finished_run(run) as folder:
                    measured = read_json(folder.prediction)["measured"]
            except Exception as error:  # one that fails does not stop the others
                record(name, failed(error))
                continue
            devices = 1 if way == "one device" else 2
            rate = devices * batch_size * seq_len / measured["seconds"]
            alone = alone or rate
            record(
                name,
                {
                    "tokens_per_s": round(rate),
                    "step_s": measured["seconds"],
                    "steps": measured["steps"],
                    "peak_gib": None if measured["peak_bytes"] is None else measured["peak_bytes"] / 2**30,
                    "efficiency": rate / (devices * alone),
                },
            )


def check_faults(record: Record, overrides: Overrides) -> None:
    """Kill rank 1 once the fifth step is recorded."""
    tiny = on_cpu(overrides)
    for way in ("ddp", "fsdp"):
        with tempfile.TemporaryDirectory() as place:
            folder = RunFolder(Path(place) / "run")
            settings = [
                *(SMALL if tiny else ["model=scout_mamba"]), *EVERY_ROW_PREDICTS_EQUALLY, "trainer.max_steps=100000",
                "trainer.log_every_n_steps=1", *WAYS[way], *COMMON, *overrides, f"run_dir={folder.path}",
            ]  # fmt: skip
            command = [sys.executable, "-m", "subquad", "train", *settings]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            try:
                while process.poll() is None and steps_of(folder) < 5:
                    time.sleep(0.05)
                for rank in worker_processes(folder):
                    os.kill(rank, signal.SIGKILL)
                began = time.monotonic()
                _, err = process.communicate(timeout=BOUND_S)
                seconds = time.monotonic() - began
                record(
                    f"faults/{way}",
                    {
                        "seconds": seconds,
                        "exit_code": process.returncode,
                        "named": "rank 1 was killed by SIGKILL" in err,
                        "left": len(worker_processes(folder)),
                        "stderr": err[-1500:],
                    },
                )
            except subprocess.TimeoutExpired as error:
                record(f"faults/{way}", failed(error))
            finally:
                process.kill()
                process.communicate()


@contextmanager
def finished_run(overrides: Overrides) -> Iterator[RunFolder]:
    """Train in a folder that is removed afterwards."""
    place = Path(tempfile.mkdtemp())
    try:
        yield RunFolder(train(load_config([*COMMON, *overrides, f"run_dir={place / 'run'}"])).run_dir)
    finally:
        shutil.rmtree(place)
        gc.collect()
        torch.cuda.empty_cache()


def on_cpu(overrides: Overrides) -> bool:
    """Whether this is a dry run."""
    return "trainer.accelerator=cpu" in overrides


def largest_difference(some: list[dict[str, float]], others: list[dict[str, float]], name: str) -> float:
    """Of any step, relative to the other run's figure."""
    pairs = [(one[name], other[name]) for one, other in zip(some, others, strict=True)]
    return max(abs(one - other) / abs(other) for one, other in pairs)


def failed(error: Exception) -> dict[str, Any]:
    """What is recorded of a run that gave no figures."""
    return {"error": f"{type(error).__name__}: {error}"[:600]}


def steps_of(folder: RunFolder) -> int:
    """Steps that the run has recorded."""
    return len(read_metrics(folder.metrics)) if folder.metrics.exists() else 0


def worker_processes(folder: RunFolder) -> list[int]:
    """The ranks above 0 of the run in that folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if b"subquad.training.worker" in command and str(folder.path).encode() in command:
            found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    (place, part), words = words_of(__doc__, sys.argv[1:], "OUT.json", " | ".join((*PARTS, "all")), keys=OF_TRAIN)
    if part not in (*PARTS, "all"):
        refuse(f"no part is called '{part}'; there are {', '.join(PARTS)} and all")
    with told():
        load_config([*SMALL, *words])  # else every run would say that a key is unknown
        main(Path(place), part, words)
