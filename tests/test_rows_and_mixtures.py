"""Files of many documents, read row by row, and sources mixed by weight."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.errors import ConfigError, DataError, SubquadError
from subquad.schema import RunConfig, TrainerConfig
from subquad.training.data import build_data, shuffled
from subquad.training.sources import text_files
from subquad.training.sources.configs import MixtureConfig, TextFilesConfig
from subquad.training.sources.mixture import Mixture
from subquad.training.sources.mixture import build as build_mixture
from subquad.training.sources.packed_text import PackedText
from subquad.training.sources.source import DataContext, Sample, Split, TextSource
from subquad.training.tokenizer import ByteTokenizer, SymbolTokenizer

TEXTS = ["first", "zweites Stück", "", "第三", "a\nb\r\nc", 'with "quotes" and \\', "x" * 300, "🦆 last of them"]


def context(seq_len: int = 4, cache: Path | None = None) -> DataContext:
    return DataContext(tokenizer=ByteTokenizer(), seq_len=seq_len, cache=cache)


def write_jsonl(path: Path, texts: list[str], key: str = "text", end: str = "\n") -> Path:
    lines = [json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_bytes(("\n\n".join(lines) + end).encode())  # an empty line after each
    return path


def write_parquet(path: Path, texts: list[str | None], kind: Any = None, rows: int = 3) -> Path:
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, type=kind or pa.string())})
    pq.write_table(table, path, row_group_size=rows)
    return path


def documents(source: PackedText, split: Split) -> list[bytes]:
    """The documents of a split, cut out of its tokens."""
    arrays = source._arrays[split]
    starts = arrays.document_starts
    return [bytes(arrays.tokens[a:b].tolist()) for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl without a last newline", "string", "large_string"])
def test_every_row_is_a_document(kind: str, tmp_path: Path) -> None:
    if kind.startswith("jsonl"):
        file = write_jsonl(tmp_path / "rows.jsonl", TEXTS, end="" if "without" in kind else "\n")
    else:
        file = write_parquet(tmp_path / "rows.parquet", [*TEXTS, None], getattr(pa, kind)())
    held = tmp_path / "held.txt"
    held.write_text("held out")
    source = text_files.build(TextFilesConfig(files=[str(file)], validation_files=[str(held)]), context())
    assert documents(source, "train") == [text.encode() for text in TEXTS if text]
    names = source.fingerprint["train"]["documents"]  # type: ignore[index]
    step = 2 if kind.startswith("jsonl") else 1
    assert names == [f"{file.name}:{1 + step * i}" for i, text in enumerate(TEXTS) if text]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=12))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    from subquad.training.sources.rows import documents_of_rows

    folder = tmp_path_factory.mktemp("rows")
    expected = [text.encode() for text in texts if text]
    for file in (write_jsonl(folder / "a.jsonl", texts), write_parquet(folder / "a.parquet", list(texts))):
        rows = documents_of_rows("a", file, "text")
        assert [bytes(row.read()) for row in rows] == expected
        assert [bytes(row.read()) for row in reversed(rows)] == expected[::-1]
        assert [row.num_bytes for row in rows] == [len(text) for text in expected]


def test_rows_are_held_out_whole_and_copies_of_them_are_not_trained_on(tmp_path: Path) -> None:
    texts = [f"document number {i} says {'so ' * (i % 7)}" for i in range(40)]
    file = write_jsonl(tmp_path / "rows.jsonl", texts + texts[:10])
    source = text_files.build(TextFilesConfig(files=[str(file)], validation_fraction=0.25), context())
    train, validation = documents(source, "train"), documents(source, "validation")
    assert sorted(train + validation) == sorted(text.encode() for text in texts)
    assert 0.1 < sum(map(len, validation)) / sum(map(len, texts)) <= 0.25


@pytest.mark.parametrize(
    ("file", "what", "mend"),
    [
        ('{"text": "good"}\n{"text": bad}\n', "line 2", "JSON object per line"),
        ('{"body": "good"}\n', "no field 'text'", "data.text_field=body"),
        ('["good"]\n', "no field 'text'", "objects"),
        ('{"text": 7}\n', "holds int, not text", "field of text"),
        ('{"text": "\\ud800"}\n', "half a character", "leave the row out"),
        (b'{"text": "caf\xe9"}\n', "no JSON", "UTF-8"),
        ("[" * 100_000, "no JSON", "JSON object per line"),
        ("\n\n", "there is no text", "hold text"),
    ],
)
def test_bad_rows_are_named(file: str | bytes, what: str, mend: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(file if isinstance(file, bytes) else file.encode())
    with pytest.raises(DataError) as caught:
        text_files.build(TextFilesConfig(files=[str(path)]), context())
    assert what in f"{caught.value.what} {caught.value.where}"
    assert mend in caught.value.mend


def test_bad_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "none.parquet").write_bytes(b"PAR1 and nothing else")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "other.parquet")
    for name, what in (("none", "no Parquet file"), ("numbers", "int64, not text"), ("other", "no field 'text'")):
        with pytest.raises(DataError, match=what):
            text_files.build(TextFilesConfig(files=[f"{tmp_path}/{name}.parquet"]), context())


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "txt"])
def test_memory_does_not_grow_with_the_text(suffix: str, tmp_path: Path) -> None:
    """20 MB of text in 40 documents: what is held at once stays below a quarter of it, and the cache is mapped."""
    texts = [f"{i} " + "some words of text " * 26_000 for i in range(40)]
    if suffix == "jsonl":
        files = [write_jsonl(tmp_path / "rows.jsonl", texts)]
    elif suffix == "parquet":
        files = [write_parquet(tmp_path / "rows.parquet", list(texts), rows=2)]
    else:
        files = [tmp_path / f"{i:02}.txt" for i in range(len(texts))]
        for file, text in zip(files, texts):
            file.write_text(text)
    total = sum(map(len, texts))
    del texts
    (tmp_path / "cache").mkdir()
    config = TextFilesConfig(files=[str(file) for file in files])
    tracemalloc.start()
    source = text_files.build(config, context(cache=tmp_path / "cache"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(source._arrays["train"].tokens, np.memmap)
    assert total > 15e6
    # Bytes are counted as integers of eight bytes, a document's at once.
    assert peak < total / 4 + 8 * 500_000


# Mixtures


class Numbers:
    """A source whose samples are their own numbers, marked by the source's."""

    packed = False
    unigram_bits_per_byte = None

    def __init__(self, mark: int, train: int, validation: int = 3, vocab_size: int = 16) -> None:
        self.tokenizer = SymbolTokenizer(vocab_size)
        self._counts: dict[Split, int] = {"train": train, "validation": validation}
        self._mark = mark
        self.fingerprint: dict[str, object] = {"mark": mark, "train": train}

    def num_samples(self, split: Split) -> int:
        return self._counts[split]

    def sample(self, split: Split, index: int) -> Sample:
        assert 0 <= index < self._counts[split]
        pair = np.array([self._mark, index])
        return Sample(pair, pair, np.zeros(0, dtype=np.int64), 0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 5)), min_size=1, max_size=4))
def test_an_epoch_shows_everything_in_the_shares_that_were_asked_for(sources: list[tuple[int, float]]) -> None:
    keys = [f"source {i}" for i in range(len(sources))]
    mixture = Mixture(
        {key: Numbers(i, count) for i, (key, (count, _)) in enumerate(zip(keys, sources))},
        {key: weight for key, (_, weight) in zip(keys, sources)},
    )
    total = mixture.num_samples("train")
    shown = Counter(tuple(mixture.sample("train", i).tokens.tolist()) for i in range(total))
    weights = sum(weight for _, weight in sources)
    for mark, (count, weight) in enumerate(sources):
        times = [shown[mark, index] for index in range(count)]
        assert min(times) >= 1
        assert max(times) - min(times) <= 1
        assert abs(sum(times) - total * weight / weights) <= len(sources)
    with pytest.raises(IndexError):
        mixture.sample("train", total)


def test_batches_of_a_mixture_hold_its_shares() -> None:
    mixture = Mixture({"a": Numbers(0, 900), "b": Numbers(1, 40)}, {"a": 3.0, "b": 1.0})
    order = [shuffled(i, mixture.num_samples("train"), seed=1) for i in range(800)]
    marks = [int(mixture.sample("train", i).tokens[0]) for i in order]
    assert 0.2 < np.mean(marks) < 0.3


def test_a_mixture_of_files_trains_from_both_and_resumes_by_its_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("aaaa bbbb\n\n" * 50)
    write_jsonl(tmp_path / "rows.jsonl", [f"cccc {i}" for i in range(50)])
    sources = {
        "plain": {"name": "text_files", "files": [f"{tmp_path}/plain.txt"], "weight": 1},
        "rows": {"name": "text_files", "files": [f"{tmp_path}/rows.jsonl"], "weight": 2.5},
    }
    config = RunConfig(
        data={"name": "mixture", "sources": sources}, trainer=TrainerConfig(batch_size=8, seq_len=8, accelerator="cpu")
    )
    data = build_data(config)
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(20))]
    has_c = [(batch["tokens"] == ord("c")).any(1) for batch in batches]
    share = float(sum(rows.float().mean() for rows in has_c)) / len(has_c)
    assert 0.55 < share < 0.9
    assert all(batch["cu_seqlens"] is not None for batch in batches)
    assert isinstance(data.source, TextSource)
    for split, index in (("train", 0), ("train", data.source.num_samples("train") - 1), ("validation", 0)):
        widths = data.source.bytes_of_targets(split, index)  # type: ignore[arg-type]
        assert widths.sum() == data.source.sample(split, index).target_bytes > 0  # type: ignore[arg-type]
    before = data.fingerprint
    sources["rows"]["weight"] = 1
    assert build_data(config).fingerprint != before


@pytest.mark.parametrize(
    ("sources", "where"),
    [
        ({}, "data.sources"),
        ({"a": {"name": "text_files", "files": ["x"], "weight": 0}}, "data.sources.a"),
        ({"a": {"name": "text_files", "files": ["x"], "weight": float("nan")}}, "data.sources.a"),
        ({"a": "text_files"}, "data.sources.a"),
        ({"a": {"name": "text_fils"}}, "data.sources.a.name"),
        ({"a": {"name": "synthetic", "size": 3}}, "data.sources.a.size"),
        ({"a": {"name": "synthetic"}, "b": {"name": "synthetic", "task": "copying"}}, "data.sources.b"),
        ({"a": {"name": "synthetic"}, "b": {"name": "synthetic", "weight": 1e-300}}, "data.sources"),
    ],
)
def test_a_mixture_that_cannot_be_is_named(sources: dict[str, Any], where: str) -> None:
    with pytest.raises((ConfigError, SubquadError)) as caught:
        build_mixture(MixtureConfig(sources=sources), context(seq_len=64))
    assert caught.value.where == where
