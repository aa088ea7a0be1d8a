"""Tokens of one split as arrays on disk: built once under a lock, checked when opened, rebuilt when damaged.

A file holds a magic word, the length of a JSON header, the header, and then (each at a multiple of 64 bytes) the
arrays it names. The header's `sha256` covers everything after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

MAGIC = b"SQTOKENS"
FORMAT_VERSION = 1
ALIGNMENT = 64
COPIED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class TokenArrays:
    """The concatenated documents of a split.

    Shapes:  tokens: n    document_starts: documents + 1 (the last is n)    token_bytes: n, or None if each is one byte
    byte_counts: 256, how often each byte occurs in the text
    """

    tokens: NDArray[np.unsignedinteger]
    document_starts: NDArray[np.int64]
    byte_counts: NDArray[np.int64]
    token_bytes: NDArray[np.uint32] | None = None
    path: Path | None = None

    def __reduce__(self) -> tuple[object, ...]:
        # A worker process maps the file again; pickling the map itself would copy the corpus.
        if self.path is not None:
            return _reopen, (self.path,)
        return TokenArrays, (self.tokens, self.document_starts, self.byte_counts, self.token_bytes)


class DamagedError(Exception):
    """A cache file is not what was written."""


def cached_tokens(folder: Path | None, key: str, build: Callable[[Path | None], TokenArrays]) -> TokenArrays:
    """The arrays stored under `key`, built and stored first if they are missing or damaged.

    `build` is given a folder for scratch files, or None to work in memory. Processes that ask at the same time wait
    for the one that builds. Without a folder the arrays stay in memory.
    """
    if folder is None:
        return build(None)
    path = folder / f"{key}.tokens"
    with FileLock(f"{path}.lock"):
        try:
            return open_tokens(path, key)
        except FileNotFoundError:
            pass
        except DamagedError as error:
            warnings.warn(f"the token cache {path} is damaged ({error}); it is built again", stacklevel=2)
        try:
            _write(path, key, build(folder))
        except OSError as error:
            warnings.warn(f"no token cache: {path} cannot be written ({error.strerror})", stacklevel=2)
            return build(None)
        return open_tokens(path, key)


def open_tokens(path: Path, key: str) -> TokenArrays:
    """Map a cache file.  Raises: FileNotFoundError; DamagedError if version, key, length or hash are not as written."""
    with path.open("rb") as file:
        header, payload_start = _read_header(file)
        if header.get("key") != key:
            raise DamagedError("it holds another corpus")
        expected = payload_start + int(header["payload_bytes"])
        actual = os.fstat(file.fileno()).st_size
        if actual != expected:
            raise DamagedError(f"it has {actual} bytes instead of {expected}")
        file.seek(payload_start)
        if hashlib.file_digest(file, "sha256").hexdigest() != header["sha256"]:
            raise DamagedError("its hash is another")
        return _map(path, header, payload_start)


def _map(path: Path, header: dict[str, Any], payload_start: int) -> TokenArrays:
    arrays = {
        name: np.memmap(path, dtype=dtype, mode="r", offset=payload_start + offset, shape=(length,))
        for name, dtype, offset, length in header["arrays"]
    }
    return TokenArrays(**arrays, path=path)


def _reopen(path: Path) -> TokenArrays:
    with path.open("rb") as file:
        return _map(path, *_read_header(file))


def _read_header(file: IO[bytes]) -> tuple[dict[str, Any], int]:
    prefix = file.read(len(MAGIC) + 4)
    if len(prefix) < len(MAGIC) + 4 or not prefix.startswith(MAGIC):
        raise DamagedError("it does not begin like a token cache")
    (header_bytes,) = struct.unpack("<I", prefix[len(MAGIC) :])
    try:
        header = json.loads(file.read(header_bytes))
        version = header["format_version"]
    except (ValueError, KeyError, TypeError):
        raise DamagedError("its header is unreadable") from None
    if version != FORMAT_VERSION:
        raise DamagedError(f"its format version is {version} instead of {FORMAT_VERSION}")
    return header, _aligned(len(prefix) + header_bytes)


def _write(path: Path, key: str, arrays: TokenArrays) -> None:
    """Write beside the final place, flush to disk, rename: a reader sees all of it or nothing."""
    parts: list[tuple[str, NDArray[Any]]] = [
        ("tokens", arrays.tokens),
        ("document_starts", arrays.document_starts),
        ("byte_counts", arrays.byte_counts),
    ]
    if arrays.token_bytes is not None:
        parts.append(("token_bytes", arrays.token_bytes))
    offset, described = 0, []
    for name, array in parts:
        described.append((name, array.dtype.str, offset, len(array)))
        offset = _aligned(offset + array.nbytes)
    digest = hashlib.sha256()
    for block in _payload(parts):
        digest.update(block)
    header = json.dumps(
        {
            "format_version": FORMAT_VERSION,
            "key": key,
            "arrays": described,
            "payload_bytes": offset,
            "sha256": digest.hexdigest(),
        }
    ).encode()
    for abandoned in path.parent.glob(f".{path.name}.*"):  # by a builder that was killed: we hold its lock
        abandoned.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(MAGIC + struct.pack("<I", len(header)) + header)
            file.write(bytes(_aligned(file.tell()) - file.tell()))
            for block in _payload(parts):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _payload(parts: list[tuple[str, NDArray[Any]]]) -> Iterator[memoryview | bytes]:
    for _, array in parts:
        raw = np.ascontiguousarray(array).data.cast("B")
        for start in range(0, len(raw), COPIED_AT_ONCE):
            yield raw[start : start + COPIED_AT_ONCE]
        yield bytes(_aligned(len(raw)) - len(raw))


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
