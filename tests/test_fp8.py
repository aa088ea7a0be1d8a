"""Linear maps in float8: torchao's modules in the right places, their errors, and what a step of them computes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from subquad.compiler.compile_model import compile_model
from subquad.compiler.example import Example
from subquad.compiler.options import CompileOptions
from subquad.errors import ConfigError
from subquad.model.build import build_model
from subquad.model.language_model import LanguageModel
from subquad.schema import ChannelMixerConfig, ModelConfig, RunConfig
from subquad.training import fp8
from subquad.training.fit import train

TinyRun = Callable[..., RunConfig]
MIXERS: dict[str, Any] = {
    "softmax_attention": {"mixer": "softmax_attention", "num_heads": 2},
    "mamba": {"mixer": "mamba", "state_dim": 4},
}
TOLERANCE = {"tensorwise": 2**-3, "rowwise": 0.1, "rowwise_with_gw_hp": 0.1}
"""Of a gradient's norm: e4m3 has 3 bits of fraction, so that a factor is off by up to 2^-4, and both are rounded; with
one scale a tensor gradients are e5m2, off by up to 2^-3."""


def model(d_hidden: int = 64) -> LanguageModel:
    torch.manual_seed(0)
    return build_model(
        ModelConfig(
            d_model=32, num_layers=2, vocab_size=64, context_len=16, tie_embeddings=False, schedule=list(MIXERS),
            mixers=MIXERS, channel_mixer=ChannelMixerConfig(d_hidden=d_hidden),
        )
    )  # fmt: skip


def needs_torchao() -> None:
    pytest.importorskip("torchao", reason="an extra that make does not install")


@pytest.mark.filterwarnings("ignore")  # torchao's own
@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_a_step_is_that_of_float32_up_to_what_float8_rounds(recipe: str) -> None:
    needs_torchao()
    exact, rounded = model(), model()
    converted = fp8.convert_to_fp8(rounded, recipe, emulate=True)
    assert "1.channel_mixer.gate" in converted
    assert rounded.state_dict().keys() == exact.state_dict().keys()
    assert type(rounded.lm_head) is nn.Linear
    example = Example(tokens_shape=(2, 16), training=True)
    for each in (exact, rounded):
        compile_model(each, example, target="cpu", options=CompileOptions(measure=False))
    tokens = torch.randint(64, (2, 16))
    gradients = []
    for each in (exact, rounded):
        each(tokens, None, tokens).backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    for one, other in zip(*gradients):
        assert one is not None and other is not None
        assert (one - other).norm() < TOLERANCE[recipe] * one.norm()
    assert any(not torch.equal(one, other) for one, other in zip(*gradients)), "something is rounded"


@pytest.mark.filterwarnings("ignore")
def test_maps_of_other_widths_stay() -> None:
    needs_torchao()
    converted = fp8.convert_to_fp8(model(d_hidden=40), "rowwise", emulate=True)
    assert converted
    assert not any("channel_mixer" in name for name in converted)


def test_what_cannot_be_float8_is_refused(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="fp8 is 'true'"):
        train(tiny_run("run", fp8="true"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="torchao is not installed"):
        fp8.check_fp8(tiny_run("run", fp8="rowwise"), torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="the CPU has no float8 products"):
        fp8.check_fp8(tiny_run("run", fp8="rowwise"), torch.device("cpu"))
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match="A100 has no float8 products"):
        fp8.check_fp8(tiny_run("run", fp8="rowwise"), cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp8.check_fp8(tiny_run("run", fp8="rowwise"), cuda)
    for settings, what in (
        ({"batch_size": 3, "seq_len": 24}, "72 tokens at a time"),
        ({"precision": "float32"}, "a bfloat16 run"),
        ({"tensor_parallel": 2}, "never tried"),
    ):
        with pytest.raises(ConfigError, match=what):
            fp8.check_fp8(tiny_run("run", fp8="rowwise", **settings), cuda)
