"""One cell of `quality_cells.py` after another, by the functions that `subquad train` and `evaluate` call.

A request is a line of JSON on stdin, its answer a line on stdout; what training prints goes to stderr. After a cell
that failed the process ends, as a device may be in no state to go on: `quality_run.py` starts another.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from command_line import words_of
from quality_cells import SETTINGS, SIZES, Cell, overrides

from subquad import Example, build_model, compile_model, load_config, train
from subquad.compiler.options import CompileOptions
from subquad.model.cuda_graph import cuda_graphs
from subquad.model.decoder import Decoder
from subquad.model.model_carry import carry_bytes
from subquad.schema import EvaluateConfig, RunConfig
from subquad.training.checkpoint import newest_checkpoint
from subquad.training.compilation import compiled, device_of, target_of, uses_bfloat16
from subquad.training.evaluation.evaluate import evaluate
from subquad.training.module import summed_cross_entropy
from subquad.training.optimizers import build_optimizer
from subquad.training.run_folder import RunFolder

VOCAB_SIZE = 256
"""Bytes, and the symbols of the task."""
STEP = 4
"""Widths are multiples of it: rows of 16 bytes."""
TIMED_SHAPES = ((8, 1024), (1, 16384))
"""Sequences and tokens of the training steps, and of the prefills behind which decoding is timed."""
DECODED = 64
"""Tokens."""
PIECE = 2048
"""Tokens that are prefilled together, as `generate` does."""
SAMPLES = 512
"""Rows of the task at each size."""
CONTEXTS = (1024, 2048, 4096, 8192, 16384)
"""At which long rows of text are judged."""

Record = dict[str, Any]


def main() -> int:
    """Answer requests until there are none, or one fails."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            answer = answered(json.loads(line))
        except Exception as error:  # whatever one cell meets, the others are still made
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if "failed" in answer:
            return 1
    return 0


def answered(request: Record) -> Record:
    """What came of a cell: its figures, and the command that repeats it."""
    cell = Cell(**request["cell"])
    width = fitting_width(cell)
    words = [*overrides(cell, width), f"trainer.accelerator={request['accelerator']}"]
    config = load_config(words)
    common = {
        "parameters": parameters(config),
        "width": width,
        "command": shlex.join(["python", "-m", "subquad", "train", *words]),
        "device": torch.cuda.get_device_name() if device_of(config).type == "cuda" else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if cell.task == "speed":
        return common | {"made_steps": cell.steps, "speed": [speed(config, *shape) for shape in TIMED_SHAPES]}
    config.trainer.max_seconds = request["max_seconds"]
    begun = newest_checkpoint(RunFolder(Path(request["run_dir"])).checkpoints)
    if begun is None:
        config.run_dir = request["run_dir"]
    else:  # the budget cut it short, and its folder was kept
        config.resume = request["run_dir"]
        config.trainer.max_seconds += begun.trainer_outline()["seconds"]
    result = train(config)
    record = common | {
        "kernels": kernels_of(request["run_dir"]),
        "made_steps": result.step,
        "validation_loss": result.validation_loss,
        "bits_per_byte": result.validation_bits_per_byte,
        "tokens_per_s": result.tokens_per_s,
        "carry_bytes": carry_after(config, config.trainer.seq_len),
    }
    return record | judged(cell, request["run_dir"])


def judged(cell: Cell, run_dir: str) -> Record:
    """Accuracy by size on rows that training never draws; for long rows of text, bits per byte by context."""
    if cell.task == "mqar":
        _, _, found = evaluate(EvaluateConfig(run=run_dir, suite="mqar", sizes=list(SIZES), samples=SAMPLES))
        levels: Any = found["levels"]
        return {
            "accuracy": {str(level["size"]): level["accuracy"] for level in levels},
            "row_guess": {str(level["size"]): level["row_guess"] for level in levels},
        }
    if cell.study != "mixers":
        _, _, found = evaluate(EvaluateConfig(run=run_dir, suite="text", lengths=lengths_of(cell)))
        lengths: Any = found["by_length"]
        return {"bits_per_byte_at": {str(row["length"]): row["bits_per_byte"] for row in lengths}}
    return {}


def kernels_of(run_dir: str) -> dict[str, dict[str, str]]:
    """The kernels that a run called, and why what failed on this device was left out: what its speed is read with."""
    choices = [choice for choice in json.loads((Path(run_dir) / "plan.json").read_text())["choices"] if choice["used"]]
    return {
        "called": {choice["operator"]: choice["chosen"] for choice in choices},
        "failed": {
            f"{choice['operator']}/{name}": reason
            for choice in choices
            for name, reason in choice["declined"].items()
            if "failed" in reason
        },
    }


def lengths_of(cell: Cell) -> list[int]:
    """Those of `evaluate`, where rows are no longer than the shortest context."""
    longest = cell.setting.seq_len
    return [length for length in CONTEXTS if length <= longest] if longest > CONTEXTS[0] else []


def fitting_width(cell: Cell) -> int:
    """The width that brings the model closest to its setting's number of parameters, which grow linearly with it."""
    config = load_config(overrides(cell, STEP))
    low = parameters(config)
    if config.model.channel_mixer is None:
        config.model.mixers["shift"]["d_hidden"] += STEP
    else:
        config.model.channel_mixer.d_hidden += STEP
    high = parameters(config)
    wanted = SETTINGS[cell.study, cell.task].parameters
    return STEP * max(1, 1 + round((wanted - low) / (high - low)))


def parameters(config: RunConfig) -> int:
    return sum(parameter.numel() for parameter in build_model(sized(config).model, device="meta").parameters())


def sized(config: RunConfig) -> RunConfig:
    """The configuration with the sizes that it leaves to the data."""
    config = copy.deepcopy(config)
    config.model.vocab_size, config.model.context_len = VOCAB_SIZE, config.trainer.seq_len
    return config


@torch.no_grad()
def carry_after(config: RunConfig, tokens: int) -> int:
    """Bytes that one sequence leaves behind after so many tokens, in float32."""
    # Shapes alone, unless a mixer sets out from values.
    asks_for_values = any(entry["mixer"] == "rwkv_channel_mix" for entry in config.model.mixers.values())
    with torch.device("cpu" if asks_for_values else "meta"):
        model = build_model(sized(config).model)
        _, carry = model.prefill(torch.zeros(1, tokens, dtype=torch.int64), model.empty_carry(1))
    return sum(carry_bytes(model, carry).values())


def speed(config: RunConfig, sequences: int, tokens: int) -> Record:
    """Tokens/s of training in the trainer's precision and of decoding in float32, as `train` and `generate` compute."""
    config = sized(config)
    config.trainer.batch_size, config.trainer.seq_len, config.model.context_len = sequences, tokens, tokens
    return {
        "sequences": sequences,
        "tokens": tokens,
        "training_tokens_per_s": sequences * tokens / training_step_s(config),
        **decoding(config),
    }


def training_step_s(config: RunConfig, timed: int = 10) -> float:
    """Seconds of a forward, a backward and an AdamW update on random tokens: the mean of ten after five."""
    device, trainer = device_of(config), config.trainer
    torch.manual_seed(config.seed)
    model = build_model(config.model).to(device)
    model, _ = compiled(model, config, None, packed=False)
    optimizer = build_optimizer(config.optimizer, model.parameter_groups)
    shape = (trainer.batch_size, trainer.seq_len)
    batch, targets = (torch.randint(VOCAB_SIZE, shape, device=device) for _ in range(2))

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(config)):
            nats, count = summed_cross_entropy(model(batch), targets)
        (nats / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _seconds(step, before=5, timed=timed, device=device)


@torch.no_grad()
def decoding(config: RunConfig) -> Record:
    """Tokens/s of all sequences together, one token at a time as `generate` does, behind a prefill of the whole row."""
    device, trainer = device_of(config), config.trainer
    model = build_model(config.model).to(device).eval()
    example = Example(tokens_shape=(trainer.batch_size, trainer.seq_len), decoding=True)
    options = dataclasses.replace(CompileOptions.of_run(config), measure=False)
    compile_model(model, example, target=target_of(config), options=options)
    token = torch.zeros(trainer.batch_size, dtype=torch.int64, device=device)
    carry = model.empty_carry(trainer.batch_size)
    for piece in torch.randint(VOCAB_SIZE, (trainer.batch_size, trainer.seq_len), device=device).split(PIECE, dim=1):
        _, carry = model.prefill(piece, carry)
    size = sum(carry_bytes(model, carry).values())
    decoder = Decoder(model, carry, capture=cuda_graphs(device))
    del carry  # held by the decoder alone
    seconds = _seconds(lambda: decoder.step(token), before=8, timed=DECODED, device=device)
    return {"decoding_tokens_per_s": trainer.batch_size / seconds, "carry_bytes": size // trainer.batch_size}


def _seconds(step: Any, *, before: int, timed: int, device: torch.device) -> float:
    for _ in range(before):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(timed):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / timed


if __name__ == "__main__":
    words_of(__doc__, sys.argv[1:])
    raise SystemExit(main())
