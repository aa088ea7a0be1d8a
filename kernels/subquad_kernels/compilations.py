"""What Triton compiles, how long each kernel took, and which of its stages; found by triton's own listener."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """One kernel, for one list of types, constants and alignments; `stages` are seconds of each by triton's names.

    `ast` is Python, which other threads wait for; the rest is not (`llir` is LLVM, `cubin` ptxas, a process). One that
    a folder of Triton's held already is `cached` and has no stages. `hash` is what triton calls it there.
    """

    kernel: str
    seconds: float
    stages: Mapping[str, float]
    cached: bool
    thread: int
    hash: str


@contextmanager
def compilations() -> Iterator[list[Compilation]]:
    """A list that grows by what any thread compiles meanwhile; it stays empty without triton."""
    found: list[Compilation] = []
    if importlib.util.find_spec("triton") is None:
        yield found
        return
    from triton import knobs

    before = knobs.compilation.listener

    def listen(*, src: Any, metadata: Any, times: Any, cache_hit: bool, **rest: Any) -> None:
        stages = {"ast": times.ir_initialization, **dict(times.lowering_stages), "store": times.store_results}
        found.append(
            Compilation(
                kernel=getattr(src, "name", str(src)),
                seconds=times.total / 1e6,
                stages={} if cache_hit else {stage: microseconds / 1e6 for stage, microseconds in stages.items()},
                cached=cache_hit,
                thread=threading.get_ident(),
                hash=metadata["hash"],
            )
        )
        if before is not None:
            before(src=src, metadata=metadata, times=times, cache_hit=cache_hit, **rest)

    knobs.compilation.listener = listen
    try:
        yield found
    finally:
        knobs.compilation.listener = before
