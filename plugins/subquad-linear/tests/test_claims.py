"""What the papers claim of these memories, on states that can be checked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from subquad import MixerContext
from subquad_linear.config import (
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
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
from subquad_linear.matrix_lstm import MatrixLSTM
from subquad_linear.retnet import RetNet
from subquad_linear.rwkv6 import RWKV6
from subquad_linear.rwkv7 import RWKV7
from subquad_linear.rwkv_channel_mix import RWKVChannelMix
from subquad_linear.scalar_lstm import ScalarLSTM
from subquad_linear.unit_length import unit_length

CONTEXT = MixerContext(d_model=16, layer_index=0, num_layers=2, context_len=64)


@pytest.fixture(autouse=True)
def _one_draw() -> None:
    torch.manual_seed(0)


def tokens(t: int) -> Tensor:
    return torch.randn(2, t, 16, generator=torch.Generator().manual_seed(t), dtype=torch.float64)


def test_delta_net_is_gated_delta_net_without_decay_nor_gate() -> None:
    """With A = 0 nothing decays; the states of the two mixers are then the same, whatever the step sizes."""
    plain = DeltaNet(DeltaNetConfig(num_heads=2), CONTEXT).double()
    gated = GatedDeltaNet(GatedDeltaNetConfig(num_heads=2, key_dim=8, expand_v=1), CONTEXT).double()
    with torch.no_grad():
        for name in ("qkv_proj", "conv", "write_proj"):
            getattr(gated, name).load_state_dict(getattr(plain, name).state_dict())
        gated.A_log.fill_(-float("inf"))
        x = tokens(40)
        _, expected = plain.prefill(x, plain.empty_carry(2))
        _, found = gated.prefill(x, gated.empty_carry(2))
        torch.testing.assert_close(found.state, expected.state, rtol=1e-12, atol=1e-14)
        gated.A_log.fill_(0.0)
        gated.dt_bias.fill_(8.0)  # e^-8 of a state outlives a token: what is left is what the last one wrote
        _, decayed = gated.prefill(x, gated.empty_carry(2))
        rank_one = torch.linalg.svdvals(decayed.state)
        assert (rank_one[..., 1] < 0.05 * rank_one[..., 0]).all()
        several = torch.linalg.svdvals(expected.state)
        assert (several[..., 1] > 0.05 * several[..., 0]).all()


@pytest.mark.parametrize("negative", [False, True])
def test_a_second_write_under_one_key_replaces_the_first(negative: bool) -> None:
    """beta = 1 (a write gate at its middle or end): the same token twice leaves the state of one, to the unit's eps."""
    mixer = DeltaNet(DeltaNetConfig(num_heads=1, conv_width=1, negative_eigenvalues=negative), CONTEXT).double()
    x = tokens(1)
    with torch.no_grad():
        mixer.write_proj.weight.copy_((0.0 if negative else 1e3) * x[:1, 0])
        _, once = mixer.prefill(x[:1], mixer.empty_carry(1))
        _, twice = mixer.prefill(x[:1], once)
    # |k|^2 is 1 - 1e-6 / |k|^2 of the unscaled key, which is not small here.
    torch.testing.assert_close(twice.state, once.state, rtol=1e-3, atol=1e-4 * once.state.abs().max().item())


def test_with_negative_eigenvalues_a_state_flips_its_sign() -> None:
    """beta = 2 and v = 0 on a key: the transition is a reflection, which answers that key with the opposite."""
    mixer = DeltaNet(DeltaNetConfig(num_heads=1, conv_width=1, negative_eigenvalues=True), CONTEXT).double()
    x = tokens(1)[:1]
    with torch.no_grad():
        mixer.qkv_proj.weight[32:] = 0  # no values are written
        mixer.write_proj.weight.copy_(1e3 * x[:, 0])
        key = torch.nn.functional.silu(mixer.qkv_proj(x)[..., 16:32] * mixer.conv.weight[16:32, 0, 0])
        held = unit_length(key, 1, 16)[0, 0, 0, :, None] * tokens(3)[0, 0][None, :]
        _, after = mixer.prefill(x, mixer.empty_carry(1)._replace(state=held[None, None].contiguous()))
    torch.testing.assert_close(after.state[0, 0], -held, rtol=1e-3, atol=1e-3)


def test_gated_linear_attention_with_one_rate_for_all_channels_is_retention_at_that_rate() -> None:
    """Without positions both write k v^T into a state; equal decays give equal states."""
    retention = RetNet(RetNetConfig(num_heads=2, expand_v=1, rope_theta=1e300), CONTEXT).double()
    gated = GatedLinearAttention(GatedLinearAttentionConfig(num_heads=2, expand_k=1.0), CONTEXT).double()
    rate = torch.tensor([-0.3, -0.01], dtype=torch.float64)
    x = tokens(1)
    with torch.no_grad():
        retention.log_decay.copy_(rate)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(gated, name).load_state_dict(getattr(retention, name).state_dict())
        gated.decay_up.weight.zero_()
        # The inverse of log sigmoid(b) / 16.
        logits = 16 * rate - torch.log(-torch.expm1(16 * rate))
        gated.decay_up.bias.copy_(logits.repeat_interleave(8))
        held = torch.randn(2, 2, 8, 8, dtype=torch.float64)
        _, expected = retention.prefill(x, retention.empty_carry(2)._replace(state=held))
        _, found = gated.prefill(x, gated.empty_carry(2)._replace(state=held))
    torch.testing.assert_close(found.state, expected.state, rtol=1e-12, atol=1e-14)


def test_keys_have_length_one_and_zeros_stay_zeros() -> None:
    x = torch.cat([1e3 * torch.randn(50, 8), torch.zeros(1, 8)])
    for heads, width in ((1, 8), (2, 4)):
        lengths = unit_length(x[None], heads, width)[0].norm(dim=-1)
        assert (lengths[:-1] - 1).abs().max() < 1e-6
        assert (lengths[-1] == 0).all()
    torch.testing.assert_close(
        unit_length(x[None].double(), 1, 8, eps=4.0)[0, :, 0],
        x.double() / (x.double().square().sum(-1, keepdim=True) + 4).sqrt(),
    )
    assert unit_length(x[None].bfloat16(), 1, 8).dtype == torch.bfloat16


@pytest.mark.parametrize("gate", [-1e4, 1e4])
def test_gates_of_the_matrix_lstm_far_beyond_their_caps_stay_finite(gate: float) -> None:
    mixer = MatrixLSTM(MatrixLSTMConfig(num_heads=2), CONTEXT)
    mixer.init_parameters(0.3)
    with torch.no_grad():
        mixer.input_gate.bias.fill_(gate)
        mixer.forget_gate.bias.fill_(-gate)
    y = mixer(tokens(300).float())
    y.square().sum().backward()
    assert y.isfinite().all()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_constant_on_all_input_gates_changes_nothing_above_the_floor() -> None:
    """The quotient of state and normaliser is free of the gates' common scale, once |z . q| is above 1."""
    mixer = MatrixLSTM(MatrixLSTMConfig(num_heads=1), CONTEXT).double()
    mixer.init_parameters(0.3)
    x = tokens(1)
    with torch.no_grad():
        mixer.input_gate.bias.fill_(10.0)
        first = mixer(x)
        mixer.input_gate.bias.fill_(14.0)
        torch.testing.assert_close(mixer(x), first, rtol=1e-8, atol=1e-10)
        mixer.input_gate.bias.fill_(-10.0)
        assert not torch.allclose(mixer(x), first, rtol=1e-2)


def rwkv7_of_one_stream() -> RWKV7:
    """Nothing shifted nor forgotten; k is written and its direction taken out, at rates in context of 1."""
    mixer = RWKV7(RWKV7Config(num_heads=2), CONTEXT)
    mixer.init_parameters(0.3)
    with torch.no_grad():
        mixer.mix.zero_()
        mixer.decay_base.fill_(-float("inf"))
        mixer.rate_base.fill_(float("inf"))
        mixer.removal.fill_(1)
    return mixer.double()


def test_rwkv6_without_decay_and_with_a_bonus_of_one_is_linear_attention() -> None:
    """The state is read before the write, which a bonus of 1 makes up for: o = tril(R K^T) V."""
    mixer = RWKV6(RWKV6Config(num_heads=2), CONTEXT)
    mixer.init_parameters(0.3)
    seen: list[Tensor] = []
    leave = mixer.norm.leave
    mixer.norm.leave = lambda o, gate: leave(seen.append(o) or o, gate)  # type: ignore[method-assign, func-returns-value]
    with torch.no_grad():
        mixer.mix.zero_()
        mixer.decay_base.fill_(-float("inf"))
        x = tokens(40)
        mixer.double()
        r, k, v = (proj(x).unflatten(-1, (2, 8)) for proj in (mixer.r_proj, mixer.k_proj, mixer.v_proj))
        scores = torch.einsum("bihn,bjhn->bhij", r, k)
        for bonus, visible in ((1.0, scores.tril()), (0.0, scores.tril(-1))):
            mixer.bonus.fill_(bonus)
            mixer(x)
            torch.testing.assert_close(seen.pop(), torch.einsum("bhij,bjhp->bihp", visible, v), rtol=1e-10, atol=1e-12)


def test_rwkv7_without_rates_in_context_has_the_state_of_rwkv6() -> None:
    """a = 0 takes nothing out: what is left is a decay per channel and a write."""
    sixth, seventh = RWKV6(RWKV6Config(num_heads=2), CONTEXT), rwkv7_of_one_stream()
    sixth.init_parameters(0.3)
    sixth.double()
    rate = torch.linspace(-0.6, -0.01, 16, dtype=torch.float64)
    x = tokens(40)
    with torch.no_grad():
        sixth.mix.zero_()
        sixth.decay_base.copy_((-rate).log())
        share = -rate / torch.exp(torch.tensor(-0.5, dtype=torch.float64))
        seventh.decay_base.copy_((share / (1 - share)).log())
        seventh.rate_base.fill_(-float("inf"))
        seventh.replacement.zero_()
        for name in ("k_proj", "v_proj"):
            getattr(seventh, name).load_state_dict(getattr(sixth, name).state_dict())
        _, expected = sixth.prefill(x, sixth.empty_carry(2))
        _, found = seventh.prefill(x, seventh.empty_carry(2))
    torch.testing.assert_close(found.state, expected.state, rtol=1e-12, atol=1e-14)


def test_with_a_rate_of_one_rwkv7_replaces_what_a_key_held() -> None:
    """The same token twice leaves the state of one; with a rate of 0 it leaves twice that."""
    mixer, x = rwkv7_of_one_stream(), tokens(1)
    with torch.no_grad():
        _, once = mixer.prefill(x, mixer.empty_carry(2))
        _, twice = mixer.prefill(x, once)
        torch.testing.assert_close(twice.state, once.state, rtol=1e-12, atol=1e-14)
        mixer.rate_base.fill_(-float("inf"))
        mixer.replacement.zero_()
        _, twice = mixer.prefill(x, once)
        torch.testing.assert_close(twice.state, 2 * once.state, rtol=1e-12, atol=1e-14)


def test_the_state_of_rwkv7_stays_bounded_at_its_slowest_decay() -> None:
    """I - a c c^T with |c| = 1 and a in (0, 1) never lengthens what it meets: without decay too, 2000 tokens fit."""
    mixer = rwkv7_of_one_stream()
    with torch.no_grad():
        _, short = mixer.prefill(tokens(100), mixer.empty_carry(2))
        _, long = mixer.prefill(tokens(2000), mixer.empty_carry(2))
    assert long.state.abs().max() < 3 * short.state.abs().max()


def test_the_channel_mix_sees_a_token_and_the_one_before() -> None:
    mixer = RWKVChannelMix(RWKVChannelMixConfig(receptance=True), CONTEXT)
    mixer.init_parameters(0.3)
    torch.nn.init.normal_(mixer.v_proj.weight)
    mixer.double()
    x = tokens(9).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x)[:, 5].sum(), x)
    assert gradient.abs().amax((0, 2)).nonzero().flatten().tolist() == [4, 5]


@pytest.mark.parametrize("kind", [RWKV6, RWKV7])
@pytest.mark.parametrize("base", [-1e4, 100.0, 1e4])
def test_decays_of_rwkv_beyond_all_bounds_stay_finite(kind: Any, base: float) -> None:
    """RWKV-6's inner exponential would overflow at 89 in float32; a channel that forgets all holds the last token."""
    config: Any = RWKV6Config(num_heads=2) if kind is RWKV6 else RWKV7Config(num_heads=2)
    mixer = kind(config, CONTEXT)
    mixer.init_parameters(0.3)
    with torch.no_grad():
        mixer.o_proj.weight.normal_()
        mixer.mix.zero_()
        mixer.decay_base[0] = base
    x = tokens(150).float().requires_grad_()
    y = mixer(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if kind is RWKV6 and base > 0:
        _, carry = mixer.prefill(x, mixer.empty_carry(2))
        last = mixer.k_proj(x)[:, -1, :1] * mixer.v_proj(x)[:, -1, :8]
        torch.testing.assert_close(carry.state[:, 0, 0], last)


def test_a_scalar_lstm_tells_the_parity_of_bits_by_weights_set_by_hand() -> None:
    """A 1 forgets all and writes the opposite of what the head shows, a 0 keeps it: the sign is the parity."""
    context = MixerContext(d_model=4, layer_index=0, num_layers=2, context_len=64)
    mixer = ScalarLSTM(ScalarLSTMConfig(num_heads=1, conv_width=1), context).double()
    bits = torch.randint(0, 2, (3, 200))
    x = torch.zeros(3, 201, 4, dtype=torch.float64)
    x[:, 1:, 1], x[:, 0, 2] = 30.0 * bits, 30.0  # the bit, and the mark of the first token
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.zero_()
        mixer.conv.weight.fill_(1.0)
        mixer.norm.weight.fill_(1.0)
        mixer.conv_gates[0, 1:3, 0], mixer.conv_gates[0, 1:3, 1] = 1.0, -2.0  # i and f of every channel
        mixer.bias[0, 0], mixer.bias[0, 1], mixer.bias[0, 3] = -30.0, 30.0, 30.0
        mixer.input_gates[0, 2, 0, 0] = 5 / 30  # the first token writes +1 to channel 0
        mixer.recurrent[0, 0, 2, 0] = -5.0
        y = mixer(x)[:, 1:, 0]
        assert torch.equal(y < 0, bits.cumsum(1) % 2 == 1)
        assert y.abs().min() > 0.99 * y.abs().max()
        mixer.recurrent.zero_()
        assert not torch.equal(mixer(x)[:, 1:, 0] < 0, bits.cumsum(1) % 2 == 1)
