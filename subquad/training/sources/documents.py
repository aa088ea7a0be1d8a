"""Documents of a text corpus: read when needed, checked to be UTF-8, split into training and validation."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from subquad.errors import DataError
from subquad.training.sources.source import Split

Bytes = NDArray[np.uint8]

MAX_RECORDED_NAMES = 10_000
"""Above this a fingerprint holds the number of documents, not their names."""
CHECKED_AT_ONCE = 1 << 24
SEARCHED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Document:
    """A text by name; `read` gives its UTF-8 bytes, memory-mapped where it is a file."""

    name: str
    num_bytes: int
    read: Callable[[], Bytes]


@dataclass(frozen=True)
class Corpus:
    """The documents of both splits and what they were made from; `details` go into the fingerprint."""

    source: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    details: dict[str, object] = field(default_factory=dict)

    def documents(self, split: Split) -> tuple[Document, ...]:
        return self.train if split == "train" else self.validation


def document_of_bytes(name: str, text: bytes) -> Document:
    """A document that is held in memory."""
    array = np.frombuffer(text, dtype=np.uint8)
    return Document(name, len(array), lambda: array)


def document_of_file(name: str, path: Path) -> Document:
    """A document that is a file; the mapping lasts as long as somebody looks at it.  Raises: DataError."""

    def read() -> Bytes:
        try:
            return np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.zeros(0, dtype=np.uint8)
        except OSError as error:
            raise unreadable(path, error) from None

    try:
        return Document(name, path.stat().st_size, read)
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file that the system does not let us read."""
    return DataError(
        what=f"cannot read {path}: {error.strerror}", where="data", mend="check the path and its permissions"
    )


def digest_of(documents: Iterable[Document]) -> str:
    """A hash of names, lengths and contents, in order."""
    digest = hashlib.sha256()
    for document in documents:
        text = document.read()
        digest.update(f"{document.name}\0{len(text)}\0".encode())
        digest.update(text.data)
    return digest.hexdigest()


def first_byte_not_utf8(document: Document) -> int | None:
    """The offset of the first byte that is not UTF-8, or None."""
    text = document.read()
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(text), CHECKED_AT_ONCE):
        pending = len(decoder.getstate()[0])  # bytes of a character that the stretch before cut in two
        stretch = text[start : start + CHECKED_AT_ONCE].tobytes()
        try:
            decoder.decode(stretch, final=start + CHECKED_AT_ONCE >= len(text))
        except UnicodeDecodeError as error:
            return start - pending + error.start
    return None


def check_utf8(document: Document, where: str) -> None:
    """Raises: DataError with the offset of the first byte that is not UTF-8."""
    offset = first_byte_not_utf8(document)
    if offset is not None:
        raise DataError(
            what=f"{document.name} is not UTF-8 at byte {offset}",
            where=where,
            mend="convert it, e.g. iconv -f latin1 -t utf-8, or leave it out",
        )


def without_copies(documents: Iterable[Document]) -> list[Document]:
    """The documents that have text, each text once, so that no held-out text is also trained on."""
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        if document.num_bytes == 0:
            continue
        digest = hashlib.sha256(document.read().data).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(document)
    return kept


def by_hash_of_name(documents: Iterable[Document]) -> list[Document]:
    """The documents in an order that depends on nothing but their names and looks random."""
    return sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest())


def split_documents(
    documents: Sequence[Document], fraction: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Hold out whole documents, in the order of their names' hashes, that make up at most `fraction` of the bytes.

    When every document is larger than that, the smallest is held out; a single document is cut before its last
    paragraphs. Both answers keep the documents' order.
    """
    if len(documents) == 1:
        head, tail = cut_document(documents[0], fraction)
        return (head,), (tail,)
    allowance = fraction * sum(document.num_bytes for document in documents)
    held_out: set[str] = set()
    for document in by_hash_of_name(documents):
        if document.num_bytes <= allowance:
            allowance -= document.num_bytes
            held_out.add(document.name)
    if not held_out:
        held_out = {min(documents, key=lambda document: (document.num_bytes, document.name)).name}
    return (
        tuple(document for document in documents if document.name not in held_out),
        tuple(document for document in documents if document.name in held_out),
    )


def cut_document(document: Document, fraction: float) -> tuple[Document, Document]:
    """Cut one document in two, after the last paragraph that ends before the last `fraction` of its bytes.

    Without a paragraph there, after the last line; without a line, between two characters.
    """
    text = document.read()
    target = max(1, min(len(text) - 1, round(len(text) * (1 - fraction))))
    cut = target
    for boundary in (b"\n\n", b"\n"):
        # A boundary far from the target would hold out another share than asked for.
        position = _last(boundary, text, target // 2 + 1, target)
        if position is not None:
            cut = position + len(boundary)
            break
    while cut < len(text) and text[cut] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        cut += 1
    return (
        Document(f"{document.name}[:{cut}]", cut, lambda: document.read()[:cut]),
        Document(f"{document.name}[{cut}:]", document.num_bytes - cut, lambda: document.read()[cut:]),
    )


def _last(boundary: bytes, text: Bytes, start: int, end: int) -> int | None:
    """Where a boundary lies last within text[start:end]; no more of the text is held than SEARCHED_AT_ONCE bytes."""
    while end - start >= len(boundary):
        begin = max(start, end - SEARCHED_AT_ONCE)
        position = text[begin:end].tobytes().rfind(boundary)
        if position >= 0:
            return begin + position
        if begin == start:
            return None
        end = begin + len(boundary) - 1
    return None


def recorded_names(documents: Sequence[Document]) -> list[str] | int:
    """What a fingerprint says about documents: their names, or how many if they are very many."""
    return [document.name for document in documents] if len(documents) <= MAX_RECORDED_NAMES else len(documents)
