"""What a data source is: a pure function from a split and an index to a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from subquad.training.tokenizer import Tokenizer

Split = Literal["train", "validation"]

IGNORED = -100
"""The target of a token after which nothing is predicted (torch's default `ignore_index`)."""


class Sample(NamedTuple):
    """One row of a batch.

    Shapes:  tokens, targets: t (int64)    document_starts: those positions above 0 where another document begins
    `target_bytes` counts the bytes of text that the predicted targets stand for; 0 if they are not text.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    document_starts: NDArray[np.int64]
    target_bytes: int


class Source(Protocol):
    """Samples of a training and a validation split, addressed by number; equal numbers give equal samples for ever."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Turns prompts into tokens and tokens into text; also tells the size of the vocabulary."""

    @property
    def packed(self) -> bool:
        """Whether a sample may hold more than one document."""

    @property
    def fingerprint(self) -> dict[str, object]:
        """What the samples depend on, as JSON: a run that resumes under another fingerprint sees other data."""

    @property
    def unigram_bits_per_byte(self) -> float | None:
        """Bits per byte of the validation text under the training split's byte frequencies; None if it is not text."""

    def num_samples(self, split: Split) -> int:
        """How many different samples a split has."""

    def sample(self, split: Split, index: int) -> Sample:
        """The sample of that number."""


@runtime_checkable
class TextSource(Source, Protocol):
    """A source that also tells bytes target by target, for bits per byte of a part of a sample."""

    def bytes_of_targets(self, split: Split, index: int) -> NDArray[np.int64]:
        """How many bytes of text each target of a sample stands for, 0 where nothing is predicted.  Shapes:  t"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a lane of a stream stands: `tokens` of a document's are used, the `document`-th of a permuted block.

    `begins` is the state in which `datasets` was before the block, None at the beginning of an epoch.
    """

    rows: int = 0  # given so far
    epoch: int = 0
    block: int = 0
    begins: dict[str, Any] | None = None
    document: int = 0
    tokens: int = 0

    def to_json(self) -> str:
        """As a checkpoint keeps it."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Place:
        """What `to_json` wrote."""
        return cls(**json.loads(text))


@runtime_checkable
class StreamedSource(Source, Protocol):
    """A source whose training samples come one after another, in `lanes` that share no document.

    Its `sample("train", ...)` knows no more than the beginning of it.
    """

    lanes: int

    def lane_rows(self, lane: int, seed: int, start: Place) -> Iterator[tuple[Sample, Place]]:
        """The samples of a lane from a place on, each with the place behind it; they have no end."""


@dataclass(frozen=True, kw_only=True)
class DataContext:
    """What a source is built with besides its own config; `cache` is a folder, or None to keep tokens in memory."""

    tokenizer: Tokenizer
    seq_len: int
    cache: Path | None
