"""Tokenizers are reversible, keep count of the bytes, and survive the way through a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad.errors import ConfigError, DataError
from subquad.schema import TokenizerConfig
from subquad.training import tokenizer as tokenizer_module
from subquad.training.tokenizer import (
    ByteTokenizer,
    Encoded,
    SymbolTokenizer,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
    save_tokenizer,
    token_dtype,
)

TEXT = "Grüße an alle: naïve café, 日本語 and 𝄞 music.\n\nA second paragraph, with  two spaces.\n" * 20


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE file whose merges were learnt from a text with characters of one to four bytes."""
    from tokenizers import Tokenizer as TokenizerFile
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = TokenizerFile(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    path = tmp_path_factory.mktemp("bpe") / "bpe.json"
    tokenizer.save(str(path))
    return path


def file_tokenizer(path: Path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(kind="file", file=str(path)))


def as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def encode_document(tokenizer: Tokenizer, text: np.ndarray) -> list[Encoded]:
    return [tokenizer.encode_piece(piece) for piece in tokenizer.pieces(text)]


@given(st.text())
def test_bytes_give_back_any_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert max(tokens, default=0) < tokenizer.vocab_size


def test_half_a_character_decodes_to_a_replacement_and_not_to_an_error() -> None:
    assert ByteTokenizer().decode("é".encode()[:1]) == "�"


def test_a_tokenizer_file_gives_back_the_text_and_is_shorter_than_bytes(bpe_file: Path) -> None:
    tokenizer = file_tokenizer(bpe_file)
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.decode(tokens) == TEXT
    assert tokenizer.vocab_size == 300
    assert len(tokens) < len(TEXT.encode())


@pytest.mark.parametrize("piece_bytes", [64, 1 << 20])
def test_the_bytes_of_all_tokens_add_up_to_the_document(
    bpe_file: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "PIECE_BYTES", piece_bytes)
    tokenizer = file_tokenizer(bpe_file)
    pieces = encode_document(tokenizer, as_bytes(TEXT))
    assert sum(int(piece.token_bytes.sum()) for piece in pieces if piece.token_bytes is not None) == len(TEXT.encode())
    assert all(len(piece.tokens) == len(piece.token_bytes) for piece in pieces if piece.token_bytes is not None)
    assert tokenizer.decode([int(token) for piece in pieces for token in piece.tokens]) == TEXT
    assert len(pieces) == 1 if piece_bytes > len(TEXT.encode()) else len(pieces) > 10


def test_each_token_is_charged_with_the_bytes_it_spells(bpe_file: Path) -> None:
    ascii_text = "a second paragraph, with two spaces."
    tokenizer = file_tokenizer(bpe_file)
    (piece,) = encode_document(tokenizer, as_bytes(ascii_text))
    assert piece.token_bytes is not None
    spelled = [len(tokenizer.decode([int(token)])) for token in piece.tokens]
    assert piece.token_bytes.tolist() == spelled
    assert max(spelled) > 1


def test_pieces_without_a_newline_are_cut_between_characters(monkeypatch: pytest.MonkeyPatch, bpe_file: Path) -> None:
    monkeypatch.setattr(tokenizer_module, "PIECE_BYTES", 64)
    text = "日本語" * 100
    tokenizer = file_tokenizer(bpe_file)
    pieces = encode_document(tokenizer, as_bytes(text))
    assert "".join(tokenizer.decode([int(token) for token in piece.tokens]) for piece in pieces) == text


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_tokens_are_stored_in_the_narrowest_integer_that_holds_them(vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) is dtype
    assert int(dtype(vocab_size - 1)) == vocab_size - 1


@pytest.mark.parametrize("kind", ["bytes", "file", "symbols"])
def test_a_saved_tokenizer_reads_back_equal(kind: str, bpe_file: Path, tmp_path: Path) -> None:
    tokenizer = {"bytes": ByteTokenizer(), "file": file_tokenizer(bpe_file), "symbols": SymbolTokenizer(64)}[kind]
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.kind, again.vocab_size, again.digest) == (kind, tokenizer.vocab_size, tokenizer.digest)
    text = "3 17 63" if kind == "symbols" else TEXT
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_two_tokenizer_files_have_different_digests(bpe_file: Path, tmp_path: Path) -> None:
    record = json.loads(bpe_file.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(record, indent=3))
    assert file_tokenizer(other).digest == file_tokenizer(bpe_file).digest, "white space is no difference"
    record["model"]["merges"].pop()
    other.write_text(json.dumps(record))
    assert file_tokenizer(other).digest != file_tokenizer(bpe_file).digest


def test_symbols_refuse_what_the_task_does_not_have() -> None:
    with pytest.raises(ConfigError, match="'64' is no symbol"):
        SymbolTokenizer(64).encode("1 64")
    with pytest.raises(ConfigError, match="'x' is no symbol"):
        SymbolTokenizer(64).encode("x")


def test_an_unknown_kind_is_told_its_neighbour() -> None:
    with pytest.raises(ConfigError) as caught:
        build_tokenizer(TokenizerConfig(kind="byte"))
    assert "did you mean 'bytes'?" in caught.value.mend


def test_a_file_tokenizer_needs_a_file_that_is_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no file"):
        build_tokenizer(TokenizerConfig(kind="file"))
    with pytest.raises(DataError, match=r"nowhere\.json: No such file"):
        file_tokenizer(tmp_path / "nowhere.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json is no tokenizer"):
        file_tokenizer(tmp_path / "bad.json")
    (tmp_path / "latin.json").write_bytes(b"{\xe9}")
    with pytest.raises(DataError, match="not UTF-8 at byte 1"):
        file_tokenizer(tmp_path / "latin.json")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "cannot be read"),
        ("{", "no saved tokenizer"),
        ('{"format_version": 1, "kind": "bytse"}', "no saved tokenizer"),
        ('{"format_version": 2, "kind": "bytes"}', "format version is 2"),
        ('{"format_version": 1, "kind": "symbols"}', "no saved tokenizer"),
    ],
)
def test_a_damaged_saved_tokenizer_is_named(content: str | None, what: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=what) as caught:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in caught.value.where
