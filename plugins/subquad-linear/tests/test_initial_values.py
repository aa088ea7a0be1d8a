"""The parameters start where the papers start them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subquad import ConfigError, MixerContext, SharedTensor, build_model, load_config
from subquad_linear.config import (
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    LightningConfig,
    MatrixLSTMConfig,
    RetNetConfig,
    RWKV6Config,
    RWKV7Config,
    RWKVChannelMixConfig,
    ScalarLSTMConfig,
)
from subquad_linear.delta_net import DeltaNet
from subquad_linear.gated_delta_net import GatedDeltaNet
from subquad_linear.gated_linear_attention import GatedLinearAttention
from subquad_linear.lightning import Lightning, log_decays
from subquad_linear.matrix_lstm import MatrixLSTM
from subquad_linear.retnet import RetNet
from subquad_linear.rwkv6 import RWKV6
from subquad_linear.rwkv7 import RWKV7
from subquad_linear.rwkv_channel_mix import RWKVChannelMix
from subquad_linear.scalar_lstm import ScalarLSTM


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


def assert_normal(mixer: nn.Module, std: float) -> None:
    """Every linear map has this standard deviation."""
    maps = {name: module for name, module in mixer.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in maps.items():
        # The sample of n values is off by std / sqrt(2 n), one in a thousand by more than 3.3 times that.
        assert linear.weight.std().item() == pytest.approx(std, rel=3.3 / math.sqrt(2 * linear.weight.numel())), name


def test_gated_linear_attention_starts_by_forgetting_slowly() -> None:
    mixer = initialised(GatedLinearAttention(GatedLinearAttentionConfig(), context()))
    assert_normal(mixer, 0.02)
    assert (mixer.decay_up.bias == 0).all()
    assert (mixer.output.norm.weight == 1).all()
    # sigmoid(0)^(1/16): a state loses 4.2 % a token.
    assert nn.functional.logsigmoid(mixer.decay_up.bias[0]).div(16).exp().item() == pytest.approx(0.9576, abs=1e-4)


def test_decays_of_gated_delta_net_start_in_the_papers_ranges() -> None:
    mixer = initialised(GatedDeltaNet(GatedDeltaNetConfig(num_heads=96, key_dim=2), context()))
    rates, step = mixer.A_log.exp(), nn.functional.softplus(mixer.dt_bias)
    assert 0 < rates.min() < 1.5 and 14.5 < rates.max() <= 16
    assert 0.999e-3 < step.min() < 2e-3 and 0.5e-1 < step.max() < 1.001e-1
    assert mixer.conv.weight.abs().max() <= 4**-0.5
    assert mixer.conv.bias is None
    assert_normal(mixer, 0.02)


def test_delta_net_draws_every_map_with_the_models_deviation() -> None:
    mixer = initialised(DeltaNet(DeltaNetConfig(), context()), std=0.05)
    assert_normal(mixer, 0.05)
    assert mixer.conv.weight.abs().max() <= 4**-0.5
    assert (mixer.norm.weight == 1).all()


def test_lightning_draws_every_map_with_the_models_deviation() -> None:
    mixer = initialised(Lightning(LightningConfig(), context()))
    assert_normal(mixer, 0.02)
    assert (mixer.norm.weight == 1).all()


def test_deeper_layers_of_lightning_forget_more_slowly_and_no_state_grows() -> None:
    for kind in ("alibi", "transnormer"):
        layers = torch.stack([log_decays(kind, 8, layer, 12) for layer in range(12)])
        assert (layers <= 0).all()
        assert (layers.diff(dim=0) >= 0).all()
    assert (log_decays("alibi", 8, 0, 1) < 0).all(), "a model of one layer"
    with pytest.raises(ConfigError, match="decays is 'linear'"):
        LightningConfig(decays="linear")


def test_gates_of_the_matrix_lstm_start_by_ignoring_the_token() -> None:
    mixer = initialised(MatrixLSTM(MatrixLSTMConfig(), context()))
    assert (mixer.input_gate.weight == 0).all() and (mixer.forget_gate.weight == 0).all()
    assert (mixer.input_gate.bias == -10).all()
    assert mixer.forget_gate.bias.tolist() == [3, 4, 5, 6]
    for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj, mixer.out_proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.06)


def assert_orthogonal(weight: Tensor, gain: float) -> None:
    """The shorter side's vectors are orthogonal, each `gain` long."""
    rows = weight if weight.shape[0] <= weight.shape[1] else weight.T
    torch.testing.assert_close(rows @ rows.T, gain**2 * torch.eye(len(rows)), rtol=0, atol=1e-5)


def test_rwkv6_starts_by_channel_and_depth() -> None:
    """Block 2 of 8, two blocks a layer: layer 1 of 4, thus i / (L - 1) = 1/3 and 1 - i / L = 3/4."""
    config = RWKV6Config(blocks_per_layer=2)
    mixer = initialised(RWKV6(config, context(layer_index=2, num_layers=8)))
    assert mixer.first_mix[32].item() == pytest.approx(1 - 0.5**0.75)
    for stream, expected in enumerate((1 - 0.5**0.75, 1 - 0.5**0.75, 0.9 - 0.5**0.75, 1 - 0.5**0.375, 1 - 0.5**0.375)):
        assert mixer.mix[stream, 32].item() == pytest.approx(expected), stream
    assert mixer.decay_base[[0, -1]].tolist() == [-6, -1]
    assert mixer.decay_base[21].item() == pytest.approx(-6 + 5 * (1 / 3) ** (0.7 + 1.3 / 3))
    assert mixer.bonus.flatten()[[0, 21, 62]].tolist() == pytest.approx([1 / 3, 2 / 9, 1 / 189 - 0.1])
    assert (mixer.mix_down.weight == 0).all() and (mixer.decay.down.weight == 0).all()
    assert 0.009 < mixer.mix_up.abs().max() <= 0.01 and 0.009 < mixer.decay.up.weight.abs().max() <= 0.01
    for linear, gain in ((mixer.r_proj, 1.0), (mixer.k_proj, 0.1), (mixer.v_proj, 1.0), (mixer.g_proj, 0.1)):
        assert_orthogonal(linear.weight, gain)
    assert mixer.norm.weight.tolist() == pytest.approx([0.5**0.7] * 64)
    assert (mixer.norm.bias == 0).all() and (mixer.o_proj.weight == 0).all()


def test_rwkv7_starts_by_channel_and_depth() -> None:
    """Block 6 of 8, two blocks a layer: the last of 4 layers, thus i / (L - 1) = 1 and 1 - i / L = 1/4."""
    config = RWKV7Config(blocks_per_layer=2)
    place = replace(context(layer_index=6, num_layers=8), published={"rwkv7.value": SharedTensor(shape=(64,))})
    mixer = initialised(RWKV7(config, place))
    for stream, power in enumerate((0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
        assert mixer.mix[stream, 32].item() == pytest.approx(1 - 0.5 ** (power / 4)), stream
    # Heads of 16: the first channel of a head is at -1 of its zigzag, the last at 1.
    assert mixer.decay_base[[0, 63]].tolist() == pytest.approx([-5.5 - 2.5, 0.5 + 2.5])
    assert mixer.decay_base[15].item() == pytest.approx(-5.5 + 6 * (15 / 63) ** 2 + 2.5)
    assert mixer.rate_base[[0, 63]].tolist() == pytest.approx([-0.19 - 0.3 - 0.2, -0.19 + 0.3 + 0.2])
    assert mixer.removal[[0, 63]].tolist() == pytest.approx([0.76, 0.66])
    assert mixer.replacement.tolist() == pytest.approx([1.02] * 64)
    assert mixer.bonus.flatten().tolist() == pytest.approx([-0.04] * 64)
    assert mixer.value_base[[0, 63]].tolist() == pytest.approx([0.93, 0.53])
    for low_rank in (mixer.decay, mixer.rate, mixer.gate, mixer.value):
        assert (low_rank.down.weight == 0).all()
        assert_orthogonal(low_rank.up.weight, 0.1)
    for linear, gain in ((mixer.r_proj, 1.0), (mixer.k_proj, 0.1), (mixer.v_proj, 1.0)):
        assert_orthogonal(linear.weight, gain)
    assert mixer.norm.weight.tolist() == pytest.approx([1.0] * 64)
    assert (mixer.o_proj.weight == 0).all()


def test_the_ranks_of_rwkv7_are_those_of_the_authors_code() -> None:
    config = RWKV7Config()
    for d_model, decay, gate, value in (
        (192, 32, 64, 32), (768, 64, 128, 32), (1024, 64, 160, 64), (2048, 128, 224, 64), (4096, 160, 320, 96)
    ):  # fmt: skip
        assert config.resolved_decay_rank(d_model) == config.resolved_rate_rank(d_model) == decay
        assert (config.resolved_gate_rank(d_model), config.resolved_value_rank(d_model)) == (gate, value)


@pytest.mark.parametrize(("receptance", "power"), [(True, 3), (False, 4)])
def test_the_channel_mix_of_rwkv_starts_by_channel_and_depth(receptance: bool, power: int) -> None:
    """Block 5 of 8, two blocks a layer: layer 2 of 4, thus 1 - i / L = 1/2."""
    config = RWKVChannelMixConfig(receptance=receptance)
    mixer = initialised(RWKVChannelMix(config, context(layer_index=5, num_layers=8)))
    assert mixer.k_mix[32].item() == pytest.approx(1 - 0.5 ** (0.5**power))
    assert mixer.k_proj.weight.shape == (224 if receptance else 256, 64)
    assert_orthogonal(mixer.k_proj.weight, 1.0)
    assert (mixer.v_proj.weight == 0).all()
    if receptance:
        assert torch.equal(mixer.r_mix, mixer.k_mix) and (mixer.r_proj.weight == 0).all()


def test_a_model_of_rwkv_starts_with_blocks_that_add_nothing() -> None:
    config = load_config(["model=rwkv7"]).model
    config.vocab_size, config.context_len = 64, 64
    torch.manual_seed(0)
    model, ids = build_model(config), torch.arange(12)[None]
    expected = model.norm(model.embedding(ids)) @ model.embedding.weight.T
    torch.testing.assert_close(model(ids), expected)


def test_a_scalar_lstm_starts_without_mixing_and_forgets_from_slow_to_fast() -> None:
    for layer, power in ((0, 0.3), (3, 1.6)):
        mixer = initialised(ScalarLSTM(ScalarLSTMConfig(), context(d_model=256, layer_index=layer)))
        assert (mixer.recurrent == 0).all()
        assert (mixer.bias[:, [0, 2, 3]] == 0).all()
        expected = [5 - 12 * (j / 63) ** power for j in range(64)]
        torch.testing.assert_close(mixer.bias[:, 1], torch.tensor(expected).expand(4, 64))
        for gates in (mixer.conv_gates, mixer.input_gates):
            assert gates.std().item() == pytest.approx(math.sqrt(2 / (5 * 256)), rel=0.02)
    assert initialised(ScalarLSTM(ScalarLSTMConfig(num_heads=64), context())).bias[:, 1].tolist() == [[5.0]] * 64


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (RetNetConfig, "num_heads"), (RetNetConfig, "expand_v"), (RetNetConfig, "rope_theta"),
        (GatedLinearAttentionConfig, "num_heads"), (GatedLinearAttentionConfig, "gate_rank"),
        (GatedLinearAttentionConfig, "expand_k"), (GatedLinearAttentionConfig, "gate_temperature"),
        (GatedDeltaNetConfig, "num_heads"), (GatedDeltaNetConfig, "expand_v"), (GatedDeltaNetConfig, "conv_width"),
        (LightningConfig, "num_heads"), (MatrixLSTMConfig, "num_heads"),
        (ScalarLSTMConfig, "num_heads"), (ScalarLSTMConfig, "conv_width"),
        (MatrixLSTMConfig, "gate_cap"), (DeltaNetConfig, "num_heads"), (DeltaNetConfig, "conv_width"),
        (RWKV6Config, "num_heads"), (RWKV6Config, "mix_rank"), (RWKV6Config, "decay_rank"),
        (RWKV7Config, "num_heads"), (RWKV7Config, "blocks_per_layer"), (RWKVChannelMixConfig, "blocks_per_layer"),
    ],
)  # fmt: skip
def test_a_size_of_zero_is_refused_by_name(config: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is 0"):
        config(**{key: 0})


def test_heads_that_do_not_divide_the_width_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="7 heads"):
        RetNet(RetNetConfig(num_heads=7), context())
    with pytest.raises(ConfigError, match="3 heads do not share 32 channels of keys"):
        GatedLinearAttention(GatedLinearAttentionConfig(num_heads=3), context())
    with pytest.raises(ConfigError, match="5 heads do not share 64 channels of the model"):
        ScalarLSTM(ScalarLSTMConfig(num_heads=5), context())
    with pytest.raises(ConfigError, match="4 heads"):
        GatedDeltaNet(GatedDeltaNetConfig(num_heads=4), context(d_model=8))
    with pytest.raises(ConfigError, match="3 heads"):
        RWKV7(RWKV7Config(num_heads=3), context())


def test_a_negative_rank_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="gate_rank is -1"):
        RWKV7Config(gate_rank=-1)
