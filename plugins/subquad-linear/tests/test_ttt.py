"""Test-time training keeps the suite's promises, is gradient descent by autograd, and starts as its authors start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad import ConfigError, MixerContext
from subquad.testing.mixer_suite import MixerSuite, assert_close, carry_bytes, gradients
from subquad_linear import ttt
from subquad_linear.batch_angles import BatchAngles
from subquad_linear.config import (
    ShortConvConfig,
    TTTLinearConfig,
    TTTLinearMambaConfig,
    TTTMLPConfig,
    TTTMLPMambaConfig,
)
from subquad_linear.short_conv import ShortConv

D_MODEL = 12
TOLERANCE = 1e-9
"""Relative to the largest value: float64, sums of a mini-batch in another order, through norms."""


class TTTSuite(MixerSuite):
    """What this family promises beyond the suite: one size of carry, and states in float32."""

    state_bytes: ClassVar[int]
    """Bytes of the carry of one float32 sequence, from the formula of the README."""

    def test_the_carry_has_one_size_however_long_the_sequence(self) -> None:
        mixer = self.build().float()
        for t in (1, 50):
            with torch.no_grad():
                _, carry = mixer.prefill(self.tokens(3, t).float(), mixer.empty_carry(3))
            assert carry_bytes(carry) == carry_bytes(mixer.empty_carry(3)) == 3 * self.state_bytes

    def test_in_bfloat16_the_state_stays_float32(self) -> None:
        mixer, x = self.build().float(), self.tokens(2, 9).float()
        with torch.no_grad():
            expected = mixer(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y, carry = mixer.prefill(x, mixer.empty_carry(2))
                y_t, carry = mixer.decode(x[:, 0], carry)
        assert carry.state.dtype == torch.float32
        # Products with factors rounded to 8 bits, through two norms, relative to the largest output.
        assert (y - expected).abs().max() < 1e-1 * expected.abs().max()
        assert y_t.isfinite().all()


class TestTTTLinear(TTTSuite):
    mixer = "ttt_linear"
    state_bytes = 4 * 2 * 4 * 4 * 5


class TestTTTLinearWithGateAndShortMiniBatches(TTTSuite):
    mixer = "ttt_linear"
    config: ClassVar = {"num_heads": 2, "mini_batch": 5, "gate": True, "base_rate": 0.5, "rope_theta": 50.0}
    state_bytes = 4 * 2 * 2 * 8 * 9


class TestTTTMLP(TTTSuite):
    mixer = "ttt_mlp"
    state_bytes = 4 * 2 * 4 * (4 * 4 * 5 + 4 * 17)


class TestTTTLinearOfTheMambaBackbone(TTTSuite):
    mixer = "ttt_linear_mamba"
    state_bytes = 4 * 2 * 4 * 4 * 5 + 4 * 3 * 16


class TestTTTMLPOfTheMambaBackbone(TTTSuite):
    mixer = "ttt_mlp_mamba"
    config: ClassVar = {"mini_batch": 5, "gate": False, "conv_width": 2}
    state_bytes = 4 * 2 * 4 * (4 * 4 * 5 + 4 * 17) + 4 * 16


class TestShortConv(MixerSuite):
    mixer = "short_conv"


def context(d_model: int = D_MODEL) -> MixerContext:
    return MixerContext(d_model=d_model, layer_index=0, num_layers=2, context_len=64)


KINDS: Mapping[str, tuple[Any, Any]] = {
    "linear": (TTTLinearConfig, ttt.linear),
    "mlp": (TTTMLPConfig, ttt.mlp),
    "linear_mamba": (TTTLinearMambaConfig, ttt.linear_mamba),
    "mlp_mamba": (TTTMLPMambaConfig, ttt.mlp_mamba),
}


def build(kind: str, d_model: int = D_MODEL, **config: Any) -> ttt.TTT:
    torch.manual_seed(0)
    options, make = KINDS[kind]
    mixer: ttt.TTT = make(options(**config), context(d_model))
    mixer.init_parameters(0.3)
    return mixer


def descent(m: ttt.TTT, x: Tensor, base_rate: float) -> Tensor:
    """Sun et al. 2024, equations 1, 4, 6 and 7: the loss of each token by itself, differentiated by torch."""
    b, t, d = x.shape
    h, k, c = m.num_heads, m.head_dim, m.mini_batch
    rates = base_rate / k / (1 + torch.exp(-(x @ m.rate_proj.weight.T + m.rate_proj.bias)))
    theta = m.angles.theta ** (-torch.arange(0, k, 2, dtype=x.dtype) / k)

    def convolved(rows: Tensor, conv: nn.Conv1d) -> Tensor:
        """A sum of the last tokens by hand, and the bias."""
        taps, bias = conv.weight.squeeze(1), conv.bias
        assert bias is not None
        found = [bias.expand(b, d)] * t
        for i in range(t):
            for back in range(min(taps.shape[1], i + 1)):
                found[i] = found[i] + taps[:, -1 - back] * rows[:, i - back]
        return torch.stack(found, dim=1)

    def heads(rows: Tensor, turn: bool) -> Tensor:
        rows = rows.reshape(b, t, h, k)
        if not turn:
            return rows
        angles = (torch.arange(t) % c)[:, None, None] * theta
        pairs = torch.view_as_complex(rows.reshape(b, t, h, k // 2, 2)) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(pairs).reshape(b, t, h, k)

    if m.k_proj is not None:
        q, keys = x @ m.q_proj.weight.T, x @ m.k_proj.weight.T
    else:
        assert m.conv_q is not None and m.conv_k is not None
        q, keys = (convolved(x @ m.q_proj.weight.T, conv) for conv in (m.conv_q, m.conv_k))
    q, keys, v = heads(q, True), heads(keys, True), heads(x @ m.v_proj.weight.T, False)

    def model(x: Tensor, parameters: list[Tensor], head: int) -> Tensor:
        z = x @ parameters[0] + parameters[1]
        if len(parameters) == 4:
            z = F.gelu(z, approximate="tanh") @ parameters[2] + parameters[3]
        return F.layer_norm(z, (k,), m.norm_weight[head], m.norm_bias[head], eps=1e-6)

    start = [m.W1, m.b1] if m.inner == "linear" else [m.W1, m.b1, m.W2, m.b2]
    sequences = []
    for row in range(b):
        columns = []
        for head in range(h):
            weights = [part[head] * 1 for part in start]
            sums = [torch.zeros_like(w) for w in weights]
            outputs = []
            for token in range(t):
                place = token % c
                key, value = keys[row, token, head], v[row, token, head]
                loss = 0.5 * (model(key, weights, head) - (value - key)).square().sum()
                found = torch.autograd.grad(loss, weights, create_graph=True)
                sums = [a + rates[row, token, head] * g for a, g in zip(sums, found)]
                scale = torch.relu(1 / (place + 1) + m.token_scale[place])
                trained = [w - scale * a for w, a in zip(weights, sums)]
                outputs.append(q[row, token, head] + model(q[row, token, head], trained, head))
                if place == c - 1:
                    weights, sums = trained, [torch.zeros_like(a) for a in sums]
            columns.append(torch.stack(outputs))
        sequences.append(torch.stack(columns, dim=1))
    y = F.layer_norm(torch.stack(sequences).flatten(2), (d,), m.post_norm.weight, m.post_norm.bias, eps=1e-6)
    if m.g_proj is not None:
        y = y * F.gelu(x @ m.g_proj.weight.T, approximate="tanh")
    return y @ m.o_proj.weight.T


@pytest.mark.parametrize("kind", [pytest.param(n, marks=pytest.mark.oracle(f"ttt_{n}")) for n in KINDS])
@pytest.mark.parametrize("t", [1, 3, 11])
def test_the_mixer_is_gradient_descent_by_autograd_with_all_gradients(kind: str, t: int) -> None:
    mixer = build(kind, num_heads=3, mini_batch=4, base_rate=0.7, gate=t == 11).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, pull = (torch.randn(2, t, D_MODEL, dtype=torch.float64) for _ in range(2))
    y, expected = mixer(x.requires_grad_()), descent(mixer, x, 0.7)
    assert_close(y, expected, tolerance=TOLERANCE)
    right = gradients(expected, pull, x, mixer)
    for name, found in gradients(y, pull, x, mixer).items():
        assert_close(found, right[name], name, TOLERANCE)


@pytest.mark.oracle("short_conv")
@pytest.mark.parametrize("t", [1, 9])
def test_a_short_convolution_is_a_weighted_sum_of_the_last_tokens_with_all_gradients(t: int) -> None:
    mixer = ShortConv(ShortConvConfig(conv_width=3), context()).double()
    x, pull = (torch.randn(2, t, D_MODEL, dtype=torch.float64) for _ in range(2))
    before = torch.cat([torch.zeros(2, 2, D_MODEL, dtype=torch.float64), x.requires_grad_()], dim=1)
    taps = mixer.conv.weight.squeeze(1)
    assert mixer.conv.bias is not None
    expected = mixer.conv.bias + sum(taps[:, j] * before[:, j : j + t] for j in range(3))
    y = mixer(x)
    assert_close(y, expected, tolerance=TOLERANCE)
    right = gradients(expected, pull, x, mixer)
    for name, found in gradients(y, pull, x, mixer).items():
        assert_close(found, right[name], name, TOLERANCE)


def test_positions_restart_with_every_mini_batch_and_every_document() -> None:
    angles, x = BatchAngles(6, 4, 100.0), torch.empty(1, 11, 2, 6)
    whole = angles(x, 0, None)
    assert whole.shape == (1, 11, 1, 3)
    assert torch.equal(whole[:, :4], whole[:, 4:8])
    torch.testing.assert_close(whole[0, :4, 0, 2], torch.arange(4) * 100.0 ** (-4 / 6))
    packed = angles(x, 0, torch.tensor([0, 3, 3, 11], dtype=torch.int32))
    assert torch.equal(packed[:, 3:], whole[:, :8])
    assert torch.equal(angles(x[:, :5], 6, None), whole[:, 6:])


@pytest.mark.parametrize("inner", ["linear", "mlp"])
def test_the_inner_model_starts_as_the_authors_start_it(inner: str) -> None:
    mixer = build(inner, d_model=64, num_heads=2)
    mixer.init_parameters(0.02)
    maps = dict(mixer.named_parameters())
    for name in ("W1", "W2", "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"):
        if name in maps:
            assert maps[name].std().item() == pytest.approx(0.02, rel=0.06), name
    for name in ("b1", "b2", "token_scale", "norm_bias", "rate_proj.bias", "post_norm.bias"):
        assert name not in maps or (maps[name] == 0).all(), name
    assert (mixer.norm_weight == 1).all() and (mixer.post_norm.weight == 1).all()
    assert mixer.largest_rate == (1.0 if inner == "linear" else 0.1) / 32
    assert ("W2" in maps) == (inner == "mlp")


def test_a_scale_below_zero_counts_as_zero_and_the_model_is_not_trained() -> None:
    mixer = build("linear", num_heads=2)
    torch.nn.init.constant_(mixer.token_scale, -2.0)
    x = torch.randn(1, 40, D_MODEL)
    with torch.no_grad():
        _, carry = mixer.prefill(x, mixer.empty_carry(1))
    assert torch.equal(carry.state[:, 0], mixer.empty_carry(1).state[:, 0])


@pytest.mark.parametrize("key", ["num_heads", "mini_batch", "base_rate", "rope_theta"])
def test_sizes_of_zero_and_odd_heads_are_refused_by_name(key: str) -> None:
    for config, _ in KINDS.values():
        with pytest.raises(ConfigError, match=f"{key} is 0"):
            config(**{key: 0})
    for config in (TTTLinearMambaConfig, TTTMLPMambaConfig, ShortConvConfig):
        with pytest.raises(ConfigError, match="conv_width is 0"):
            config(conv_width=0)
    with pytest.raises(ConfigError, match="4 heads of 3 channels have no pairs"):
        build("linear", num_heads=4)
