"""generate: text from a trained run or an exported model, token by token."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

import torch

from subquad.compiler.pipeline import decoding_kernels
from subquad.compiler.report import bytes_text, decoded_by
from subquad.errors import ConfigError, ResumeError
from subquad.model.build import build_model
from subquad.model.cuda_graph import cuda_graphs
from subquad.model.exported import CONFIG as EXPORTED
from subquad.model.exported import load_model, read_model_config
from subquad.model.language_model import LanguageModel
from subquad.model.narrow import DTYPES, narrow
from subquad.schema import GenerateConfig, RunConfig
from subquad.training.checkpoint import newest_checkpoint
from subquad.training.compilation import compile_for_generation, device_of
from subquad.training.continuation import Continuation, continued
from subquad.training.prompts import Prompt, open_results, read_prompts
from subquad.training.run_folder import RunFolder, read_config
from subquad.training.sampling import Sampling
from subquad.training.tokenizer import Tokenizer, load_tokenizer

FIRST_BYTE = "\n"
"""What an empty prompt stands for: most texts go on after a line's end as they begin."""


def generate(config: GenerateConfig, *, out: TextIO | None = None) -> list[str]:
    """Continue a prompt with the run's newest checkpoint, writing text as it comes; speed and carry go to stderr.

    With `prompts`, continue every prompt of a file, `batch_size` at a time, and write an object of JSON a line, in the
    file's order, to `out` (a file of `config.out`, or stdout). Prompt number i is drawn with the seed `seed + i`: alone
    and with that seed it gives the same text.

    Returns the continuations. Raises: ConfigError, DataError, ResumeError, RunError.
    """
    _check(config)
    prompts = [Prompt(config.prompt)] if config.prompts is None else read_prompts(config.prompts)
    batch_size = min(config.batch_size, len(prompts))
    model, tokenizer, device = load_run(Path(config.run).expanduser(), batch_size=batch_size, dtype=config.dtype)
    tokens = [_tokens(prompt.text, tokenizer, config, index) for index, prompt in enumerate(prompts)]
    _check_stop_ids(config, tokenizer)
    capture = cuda_graphs(device, config.cuda_graph)
    results = None if config.out is None else open_results(config.out)
    started = time.monotonic()
    texts, count, longest = [], 0, None
    with nullcontext(out or sys.stdout) if results is None else results.open("a", encoding="utf-8") as stream:
        for first in range(0, len(prompts), batch_size):
            sequences = [
                Continuation(index, tokens[index], tokenizer, config)
                for index in range(first, min(first + batch_size, len(prompts)))
            ]
            for _, piece in continued(model, sequences, device, capture=capture):
                if config.prompts is None:
                    stream.write(piece)
                    stream.flush()
            for sequence in sequences:
                stream.write("\n" if config.prompts is None else _result(prompts[sequence.index], sequence))
                texts.append(sequence.text)
                count += sequence.num_tokens
                longest = sequence if longest is None else max(longest, sequence, key=lambda one: one.num_read)
            stream.flush()
    seconds = time.monotonic() - started
    assert longest is not None, "a file holds at least one prompt"
    print(f"{count} tokens, {count / seconds:,.0f} tokens/s on {device}", file=sys.stderr)
    print(carry_line(longest, model), file=sys.stderr)
    print(decoded_by(decoding_kernels(model, batch_size, in_place=capture is not None)), file=sys.stderr)
    return texts


def carry_line(sequence: Continuation, model: LanguageModel) -> str:
    """What a sequence that has ended had kept, in all and by mixer, and after how many tokens."""
    layers = Counter(str(block.mixer_name) for block in model.blocks)
    parts = [
        f"{name} {bytes_text(size)} in {layers[name]} layer{'s' if layers[name] > 1 else ''}"
        for name, size in sequence.carry_bytes.items()
    ]
    total = bytes_text(sum(sequence.carry_bytes.values()))
    return f"carry of a sequence after {sequence.num_read} tokens: {total} ({', '.join(parts)})"


def load_run(
    path: Path, *, batch_size: int = 1, dtype: str = "float32"
) -> tuple[LanguageModel, Tokenizer, torch.device]:
    """The model of a run folder, with kernels chosen for generation, and its tokenizer; or of an exported folder.

    Weights are of type `dtype`, but for those that mixers pin to float32.

    Raises: ConfigError, NotFoundError, ResumeError.
    """
    folder = RunFolder(path.absolute())
    if not folder.config.exists() and (folder.path / EXPORTED).is_file():
        config = RunConfig(model=read_model_config(path))
        return _loaded(load_model(path), config, folder.path, batch_size, dtype)
    config = read_config(folder, f"run={path}")
    checkpoint = newest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise ResumeError(
            what="the run holds no checkpoint that is whole", where=f"run={path}", mend="train it further first"
        )
    model = build_model(config.model)
    model.load_state_dict(checkpoint.weights())
    return _loaded(model, config, folder.path, batch_size, dtype)


def _loaded(
    model: LanguageModel, config: RunConfig, folder: Path, batch_size: int, dtype: str
) -> tuple[LanguageModel, Tokenizer, torch.device]:
    device = device_of(config)
    narrow(model.to(device).eval(), DTYPES[dtype])
    compile_for_generation(model, config, batch_size, dtype)
    return model, load_tokenizer(folder), device


def _tokens(text: str, tokenizer: Tokenizer, config: GenerateConfig, index: int) -> list[int]:
    where = "prompt" if config.prompts is None else f"{config.prompts}, prompt {index}"
    try:
        return tokenizer.encode(text) or tokenizer.encode(FIRST_BYTE) or [0]
    except ConfigError as error:
        raise ConfigError(what=error.what, where=where, mend=error.mend) from None
    except UnicodeEncodeError as error:
        raise ConfigError(
            what=f"character {error.start} is half of a pair (U+{ord(text[error.start]):04X}) and no text",
            where=where,
            mend="write it as UTF-8",
        ) from None


def _result(prompt: Prompt, sequence: Continuation) -> str:
    record: Mapping[str, object] = {
        **prompt.others,
        "index": sequence.index,
        "prompt": prompt.text,
        "text": sequence.text,
        "num_tokens": sequence.num_tokens,
        "ending": sequence.ending,
        "carry_bytes": sequence.carry_bytes,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def _check(config: GenerateConfig) -> None:
    Sampling.of(config)
    for name in ("max_tokens", "batch_size"):
        if getattr(config, name) < 1:
            raise ConfigError(what=f"{name} is {getattr(config, name)}", where=name, mend="use 1 or more")
    if not 0 <= config.seed < 2**63:
        raise ConfigError(what=f"seed is {config.seed}", where="seed", mend="use 0 or more, below 2^63")
    if config.dtype not in DTYPES:
        raise ConfigError(what=f"dtype is {config.dtype}", where="dtype", mend=f"use {' or '.join(DTYPES)}")
    if config.prompt and config.prompts is not None:
        raise ConfigError(
            what="a prompt and a file of prompts are given", where="prompts", mend="leave one of them out"
        )
    if "" in config.stop:
        raise ConfigError(what="a stop string is empty", where="stop", mend="leave it out")


def _check_stop_ids(config: GenerateConfig, tokenizer: Tokenizer) -> None:
    for token in config.stop_ids:
        if not 0 <= token < tokenizer.vocab_size:
            raise ConfigError(
                what=f"{token} is no token", where="stop_ids", mend=f"use numbers from 0 to {tokenizer.vocab_size - 1}"
            )
