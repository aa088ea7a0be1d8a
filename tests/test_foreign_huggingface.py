"""Hugging Face models of random weights run chosen kernels and stay what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign_models import QUIET, assert_same, calls_in, compiled, tensors
from torch import Tensor, nn

from subquad import compile_model
from subquad.compiler.foreign.compile_foreign import attention_calls
from subquad.compiler.options import CompileOptions

transformers = pytest.importorskip("transformers", minversion="5", reason="needs subquad[hf]")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = SIZES | {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T = 13


def llama(written: str, **options: Any) -> nn.Module:
    config = transformers.LlamaConfig(**TEXT | {"num_key_value_heads": 2, "attn_implementation": written} | options)
    return transformers.LlamaForCausalLM(config).eval()  # type: ignore[no-any-return]


def mistral(written: str, **options: Any) -> nn.Module:
    config = transformers.MistralConfig(
        **TEXT | {"num_key_value_heads": 2, "sliding_window": 5, "attn_implementation": written} | options
    )
    return transformers.MistralForCausalLM(config).eval()  # type: ignore[no-any-return]


def gpt2(written: str, **options: Any) -> nn.Module:
    config = transformers.GPT2Config(
        **{"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 64, "bos_token_id": 1,
           "eos_token_id": 2, "attn_implementation": written} | options
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()  # type: ignore[no-any-return]


def bert(written: str, **options: Any) -> nn.Module:
    return transformers.BertModel(  # type: ignore[no-any-return]
        transformers.BertConfig(**TEXT | {"attn_implementation": written} | options)
    ).eval()


def vit(written: str, **options: Any) -> nn.Module:
    config = transformers.ViTConfig(**SIZES | {"image_size": 24, "patch_size": 8, "attn_implementation": written})
    return transformers.ViTModel(config).eval()  # type: ignore[no-any-return]


def tokens() -> Tensor:
    return torch.randint(3, 50, (2, T))


def left_padded() -> Tensor:
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, :4] = 0
    return mask


def inputs_of(build: Callable[..., nn.Module]) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 24, 24)} if build is vit else {"input_ids": tokens()}


def run_with(inputs: dict[str, Tensor]) -> Callable[[nn.Module], object]:
    def run(model: nn.Module) -> object:
        dtype = next(model.parameters()).dtype
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        return model(**cast, **({} if "pixel_values" in inputs else {"use_cache": False}))

    return run


@pytest.mark.parametrize("written", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("build", "kind"), [(llama, (True, 0)), (gpt2, (True, 0)), (bert, (False, 0)), (vit, (False, 0)),
                        (mistral, (True, 5))]
)  # fmt: skip
def test_a_model_runs_kernels_and_says_the_same(
    build: Callable[..., nn.Module], kind: tuple[bool, int], written: str
) -> None:
    inputs = inputs_of(build)
    before, after, plan = compiled(build(written), inputs)
    assert not plan.uncaptured
    assert [(choice.options["causal"], choice.options["window"]) for choice in plan.choices] == [kind] * 2
    assert all("rewritten by huggingface" in note for note in plan.notes)
    assert calls_in(lambda: run_with(inputs)(after)) == [kind] * 2
    assert calls_in(lambda: run_with(inputs)(before)) == []
    assert after.config._attn_implementation == f"subquad_{written}"
    assert before.config._attn_implementation == written
    assert list(after.state_dict()) == list(before.state_dict())
    assert_same(before, after, run_with(inputs))


@pytest.mark.parametrize("written", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [llama, bert, mistral])
def test_padding_is_what_it_was_in_every_row(build: Callable[..., nn.Module], written: str) -> None:
    inputs = {"input_ids": tokens(), "attention_mask": left_padded()}
    before, after, plan = compiled(build(written), inputs)
    assert not plan.uncaptured
    assert ["padding run as written (mask from attention_mask)" in note for note in plan.notes] == [True]
    assert calls_in(lambda: run_with(inputs)(after)) == []
    for old, new in zip(tensors(run_with(inputs)(before)), tensors(run_with(inputs)(after))):
        assert torch.equal(old.isnan(), new.isnan())
        assert torch.equal(old.nan_to_num(), new.nan_to_num())
    whole = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones(2, T, dtype=torch.long)}
    assert len(calls_in(lambda: run_with(whole)(after))) == 2
    assert_same(before, after, run_with(whole))


@pytest.mark.parametrize("written", ["sdpa", "eager"])
def test_packed_documents_are_not_taken_for_a_causal_mask(written: str) -> None:
    before, after, _ = compiled(llama(written), {"input_ids": tokens()})
    positions = torch.cat([torch.arange(5), torch.arange(T - 5)]).expand(2, -1)
    inputs = {"input_ids": tokens(), "position_ids": positions}
    assert calls_in(lambda: run_with(inputs)(after)) == []
    for old, new in zip(tensors(run_with(inputs)(before)), tensors(run_with(inputs)(after))):
        assert torch.equal(old, new)


@pytest.mark.parametrize("written", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [llama, gpt2, mistral])
def test_generation_with_a_cache_says_the_same(build: Callable[..., nn.Module], written: str) -> None:
    before, after, _ = compiled(build(written), {"input_ids": tokens()})
    prompt = tokens()
    said = [model.generate(prompt, max_new_tokens=6, do_sample=False) for model in (before, after)]
    assert torch.equal(*said)
    assert said[0].shape[1] > T


def test_a_prefill_after_a_cache_says_the_same() -> None:
    before, after, _ = compiled(llama("sdpa"), {"input_ids": tokens()})
    found = []
    for model in (before, after):
        torch.manual_seed(0)
        first, rest = tokens(), tokens()
        cache = model(first, use_cache=True).past_key_values
        found.append(model(rest, past_key_values=cache).logits)
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("written", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [gpt2, bert])
def test_dropout_stays_while_training(build: Callable[..., nn.Module], written: str) -> None:
    inputs = {"input_ids": tokens()}
    before, after, plan = compiled(build(written).train(), inputs)
    assert any("dropout of 0.1" in note for note in plan.notes)
    run = run_with(inputs)
    assert calls_in(lambda: run(after)) == []

    def drawn(model: nn.Module, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return tensors(run(model))[0]

    assert torch.equal(drawn(before, 3), drawn(after, 3))
    assert not torch.equal(drawn(after, 3), drawn(after, 4))
    before.eval(), after.eval()
    assert torch.equal(drawn(after, 3), drawn(after, 4))
    assert len(calls_in(lambda: run(after))) == 2
    assert_same(before, after, run)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_compiled_model_learns_as_the_original_does(build: Callable[..., nn.Module]) -> None:
    dropless = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if build is gpt2 else {}
    ids = tokens()
    before, after, _ = compiled(build("sdpa", **dropless).train(), {"input_ids": ids})
    assert calls_in(lambda: after(input_ids=ids, use_cache=False)) == [(True, 0)] * 2
    histories = []
    for model in (before, after):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        history = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        histories.append(history)
    assert histories[1][-1] < histories[1][0]
    assert torch.tensor(histories[0]).allclose(torch.tensor(histories[1]), atol=1e-3)


def test_probabilities_that_are_asked_for_come_from_eager_attention() -> None:
    inputs = {"input_ids": tokens()}
    before, after, _ = compiled(bert("eager"), inputs)
    old, new = (model(**inputs, output_attentions=True).attentions for model in (before, after))
    assert len(old) == len(new) == 2
    for a, b in zip(old, new):
        assert torch.equal(a, b)


def test_another_model_of_the_same_configuration_is_not_touched() -> None:
    first = llama("sdpa")
    second = transformers.LlamaForCausalLM(first.config).eval()  # the configuration is shared, not copied
    second.load_state_dict(first.state_dict())
    ids = tokens()
    expected = second(ids, use_cache=False).logits
    compile_model(first, {"input_ids": ids}, target="cpu", options=QUIET)
    assert calls_in(lambda: second(ids, use_cache=False)) == []
    assert torch.equal(second(ids, use_cache=False).logits, expected)


def test_copies_and_saved_models_stay_usable(tmp_path: Any) -> None:
    ids = tokens()
    _, after, _ = compiled(llama("sdpa"), {"input_ids": ids})
    expected = after(ids, use_cache=False).logits
    twin = copy.deepcopy(after)
    assert calls_in(lambda: twin(ids, use_cache=False)) == [(True, 0)] * 2
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(after(ids, use_cache=False).logits, expected)
    after.save_pretrained(tmp_path)
    assert "subquad" not in (tmp_path / "config.json").read_text()
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(loaded(ids, use_cache=False).logits, expected, atol=1e-5)


def test_compiling_again_follows_the_new_choice() -> None:
    inputs = {"input_ids": tokens()}
    _, after, plan = compiled(llama("eager"), inputs)
    again = CompileOptions(measure=False, pins={"softmax_attention": "reference"})
    compile_model(after, inputs, target="cpu", options=again)
    assert {call.chosen[True, 0].kernel for call in attention_calls(after).values()} == {"reference"}
    assert after.config._attn_implementation == "subquad_eager"
    assert len(attention_calls(after)) == len(plan.schedule) == 2


def test_a_softcap_is_declined_by_name() -> None:
    config = transformers.Gemma2Config(
        **TEXT | {"num_key_value_heads": 2, "head_dim": 8, "attn_implementation": "eager", "sliding_window": 4}
    )
    inputs = {"input_ids": tokens()}
    before, after, plan = compiled(transformers.Gemma2ForCausalLM(config).eval(), inputs)
    assert len(plan.uncaptured) == 2
    assert all("tanh" in entry.reason for entry in plan.uncaptured)
    assert torch.equal(before(**inputs, use_cache=False).logits, after(**inputs, use_cache=False).logits)


def test_a_learned_bias_is_declined_by_name() -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50, attn_implementation="eager"
    )
    inputs = {"input_ids": tokens()}
    before, after, plan = compiled(transformers.T5EncoderModel(config).eval(), inputs)
    assert len(plan.uncaptured) == 2
    assert all("learned" in entry.reason for entry in plan.uncaptured)
    assert torch.equal(before(**inputs).last_hidden_state, after(**inputs).last_hidden_state)


def test_a_compiled_model_goes_through_torch_compile() -> None:
    inputs = {"input_ids": tokens()}
    before, after, _ = compiled(llama("sdpa"), inputs)
    fast = torch.compile(after, backend="aot_eager")
    assert torch.allclose(
        fast(**inputs, use_cache=False).logits, before(**inputs, use_cache=False).logits, atol=1e-5
    )
