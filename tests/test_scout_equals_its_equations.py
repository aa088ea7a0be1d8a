"""SCOUT-Mamba in float64 equals an implementation written from the paper's equations, outputs and all gradients."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import scout_oracle
import torch
from torch import Tensor

from subquad.compiler.example import Example
from subquad.compiler.options import CompileOptions
from subquad.compiler.pipeline import compile_model
from subquad.model.build import build_model
from subquad.model.language_model import LanguageModel
from subquad.schema import ChannelMixerConfig, ModelConfig

TOLERANCE = 1e-9
HEADS, VOCAB = 2, 19


def small_scout(segment_len: int, *, tie: bool = True) -> LanguageModel:
    """Two SCOUT layers: four blocks."""
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=12,
        num_layers=4,
        vocab_size=VOCAB,
        context_len=64,
        schedule=["mamba", "segment_attention"],
        mixers={
            "mamba": {"mixer": "mamba", "state_dim": 5, "dt_rank": 3},
            "segment_attention": {"mixer": "segment_attention", "num_heads": HEADS, "segment_len": segment_len},
        },
        channel_mixer=ChannelMixerConfig(d_hidden=20),
        tie_embeddings=tie,
        init_std=0.3,
    )
    model = build_model(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith((".D", "conv.bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))  # ones and zeros would hide a forgotten factor
    return model


def oracle_weights(model: LanguageModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The oracle's dictionary, and its leaves by the project's names."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    layers = []
    for first in range(0, 4, 2):
        local, far = f"blocks.{first}.", f"blocks.{first + 1}."
        mamba = {
            "W_in": "in_proj.weight", "conv_b": "conv.bias", "W_x": "x_proj.weight", "W_dt": "dt_proj.weight",
            "b_dt": "dt_proj.bias", "A_log": "A_log", "D": "D", "W_out": "out_proj.weight",
        }  # fmt: skip
        layer: dict[str, Any] = {key: leaves[f"{local}mixer.{name}"] for key, name in mamba.items()}
        layer["conv_w"] = leaves[f"{local}mixer.conv.weight"].squeeze(1)
        for key, name in (("W_q", "q_proj"), ("W_k", "k_proj"), ("W_v", "v_proj"), ("W_o", "o_proj")):
            layer[key] = leaves[f"{far}mixer.{name}.weight"]
        for number, name in enumerate((f"{local}norm", f"{local}channel_norm", f"{far}norm", f"{far}channel_norm")):
            layer[f"norm_{number + 1}"] = leaves[f"{name}.weight"]
        for key, block in (("mlp_1", local), ("mlp_2", far)):
            layer[key] = {part: leaves[f"{block}channel_mixer.{part}.weight"] for part in ("gate", "up", "down")}
        layers.append(layer)
    weights = {"embedding": leaves["embedding.weight"], "norm": leaves["norm.weight"], "layers": layers}
    if "lm_head.weight" in leaves:
        weights["head"] = leaves["lm_head.weight"]
    return weights, leaves


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-12))


@pytest.mark.oracle("mamba", "segment_attention")
@pytest.mark.parametrize(("segment_len", "length", "tie"), [(4, 23, True), (1, 9, False), (10, 7, True), (3, 1, False)])
def test_scout_mamba_equals_its_equations(segment_len: int, length: int, tie: bool) -> None:
    model = small_scout(segment_len, tie=tie)
    tokens = torch.randint(0, VOCAB, (length,))
    weights, leaves = oracle_weights(model)
    expected = scout_oracle.logits(weights, tokens, heads=HEADS, segment_len=segment_len)
    found = model(tokens[None])[0]
    assert relative_error(found, expected) <= TOLERANCE
    pull = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * pull).sum(), list(leaves.values()), allow_unused=True)
    gradients = torch.autograd.grad((found * pull).sum(), list(model.parameters()))
    for name, mine, theirs in zip(leaves, gradients, expected_gradients, strict=True):
        if theirs is None or theirs.abs().max() < 1e-12:
            assert mine.abs().max() < 1e-12, name
        else:
            assert relative_error(mine, theirs) <= TOLERANCE, name


def test_a_compiled_scout_mamba_equals_the_same_equations() -> None:
    model = small_scout(4)
    tokens = torch.randint(0, VOCAB, (23,))
    weights, _ = oracle_weights(model)
    example = Example(tokens_shape=(1, 23), dtype="float64", training=True)
    model, _ = compile_model(model, example, target="cpu", options=CompileOptions(measure=False))
    expected = scout_oracle.logits(weights, tokens, heads=HEADS, segment_len=4)
    assert relative_error(model(tokens[None])[0], expected) <= TOLERANCE


def test_the_comparison_notices_a_segment_that_is_one_token_longer() -> None:
    model = small_scout(4)
    tokens = torch.randint(0, VOCAB, (23,))
    weights, _ = oracle_weights(model)
    wrong = scout_oracle.logits(weights, tokens, heads=HEADS, segment_len=5)
    assert relative_error(model(tokens[None])[0], wrong) > 1e-3


def test_the_oracle_imports_nothing_of_the_project() -> None:
    tree = ast.parse(Path(scout_oracle.__file__).read_text())
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {"__future__", "math", "torch", "typing"}
