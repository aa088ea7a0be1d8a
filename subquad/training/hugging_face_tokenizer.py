"""Our tokenizers as the files that transformers' AutoTokenizer reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from tokenizers import Tokenizer as TokenizerFile
from tokenizers import decoders, models, pre_tokenizers

from subquad.training.tokenizer import FILE_NAME, Tokenizer


def write_hugging_face_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`; a text has the same tokens there as here."""
    writers: Mapping[str, Callable[[Tokenizer], str]] = {
        "bytes": lambda tokenizer: _bytes().to_str(pretty=True),
        "file": lambda tokenizer: json.dumps(tokenizer.settings()["tokenizer"], ensure_ascii=False, indent=2),
        "symbols": lambda tokenizer: _symbols(tokenizer.vocab_size).to_str(pretty=True),
    }
    (folder / FILE_NAME).write_text(writers[tokenizer.kind](tokenizer), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _bytes() -> TokenizerFile:
    """Byte-level BPE without merges, the letter of a byte numbered by the byte."""
    tokenizer = TokenizerFile(models.BPE(vocab={letter: byte for byte, letter in _letters().items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _letters() -> dict[int, str]:
    """The letter that byte-level BPE writes for each byte (Radford et al. 2019, GPT-2's vocabulary).

    A printable character of Latin-1 stands for itself; the other bytes, in their order, for those from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + place) for place, byte in enumerate(others)}


def _symbols(vocab_size: int) -> TokenizerFile:
    tokenizer = TokenizerFile(models.WordLevel({str(symbol): symbol for symbol in range(vocab_size)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer
