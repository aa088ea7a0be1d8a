"""Layers that publish tensors to later ones, through every way in which a model runs; and recipes that cannot."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad import ConfigError, Example, ModelConfig, build_model, compile_model, load_config, train
from subquad.compiler.assign_mixers import assign_mixers
from subquad.compiler.choose import Chooser
from subquad.compiler.options import CompileOptions
from subquad.compiler.quality.measure import measure_quality
from subquad.compiler.step_work import step_work
from subquad.compiler.target import resolve_target
from subquad.contracts import Growth, MixerSpec, SharedTensor, Sharing
from subquad.model.language_model import LanguageModel
from subquad.sharing import sharing_by_layer
from subquad.testing.mixer_suite import assert_close, carry_bytes

RWKV7: Mapping[str, Any] = {
    "channel_mixer": None,
    "schedule": ["rwkv7", "rwkv_channel_mix"],
    "mixers": {
        "rwkv7": {"mixer": "rwkv7", "num_heads": 2, "blocks_per_layer": 2},
        "rwkv_channel_mix": {"mixer": "rwkv_channel_mix"},
    },
}
SHARED_KEYS: Mapping[str, Any] = {
    "schedule": ["near", "far", "far_reader", "near_reader"],
    "mixers": {
        "far": {"mixer": "softmax_attention", "num_kv_heads": 2, "kv": "publish"},
        "far_reader": {"mixer": "softmax_attention", "num_kv_heads": 2, "kv": "read"},
        "near": {"mixer": "window", "window": 3, "kv": "publish"},
        "near_reader": {"mixer": "window", "window": 3, "kv": "read"},
    },
}
SHARED_SUMMARIES: Mapping[str, Any] = {
    "schedule": ["window", "publisher", "window", "reader"],
    "mixers": {
        "window": {"mixer": "window", "window": 3},
        "publisher": {"mixer": "segment_attention", "segment_len": 3, "num_kv_heads": 2, "kv": "publish"},
        "reader": {"mixer": "segment_attention", "segment_len": 3, "num_kv_heads": 2, "kv": "read"},
    },
}
LAYOUTS = {"value residual": RWKV7, "shared keys": SHARED_KEYS, "shared summaries": SHARED_SUMMARIES}
TOKENS = torch.arange(22).view(2, 11) * 7 % 32


def config_of(layout: str, **changes: Any) -> ModelConfig:
    return ModelConfig(d_model=16, num_layers=4, vocab_size=32, context_len=64, **{**LAYOUTS[layout], **changes})


def model_of(layout: str) -> LanguageModel:
    """In float64, with parameters drawn so wide that what is read shows in the logits."""
    torch.manual_seed(0)
    model = build_model(config_of(layout)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def run(model: LanguageModel, call: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Logits, and the gradient of every parameter."""
    logits = (model if call is None else call)(TOKENS)
    return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for left, right in zip(found, expected, strict=True):
        assert_close(left, right)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reader_s_gradient_reaches_the_publisher_with_and_without_checkpointing(layout: str) -> None:
    model = model_of(layout)
    expected = run(model)
    assert all(gradient.abs().max() > 0 for gradient in expected[1:])
    model.activation_checkpointing = True
    assert_equal(run(model), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_documents_read_only_what_is_of_their_own(layout: str) -> None:
    model = model_of(layout)
    packed = model(TOKENS, torch.tensor([0, 4, 4, 11, 22], dtype=torch.int32)).flatten(0, 1)
    flat = TOKENS.flatten()
    separate = torch.cat([model(part[None])[0] for part in (flat[:4], flat[4:11], flat[11:])])
    assert_close(packed, separate)


@torch.no_grad()
def decoded(model: LanguageModel, split: int) -> Tensor:
    carry, outputs = model.empty_carry(len(TOKENS)), []
    for piece in (TOKENS[:, :2], TOKENS[:, 2:split]):
        logits, carry = model.prefill(piece, carry)
        outputs.append(logits)
    for t in range(split, TOKENS.shape[1]):
        logits, carry = model.decode(TOKENS[:, t], carry)
        outputs.append(logits.unsqueeze(1))
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefill_and_decode_equal_forward_as_written_and_by_graphs(layout: str) -> None:
    model = model_of(layout)
    expected = run(model)
    assert_close(decoded(model, 6), expected[0])
    example = Example(tokens_shape=(2, 11), training=True, decoding=True)
    compiled, plan = compile_model(model, example, target="cpu", options=CompileOptions(measure=False))
    assert not plan.uncaptured
    assert_equal(run(compiled), expected)
    assert_close(decoded(compiled, 6), expected[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_torch_compile_takes_the_whole_model(layout: str, checkpointing: bool) -> None:
    model = model_of(layout)
    expected = run(model)
    model.activation_checkpointing = checkpointing
    torch._dynamo.reset()
    assert_equal(run(model, torch.compile(model, backend="aot_eager", fullgraph=True)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_work_of_a_step_counts_publishers_and_readers_for_what_they_are(layout: str) -> None:
    config = config_of(layout)
    found = step_work(config, Example(tokens_shape=(2, 11), training=True), kind="cpu", checkpointing=False)
    assert found.parameters == sum(parameter.numel() for parameter in build_model(config).parameters())


def spec_of(name: str, **sharing: Mapping[str, SharedTensor]) -> MixerSpec:
    return MixerSpec(
        name=name, summary="", paper="", config=dict, build="", work_growth=Growth.LINEAR,
        carry_growth=Growth.CONSTANT, shares=lambda config, context: Sharing(**sharing),
    )  # fmt: skip


NARROW, WIDE = SharedTensor(shape=(2, 8)), SharedTensor(shape=(2, 16))
PUBLISHER, READER = spec_of("publisher", publishes={"a": NARROW}), spec_of("reader", reads={"a": NARROW})
PLAIN, WIDER = spec_of("plain"), spec_of("wider", publishes={"a": WIDE, "b": NARROW})


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ([PLAIN, READER], r"layer 1 \(reader\) reads 'a', and no earlier layer publishes it \(they publish nothing\)"),
        ([READER, PUBLISHER], r"layer 0 \(reader\) reads 'a', and no earlier layer publishes it"),
        (
            [PUBLISHER, WIDER, READER],
            r"layer 2 \(reader\) reads 'a' of 2 x 8 numbers a token; the last one before it is of 2 x 16 numbers",
        ),
    ],
)
def test_a_reader_without_its_publisher_is_refused_by_name(specs: list[MixerSpec], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sharing_by_layer([(spec.name, spec, {}) for spec in specs], d_model=16, context_len=64)


def test_readers_get_the_last_publisher_s_and_others_nothing() -> None:
    specs = [WIDER, PUBLISHER, PLAIN, READER]
    places = sharing_by_layer([(spec.name, spec, {}) for spec in specs], d_model=16, context_len=64)
    assert [bool(sharing) for _, sharing in places] == [True, True, False, True]
    assert places[3][0].published == {"a": NARROW, "b": NARROW}


def test_only_the_first_layer_of_rwkv7_publishes_and_every_later_one_reads() -> None:
    blocks: Any = model_of("value residual").blocks
    assert [list(block.sharing.publishes) for block in blocks] == [["rwkv7.value"], [], [], []]
    assert [list(block.sharing.reads) for block in blocks] == [[], [], ["rwkv7.value"], []]


def test_layers_that_read_of_each_other_are_not_exchanged_one_by_one() -> None:
    config = config_of("value residual")
    with pytest.raises(ConfigError, match=r"layer 2 of the run reads rwkv7\.value of earlier layers"):
        measure_quality(
            build_model(config), config, ["rwkv7"], "local_error", [], [],
            steps=1, learning_rate=1e-3, seed=0, origin="", progress=lambda *_: None,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.schedule=[reader,publisher]", "layer 0 (reader) reads 'softmax_attention.keys', and no earlier layer"),
        ("model.mixers.reader.num_kv_heads=2", "of 2 x 48 numbers a token, rope_theta 1000000.0; the last one before"),
        ("model.mixers.reader.rope_theta=500", "rope_theta 500.0; the last one before it is of 1 x 48 numbers a token"),
        ("model.mixers.reader.kv=read_it", "kv is 'read_it'"),
        ("model.d_model=190", "4 heads do not divide the width 190"),
    ],
)
def test_a_recipe_whose_readers_find_nothing_is_refused_when_it_is_composed(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(["model=transformer_cla2", override])


def test_summaries_are_shared_by_segments_of_one_length_alone() -> None:
    with pytest.raises(ConfigError, match=re.escape("segment_len 5; the last one before it is of 4 x 48 numbers")):
        load_config(["model=scout_mamba_cla2", "model.mixers.reader.segment_len=5"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=transformer", "model.mixers.softmax_attention.bidirectional=true"], "sees later tokens, and runs"),
        (["model=mamba", "model.mixers.mamba.bidirectional=true"], "'mamba' sees later tokens"),
        (["model=samba", "model.mixers.window.bidirectional=true"], "'window' sees later tokens"),
        (["model=transformer_cla2", "model.mixers.reader.bidirectional=true"], "has its own keys and values, and kv"),
    ],
)
def test_a_run_that_predicts_the_next_token_takes_no_mixer_that_sees_it(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(overrides)


def test_nor_does_one_that_was_configured_in_python() -> None:
    config = load_config(["model=transformer", "trainer=smoke", "trainer.accelerator=cpu", "compiler.measure=false"])
    config.model.mixers["softmax_attention"]["bidirectional"] = True
    with pytest.raises(ConfigError, match="layer 0 sees later tokens"):
        train(config)


def assigned_schedule(*overrides: str) -> list[str]:
    config = load_config(["target=cpu", "trainer.batch_size=2", "trainer.seq_len=16", *overrides])
    chooser = Chooser(resolve_target("cpu"), CompileOptions(measure=False))
    config.compiler.measure = False
    return assign_mixers(config, resolve_target("cpu"), chooser)[0].model.schedule


def test_an_auto_layer_may_publish_and_not_read() -> None:
    overrides = ["model=transformer_cla2", "model.candidates=[publisher]"]
    assert assigned_schedule(*overrides, "model.schedule=[auto,reader]") == ["publisher", "reader"] * 2
    with pytest.raises(ConfigError, match=r"'reader' is no candidate: it reads softmax_attention\.keys"):
        assigned_schedule("model=transformer_cla2", "model.candidates=[reader]", "model.schedule=[publisher,auto]")


@pytest.mark.parametrize(
    ("recipe", "kept"),
    [("transformer_cla2", [2 * 27 * 48 * 4, 0] * 2), ("scout_mamba_cla2", [2 * 2 * 192 * 4, 0])],
    ids=["all tokens", "2 summaries of 10 tokens each"],
)
def test_a_cache_is_kept_by_publishers_alone(recipe: str, kept: list[int]) -> None:
    config = load_config([f"model={recipe}"]).model
    config.vocab_size, config.context_len = 64, 64
    model: Any = build_model(config)
    _, carry = model.prefill(torch.zeros(1, 27, dtype=torch.int64), model.empty_carry(1))
    sizes = [carry_bytes(part) for block, part in zip(model.blocks, carry) if block.sharing]
    assert sizes == kept
