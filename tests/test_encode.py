"""Documents become tokens on several cores, in the order of the text and within bounded memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as TokenizerFile
from tokenizers import models, pre_tokenizers

from subquad.schema import TokenizerConfig
from subquad.training import tokenizer as tokenizer_module
from subquad.training.sources import documents as documents_module
from subquad.training.sources import encode
from subquad.training.sources.documents import Bytes, cut_document, document_of_bytes
from subquad.training.sources.encode import PARALLELISM, encoded
from subquad.training.sources.packed_text import tokenise
from subquad.training.tokenizer import Tokenizer, build_tokenizer

TEXTS = [("line %d of some text\n" % number) * (number % 7) for number in range(40)]  # noqa: UP031


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = TokenizerFile(
        models.BPE(
            vocab={letter: place for place, letter in enumerate([*alphabet, "li", "ne"])},
            merges=[("l", "i"), ("n", "e")],
        )
    )
    merged.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merged.save(str(tmp_path / "tokenizer.json"))
    return build_tokenizer(TokenizerConfig(kind="file", file=str(tmp_path / "tokenizer.json")))


def as_bytes(text: str) -> Bytes:
    return np.frombuffer(text.encode(), dtype=np.uint8)


@pytest.mark.parametrize("piece_bytes", [50, 1 << 20])
def test_threads_give_what_one_gives_in_its_order(
    tokenizer: Tokenizer, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "PIECE_BYTES", piece_bytes)
    found = {}
    for cores in (1, 5):
        monkeypatch.setattr(encode, "_cores", lambda cores=cores: cores)
        found[cores] = list(encoded(map(as_bytes, TEXTS), tokenizer))
    assert [number for number, _ in found[5]] == [number for number, _ in found[1]]
    for (_, one), (_, other) in zip(found[1], found[5], strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert one.token_bytes is not None
        assert np.array_equal(one.token_bytes, other.token_bytes)  # type: ignore[arg-type]
    assert "".join(tokenizer.decode(piece.tokens.tolist()) for _, piece in found[5]).replace("Ġ", " ")


def test_pieces_are_encoded_by_threads_and_few_are_read_ahead(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_cores", lambda: 3)
    seen, read, taken = set(), 0, 0
    whole = tokenizer.encode_piece

    def noted(piece: Bytes) -> tokenizer_module.Encoded:
        seen.add(threading.current_thread().name)
        assert os.environ[PARALLELISM] == "false"
        return whole(piece)

    def texts() -> Iterator[Bytes]:
        nonlocal read
        for _ in range(50):
            read += 1
            yield as_bytes("some text\n")

    monkeypatch.setattr(tokenizer, "encode_piece", noted)
    monkeypatch.delenv(PARALLELISM, raising=False)
    for _ in encoded(texts(), tokenizer):
        taken += 1
        assert read - taken <= 2 * 3
    assert taken == 50
    assert threading.current_thread().name not in seen
    assert PARALLELISM not in os.environ


def test_an_error_in_a_document_comes_out_and_no_thread_stays(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_cores", lambda: 2)
    before = threading.active_count()
    texts = [as_bytes("fine\n"), np.frombuffer(b"\xff\xfe", dtype=np.uint8), *map(as_bytes, TEXTS)]
    with pytest.raises(UnicodeDecodeError):
        list(encoded(texts, tokenizer))
    assert threading.active_count() == before


def test_documents_begin_where_their_tokens_do(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "PIECE_BYTES", 30)
    documents = [document_of_bytes(f"{number}", text.encode()) for number, text in enumerate(TEXTS)]
    arrays = tokenise(documents, tokenizer, None)
    starts = arrays.document_starts.tolist()
    assert (starts[0], starts[-1]) == (0, len(arrays.tokens))
    assert len(starts) - 1 == sum(bool(text) for text in TEXTS), "an empty document has no start of its own"
    assert arrays.token_bytes is not None
    sizes = [int(arrays.token_bytes[begin:end].sum()) for begin, end in pairwise(starts)]
    assert sizes == [len(text) for text in TEXTS if text]
    assert int(arrays.byte_counts.sum()) == sum(map(len, TEXTS))


@given(
    text=st.text(alphabet="ab\né", min_size=4, max_size=80),
    fraction=st.floats(0.05, 0.6),
    window=st.sampled_from([2, 3, 7, 1 << 20]),
)
def test_a_lone_document_is_cut_at_the_same_place_however_little_of_it_is_held(
    text: str, fraction: float, window: int
) -> None:
    content = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "SEARCHED_AT_ONCE", window)
        head, tail = cut_document(document_of_bytes("lone", content), fraction)
    assert head.read().tobytes() + tail.read().tobytes() == content
    target = max(1, min(len(content) - 1, round(len(content) * (1 - fraction))))
    cuts = [content[:target].rfind(boundary) for boundary in (b"\n\n", b"\n")]
    near = [place + size for place, size in zip(cuts, (2, 1)) if place > target // 2]
    if near:
        assert head.num_bytes == near[0]
    else:
        assert 0 <= head.num_bytes - target < 2
