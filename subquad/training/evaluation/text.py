"""Held-out text: perplexity and bits per byte by position, and by the length that the context is cut to.

For the targets y of the validation split, with q the model's predictions from the tokens of the same row and document:

    nats per token = -mean log q(y)      perplexity = exp(nats per token)      bits per byte = sum -log2 q(y) / bytes(y)

By position: targets are sorted by how many tokens of their document the model has seen, in buckets of doubling width.
By length: the longest rows are cut into shorter ones, so that every length predicts the same targets, and what a
longer context is worth is a difference of two rows of one table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from subquad.errors import ConfigError
from subquad.schema import EvaluateConfig
from subquad.training.batch import Batch
from subquad.training.data import batch_of, build_data
from subquad.training.evaluation.loaded_run import LoadedRun
from subquad.training.resume import check_same_data
from subquad.training.run_folder import read_json
from subquad.training.sources.source import IGNORED, Source, TextSource

Record = dict[str, object]


def evaluate_text(run: LoadedRun, request: EvaluateConfig) -> Record:
    """Judge a run on its validation split.  Raises: ConfigError, DataError, ResumeError."""
    config = run.config
    lengths = lengths_of(request, config.trainer.seq_len)
    longest = lengths[-1]
    source = build_data(replace(config, trainer=replace(config.trainer, seq_len=longest))).source
    if source.unigram_bits_per_byte is None:
        raise ConfigError(
            what=f"the run's data, {config.data.get('name')}, are not text",
            where="evaluate.suite",
            mend="leave suite out, or name a task: suite=mqar",
        )
    check_same_data(read_json(run.folder.data)["fingerprint"], source.fingerprint, str(run.folder.data))
    by_length = {length: Sums(length) for length in lengths}
    rows = 0
    for batch, widths in _batches(source, request, run):
        rows += len(batch["tokens"])
        for length, sums in by_length.items():
            cut = cut_rows(batch, length)
            logits = run.logits(cut["tokens"], cut["cu_seqlens"])
            sums.add(logits, cut["targets"], widths, contexts(cut["tokens"].shape, cut["cu_seqlens"]))
    return {
        "split": "validation",
        "rows": rows,
        "longest": longest,
        "trained_length": config.trainer.seq_len,
        "unigram_bits_per_byte": source.unigram_bits_per_byte,
        "by_length": [{"length": length, **sums.total()} for length, sums in by_length.items()],
        "by_position": by_length[longest].buckets(),
    }


class Sums:
    """Nats, targets and bytes by the number of tokens seen, which is 1 to `length`."""

    def __init__(self, length: int) -> None:
        self._nats, self._tokens, self._bytes = (np.zeros(length + 1) for _ in range(3))

    def add(self, logits: Tensor, targets: Tensor, widths: NDArray[np.int64] | None, seen: NDArray[np.int64]) -> None:
        """Count a batch.  Shapes:  logits: b t v    targets, seen: b t    widths: b t in any shape"""
        nats = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten().to(logits.device), ignore_index=IGNORED, reduction="none"
        )
        asked = (targets != IGNORED).flatten().numpy()
        places, size = seen.reshape(-1)[asked], len(self._nats)
        self._nats += np.bincount(places, nats.double().cpu().numpy()[asked], minlength=size)
        self._tokens += np.bincount(places, minlength=size)
        if widths is not None:
            self._bytes += np.bincount(places, widths.reshape(-1)[asked], minlength=size)

    def total(self) -> Record:
        """Over all positions."""
        return self._figures(slice(None))

    def buckets(self) -> list[Record]:
        """By tokens seen: 1, 2 to 3, 4 to 7, ..."""
        found = []
        first = 1
        while first < len(self._nats):
            last = min(2 * first, len(self._nats)) - 1
            if self._tokens[first : last + 1].sum():
                found.append({"first": first, "last": last, **self._figures(slice(first, last + 1))})
            first *= 2
        return found

    def _figures(self, part: slice) -> Record:
        nats, tokens, text_bytes = (float(sums[part].sum()) for sums in (self._nats, self._tokens, self._bytes))
        loss = nats / tokens
        return {
            "tokens": int(tokens),
            "bytes": int(text_bytes),
            "nats_per_token": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": nats / text_bytes / math.log(2) if text_bytes else None,
        }


def lengths_of(request: EvaluateConfig, trained: int) -> list[int]:
    """The lengths in rising order; each divides the last.  Raises: ConfigError."""
    if not request.lengths:
        return [trained // part for part in (8, 4, 2) if trained % part == 0 and trained // part >= 4] + [trained]
    lengths = sorted(set(request.lengths))
    if lengths[0] < 1:
        raise ConfigError(what=f"a length is {lengths[0]}", where="evaluate.lengths", mend="use 1 or more")
    for length in lengths:
        if lengths[-1] % length:
            raise ConfigError(
                what=f"rows of {lengths[-1]} tokens cannot be cut into rows of {length}",
                where="evaluate.lengths",
                mend=f"use lengths that divide the longest, such as {lengths[-1] // 2}",
            )
    return lengths


def cut_rows(batch: Batch, length: int) -> Batch:
    """The same tokens in rows of `length`; documents also begin where rows do."""
    tokens, bounds = batch["tokens"], batch["cu_seqlens"]
    if bounds is not None:
        row_starts = torch.arange(0, tokens.numel() + 1, length, dtype=bounds.dtype)
        bounds = torch.unique(torch.cat([bounds, row_starts]))
    return Batch(
        tokens=tokens.reshape(-1, length),
        targets=batch["targets"].reshape(-1, length),
        cu_seqlens=bounds,
        sample_ids=batch["sample_ids"],
        target_bytes=batch["target_bytes"],
    )


def contexts(shape: tuple[int, ...], cu_seqlens: Tensor | None) -> NDArray[np.int64]:
    """How many tokens of its row and document the model has seen at each position, itself included.  Shapes:  b t"""
    rows, length = shape
    if cu_seqlens is None:
        return np.tile(np.arange(1, length + 1), (rows, 1))
    bounds = cu_seqlens.numpy()
    places = np.arange(rows * length)
    return np.asarray(places + 1 - bounds[np.searchsorted(bounds, places, side="right") - 1]).reshape(rows, length)


def _batches(
    source: Source, request: EvaluateConfig, run: LoadedRun
) -> Iterator[tuple[Batch, NDArray[np.int64] | None]]:
    """The longest rows, spread evenly over the split, and the bytes of their targets if the source tells them."""
    trainer, total = run.config.trainer, source.num_samples("validation")
    longest = len(source.sample("validation", 0).tokens)
    wanted = request.samples or max(1, trainer.validation_batches * trainer.batch_size * trainer.seq_len // longest)
    count = min(wanted, total)
    # The rows that validation while training takes, if it has as many (`FixedBatches`).
    ids = [number * total // count for number in range(count)]
    at_once = max(1, trainer.batch_size * trainer.seq_len // longest)
    for start in range(0, count, at_once):
        chosen = ids[start : start + at_once]
        widths = None
        if isinstance(source, TextSource):
            widths = np.stack([source.bytes_of_targets("validation", number) for number in chosen])
        yield batch_of(source, "validation", chosen), widths
