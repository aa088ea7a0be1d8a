"""Generation: the newest good checkpoint, through prefill and decode, streamed; what a seed and a temperature do."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from decoding_models import types_that_kernels_are_chosen_for
from torch.utils._pytree import tree_leaves

from subquad.errors import ConfigError, DataError, ResumeError, RunError
from subquad.schema import GenerateConfig, RunConfig
from subquad.training.continuation import Continuation, continued
from subquad.training.fit import train
from subquad.training.generate import generate, load_run
from subquad.training.prompts import read_prompts
from subquad.training.sampling import Sampler, Sampling, penalised, probabilities
from subquad.training.text_stream import StopText, TextStream
from subquad.training.tokenizer import ByteTokenizer, SymbolTokenizer


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def trained(tiny_run: Callable[..., RunConfig], once: Path, tmp_path: Path) -> Path:
    """A run of a test's own: trained once, copied for each."""
    if not once.exists():
        train(tiny_run(str(once), max_steps=5))
    return Path(shutil.copytree(once, tmp_path / "run"))


def text_of(run: Path, **settings: object) -> str:
    out = io.StringIO()
    (text,) = generate(GenerateConfig(run=str(run), **({"max_tokens": 30} | settings)), out=out)  # type: ignore[arg-type]
    assert out.getvalue() == text + "\n"
    return text


def test_text_is_streamed_and_its_speed_told(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pieces: list[str] = []

    class Recording(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return super().write(text)

    (text,) = generate(GenerateConfig(run=str(trained), prompt="the ", max_tokens=30), out=Recording())
    assert "".join(pieces) == text + "\n"
    assert sum(bool(piece) for piece in pieces) > 5, "not all at once"
    told = capsys.readouterr().err
    assert "30 tokens, " in told
    # Keys and values of two layers of 32 channels, float32, of 4 tokens of the prompt and 29 that were read.
    assert "carry of a sequence after 33 tokens: 16.50 KiB (softmax_attention 16.50 KiB in 2 layers)" in told


def test_a_seed_gives_one_text_and_temperature_zero_needs_none(trained: Path) -> None:
    assert text_of(trained, seed=1) == text_of(trained, seed=1) != text_of(trained, seed=2)
    assert text_of(trained, seed=1, temperature=0) == text_of(trained, seed=2, temperature=0)
    assert text_of(trained, seed=1, top_k=1) == text_of(trained, temperature=0)


def test_decoding_says_what_the_whole_sequence_would(trained: Path) -> None:
    model, tokenizer, device = load_run(trained)
    prompt = tokenizer.encode("the cat")
    asked = Continuation(0, prompt, tokenizer, GenerateConfig(temperature=0, max_tokens=12))
    tokens = tokenizer.encode("".join(piece for _, piece in continued(model, [asked], device)))
    assert len(tokens) == 12, "the corpus is ASCII"
    sequence = list(prompt)
    with torch.inference_mode():
        for token in tokens:
            assert int(model(torch.tensor([sequence]))[0, -1].argmax()) == token
            sequence.append(token)


def test_an_empty_prompt_starts_a_line(trained: Path) -> None:
    assert text_of(trained, prompt="", temperature=0) == text_of(trained, prompt="\n", temperature=0)


def test_a_synthetic_run_speaks_in_symbols(tiny_run: Callable[..., RunConfig]) -> None:
    data = {"name": "synthetic", "task": "copying", "sizes": [4]}
    run = train(tiny_run("copying", max_steps=2, run={"data": data})).run_dir
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


def test_a_text_ends_before_a_stop_string_and_shows_nothing_of_it() -> None:
    stop = StopText(["ab", "abcd", "x"])
    assert [stop.add(piece) for piece in ("a", "a", "c", "a", "bc")] == ["", "a", "ac", "", ""]
    assert stop.reached
    assert stop.add("more") == stop.rest() == ""
    stop = StopText(["<end>"])
    assert [stop.add(piece) for piece in ("1 < 2 <en", "d", ".")] == ["1 < 2 ", "", "<end."]
    assert [stop.add("<e"), stop.rest(), stop.reached] == ["", "<e", False]
    first = StopText(["later", "a"])
    assert first.add("a later") == ""


def test_probabilities_are_the_softmax_under_its_limits() -> None:
    shares = torch.tensor([0.2, 0.5, 0.3])
    for settings, expected in (
        ({}, [0.2, 0.5, 0.3]),
        ({"top_k": 2}, [0, 0.625, 0.375]),
        ({"top_k": 99}, [0.2, 0.5, 0.3]),
        ({"temperature": 1e-300}, [0, 1, 0]),
        ({"temperature": 0.5}, [0.04 / 0.38, 0.25 / 0.38, 0.09 / 0.38]),
        ({"top_p": 0.01}, [0, 1, 0]),  # the likeliest always stays
        ({"top_p": 0.6}, [0, 0.625, 0.375]),  # the token that passes the share is one of them
        ({"top_p": 0.9}, [0.2, 0.5, 0.3]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0]),  # of what top_k has left, 0.625
        ({"min_p": 0.5}, [0, 0.625, 0.375]),
        ({"min_p": 1.0}, [0, 1, 0]),
    ):
        found = probabilities(torch.log(shares), Sampling(**settings))  # type: ignore[arg-type]
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.float32), atol=1e-6), settings


def test_a_repetition_penalty_makes_what_came_before_less_likely() -> None:
    logits = torch.tensor([2.0, -2.0, 1.5, -1.0])
    assert penalised(logits, {0, 1}, 2.0).tolist() == [1.0, -4.0, 1.5, -1.0]
    assert penalised(logits, set(), 2.0).tolist() == logits.tolist()
    greedy = Sampler(Sampling(temperature=0, repetition_penalty=2.0), 0, prompt=[])
    assert [greedy(logits) for _ in range(3)] == [0, 2, 0], "1.0 for 0 and 1.5 for 2, then 0.75 for 2"


def test_draws_follow_the_probabilities() -> None:
    draw = Sampler(Sampling(), 0, prompt=[])
    count = 4000
    drawn = Counter(draw(torch.log(torch.tensor([0.5, 0.3, 0.2]))) for _ in range(count))
    for token, share in enumerate((0.5, 0.3, 0.2)):
        # Five standard deviations of a binomial share.
        assert abs(drawn[token] / count - share) <= 5 * (share * (1 - share) / count) ** 0.5


def test_logits_that_are_not_numbers_end_the_text() -> None:
    with pytest.raises(RunError, match="not finite"):
        Sampler(Sampling(), 0, prompt=[])(torch.tensor([0.0, torch.nan]))


def test_a_text_stops_at_a_string_or_a_token(trained: Path) -> None:
    whole = text_of(trained, temperature=0)
    stop = whole[3:5]
    assert text_of(trained, temperature=0, stop=[stop]) == whole[: whole.index(stop)]
    assert text_of(trained, temperature=0, stop_ids=[ord(whole[4])]) == whole[: whole.index(whole[4])]


def test_a_file_of_prompts_gives_what_each_prompt_gives_alone(trained: Path, tmp_path: Path) -> None:
    prompts = ["the cat", "a", "the dog", "it rained while", "the cat"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("\n".join(json.dumps({"prompt": prompt, "id": prompt[:3]}) for prompt in prompts) + "\n\n")
    results = tmp_path / "results.jsonl"
    texts = generate(
        GenerateConfig(run=str(trained), prompts=str(lines), out=str(results), max_tokens=9, seed=5, batch_size=3)
    )
    alone = [text_of(trained, prompt=prompt, seed=5 + i, max_tokens=9) for i, prompt in enumerate(prompts)]
    assert texts == alone
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(record["index"], record["id"]) for record in records] == [(i, p[:3]) for i, p in enumerate(prompts)]
    assert [record["text"] for record in records] == alone
    for record in records:
        read = len(record["prompt"]) + record["num_tokens"] - 1
        assert record["carry_bytes"] == {"softmax_attention": 2 * 2 * 32 * 4 * read}, "layers, k and v, channels, bytes"
        assert record["ending"] == "length"
    with pytest.raises(ConfigError, match="File exists"):
        generate(GenerateConfig(run=str(trained), prompts=str(lines), out=str(results)))


def test_a_prompt_that_is_no_text_is_named(trained: Path) -> None:
    with pytest.raises(ConfigError, match="character 1 is half of a pair") as caught:
        generate(GenerateConfig(run=str(trained), prompt="b\udcff"))  # as Python reads bytes that are no UTF-8
    assert caught.value.where == "prompt"


def test_only_newlines_part_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(
        '{"prompt": "a\u2028b\x0cc"}\r\n{"prompt": "d"}'.replace("\x0c", "\\f").encode()
    )
    assert [prompt.text for prompt in read_prompts("prompts.jsonl")] == ["a\u2028b\x0cc", "d"]


def test_weights_are_narrow_where_asked_and_kernels_are_chosen_for_them(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen_for = types_that_kernels_are_chosen_for(monkeypatch)
    wide, narrow = (load_run(trained, dtype=dtype)[0] for dtype in ("float32", "bfloat16"))
    assert chosen_for == ["float32", "bfloat16"]
    tokens = torch.tensor([list(b"the cat sat")])
    with torch.inference_mode():
        exact, logits = wide(tokens), narrow(tokens)
        _, carry = narrow.prefill(tokens, narrow.empty_carry(1))
    assert logits.dtype == torch.bfloat16
    assert 0 < (logits.float() - exact).abs().max() < 0.05 * exact.abs().max(), "rounded, and no more"
    assert {leaf.dtype for leaf in tree_leaves(carry) if isinstance(leaf, torch.Tensor)} == {torch.bfloat16}
    assert text_of(trained, dtype="bfloat16")


def test_a_file_of_lines_holds_a_prompt_each(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the cat\n\na\n")
    out = io.StringIO()
    generate(GenerateConfig(run=str(trained), prompts="prompts.txt", max_tokens=2), out=out)
    assert [json.loads(line)["prompt"] for line in out.getvalue().splitlines()] == ["the cat", "a"]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("gone.txt", None, "No such file"),
        ("empty.txt", "\n \n", "holds no prompt"),
        ("bad.jsonl", '{"prompt": "a"}\nprompt', "no JSON"),
        ("bad.jsonl", '["a"]', "'prompt'"),
        ("bad.jsonl", '{"prompt": 3}', "'prompt'"),
        ("bad.jsonl", '{"prompt": "a", "text": "b"}', "'text'"),
        ("bad.jsonl", '{"prompt": "a", "id": "\\ud800"}', "half of a pair"),
    ],
)
def test_a_bad_file_of_prompts_is_named(name: str, content: str | None, what: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=what) as caught:
        generate(GenerateConfig(run="anywhere", prompts=name))
    assert name in caught.value.where


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": [""]}, "stop"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"prompt": "a", "prompts": "b"}, "prompts"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_a_bad_setting_is_named(settings: dict[str, object], where: str) -> None:
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
