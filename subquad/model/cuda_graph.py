"""CUDA graphs as a `Decoder` takes work down: what a GPU was told once, it is told again by one launch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import torch

WARM_UP = 3
"""Runs before work is taken down: kernels compile in the first, our operators record a repeated call in the second
(`subquad_kernels.replay`), and the third is as every later one."""


class CudaGraphs:
    """A `Capture` for the current device. Graphs share the memory of their intermediate results: replay one at a time.

    Raises: RuntimeError, if the work waits for the device or asks for what cannot be taken down.
    """

    def __init__(self) -> None:
        self._pool: Any = None  # torch's type of handles is private
        self._graphs = WeakSet[torch.cuda.CUDAGraph]()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run the work beforehand, and take it down without running it."""
        outside, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        side.wait_stream(outside)
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`, which gives all cached memory back first, and does not return from `side` if it fails.
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    work()
                self._take_down(work, graph)
        finally:
            outside.wait_stream(side)  # also where it failed: memory of the work is freed here, and may be in use there
        return graph.replay

    def _take_down(self, work: Callable[[], None], graph: torch.cuda.CUDAGraph) -> None:
        try:
            # Other threads may ask for memory meanwhile.
            graph.capture_begin(pool=self._shared_pool(), capture_error_mode="thread_local")
            work()
        except BaseException:
            self._abandon(graph)
            raise
        graph.capture_end()
        self._graphs.add(graph)

    def _shared_pool(self) -> Any:
        """That of the graphs that live: it ends with the last of them, and torch refuses its handle from then on."""
        if self._pool is None or not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End what failed. Torch leaves the pool and the random state half open, and refuses either from then on."""
        with suppress(RuntimeError):  # it says that taking down failed; the work's own error says why
            graph.capture_end()
        self._pool = None
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())


def cuda_graphs(device: torch.device, wanted: bool = True) -> CudaGraphs | None:
    """What a decoder on this device takes work down with; None where there are no CUDA graphs, or none are wanted."""
    return CudaGraphs() if wanted and device.type == "cuda" and torch.version.hip is None else None


@lru_cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all graphs: torch's matrix products keep memory for each stream that they ever ran on."""
    return torch.cuda.Stream(device)
