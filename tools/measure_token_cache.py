"""How fast a token cache is built and opened again, and what memory that takes.

    python tools/measure_token_cache.py megabytes=200                      # bytes as tokens, and a BPE of 8,192 tokens
    python tools/measure_token_cache.py megabytes=200 documents=100000 kind=jsonl 'tokenizers=[bpe]'

The text is random words in paragraphs, `documents` of them (1: one file of text); the BPE is trained on its beginning.
Everything lies in a folder that is removed. Memory is what this process holds of its own (RssAnon, sampled every 50
ms), beyond what it held before: pages of mapped files belong to the system, which may take them back.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from command_line import words_of
from omegaconf import OmegaConf
from tokenizers import Tokenizer as TokenizerFile
from tokenizers import decoders, models, pre_tokenizers, trainers

from subquad.schema import TokenizerConfig
from subquad.training.sources.configs import TextFilesConfig
from subquad.training.sources.source import DataContext
from subquad.training.sources.text_files import build
from subquad.training.tokenizer import build_tokenizer

VOCABULARY = 8192
SAMPLE_BYTES = 2_000_000
SAMPLED_EVERY_S = 0.05


@dataclass
class Config:
    """What is measured."""

    megabytes: int = 200
    documents: int = 1
    kind: str = "txt"  # txt | jsonl
    tokenizers: list[str] = field(default_factory=lambda: ["bytes", "bpe"])
    seed: int = 0


@dataclass
class Cost:
    """Of a piece of work: seconds on the clock and of all cores, and the most memory of its own in bytes."""

    seconds: float = 0.0
    core_s: float = 0.0
    own_bytes: int = 0


def main(arguments: list[str]) -> None:
    """Measure and print a line for each tokenizer."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.from_cli(arguments)))
    assert isinstance(config, Config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = folder / f"corpus.{config.kind}"
        _write(config, text)
        size = text.stat().st_size
        tokenizers = {"bytes": TokenizerConfig(), "bpe": TokenizerConfig(kind="file", file=str(_trained(text, folder)))}
        for name in config.tokenizers:
            context = DataContext(tokenizer=build_tokenizer(tokenizers[name]), seq_len=1024, cache=folder)
            for start in ("first", "next"):
                cost = measured(lambda context=context: build(TextFilesConfig(files=[str(text)]), context))  # type: ignore[misc]
                print(
                    f"{name}, {start} start: {cost.seconds:.1f} s, {cost.core_s:.1f} s of cores, "
                    f"{size / cost.core_s / 1e6:.1f} MB/s of a core, {cost.own_bytes / 1e6:.0f} MB of its own",
                    flush=True,
                )


def measured(work: Callable[[], object]) -> Cost:
    """Do the work, and watch the memory of this process meanwhile."""
    cost = Cost()
    with _watched(cost):
        started, core_s = time.perf_counter(), time.process_time()
        work()
        cost.seconds, cost.core_s = time.perf_counter() - started, time.process_time() - core_s
    return cost


@contextmanager
def _watched(cost: Cost) -> Iterator[None]:
    before, done = _own_bytes(), threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLED_EVERY_S):
            cost.own_bytes = max(cost.own_bytes, _own_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def _write(config: Config, path: Path) -> None:
    """Random words, the frequent ones as frequent as in English (Zipf), in paragraphs that are documents or not."""
    dice = np.random.default_rng(config.seed)
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz", dtype=np.uint8)
    words = [bytes(dice.choice(letters[:20], dice.integers(2, 11))).decode() for _ in range(50_000)]
    left, size = config.megabytes * 1_000_000, config.megabytes * 1_000_000 // config.documents
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            lines, length = [], 0
            while length < min(size, left, SAMPLE_BYTES):
                line = " ".join(words[min(rank, len(words)) - 1] for rank in dice.zipf(1.2, 12))
                lines.append(line)
                length += len(line) + 1
            text = "\n".join(lines) + "\n"
            file.write(json.dumps({"text": text}) + "\n" if config.kind == "jsonl" else text + "\n")
            left -= len(text)


def _trained(text: Path, folder: Path) -> Path:
    """A byte-level BPE, learned from the beginning of the text."""
    with text.open(encoding="utf-8") as file:
        beginning = file.read(SAMPLE_BYTES)
    tokenizer = TokenizerFile(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(beginning.splitlines(keepends=True), trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


if __name__ == "__main__":
    main(words_of(__doc__, sys.argv[1:], keys=[field.name for field in fields(Config)])[1])
