"""Text to tokens and back: bytes, a Hugging Face `tokenizers` file, or the bare symbols of synthetic tasks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from subquad.errors import ConfigError, DataError, suggestion
from subquad.schema import TokenizerConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer as TokenizerFile

FILE_NAME = "tokenizer.json"
FORMAT_VERSION = 1
PIECE_BYTES = 1 << 20
"""Documents are tokenised in pieces of about this size, cut after a newline, so that memory does not grow with them."""


class Encoded(NamedTuple):
    """A stretch of text as tokens, and the bytes of text that each stands for (None: one byte each)."""

    tokens: NDArray[np.unsignedinteger]
    token_bytes: NDArray[np.uint32] | None


class Tokenizer(Protocol):
    """A reversible map from text to token numbers below `vocab_size`."""

    @property
    def kind(self) -> str:
        """The word under which a saved tokenizer is read back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token number."""

    @property
    def digest(self) -> str:
        """A hash of everything that the mapping depends on."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""

    @property
    def in_threads(self) -> bool:
        """Whether several threads encode more pieces than one does."""

    def pieces(self, text: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        """A document of UTF-8 bytes, cut into what is encoded by itself."""

    def encode_piece(self, piece: NDArray[np.uint8]) -> Encoded:
        """The tokens of a piece; their bytes add up to those of the piece."""

    def settings(self) -> Mapping[str, object]:
        """What a saved tokenizer must hold, as JSON."""


class ByteTokenizer:
    """Each byte is its own token: vocabulary 256, nothing to learn, every text is expressible."""

    kind = "bytes"
    in_threads = False
    vocab_size = 256
    digest = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def pieces(self, text: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        yield text

    def encode_piece(self, piece: NDArray[np.uint8]) -> Encoded:
        return Encoded(piece, None)

    def settings(self) -> Mapping[str, object]:
        return {}


class FileTokenizer:
    """A tokenizer that the `tokenizers` library reads from its JSON; special tokens are never added by themselves."""

    kind = "file"
    in_threads = True

    def __init__(self, description: str) -> None:
        from tokenizers import Tokenizer as TokenizerFile

        self._description = description
        self._tokenizer: TokenizerFile = TokenizerFile.from_str(description)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        # Of the content, not of the file's white space, so that a saved copy has the same digest.
        canonical = json.dumps(json.loads(description), sort_keys=True)
        self.digest = hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def pieces(self, text: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        return _pieces(text)

    def encode_piece(self, piece: NDArray[np.uint8]) -> Encoded:
        # A batch, even of one: `encode` would keep other threads of Python waiting.
        (encoding,) = self._tokenizer.encode_batch([piece.tobytes().decode()], add_special_tokens=False)
        ends = np.asarray([end for _, end in encoding.offsets], dtype=np.int64)
        return Encoded(np.asarray(encoding.ids, dtype=token_dtype(self.vocab_size)), _bytes_per_token(piece, ends))

    def settings(self) -> Mapping[str, object]:
        return {"tokenizer": json.loads(self._description)}


class SymbolTokenizer:
    """The numbers of a synthetic task, written in decimal and separated by spaces."""

    kind = "symbols"
    in_threads = False

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.digest = f"symbols-{vocab_size}"

    def encode(self, text: str) -> list[int]:
        tokens = []
        for word in text.split():
            if not word.isascii() or not word.isdigit() or int(word) >= self.vocab_size:
                raise ConfigError(
                    what=f"'{word}' is no symbol of this task",
                    where="prompt",
                    mend=f"write numbers from 0 to {self.vocab_size - 1}, separated by spaces",
                )
            tokens.append(int(word))
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(str(token) for token in tokens)

    def pieces(self, text: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        yield text

    def encode_piece(self, piece: NDArray[np.uint8]) -> Encoded:
        return Encoded(np.asarray(self.encode(piece.tobytes().decode()), dtype=token_dtype(self.vocab_size)), None)

    def settings(self) -> Mapping[str, object]:
        return {"vocab_size": self.vocab_size}


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that a run asks for.  Raises: ConfigError, DataError."""
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.kind != "file":
        raise ConfigError(
            what=f"no tokenizer is called '{config.kind}'",
            where="tokenizer.kind",
            mend=f"{suggestion(config.kind, ['bytes', 'file'])}use 'bytes' or 'file'",
        )
    if config.file is None:
        raise ConfigError(
            what="tokenizer.kind=file names no file", where="tokenizer.file", mend="add tokenizer.file=PATH"
        )
    try:
        description = Path(config.file).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            what=f"cannot read {config.file}: {error.strerror}", where="tokenizer.file", mend="name a readable file"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            what=f"{config.file} is not UTF-8 at byte {error.start}",
            where="tokenizer.file",
            mend="name the JSON file that the `tokenizers` library writes",
        ) from None
    return _from_description(description, config.file)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write the tokenizer into a run folder, replacing the file in one step."""
    record = {"format_version": FORMAT_VERSION, "kind": tokenizer.kind, **tokenizer.settings()}
    path = folder / FILE_NAME
    temporary = path.with_name(f".{FILE_NAME}.{os.getpid()}")
    temporary.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)
    return path


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read back what `save_tokenizer` wrote.  Raises: DataError."""
    path = folder / FILE_NAME
    readers: dict[object, Callable[[dict[str, object]], Tokenizer]] = {
        "bytes": lambda record: ByteTokenizer(),
        "file": lambda record: _from_description(json.dumps(record["tokenizer"], ensure_ascii=False), str(path)),
        "symbols": lambda record: SymbolTokenizer(int(str(record["vocab_size"]))),
    }
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format_version"] != FORMAT_VERSION:
            raise DataError(
                what=f"its format version is {record['format_version']}, this program reads {FORMAT_VERSION}",
                where=str(path),
                mend="use the version of subquad that wrote the run",
            )
        return readers[record["kind"]](record)
    except OSError as error:
        raise DataError(
            what=f"the run's tokenizer cannot be read: {error.strerror}", where=str(path), mend="name a run folder"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            what=f"this is no saved tokenizer: {error}", where=str(path), mend="take the run folder from a backup"
        ) from None


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The narrowest unsigned integer that holds every token."""
    if vocab_size <= 1 << 8:
        return np.uint8
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _from_description(description: str, where: str) -> FileTokenizer:
    try:
        return FileTokenizer(description)
    except Exception as error:  # the library raises bare Exception for every kind of bad JSON
        raise DataError(
            what=f"{where} is no tokenizer: {error}",
            where="tokenizer.file",
            mend="name the JSON file that the `tokenizers` library writes",
        ) from None


def _pieces(text: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Cut a document after newlines (or else between characters) into pieces of about PIECE_BYTES."""
    start = 0
    while start < len(text):
        end = min(start + PIECE_BYTES, len(text))
        if end < len(text):
            newlines = np.flatnonzero(text[start:end] == ord("\n"))
            if len(newlines):
                end = start + int(newlines[-1]) + 1
            else:
                while text[end] & 0xC0 == 0x80:  # a continuation byte of UTF-8
                    end -= 1
        yield text[start:end]
        start = end


def _bytes_per_token(piece: NDArray[np.uint8], ends: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Bytes between the end of a token and the end of the one before it; text after the last token counts to it.

    Text that a normaliser drops is thereby counted to the token that follows, so that bits per byte stay those of the
    original text. Tokens that share one character (byte-level BPE) give its bytes to the first of them.
    """
    if not len(ends):
        return np.zeros(0, dtype=np.uint32)
    byte_at = np.append(np.flatnonzero(piece & 0xC0 != 0x80), len(piece))  # where characters begin; `ends` counts those
    byte_ends = np.maximum.accumulate(byte_at[ends])
    byte_ends[-1] = len(piece)
    return np.diff(byte_ends, prepend=0).astype(np.uint32)
