"""Rows of equal length cut out of the concatenated documents of a corpus: the source behind every text data set.

Row i of a split is  tokens[i t : i t + t]  with the next token as target, for i = 0 .. (n - 1) // t - 1. No token is
asked to predict the first token of another document, and the places where documents begin are part of the sample.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from subquad.errors import DataError
from subquad.training.sources.documents import Bytes, Corpus, Document, digest_of, recorded_names
from subquad.training.sources.encode import encoded
from subquad.training.sources.source import IGNORED, DataContext, Sample, Split
from subquad.training.sources.token_cache import FORMAT_VERSION, TokenArrays, cached_tokens
from subquad.training.tokenizer import Tokenizer, token_dtype

COUNTED_AT_ONCE = 1 << 22


class PackedText:
    """The documents of a corpus as rows of `seq_len` tokens."""

    packed = True

    def __init__(self, corpus: Corpus, context: DataContext) -> None:
        self.tokenizer = context.tokenizer
        self._seq_len = context.seq_len
        self._arrays: dict[Split, TokenArrays] = {}
        self.fingerprint: dict[str, object] = {
            "source": corpus.source,
            **corpus.details,
            "tokenizer": context.tokenizer.digest,
        }
        splits: tuple[Split, Split] = ("train", "validation")
        for split in splits:
            documents = corpus.documents(split)
            if not any(document.num_bytes for document in documents):
                raise DataError(
                    what=f"the {split} split of '{corpus.source}' holds no text",
                    where="data",
                    mend="name files with text",
                )
            digest = digest_of(documents)
            arrays = _tokens(documents, digest, context)
            self._arrays[split] = arrays
            self.fingerprint[split] = {
                "sha256": digest,
                "bytes": int(arrays.byte_counts.sum()),
                "tokens": len(arrays.tokens),
                "documents": recorded_names(documents),
            }
            if self.num_samples(split) < 1:
                raise DataError(
                    what=f"a sequence of {context.seq_len} tokens and its last target are longer than the {split} "
                    f"split of '{corpus.source}', which has {len(arrays.tokens)} tokens",
                    where="trainer.seq_len",
                    mend=f"use trainer.seq_len={len(arrays.tokens) - 1} or less, or more text"
                    if len(arrays.tokens) > 1
                    else "use more text",
                )
        self.unigram_bits_per_byte = unigram_bits_per_byte(
            self._arrays["train"].byte_counts, self._arrays["validation"].byte_counts
        )

    def num_samples(self, split: Split) -> int:
        return (len(self._arrays[split].tokens) - 1) // self._seq_len

    def sample(self, split: Split, index: int) -> Sample:
        stretch, targets, starts = self._stretch(split, index)
        target_bytes = int(self._widths(split, index, targets).sum())
        return Sample(stretch[:-1], targets, starts[starts < self._seq_len], target_bytes)

    def bytes_of_targets(self, split: Split, index: int) -> NDArray[np.int64]:
        return self._widths(split, index, self._stretch(split, index)[1])

    def _stretch(self, split: Split, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The tokens of a row and the one behind it, the targets, and where documents begin among 1 .. t."""
        arrays = self._arrays[split]
        begin = index * self._seq_len
        stretch = arrays.tokens[begin : begin + self._seq_len + 1].astype(np.int64)
        targets = stretch[1:].copy()
        # Document starts at positions 1 .. t of the stretch: the token before each has nothing to predict.
        first, last = np.searchsorted(arrays.document_starts, (begin + 1, begin + self._seq_len + 1))
        starts = np.asarray(arrays.document_starts[first:last]) - begin
        targets[starts - 1] = IGNORED
        return stretch, targets, starts

    def _widths(self, split: Split, index: int, targets: NDArray[np.int64]) -> NDArray[np.int64]:
        predicted, token_bytes = targets != IGNORED, self._arrays[split].token_bytes
        if token_bytes is None:
            return np.asarray(predicted, dtype=np.int64)
        begin = index * self._seq_len
        widths = token_bytes[begin + 1 : begin + self._seq_len + 1]
        return np.where(predicted, np.asarray(widths, dtype=np.int64), 0)


def unigram_bits_per_byte(train_counts: NDArray[np.int64], validation_counts: NDArray[np.int64]) -> float:
    """What a model without context reaches:  - sum_x p_validation(x) log2 p_train(x), in bits.

    One is added to each of the 256 training counts, so that a byte that was never trained on has a finite price.
    """
    smoothed = train_counts + 1
    log_probability = np.log2(smoothed) - np.log2(smoothed.sum())
    return float(-(validation_counts * log_probability).sum() / validation_counts.sum())


def _tokens(documents: Sequence[Document], digest: str, context: DataContext) -> TokenArrays:
    parts = (FORMAT_VERSION, digest, context.tokenizer.kind, context.tokenizer.digest)
    key = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:40]
    return cached_tokens(context.cache, key, lambda scratch: tokenise(documents, context.tokenizer, scratch))


def tokenise(documents: Sequence[Document], tokenizer: Tokenizer, scratch: Path | None) -> TokenArrays:
    """Tokenise documents one after another.

    With a `scratch` folder the tokens lie in a file there, and memory use does not grow with the corpus.
    """
    byte_counts = np.zeros(256, dtype=np.int64)
    token_counts = np.zeros(len(documents), dtype=np.int64)
    token_spool, width_spool = _Spool(scratch), _Spool(scratch)

    def counted(document: Document) -> Bytes:
        text = document.read()
        for start in range(0, len(text), COUNTED_AT_ONCE):  # bincount works on a copy of eight times the size
            byte_counts[:] += np.bincount(text[start : start + COUNTED_AT_ONCE], minlength=256)
        return text

    for number, (tokens, token_bytes) in encoded(map(counted, documents), tokenizer):
        token_spool.append(tokens)
        if token_bytes is not None:
            width_spool.append(token_bytes)
        token_counts[number] += len(tokens)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(token_counts[token_counts > 0])])
    widths = width_spool.array(np.uint32)
    return TokenArrays(
        tokens=token_spool.array(token_dtype(tokenizer.vocab_size)),
        document_starts=starts,
        byte_counts=byte_counts,
        token_bytes=widths if len(widths) else None,
    )


class _Spool:
    """An array that grows at its end: in a nameless file, which vanishes with the process, or in memory."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        # Closed in `array`.
        self._file: IO[bytes] = io.BytesIO() if folder is None else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def append(self, array: NDArray[np.unsignedinteger]) -> None:
        self._file.write(np.ascontiguousarray(array).data)

    def array(self, dtype: type[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
        with self._file as file:
            if file.tell() == 0:
                return np.zeros(0, dtype=dtype)
            file.flush()
            file.seek(0)
            return np.frombuffer(file.read(), dtype=dtype) if self._folder is None else np.memmap(file, dtype, mode="r")
