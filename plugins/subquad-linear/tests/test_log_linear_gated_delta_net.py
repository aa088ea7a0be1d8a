"""Log-linear Gated DeltaNet keeps the suite's promises, is the paper's sum over pairs, starts as the authors start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from subquad import ConfigError, MixerContext
from subquad.testing.mixer_suite import MixerSuite, assert_close, carry_bytes, gradients
from subquad_linear.config import GatedDeltaNetConfig, LogLinearGatedDeltaNetConfig
from subquad_linear.gated_delta_net import GatedDeltaNet
from subquad_linear.log_linear_gated_delta_net import LogLinearGatedDeltaNet

D_MODEL = 12
TOLERANCE = 1e-9
"""Relative to the largest value: float64, a solve and sums of a hundred terms in another order, through a norm."""


class TestLogLinearGatedDeltaNet(MixerSuite):
    mixer = "log_linear_gated_delta_net"

    def test_the_carry_has_a_state_for_each_bit_of_the_length(self) -> None:
        mixer = self.build().float()
        for t in (1, 5, 64, 100):
            with torch.no_grad():
                _, carry = mixer.prefill(self.tokens(3, t).float(), mixer.empty_carry(3))
            assert carry_bytes(carry) == 3 * 4 * (t.bit_length() * 6 * 2 * 4 + 3 * (2 * 12 + 24))

    def test_in_bfloat16_the_states_stay_float32(self) -> None:
        mixer, x = self.build().float(), self.tokens(2, 9).float()
        with torch.no_grad():
            expected = mixer(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y, carry = mixer.prefill(x, mixer.empty_carry(2))
                y_t, carry = mixer.decode(x[:, 0], carry)
        assert carry.state.dtype == torch.float32
        # Four matrix products in a row with factors rounded to 8 bits, relative to the largest output.
        assert (y - expected).abs().max() < 5e-2 * expected.abs().max()
        assert y_t.isfinite().all()


def build(context_len: int = 64, **config: Any) -> LogLinearGatedDeltaNet:
    context = MixerContext(d_model=D_MODEL, layer_index=0, num_layers=2, context_len=context_len)
    torch.manual_seed(0)
    mixer = LogLinearGatedDeltaNet(LogLinearGatedDeltaNetConfig(**config), context)
    mixer.init_parameters(0.3)
    return mixer


def drawn(**config: Any) -> LogLinearGatedDeltaNet:
    """In float64, with parameters drawn wide, so that every path shows in the output."""
    mixer = build(**config).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def equation(m: LogLinearGatedDeltaNet, x: Tensor) -> Tensor:
    """Guo et al. 2025, section 3.4: a row at a time, its query through one transition after the other, backwards."""
    h, h_k, n = m.num_heads, m.num_key_heads, m.key_dim
    b, t, _ = x.shape
    taps, rows = m.conv.weight.squeeze(1), x @ m.qkv_proj.weight.T
    width = taps.shape[1]
    padded = torch.cat([rows.new_zeros(b, width - 1, rows.shape[-1]), rows], dim=1)
    rows = silu(sum(taps[:, tap] * padded[:, tap : tap + t] for tap in range(width)))  # type: ignore[arg-type]
    q, k, v = rows.split([h_k * n, h_k * n, h * m.value_dim], dim=-1)
    q, k = (part.reshape(b, t, h_k, n).repeat_interleave(h // h_k, dim=2) for part in (q, k))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    v = v.reshape(b, t, h, -1)
    beta = m.largest_write / (1 + torch.exp(-x @ m.write_proj.weight.T))
    alpha = torch.exp(-torch.exp(m.A_log) * torch.log1p(torch.exp(x @ m.decay_proj.weight.T + m.dt_bias)))
    scales = torch.log1p(torch.exp(m.L * (x @ m.level_proj.weight.T).reshape(b, t, h, -1)))
    outputs = []
    for i in range(t):
        end, level_of = i, {i: 0}
        while end:  # the bucket of the lowest one, then of the next
            size = end & -end
            level_of |= dict.fromkeys(range(end - size, end), size.bit_length())
            end -= size
        terms, reading = [], q[:, i]
        for j in range(i, -1, -1):
            under_key = beta[:, j] * (reading * k[:, j]).sum(-1)
            terms.append((scales[:, i, :, min(level_of[j], m.num_levels - 1)] * under_key)[..., None] * v[:, j])
            reading = alpha[:, j, :, None] * (reading - under_key[..., None] * k[:, j])
        outputs.append(torch.stack(terms).sum(0))
    o = torch.stack(outputs, 1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * m.output.norm.weight
    return (o.flatten(2) * silu(x @ m.output.g_proj.weight.T)) @ m.output.o_proj.weight.T


@pytest.mark.oracle("log_linear_gated_delta_net")
@pytest.mark.parametrize(
    ("t", "config"),
    [
        (2, {"num_heads": 3}),  # a single token reads nothing that decays
        (13, {"num_heads": 3, "num_levels": 3}),
        (67, {"num_heads": 2, "num_key_heads": 1, "key_dim": 3, "expand_v": 1, "conv_width": 2,
              "negative_eigenvalues": True}),  # more than one chunk
    ],
)  # fmt: skip
def test_the_mixer_equals_the_paper_s_equation_with_all_gradients(t: int, config: dict[str, Any]) -> None:
    mixer = drawn(**config)
    x, pull = (torch.randn(2, t, D_MODEL, dtype=torch.float64) for _ in range(2))
    y, expected = mixer(x.requires_grad_()), equation(mixer, x)
    assert_close(y, expected, tolerance=TOLERANCE)
    right = gradients(expected, pull, x, mixer)
    for name, found in gradients(y, pull, x, mixer).items():
        assert_close(found, right[name], name, TOLERANCE)


def test_with_one_level_it_is_gated_delta_net_up_to_a_factor_that_the_norm_takes_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("subquad_linear.gated_output.EPS", 1e-20)
    mixer = drawn(num_heads=3, num_levels=1)
    with torch.no_grad():
        mixer.level_proj.weight.zero_()
    context = MixerContext(d_model=D_MODEL, layer_index=0, num_layers=2, context_len=64)
    plain = GatedDeltaNet(GatedDeltaNetConfig(num_heads=3), context).double()
    left_out = plain.load_state_dict(mixer.state_dict(), strict=False)
    assert left_out.missing_keys == [] and set(left_out.unexpected_keys) == {"L", "level_proj.weight"}
    x = torch.randn(2, 30, D_MODEL, dtype=torch.float64)
    assert_close(mixer(x), plain(x), tolerance=TOLERANCE)


def test_all_levels_start_with_one_weight_and_the_rest_as_gated_delta_net() -> None:
    mixer = build(num_heads=2, key_dim=4)
    assert (mixer.L == 1).all() and (mixer.output.norm.weight == 1).all()
    rate, step = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert ((rate > 0) & (rate < 16)).all() and ((step > 0.99e-3) & (step < 1.01e-1)).all()


def test_as_many_levels_as_the_context_has_bits_and_one() -> None:
    for context_len, levels in ((1, 1), (2, 2), (64, 7), (65, 8), (2**14, 15)):
        assert build(context_len, num_heads=2, key_dim=4).L.shape == (2, levels)
    with pytest.raises(ConfigError, match="num_levels is -1"):
        LogLinearGatedDeltaNetConfig(num_levels=-1)
