"""Batches for Lightning: each is a pure function of its number, so that a run resumes exactly where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from subquad.cache import user_cache
from subquad.errors import ConfigError, ResumeError
from subquad.schema import RunConfig, TrainerConfig
from subquad.training.batch import Batch, batch_of_samples, part_of
from subquad.training.sources.build import build_source
from subquad.training.sources.source import DataContext, Place, Source, Split, StreamedSource
from subquad.training.streamed_batches import StreamedBatches
from subquad.training.tokenizer import Tokenizer, build_tokenizer

STATE_VERSION = 1
FEISTEL_ROUNDS = 6
"""Four give a pseudo-random permutation (Luby and Rackoff 1988); two more, as the round function is a cheap one."""
WORD = (1 << 64) - 1


def shuffled(position: int, num_samples: int, seed: int) -> int:
    """The sample at a position of an endless shuffled stream: each epoch is its own permutation of all samples.

    The permutation is a Feistel network over the next even number of bits, walked until it lands below `num_samples`:
    nothing is stored, and position 10^12 costs as much as position 0.
    """
    epoch, index = divmod(position, num_samples)
    half = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    seed_bytes = hashlib.blake2b(f"{seed}/{epoch}/{num_samples}".encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    keys = [int.from_bytes(seed_bytes[8 * i : 8 * i + 8], "little") for i in range(FEISTEL_ROUNDS)]
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        index = left << half | right
        if index < num_samples:
            return index


def _mixed(word: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & WORD
    return word ^ word >> 31


class NumberedBatches(Dataset[Batch]):
    """The batches of one rank by number: a micro-batch of training, or one of the fixed validation batches."""

    def __init__(self, source: Source, split: Split, *, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self._source, self._split, self._batch_size = source, split, batch_size
        self._seed, self._rank, self._world_size = seed, rank, world_size

    def sample_ids(self, number: int) -> list[int]:
        """The samples of that batch. Training shuffles without end; ranks take turns within one micro-batch."""
        first = (number * self._world_size + self._rank) * self._batch_size
        total = self._source.num_samples(self._split)
        return [shuffled(first + row, total, self._seed) for row in range(self._batch_size)]

    def __getitem__(self, number: int) -> Batch:
        return batch_of(self._source, self._split, self.sample_ids(number))


class FixedBatches(Dataset[Batch]):
    """Validation batches, spread evenly over the split and the same at every validation."""

    def __init__(self, source: Source, *, batch_size: int, num_batches: int, rank: int, world_size: int) -> None:
        total = source.num_samples("validation")
        rows = min(batch_size, total)
        # Every rank must have as many batches as the others; a small split is shared out as far as it goes.
        self._length = max(1, min(num_batches, total // rows) // world_size)
        chosen = self._length * world_size * rows
        self._source, self._rows = source, rows
        self._ids = [
            (position * total // chosen) if chosen <= total else position % total
            for position in range(rank * self._length * rows, (rank + 1) * self._length * rows)
        ]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < self._length:
            raise IndexError(number)
        return batch_of(self._source, "validation", self._ids[number * self._rows : (number + 1) * self._rows])


class PartsOfBatches(Dataset[Batch]):
    """The batches of a rank that holds part `index` of `count` of every sequence."""

    def __init__(self, batches: NumberedBatches | FixedBatches, index: int, count: int) -> None:
        self._batches, self._index, self._count = batches, index, count

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> Batch:
        return part_of(self._batches[number], self._index, self._count)


def batch_of(source: Source, split: Split, sample_ids: list[int]) -> Batch:
    """The samples of these numbers, one row each."""
    samples = [source.sample(split, index) for index in sample_ids]
    return batch_of_samples(samples, sample_ids, packed=source.packed)


class CountingSampler(Sampler[int]):
    """Batch numbers from a start, without end: the trainer's max_steps says when to stop."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        number = self._start
        while True:
            yield number
            number += 1


class TextData(L.LightningDataModule):
    """The data of a run. Its state is one integer: the number of optimizer steps whose batches were consumed.

    A stream adds the place of each of its lanes, which batches tell (`consumed`).

    Lightning must be told `use_distributed_sampler=False`: ranks already receive different samples.
    """

    def __init__(self, source: Source, trainer: TrainerConfig, seed: int) -> None:
        super().__init__()
        self.source = source
        self.tokenizer: Tokenizer = source.tokenizer
        self.vocab_size = source.tokenizer.vocab_size
        self.fingerprint = source.fingerprint
        self.unigram_bits_per_byte = source.unigram_bits_per_byte
        self.start_step = 0
        self._places: dict[int, str] = {}
        self._config, self._seed = trainer, seed

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which each training sample is seen about once (at least 1)."""
        config = self._config
        per_step = config.samples_per_step(self._world_size)
        return max(1, self.source.num_samples("train") // per_step)

    def train_dataloader(self, start_step: int | None = None) -> DataLoader[Batch]:
        """Micro-batches from the first one of an optimizer step on, without end; default: where the state stands.

        Raises: ConfigError for lanes that these processes cannot share; ResumeError for a step that is not the
        state's, if it is a stream.
        """
        step = self.start_step if start_step is None else start_step
        if isinstance(self.source, StreamedSource):
            config = self._config
            return self._loader(
                StreamedBatches(
                    self.source,
                    batch_size=config.batch_size,
                    seed=self._seed,
                    rank=self._rank // self._group_size,
                    world_size=self._groups,
                    num_workers=config.num_workers,
                    first=step * config.accumulate,
                    places={lane: Place.from_json(place) for lane, place in self._places.items()},
                    part=(self._rank % config.context_parallel, config.context_parallel),
                ),
                None,
            )
        batches = NumberedBatches(
            self.source,
            "train",
            batch_size=self._config.batch_size,
            seed=self._seed,
            rank=self._rank // self._group_size,
            world_size=self._groups,
        )
        return self._numbered(batches, CountingSampler(step * self._config.accumulate))

    def val_dataloader(self) -> DataLoader[Batch]:
        """The same batches each time, `trainer.validation_batches` of them if the split has so many."""
        batches = FixedBatches(
            self.source,
            batch_size=self._config.batch_size,
            num_batches=self._config.validation_batches,
            rank=self._rank // self._group_size,
            world_size=self._groups,
        )
        return self._numbered(batches, None)

    def consumed(self, batch: Batch) -> None:
        """A batch was trained on."""
        if "place" in batch:
            self._places[batch["lane"]] = batch["place"]

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step. Of a stream all ranks must ask, as each knows the places of its lanes."""
        step = self.start_step if self.trainer is None else int(self.trainer.global_step)
        state: dict[str, Any] = {"version": STATE_VERSION, "step": step}
        return state | {"places": self._places_of_all_ranks()} if isinstance(self.source, StreamedSource) else state

    def _places_of_all_ranks(self) -> dict[int, str]:
        found = [self._places]
        if dist.is_initialized():
            found = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(found, self._places)
        # A rank holds the places of other ranks' lanes as they were when it began.
        furthest: dict[int, str] = {}
        for lane, place in (pair for places in found for pair in places.items()):
            if lane not in furthest or Place.from_json(place).rows > Place.from_json(furthest[lane]).rows:
                furthest[lane] = place
        return furthest

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the step of that state.  Raises: ResumeError."""
        if state_dict["version"] != STATE_VERSION:
            raise ResumeError(
                what=f"the data position has format version {state_dict['version']}, not {STATE_VERSION}",
                where="the checkpoint",
                mend="resume with the version of subquad that wrote it",
            )
        self.start_step = state_dict["step"]
        self._places = dict(state_dict.get("places", {}))

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else int(self.trainer.global_rank)

    @property
    def _groups(self) -> int:
        """How many ranks, or groups of ranks that share sequences or projections, have samples of their own."""
        return self._world_size // self._group_size

    @property
    def _world_size(self) -> int:
        return self._config.devices if self.trainer is None else int(self.trainer.world_size)

    @property
    def _group_size(self) -> int:
        return self._config.ranks_per_group

    def _numbered(self, batches: NumberedBatches | FixedBatches, sampler: Sampler[int] | None) -> DataLoader[Batch]:
        count = self._config.context_parallel
        return self._loader(batches if count == 1 else PartsOfBatches(batches, self._rank % count, count), sampler)

    def _loader(self, batches: Dataset[Batch], sampler: Sampler[int] | None) -> DataLoader[Batch]:
        return DataLoader(
            batches,
            batch_size=None,  # the data set's items are whole batches
            sampler=sampler,
            num_workers=self._config.num_workers,
            pin_memory=self._config.accelerator != "cpu" and torch.cuda.is_available(),
        )


def build_data(config: RunConfig) -> TextData:
    """The data that a run asks for, tokenised (or found in the user's cache).  Raises: ConfigError, DataError."""
    trainer = config.trainer
    for name in ("batch_size", "seq_len", "accumulate", "devices", "validation_batches"):
        if getattr(trainer, name) < 1:
            raise ConfigError(what=f"{name} is {getattr(trainer, name)}", where=f"trainer.{name}", mend="use 1 or more")
    context = DataContext(
        tokenizer=build_tokenizer(config.tokenizer), seq_len=trainer.seq_len, cache=user_cache("tokens")
    )
    return TextData(build_source(config.data, context, "data"), trainer, config.seed)
