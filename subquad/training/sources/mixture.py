"""Several sources, mixed by weight.

Source k of n_k samples owns  m_k = max(n_k, round(w_k N))  numbers in a row, with  N = max_k n_k / w_k  and weights
that add up to 1; number i of them is its sample  i mod n_k.  The shuffled order of an epoch permutes all numbers, so
that it shows source k with probability w_k at each place, every sample of every source at least once, and no sample
more than once oftener than another of its source.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from subquad.errors import ConfigError
from subquad.training.sources.build import build_source
from subquad.training.sources.configs import MixtureConfig
from subquad.training.sources.source import DataContext, Sample, Source, Split, StreamedSource, TextSource

MOST_SAMPLES = 2**60
"""Their numbers are 64-bit integers."""


class Mixture:
    """The samples of several sources under one numbering."""

    unigram_bits_per_byte = None  # of one text; the sources know their own

    def __init__(self, sources: Mapping[str, Source], weights: Mapping[str, float]) -> None:
        self._sources = list(sources.values())
        first = self._sources[0].tokenizer
        for key, source in sources.items():
            if isinstance(source, StreamedSource):
                raise ConfigError(
                    what=f"source '{key}' is a stream, which has no end and no samples by number",
                    where=f"data.sources.{key}",
                    mend="give it max_bytes, which holds so much of it",
                )
            if source.tokenizer.digest != first.digest:
                raise ConfigError(
                    what=f"source '{key}' has other tokens than '{next(iter(sources))}'",
                    where=f"data.sources.{key}",
                    mend="mix text with text, or tasks of one vocabulary",
                )
        self.tokenizer = first
        self.packed = any(source.packed for source in self._sources)
        self.fingerprint: dict[str, object] = {
            "source": "mixture",
            "sources": {key: {"weight": weights[key], **source.fingerprint} for key, source in sources.items()},
        }
        total = sum(weights.values())
        shares = [weights[key] / total for key in sources]
        self._ends: dict[Split, list[int]] = {}
        splits: tuple[Split, Split] = ("train", "validation")
        for split in splits:
            counts = [source.num_samples(split) for source in self._sources]
            longest = max(count / share for count, share in zip(counts, shares))
            if longest > MOST_SAMPLES:
                raise ConfigError(
                    what="a weight is so small that an epoch would have no end",
                    where="data.sources",
                    mend="use weights that are closer to each other",
                )
            owned = [max(count, round(share * longest)) for count, share in zip(counts, shares)]
            self._ends[split] = list(itertools.accumulate(owned))

    def num_samples(self, split: Split) -> int:
        return self._ends[split][-1]

    def sample(self, split: Split, index: int) -> Sample:
        source, number = self._place(split, index)
        return source.sample(split, number)

    def _place(self, split: Split, index: int) -> tuple[Source, int]:
        begin = 0
        for source, end in zip(self._sources, self._ends[split]):
            if index < end:
                return source, (index - begin) % source.num_samples(split)
            begin = end
        raise IndexError(index)


class TextMixture(Mixture):
    """A mixture of texts alone, which tells the bytes of each target."""

    def bytes_of_targets(self, split: Split, index: int) -> NDArray[np.int64]:
        source, number = self._place(split, index)
        assert isinstance(source, TextSource)
        return source.bytes_of_targets(split, number)


def build(config: MixtureConfig, context: DataContext) -> Mixture:
    """The sources and their weights.  Raises: ConfigError, DataError, NotFoundError."""
    sources, weights = {}, {}
    for key, entry in config.sources.items():
        fields = dict(entry)
        weights[key] = float(fields.pop("weight", 1.0))
        sources[key] = build_source(fields, context, f"data.sources.{key}")
    is_text = all(isinstance(source, TextSource) for source in sources.values())
    return (TextMixture if is_text else Mixture)(sources, weights)
