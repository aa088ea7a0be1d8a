"""The mixers keep the suite's promises, carry a constant number of bytes, and keep exact states under bfloat16."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from subquad import SharedTensor
from subquad.testing.mixer_suite import MixerSuite, carry_bytes


class LinearMixerSuite(MixerSuite):
    """What this family promises beyond the suite: one size of carry, and states in float32."""

    state_bytes: ClassVar[int]
    """Bytes of the carry of one float32 sequence, from the formula of the README."""

    def narrow(self) -> Any:
        """The small mixer in float32."""
        return self.build().float()

    def test_the_carry_has_one_size_however_long_the_sequence(self) -> None:
        mixer = self.narrow()
        for t in (1, 50):
            with torch.no_grad():
                _, carry = mixer.prefill(self.tokens(3, t).float(), mixer.empty_carry(3))
            assert carry_bytes(carry) == carry_bytes(mixer.empty_carry(3)) == 3 * self.state_bytes

    def test_in_bfloat16_the_state_stays_float32(self) -> None:
        mixer, x = self.narrow(), self.tokens(2, 9).float()
        with torch.no_grad():
            expected = mixer(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y, carry = mixer.prefill(x, mixer.empty_carry(2))
                y_t, carry = mixer.decode(x[:, 0], carry)
        assert carry.state.dtype == torch.float32
        # Four matrix products in a row with factors rounded to 8 bits, relative to the largest output.
        assert (y - expected).abs().max() < 5e-2 * expected.abs().max()
        assert y_t.isfinite().all()

    def test_every_parameter_starts_as_drawn_by_the_mixer_alone(self) -> None:
        """Nothing is left as it was in memory: drawing again from the same seed gives the same values everywhere."""
        mixer = self.build()
        before = {name: value.clone() for name, value in mixer.state_dict().items()}
        with torch.no_grad():
            for value in mixer.state_dict().values():
                value.fill_(float("nan"))
        torch.manual_seed(0)
        mixer.init_parameters(0.3)
        assert not any(value.isnan().any() for value in mixer.state_dict().values()), "a value is not drawn"
        assert before.keys() == mixer.state_dict().keys()


class TestRetNet(LinearMixerSuite):
    mixer = "retnet"
    config: ClassVar = {"num_heads": 4}
    state_bytes = 4 * 4 * 4 * 8


class TestRetNetOfOneHead(LinearMixerSuite):
    mixer = "retnet"
    config: ClassVar = {"num_heads": 1, "expand_v": 1, "rope_theta": 100.0}
    state_bytes = 4 * 16 * 16


class TestGatedLinearAttention(LinearMixerSuite):
    mixer = "gla"
    state_bytes = 4 * 4 * 2 * 4


class TestGatedLinearAttentionOfOtherWidths(LinearMixerSuite):
    mixer = "gla"
    config: ClassVar = {"num_heads": 2, "expand_k": 0.75, "expand_v": 2.0, "gate_rank": 3, "gate_temperature": 4.0}
    state_bytes = 4 * 2 * 6 * 16


class TestGatedDeltaNet(LinearMixerSuite):
    mixer = "gated_delta_net"
    state_bytes = 4 * 6 * 2 * 4 + 3 * 4 * (2 * 12 + 24)


class TestGatedDeltaNetWithSignFlipsAndSharedKeys(LinearMixerSuite):
    mixer = "gated_delta_net"
    config: ClassVar = {
        "num_heads": 2, "num_key_heads": 1, "key_dim": 5, "expand_v": 1, "conv_width": 2, "negative_eigenvalues": True,
    }  # fmt: skip
    state_bytes = 4 * 2 * 5 * 5 + 4 * (2 * 5 + 10)


class TestDeltaNet(LinearMixerSuite):
    mixer = "delta_net"
    state_bytes = 4 * 8 * 2 * 2 + 3 * 4 * 48


class TestDeltaNetWithSignFlips(LinearMixerSuite):
    mixer = "delta_net"
    config: ClassVar = {"num_heads": 2, "conv_width": 1, "negative_eigenvalues": True}
    state_bytes = 4 * 2 * 8 * 8


class TestLightning(LinearMixerSuite):
    mixer = "lightning"
    state_bytes = 4 * 8 * 2 * 2


class TestLightningWithTheRatesOfTransNormer(LinearMixerSuite):
    mixer = "lightning"
    config: ClassVar = {"num_heads": 2, "decays": "transnormer"}
    state_bytes = 4 * 2 * 8 * 8


class TestMatrixLSTM(LinearMixerSuite):
    mixer = "mlstm"
    state_bytes = 4 * 4 * 2 * (4 + 1)


class TestMatrixLSTMOfOneHead(LinearMixerSuite):
    mixer = "mlstm"
    config: ClassVar = {"num_heads": 1, "expand_k": 1.0, "gate_cap": 3.0}
    state_bytes = 4 * 16 * (16 + 1)


class TestRWKV6(LinearMixerSuite):
    mixer = "rwkv6"
    state_bytes = 4 * 4 * 4 * 4 + 4 * 16


class TestRWKV6OfOtherSizes(LinearMixerSuite):
    mixer = "rwkv6"
    config: ClassVar = {"num_heads": 2, "mix_rank": 3, "decay_rank": 5, "blocks_per_layer": 2}
    state_bytes = 4 * 2 * 8 * 8 + 4 * 16


class TestRWKV7(LinearMixerSuite):
    mixer = "rwkv7"
    state_bytes = 4 * 4 * 4 * 4 + 4 * 16


class TestRWKV7OfOtherSizes(LinearMixerSuite):
    mixer = "rwkv7"
    config: ClassVar = {"num_heads": 2, "decay_rank": 3, "rate_rank": 5, "gate_rank": 7, "blocks_per_layer": 2}
    state_bytes = 4 * 2 * 8 * 8 + 4 * 16


class TestRWKV7BehindItsFirstLayer(TestRWKV7):
    published: ClassVar = {"rwkv7.value": SharedTensor(shape=(16,))}


class TestRWKV7BehindItsFirstLayerOfOtherSizes(TestRWKV7OfOtherSizes):
    published: ClassVar = {"rwkv7.value": SharedTensor(shape=(16,))}


class TestRWKV7Alone(TestRWKV7):
    config: ClassVar = {"value_residual": False}

    def test_names_only_parameters_that_exist(self) -> None:
        assert not any(name.startswith("value") for name, _ in self.build().named_parameters())


class TestRWKVChannelMix(MixerSuite):
    mixer = "rwkv_channel_mix"


class TestRWKVChannelMixWithReceptance(MixerSuite):
    mixer = "rwkv_channel_mix"
    config: ClassVar = {"receptance": True, "d_hidden": 24, "blocks_per_layer": 1}


class ScalarLSTMSuite(LinearMixerSuite):
    """The mixer starts with no recurrent weights; those of the suite are drawn, so that hidden states matter."""

    def build(self, *, seed: int = 0, device: str | None = None) -> Any:
        """The small mixer, its heads mixing their memory."""
        mixer = super().build(seed=seed, device=device)
        if mixer.recurrent.device.type != "meta":
            nn.init.normal_(mixer.recurrent, std=0.5)
        return mixer


class TestScalarLSTM(ScalarLSTMSuite):
    mixer = "slstm"
    state_bytes = 4 * 3 * 16 + 3 * 4 * 16


class TestScalarLSTMOfOneHead(ScalarLSTMSuite):
    mixer = "slstm"
    config: ClassVar = {"num_heads": 1, "conv_width": 1}
    state_bytes = 4 * 3 * 16
