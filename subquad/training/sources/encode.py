"""Documents to tokens in the order of the text; what a tokenizer does outside of Python is done on all cores."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from subquad.training.sources.documents import Bytes
from subquad.training.tokenizer import Encoded, Tokenizer

MOST_THREADS = 8
"""Each encodes a piece of a megabyte, which takes nearly two hundred times that meanwhile (README.md beside this)."""
PARALLELISM = "TOKENIZERS_PARALLELISM"


def encoded(documents: Iterable[Bytes], tokenizer: Tokenizer) -> Iterator[tuple[int, Encoded]]:
    """The pieces of all documents as tokens, each with the number of its document.

    Not more than two pieces a thread are read ahead, so memory does not grow with the text. Threads are enough, and
    need nothing of the caller's script: the `tokenizers` library lets go of Python while it works.
    """
    pieces = ((number, piece) for number, text in enumerate(documents) for piece in tokenizer.pieces(text))
    threads = min(_cores(), MOST_THREADS) if tokenizer.in_threads else 1
    if threads == 1:
        yield from ((number, tokenizer.encode_piece(piece)) for number, piece in pieces)
        return
    waiting: deque[tuple[int, Future[Encoded]]] = deque()
    with _no_threads_of_its_own(), ThreadPoolExecutor(threads) as pool:
        try:
            for number, piece in pieces:
                waiting.append((number, pool.submit(tokenizer.encode_piece, piece)))
                if len(waiting) > 2 * threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _no_threads_of_its_own() -> Iterator[None]:
    """Threads that the library starts would have it warn of every later fork, such as that of a loader's worker."""
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    try:
        yield
    finally:
        del os.environ[PARALLELISM]
        if before is not None:
            os.environ[PARALLELISM] = before


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
