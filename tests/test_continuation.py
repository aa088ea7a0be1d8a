"""Sequences continued together: each becomes what it becomes alone, whatever the mixers carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoding_models import model_of, taped
from torch import Tensor

from subquad.model.decoder import Capture, Decoder
from subquad.model.language_model import LanguageModel, ModelCarry
from subquad.model.model_carry import carry_bytes, joinable, joined, selected
from subquad.registry import load_registry
from subquad.schema import GenerateConfig
from subquad.training import continuation
from subquad.training.continuation import Continuation, continued
from subquad.training.tokenizer import SymbolTokenizer

MIXERS = (
    "segment_attention", "softmax_attention", "window", "mamba", "mamba2", "retnet", "gated_delta_net",
)  # fmt: skip
CONSTANT = {"mamba", "mamba2", "gated_delta_net"}
"""Those whose carries are alike at all lengths: a state, and no position."""
PROMPTS = [[1, 2, 3, 4, 5], [7], [3, 3], [5, 4, 3, 2, 1], [2] * 11]


def tokens_of(
    model: LanguageModel, prompts: list[list[int]], capture: Capture | None = None, **settings: object
) -> list[Continuation]:
    config = GenerateConfig(**({"max_tokens": 7, "temperature": 1.0} | settings))  # type: ignore[arg-type]
    sequences = [Continuation(i, prompt, SymbolTokenizer(16), config) for i, prompt in enumerate(prompts)]
    for _ in continued(model, sequences, torch.device("cpu"), capture=capture):
        pass
    return sequences


@pytest.mark.parametrize("mixers", [*((name,) for name in MIXERS), ("mamba", "segment_attention")], ids="-".join)
def test_prompts_of_unequal_length_are_continued_as_each_alone(mixers: tuple[str, ...]) -> None:
    model = model_of(*mixers)
    # One ends early, at a stop string: the others go on without it.
    free = tokens_of(model, PROMPTS)
    stop = free[2].text.split()[2]
    together = tokens_of(model, PROMPTS, stop=[f" {stop}"])
    assert any(sequence.ending == "stop" for sequence in together)
    for index, prompt in enumerate(PROMPTS):
        (alone,) = tokens_of(model, [prompt], stop=[f" {stop}"], seed=index)
        assert (together[index].text, together[index].ending) == (alone.text, alone.ending)
        assert together[index].carry_bytes == alone.carry_bytes


@pytest.mark.parametrize("mixers", [("mamba", "mamba2"), ("mamba", "segment_attention"), ("window",)], ids="-".join)
def test_replayed_steps_give_the_same_texts_as_sequences_end(
    mixers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, decoders = model_of(*mixers), list[Decoder]()
    expected = tokens_of(model, PROMPTS, max_tokens=12)
    stop = expected[0].text.split()[5]
    expected = tokens_of(model, PROMPTS, max_tokens=12, stop=[f" {stop}"])

    def decoder_of(*arguments: Any, **named: Any) -> Decoder:
        decoders.append(Decoder(*arguments, **named))
        return decoders[-1]

    monkeypatch.setattr(continuation, "Decoder", decoder_of)
    monkeypatch.setattr(continuation, "WORTH_A_GRAPH", 4)
    found = tokens_of(model, PROMPTS, capture=taped, max_tokens=12, stop=[f" {stop}"])
    assert [(one.text, one.ending, one.carry_bytes) for one in found] == [
        (one.text, one.ending, one.carry_bytes) for one in expected
    ]
    assert any(one.ending == "stop" for one in found)
    replayed = [decoder.graphs for decoder in decoders]
    assert any(replayed)
    assert len(decoders) > 1, "no batch shrank"
    decoders.clear()
    monkeypatch.setattr(continuation, "WORTH_A_GRAPH", 12)
    tokens_of(model, PROMPTS, capture=taped, max_tokens=12)
    assert not any(decoder.graphs for decoder in decoders), "twelve tokens are not worth it"


@pytest.mark.parametrize("name", MIXERS)
def test_a_continuation_is_what_the_whole_sequence_predicts(name: str) -> None:
    model = model_of(name)
    for sequence in tokens_of(model, PROMPTS, temperature=0):
        tokens = list(sequence.prompt)
        for token in map(int, sequence.text.split()):
            with torch.inference_mode():
                assert int(model(torch.tensor([tokens]))[0, -1].argmax()) == token
            tokens.append(token)


@pytest.mark.parametrize("name", MIXERS)
def test_states_of_constant_size_are_decoded_in_one_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = model_of(name), []
    decode: Callable[[Tensor, ModelCarry], tuple[Tensor, ModelCarry]] = model.decode

    def counted(token: Tensor, carry: ModelCarry) -> tuple[Tensor, ModelCarry]:
        sizes.append(len(token))
        return decode(token, carry)

    monkeypatch.setattr(model, "decode", counted)
    tokens_of(model, PROMPTS, max_tokens=3)
    assert set(sizes) == ({5} if name in CONSTANT else {2, 1})
    assert len(sizes) == (2 if name in CONSTANT else 2 * 4), "one decode fewer than tokens for each batch"


@pytest.mark.parametrize("name", sorted(CONSTANT))
def test_a_recurrent_carry_does_not_grow(name: str) -> None:
    short, long = (tokens_of(model_of(name), [[1, 2]], max_tokens=count)[0].carry_bytes for count in (2, 60))
    assert short == long != {name: 0}


def test_a_long_prompt_is_prefilled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("mamba", "segment_attention")
    whole = tokens_of(model, PROMPTS)
    monkeypatch.setattr(continuation, "PREFILL_TOKENS", 4)
    assert [sequence.text for sequence in tokens_of(model, PROMPTS)] == [sequence.text for sequence in whole]


@pytest.mark.parametrize("name", sorted(load_registry().mixers))
def test_carries_are_joined_and_parted_along_their_first_axis(name: str) -> None:
    model = model_of(name)
    tokens = torch.tensor([PROMPTS[0], PROMPTS[3]])
    with torch.inference_mode():
        _, both = model.prefill(tokens, model.empty_carry(2))
        apart = [model.prefill(tokens[[row]], model.empty_carry(1))[1] for row in (0, 1)]
        assert joinable(*apart)
        again = joined(apart)
        next_token = torch.tensor([3, 8])
        expected = model.decode(next_token, both)[0]
        assert torch.allclose(model.decode(next_token, again)[0], expected)
        swapped = selected(both, torch.tensor([1, 0]))
        assert torch.allclose(model.decode(next_token.flip(0), swapped)[0], expected.flip(0))
        assert carry_bytes(model, both) == {name: 2 * carry_bytes(model, apart[0])[name]}
        _, longer = model.prefill(tokens[:1, :4], model.empty_carry(1))
        if name in MIXERS:
            assert joinable(apart[0], longer) == (name in CONSTANT)
