"""Batches of a streamed source: every lane gives whole batches, in turns that no number of processes changes.

Micro-batch m of rank r, of W ranks with samples of their own, has number n = m W + r and comes from lane n mod L. With
K loader workers a rank's worker w makes those with (m - m0) mod K = w, m0 being the first: as long as K W divides L,
no lane is read by two processes, and which samples a step takes depends neither on K nor on W.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch.utils.data import IterableDataset, get_worker_info

from subquad.errors import ConfigError, ResumeError
from subquad.training.batch import Batch, batch_of_samples, part_of
from subquad.training.sources.source import Place, Sample, StreamedSource


class StreamedBatches(IterableDataset[Batch]):
    """The micro-batches of a rank from the first one of an optimizer step on, without end.

    `places` are those of the lanes that were begun; `part` (i, k) is part i of k of every sequence.
    Raises: ConfigError, ResumeError.
    """

    def __init__(
        self,
        source: StreamedSource,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        num_workers: int,
        first: int,
        places: Mapping[int, Place],
        part: tuple[int, int] = (0, 1),
    ) -> None:
        workers = max(1, num_workers)
        processes = workers * world_size
        if source.lanes % processes:
            raise ConfigError(
                what=f"{source.lanes} lanes cannot be shared out to {workers} workers of each of {world_size} ranks",
                where="data.lanes",
                mend=f"use a multiple of {processes} for a new run; one that goes on keeps its lanes: choose"
                " trainer.num_workers and trainer.devices so that their product divides them",
            )
        self._source, self._batch_size, self._seed = source, batch_size, seed
        self._rank, self._world_size, self._first, self._part = rank, world_size, first, part
        self._places = {lane: places.get(lane, Place()) for lane in range(source.lanes)}
        for lane, place in self._places.items():
            expected = batch_size * len(range(lane, first * world_size, source.lanes))
            if place.rows != expected:
                raise ResumeError(
                    what=f"lane {lane} of the stream stands at row {place.rows}, and the step before at row {expected}",
                    where="the checkpoint's data",
                    mend="resume=RUN_DIR goes on from a whole checkpoint",
                )

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        lanes: dict[int, Iterator[tuple[Sample, Place]]] = {}
        micro_batch = self._first + index
        while True:
            lane = (micro_batch * self._world_size + self._rank) % self._source.lanes
            if lane not in lanes:
                lanes[lane] = self._source.lane_rows(lane, self._seed, self._places[lane])
            samples, places = zip(*(next(lanes[lane]) for _ in range(self._batch_size)))
            # A row's number within its lane, as the lane itself tells it, and the lane.
            ids = [(place.rows - 1) * self._source.lanes + lane for place in places]
            batch = batch_of_samples(samples, ids, packed=self._source.packed)
            batch["lane"], batch["place"] = lane, places[-1].to_json()
            yield part_of(batch, *self._part)
            micro_batch += count
