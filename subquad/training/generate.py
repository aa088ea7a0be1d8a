"""generate: text from a trained run, token by token."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from subquad.errors import ConfigError, ResumeError
from subquad.model.build import build_model
from subquad.model.language_model import LanguageModel
from subquad.schema import GenerateConfig
from subquad.training.checkpoint import newest_checkpoint
from subquad.training.compilation import compile_for_generation, device_of
from subquad.training.run_folder import RunFolder, read_config
from subquad.training.tokenizer import Tokenizer, load_tokenizer

FIRST_BYTE = "\n"
"""What an empty prompt stands for: most texts go on after a line's end as they begin."""


def generate(config: GenerateConfig, *, out: TextIO | None = None) -> str:
    """Continue a prompt with the run's newest checkpoint, writing text as it comes; tokens per second go to stderr.

    Returns the continuation. Raises: ConfigError, ResumeError.
    """
    _check(config)
    out = sys.stdout if out is None else out
    model, tokenizer, device = load_run(Path(config.run).expanduser())
    prompt = tokenizer.encode(config.prompt) or tokenizer.encode(FIRST_BYTE) or [0]
    started = time.monotonic()
    stream = TextStream(tokenizer)
    text = ""
    count = 0
    for token in sampled_tokens(model, prompt, config, device):
        piece = stream.add(token)
        out.write(piece)
        out.flush()
        text += piece
        count += 1
    rest = stream.rest()
    out.write(rest + "\n")
    out.flush()
    seconds = time.monotonic() - started
    print(f"{count} tokens, {count / seconds:,.0f} tokens/s on {device}", file=sys.stderr)
    return text + rest


class TextStream:
    """Turns tokens into text as soon as it is certain: a character that is cut in its bytes waits for the rest.

    Only the last few tokens are decoded again, with those before them as context, so long texts cost no more.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # context, then what is not written yet
        self._written = 0  # how many of them are context

    def add(self, token: int) -> str:
        """The text that has become certain."""
        self._tokens.append(token)
        piece = self._unwritten()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._tokens = self._tokens[self._written :]
        self._written = len(self._tokens)
        return piece

    def rest(self) -> str:
        """What is left at the end."""
        return self._unwritten()

    def _unwritten(self) -> str:
        context = self._tokenizer.decode(self._tokens[: self._written])
        return self._tokenizer.decode(self._tokens)[len(context) :]


def load_run(path: Path) -> tuple[LanguageModel, Tokenizer, torch.device]:
    """The model of a run folder, with kernels chosen for generation, and its tokenizer.  Raises: ResumeError."""
    folder = RunFolder(path.absolute())
    config = read_config(folder, f"run={path}")
    checkpoint = newest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise ResumeError(
            what="the run holds no checkpoint that is whole", where=f"run={path}", mend="train it further first"
        )
    device = device_of(config)
    model = build_model(config.model)
    model.load_state_dict(checkpoint.weights())
    model.to(device).eval()
    compile_for_generation(model, config)
    return model, load_tokenizer(folder.path), device


@torch.inference_mode()
def sampled_tokens(
    model: LanguageModel, prompt: list[int], config: GenerateConfig, device: torch.device
) -> Iterator[int]:
    """Tokens after the prompt: one prefill, then one decode per token."""
    generator = torch.Generator().manual_seed(config.seed)
    carry = model.empty_carry(1)
    logits, carry = model.prefill(torch.tensor([prompt], device=device), carry)
    last = logits[0, -1]
    for number in range(config.max_tokens):
        token = sampled(last, config.temperature, config.top_k, generator)
        yield token
        if number + 1 < config.max_tokens:
            logits, carry = model.decode(torch.tensor([token], device=device), carry)
            last = logits[0]


def sampled(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Draw a token from softmax(logits / temperature) over the `top_k` largest (0: all); at temperature 0, the largest.

    Drawn on the CPU, so that a seed gives one text whatever the device.
    """
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        threshold = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    probabilities = torch.softmax(logits / temperature, dim=0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _check(config: GenerateConfig) -> None:
    for name, is_right, mend in (
        ("max_tokens", config.max_tokens >= 1, "use 1 or more"),
        ("temperature", config.temperature >= 0, "use 0 (always the likeliest token) or more"),
        ("top_k", config.top_k >= 0, "use 0 (no limit) or more"),
    ):
        if not is_right:
            raise ConfigError(what=f"{name} is {getattr(config, name)}", where=name, mend=mend)
