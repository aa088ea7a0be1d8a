"""The recipes of this plugin: each composes, the laptop size runs, the paper's sizes have their block's count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from subquad import build_model, load_config

PACKAGE = Path(__file__).resolve().parent.parent
README = (PACKAGE / "README.md").read_text(encoding="utf-8")


def mamba3_block(d: int, r: int, d_hidden: int) -> int:
    """W_in and W_out of 6 d^2, r pairs of B and C of 128; heads of 64 with dt, rate, trap, D and biases; 32 angles."""
    c, n = 2 * d, 128
    h = c // 64
    maps = d * (2 * c + 2 * r * n + 3 * h + n // 4) + c * d
    return maps + 2 * h + 2 * h * r * n + 2 * n + (3 * r * c if r > 1 else 0) + 3 * d * d_hidden + 2 * d


LAYOUTS = {"mamba3_440m": mamba3_block(1024, 1, 2048), "mamba3_mimo_440m": mamba3_block(1024, 4, 1792)}


@pytest.mark.parametrize(("recipe", "block"), LAYOUTS.items())
def test_the_paper_s_size_has_the_parameter_count_of_its_block_layout(recipe: str, block: int) -> None:
    expected = 24 * block + 1024 + 128_256 * 1024
    config = load_config([f"model={recipe}"]).model
    config.context_len = 2048
    model = build_model(config, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert f"{expected:,} parameters" in README
    written = (PACKAGE / "subquad_ssm" / "conf" / "model" / f"{recipe}.yaml").read_text(encoding="utf-8")
    assert f"{expected:,} parameters" in written.partition("\n")[0]


@pytest.mark.parametrize("overrides", [[], ["model.mixers.mamba3.mimo_rank=2"]], ids=["one lane", "lanes"])
def test_the_laptop_size_composes_builds_and_learns(overrides: list[str]) -> None:
    config = load_config(["model=mamba3", *overrides]).model
    config.vocab_size, config.context_len = 64, 64
    torch.manual_seed(0)
    model = build_model(config)
    logits = model(torch.randint(0, 64, (2, 33)))
    assert logits.shape == (2, 33, 64)
    logits.logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
