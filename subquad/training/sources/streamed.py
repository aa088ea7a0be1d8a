"""Rows of a data set that is read as training goes on and never held: in lanes, each with a place to go on from.

Lane l of L has its own documents (`datasets.distributed.split_dataset_by_node`: whole files where L divides their
number, else every L-th row), in blocks of `shuffle_buffer` that are each permuted by a generator of (seed, lane, epoch,
block). A block is used up before the next is read, so a place is a few numbers and what `datasets` says of where the
block began: going on reads at most one block again. Documents are cut into rows as `packed_text.py` cuts them, one lane
after itself; a lane that ends begins its next epoch in the middle of a row.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subquad.errors import DataError
from subquad.training.sources.documents import Document, document_of_bytes
from subquad.training.sources.packed_text import PackedText
from subquad.training.sources.source import IGNORED, Place, Sample, Split
from subquad.training.tokenizer import Encoded, Tokenizer

IsHeldOut = Callable[[bytes], bool]


def digest_of_text(text: bytes) -> bytes:
    """What a document is known by, wherever it stands: SHA-256."""
    return hashlib.sha256(text).digest()


def held_out_by_hash(fraction: float) -> IsHeldOut:
    """Hold out that share of all documents by the hash of their texts: copies too, wherever they stand."""
    return partial(_is_below, int(fraction * 2**64))


def held_out_as(documents: Iterable[Document]) -> IsHeldOut:
    """Hold out the texts of these documents."""
    return partial(_is_among, frozenset(digest_of_text(document.read().tobytes()) for document in documents))


def all_held_out(text: bytes) -> bool:
    """Hold out everything: the data set is a validation split."""
    return True


def _is_below(limit: int, text: bytes) -> bool:
    return int.from_bytes(digest_of_text(text)[:8], "big") < limit


def _is_among(digests: frozenset[bytes], text: bytes) -> bool:
    return digest_of_text(text) in digests


class StreamedText:
    """A data set as rows without end. `rows` is a `datasets.IterableDataset` with the column of text alone.

    What is addressed by number, as of any source, are the validation rows, and the training rows of the documents that
    were read first (`head`); runs train on `lane_rows`.
    """

    packed = True

    def __init__(
        self,
        rows: Any,
        head: PackedText,
        *,
        is_held_out: IsHeldOut,
        text_field: str,
        seq_len: int,
        lanes: int,
        shuffle_buffer: int,
        details: dict[str, object],
    ) -> None:
        self._rows, self._head, self._is_held_out = rows, head, is_held_out
        self._text_field, self._seq_len = text_field, seq_len
        self.lanes, self._shuffle_buffer = lanes, shuffle_buffer
        self.tokenizer: Tokenizer = head.tokenizer
        self.unigram_bits_per_byte: float | None = head.unigram_bits_per_byte
        self.fingerprint: dict[str, object] = {**head.fingerprint, **details}

    def num_samples(self, split: Split) -> int:
        return self._head.num_samples(split)

    def sample(self, split: Split, index: int) -> Sample:
        return self._head.sample(split, index)

    def bytes_of_targets(self, split: Split, index: int) -> NDArray[np.int64]:
        return self._head.bytes_of_targets(split, index)

    def lane_rows(self, lane: int, seed: int, start: Place) -> Iterator[tuple[Sample, Place]]:
        """The rows of a lane from a place on, each with the place behind it; they have no end.  Raises: DataError."""
        row, given, used = _Row(self._seq_len), start.rows, start.tokens
        for found, text in self._documents(lane, seed, start):
            document = _encoded(text, self.tokenizer)
            while used < len(document.tokens):
                used = row.take(document, used)
                if row.is_full:
                    given += 1
                    yield row.sample(), replace(found, rows=given, tokens=used)
                    row = _Row(self._seq_len)
            used = 0

    def _documents(self, lane: int, seed: int, start: Place) -> Iterator[tuple[Place, bytes]]:
        """The training documents of a lane in the order of its permuted blocks, epoch after epoch."""
        at = start
        while True:
            held_any = False
            for block, begins, texts in self._blocks(lane, at):
                order = np.random.default_rng((seed % 2**64, lane, at.epoch, block)).permutation(len(texts))
                for number in range(at.document if block == at.block else 0, len(texts)):
                    text = texts[order[number]]
                    if text and not self._is_held_out(text):
                        held_any = True
                        yield Place(epoch=at.epoch, block=block, begins=begins, document=number), text
            if not held_any:
                raise DataError(
                    what=f"lane {lane} of {self.lanes} holds no training document",
                    where="data.lanes",
                    mend="use fewer lanes, or more documents",
                )
            at = Place(epoch=at.epoch + 1)

    def _blocks(self, lane: int, at: Place) -> Iterator[tuple[int, dict[str, Any] | None, list[bytes]]]:
        """The blocks of a lane from that of a place on: number, state of `datasets` before it, documents."""
        from datasets.distributed import split_dataset_by_node

        # A copy: lanes that share a process would otherwise share the state of the files' iterators.
        rows = split_dataset_by_node(copy.deepcopy(self._rows), lane, self.lanes)
        begins = at.begins
        if begins is not None:
            rows.load_state_dict(begins)
        # Not `iter(rows)`, which within a loader's worker would share the lane out once more.
        for block, found in enumerate(rows.iter(batch_size=self._shuffle_buffer), start=at.block):
            yield block, begins, [text_of(text, self._text_field) for text in found[self._text_field]]
            begins = rows.state_dict()


def text_of(value: object, text_field: str) -> bytes:
    """A document as bytes.  Raises: DataError."""
    if not isinstance(value, str):
        raise DataError(
            what=f"column '{text_field}' holds {type(value).__name__}, not text",
            where="data.text_field",
            mend="name a column of strings",
        )
    return value.encode()


def beginning_of(
    rows: Any, text_field: str, num_bytes: int, is_held_out: IsHeldOut, wanted: Split
) -> dict[Split, list[Document]]:
    """The first documents of a data set by split, each text once: reading ends with `num_bytes` of the wanted split.

    Of the other split no more than that is kept, and not less than one document if one was read.
    """
    found: dict[Split, list[Document]] = {"train": [], "validation": []}
    sizes: dict[Split, int] = {"train": 0, "validation": 0}
    seen: set[bytes] = set()
    for row in rows:
        text = text_of(row[text_field], text_field)
        split: Split = "validation" if is_held_out(text) else "train"
        if not text or sizes[split] >= num_bytes or digest_of_text(text) in seen:
            continue
        seen.add(digest_of_text(text))
        found[split].append(document_of_bytes(f"{split}/{len(found[split])}", text))
        sizes[split] += len(text)
        if sizes[wanted] >= num_bytes:
            break
    return found


def _encoded(text: bytes, tokenizer: Tokenizer) -> Encoded:
    """A document as tokens, with their bytes if they are not one each."""
    pieces = [tokenizer.encode_piece(piece) for piece in tokenizer.pieces(np.frombuffer(text, dtype=np.uint8))]
    widths = [piece.token_bytes for piece in pieces if piece.token_bytes is not None]
    return Encoded(np.concatenate([piece.tokens for piece in pieces]), np.concatenate(widths) if widths else None)


class _Row:
    """A row that is being filled: `take` copies tokens of a document, and its targets where the document goes on."""

    def __init__(self, seq_len: int) -> None:
        self._tokens = np.zeros(seq_len, dtype=np.int64)
        self._targets = np.full(seq_len, IGNORED, dtype=np.int64)
        self._starts: list[int] = []
        self._filled = self._target_bytes = 0

    @property
    def is_full(self) -> bool:
        return self._filled == len(self._tokens)

    def take(self, document: Encoded, used: int) -> int:
        """Fill up with the document's tokens from `used` on; how many of them are used now."""
        count = min(len(self._tokens) - self._filled, len(document.tokens) - used)
        begin, end = self._filled, self._filled + count
        if begin and used == 0:
            self._starts.append(begin)
        self._tokens[begin:end] = document.tokens[used : used + count]
        following = document.tokens[used + 1 : used + count + 1]  # one less at the document's end
        self._targets[begin : begin + len(following)] = following
        widths = document.token_bytes
        self._target_bytes += (
            len(following) if widths is None else int(widths[used + 1 : used + 1 + len(following)].sum())
        )
        self._filled = end
        return used + count

    def sample(self) -> Sample:
        return Sample(self._tokens, self._targets, np.asarray(self._starts, dtype=np.int64), self._target_bytes)
