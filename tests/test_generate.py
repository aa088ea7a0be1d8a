"""Generation: the newest good checkpoint, through prefill and decode, streamed; what a seed and a temperature do."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from subquad.errors import ConfigError, ResumeError
from subquad.schema import GenerateConfig, RunConfig
from subquad.training.fit import train
from subquad.training.generate import TextStream, generate, load_run, sampled, sampled_tokens
from subquad.training.tokenizer import ByteTokenizer, SymbolTokenizer


@pytest.fixture
def trained(tiny_run: Callable[..., RunConfig]) -> Path:
    return train(tiny_run("run", max_steps=5)).run_dir


def text_of(run: Path, **settings: object) -> str:
    out = io.StringIO()
    text = generate(GenerateConfig(run=str(run), **({"max_tokens": 30} | settings)), out=out)  # type: ignore[arg-type]
    assert out.getvalue() == text + "\n"
    return text


def test_text_is_streamed_and_its_speed_told(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pieces: list[str] = []

    class Recording(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return super().write(text)

    text = generate(GenerateConfig(run=str(trained), prompt="the ", max_tokens=30), out=Recording())
    assert "".join(pieces) == text + "\n"
    assert sum(bool(piece) for piece in pieces) > 5, "not all at once"
    assert "30 tokens, " in capsys.readouterr().err


def test_a_seed_gives_one_text_and_temperature_zero_needs_none(trained: Path) -> None:
    assert text_of(trained, seed=1) == text_of(trained, seed=1) != text_of(trained, seed=2)
    assert text_of(trained, seed=1, temperature=0) == text_of(trained, seed=2, temperature=0)
    assert text_of(trained, seed=1, top_k=1) == text_of(trained, temperature=0)


def test_decoding_says_what_the_whole_sequence_would(trained: Path) -> None:
    model, tokenizer, device = load_run(trained)
    prompt = tokenizer.encode("the cat")
    config = GenerateConfig(temperature=0, max_tokens=12)
    tokens = list(sampled_tokens(model, prompt, config, device))
    sequence = list(prompt)
    with torch.inference_mode():
        for token in tokens:
            assert int(model(torch.tensor([sequence]))[0, -1].argmax()) == token
            sequence.append(token)


def test_an_empty_prompt_starts_a_line(trained: Path) -> None:
    assert text_of(trained, prompt="", temperature=0) == text_of(trained, prompt="\n", temperature=0)


def test_a_synthetic_run_speaks_in_symbols(tiny_run: Callable[..., RunConfig]) -> None:
    run = train(tiny_run("copying", max_steps=2, run={"data": {"name": "copying", "num_symbols": 4}})).run_dir
    for prompt in ("", "3 4 5"):
        words = text_of(run, prompt=prompt, max_tokens=5).split()
        assert len(words) == 5
        assert all(word.isdigit() for word in words)


def test_a_character_waits_for_all_its_bytes() -> None:
    stream = TextStream(ByteTokenizer())
    pieces = [stream.add(byte) for byte in "aé€b".encode()]
    assert pieces == ["a", "", "é", "", "", "€", "b"]
    assert stream.rest() == ""
    assert [stream.add(byte) for byte in b"\xff"] == [""]
    assert stream.add(ord("c")) == "\ufffdc"
    assert stream.add(0xE2) == ""
    assert stream.rest() == "\ufffd"


def test_symbols_keep_their_spaces() -> None:
    stream = TextStream(SymbolTokenizer(20))
    assert "".join(stream.add(symbol) for symbol in (3, 14, 7)) == "3 14 7"


def test_samples_follow_the_softmax_and_its_limits() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    generator = torch.Generator().manual_seed(0)
    count = 4000
    for temperature, top_k, expected in (
        (1.0, 0, [0.5, 0.3, 0.2]),
        (1.0, 2, [0.625, 0.375, 0.0]),
        (0.5, 0, [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]),
        (1.0, 99, [0.5, 0.3, 0.2]),
    ):
        drawn = Counter(sampled(logits, temperature, top_k, generator) for _ in range(count))
        for token, share in enumerate(expected):
            # Five standard deviations of a binomial share.
            assert abs(drawn[token] / count - share) <= 5 * (share * (1 - share) / count) ** 0.5


@pytest.mark.parametrize(
    ("settings", "where"),
    [({"max_tokens": 0}, "max_tokens"), ({"temperature": -1.0}, "temperature"), ({"top_k": -1}, "top_k")],
)
def test_a_bad_setting_is_named(settings: dict[str, float], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        generate(GenerateConfig(run="anywhere", **settings))  # type: ignore[arg-type]
    assert caught.value.where == where


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ResumeError) as caught:
            generate(GenerateConfig(run=str(path)))
        assert caught.value.where == f"run={path}"
        assert str(path) in caught.value.what


def test_a_run_without_a_whole_checkpoint_is_named(trained: Path) -> None:
    for path in trained.glob("checkpoints/*/weights.safetensors"):
        path.unlink()
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ResumeError, match="no checkpoint"):
        generate(GenerateConfig(run=str(trained)))


def test_generation_chooses_its_own_kernels_whatever_training_ran(trained: Path) -> None:
    expected = text_of(trained, temperature=0)
    plan = json.loads((trained / "plan.json").read_text())
    plan["target"] = "another device"
    for choice in plan["choices"]:
        choice["kernel"] = "a kernel of that device"
    (trained / "plan.json").write_text(json.dumps(plan))
    assert text_of(trained, temperature=0) == expected
