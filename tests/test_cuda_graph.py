"""CUDA graphs: their shared memory, and what a failure leaves; without a GPU on stand-ins that refuse as torch does."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any
from weakref import finalize

import pytest
import torch

from subquad.model import cuda_graph
from subquad.model.cuda_graph import WARM_UP, CudaGraphs


class Pools:
    """Memory of graphs: a pool lives as long as one of its graphs, and is refused afterwards."""

    def __init__(self) -> None:
        self._handles = count(1)
        self.users: dict[tuple[int, int], int] = {}
        self.ended: set[tuple[int, int]] = set()
        self.capturing: Graph | None = None
        self.generators_reset = 0

    def handle(self) -> tuple[int, int]:
        return (0, next(self._handles))

    def leave(self, pool: tuple[int, int]) -> None:
        self.users[pool] -= 1
        if not self.users[pool]:
            self.ended.add(pool)

    def reset(self, state: object) -> None:
        self.generators_reset += 1


class Graph:
    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    def capture_begin(self, *, pool: tuple[int, int], capture_error_mode: str) -> None:
        self._pools.capturing = self  # so far torch goes before it looks at the pool
        if pool in self._pools.ended:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self._pools.users[pool] = self._pools.users.get(pool, 0) + 1
        finalize(self, self._pools.leave, pool)

    def capture_end(self) -> None:
        self._pools.capturing = None

    def replay(self) -> None: ...


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> Pools:
    made = Pools()

    @contextmanager
    def on(stream: object) -> Iterator[None]:
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=made.reset)
    for name, stand_in in (
        ("current_stream", lambda: stream), ("current_device", lambda: 0), ("stream", on),
        ("CUDAGraph", lambda: Graph(made)), ("graph_pool_handle", made.handle), ("default_generators", [generator]),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(cuda_graph, "_side_stream", lambda device: stream)
    return made


def test_graphs_that_live_share_memory_and_later_ones_get_their_own(pools: Pools) -> None:
    capture = CudaGraphs()
    replays: list[Any] = [capture(lambda: None), capture(lambda: None)]
    assert list(pools.users.values()) == [2]
    replays.clear()
    gc.collect()
    replays.append(capture(lambda: None))
    assert list(pools.users.values()) == [0, 1]


def test_what_fails_is_ended_and_the_random_state_is_free_again(pools: Pools) -> None:
    capture, runs = CudaGraphs(), count()
    kept = capture(lambda: None)

    def waits() -> None:
        if next(runs) == WARM_UP:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        capture(waits)
    assert (pools.capturing, pools.generators_reset) == (None, 1)
    kept, later = capture(lambda: None), kept
    assert kept is not later


def test_a_capture_that_cannot_begin_is_ended_as_well(pools: Pools) -> None:
    pools.ended.add((0, 1))
    with pytest.raises(RuntimeError, match="use_count"):
        CudaGraphs()(lambda: None)
    assert (pools.capturing, pools.generators_reset) == (None, 1)


def add_one(x: torch.Tensor) -> None:
    x.add_(1)


@pytest.mark.gpu
def test_on_a_gpu_graphs_are_taken_down_again_when_all_before_are_gone() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    capture, x = CudaGraphs(), torch.zeros(3, device="cuda")
    for round_ in range(1, 4):
        replay = capture(partial(add_one, x))
        before = x.clone()
        replay()
        assert torch.equal(x, before + 1), f"round {round_}"
        del replay
        gc.collect()
    assert torch.rand(3, device="cuda").isfinite().all(), "random numbers are refused"
