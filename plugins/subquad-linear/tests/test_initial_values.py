"""The parameters start where the papers start them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subquad import ConfigError, MixerContext
from subquad_linear.config import RetNetConfig
from subquad_linear.retnet import RetNet


def context(d_model: int = 64, *, layer_index: int = 0, num_layers: int = 4) -> MixerContext:
    return MixerContext(d_model=d_model, layer_index=layer_index, num_layers=num_layers, context_len=64)


def initialised(mixer: Any, std: float = 0.02) -> Any:
    torch.manual_seed(0)
    mixer.init_parameters(std)
    return mixer


def assert_xavier(weight: Tensor, gain: float) -> None:
    """Uniform within gain sqrt(6 / (fan_in + fan_out)), and close to both ends."""
    bound = gain * math.sqrt(6 / sum(weight.shape))
    assert 0.98 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_retention_draws_by_xavier_with_the_authors_gains() -> None:
    mixer = initialised(RetNet(RetNetConfig(), context()))
    for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.output.g_proj):
        assert_xavier(linear.weight, 2**-2.5)
    assert_xavier(mixer.output.o_proj.weight, 0.5)
    assert not any(isinstance(module, nn.Linear) and module.bias is not None for module in mixer.modules())


def test_decays_of_retention_are_exact_for_many_heads() -> None:
    mixer = RetNet(RetNetConfig(num_heads=32), context())
    slow = mixer.log_decay[31].double().item()
    assert slow == pytest.approx(-(2.0**-36), rel=1e-6)
    assert not any(name == "log_decay" for name, _ in mixer.named_parameters())


@pytest.mark.parametrize("key", ["num_heads", "expand_v"])
def test_a_size_of_zero_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is 0"):
        RetNetConfig(**{key: 0})


def test_heads_that_do_not_divide_the_width_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="7 heads"):
        RetNet(RetNetConfig(num_heads=7), context())
