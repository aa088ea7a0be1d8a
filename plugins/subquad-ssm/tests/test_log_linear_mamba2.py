"""Log-linear Mamba-2 keeps the suite's promises, is Mamba-2 under the paper's second mask, and has its size."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from subquad import ConfigError, MixerContext
from subquad.testing.mixer_suite import MixerSuite, assert_close, carry_bytes, gradients
from subquad_ssm.config import LogLinearMamba2Config, Mamba2Config
from subquad_ssm.log_linear_mamba2 import LogLinearMamba2
from subquad_ssm.mamba2 import Mamba2

D_MODEL = 12
TOLERANCE = 1e-9
"""Relative to the largest value: float64, sums of a hundred terms in another order, through a norm."""


class TestLogLinearMamba2(MixerSuite):
    mixer = "log_linear_mamba2"
    config: ClassVar = {"state_dim": 4, "head_dim": 8}

    def test_the_carry_has_a_state_for_each_bit_of_the_length(self) -> None:
        mixer = self.build().float()
        for t in (1, 5, 64, 100):
            with torch.no_grad():
                _, carry = mixer.prefill(self.tokens(3, t).float(), mixer.empty_carry(3))
            assert carry_bytes(carry) == 3 * 4 * (t.bit_length() * 32 * 4 + 3 * (32 + 8))


class TestLogLinearMamba2WithGroups(MixerSuite):
    mixer = "log_linear_mamba2"
    config: ClassVar = {
        "state_dim": 4, "head_dim": 4, "num_groups": 2, "expand": 1, "conv_width": 1, "num_levels": 3,
    }  # fmt: skip


def build(kind: Any, config: Any, d_model: int = D_MODEL, context_len: int = 64) -> Any:
    mixer = kind(config, MixerContext(d_model=d_model, layer_index=0, num_layers=2, context_len=context_len))
    torch.manual_seed(0)
    mixer.init_parameters(0.3)
    return mixer


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def equation(m: LogLinearMamba2, x: Tensor) -> Tensor:
    """Guo et al. 2025, section 3.4: (C B^T o M_S o M_H) (dt u), M_S = exp(segsum dt A), M_H = lambda of the buckets."""
    h, p, g, n, c, t = m.num_heads, m.head_dim, m.num_groups, m.state_dim, m.channels, x.shape[1]
    z, mixed, dt, dl = (x @ m.in_proj.weight.T).split([c, c + 2 * g * n, h, h * m.num_levels], dim=-1)
    width = m.conv.weight.shape[-1]
    padded = torch.cat([mixed.new_zeros(x.shape[0], width - 1, mixed.shape[-1]), mixed], dim=1)
    assert m.conv.bias is not None
    rows = [sum((padded[:, i + j] * m.conv.weight[:, 0, j] for j in range(width)), m.conv.bias) for i in range(t)]
    u, B, C = silu(torch.stack(rows, 1)).split([c, g * n, g * n], dim=-1)
    u, B, C = u.reshape(*x.shape[:2], h, p), B.reshape(*x.shape[:2], g, n), C.reshape(*x.shape[:2], g, n)
    step = torch.log1p(torch.exp(dt + m.dt_bias))
    decays, scales = -torch.exp(m.A_log) * step, torch.log1p(torch.exp(m.L * dl.reshape(*x.shape[:2], h, -1)))
    heads = torch.arange(h) // (h // g)
    outputs = []
    for i in range(t):
        total, sums, end, kept = m.D[:, None] * u[:, i], torch.zeros_like(decays[:, i]), i, {i: 0}
        while end:
            size = end & -end
            kept |= dict.fromkeys(range(end - size, end), min(size.bit_length(), m.num_levels - 1))
            end -= size
        for j in range(i, -1, -1):
            weight = scales[:, i, :, kept[j]] * torch.exp(sums) * (C[:, i, heads] * B[:, j, heads]).sum(-1)
            total = total + (weight * step[:, j])[..., None] * u[:, j]
            sums = sums + decays[:, j]
        outputs.append(total)
    gated = torch.stack(outputs, 1).flatten(2) * silu(z)
    groups = gated.reshape(*gated.shape[:2], g, -1)
    normal = groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (normal.flatten(2) * m.norm.weight) @ m.out_proj.weight.T


@pytest.mark.oracle("log_linear_mamba2")
@pytest.mark.parametrize("t", [2, 75])  # a single token reads nothing that decays; 75: more than one chunk
@pytest.mark.parametrize("config", [{"state_dim": 5}, {"state_dim": 3, "num_groups": 3, "num_levels": 4}], ids=str)
def test_the_mixer_equals_the_paper_s_equation_with_all_gradients(config: dict[str, int], t: int) -> None:
    mixer = build(LogLinearMamba2, LogLinearMamba2Config(head_dim=4, **config)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, pull = (torch.randn(2, t, D_MODEL, dtype=torch.float64) for _ in range(2))
    y, expected = mixer(x.requires_grad_()), equation(mixer, x)
    assert_close(y, expected, tolerance=TOLERANCE)
    right = gradients(expected, pull, x, mixer)
    for name, found in gradients(y, pull, x, mixer).items():
        assert_close(found, right[name], name, TOLERANCE)


def test_with_weights_of_one_it_is_mamba_2() -> None:
    plain = build(Mamba2, Mamba2Config(state_dim=5, head_dim=4)).double()
    mixer = build(LogLinearMamba2, LogLinearMamba2Config(state_dim=5, head_dim=4, num_levels=3)).double()
    with torch.no_grad():
        mixer.load_state_dict(plain.state_dict() | {"L": mixer.L, "in_proj.weight": mixer.in_proj.weight})
        mixer.in_proj.weight[: -6 * 3] = plain.in_proj.weight
        x = torch.randn(2, 90, D_MODEL, dtype=torch.float64)
        # The last weights of W_in give dl; softplus of it is 1 where L dl = log(e - 1), for one input alone: so by L.
        first = x[:, :1].expand_as(x).contiguous()
        mixer.in_proj.weight[-6 * 3 :] = first[:1, 0] / first[0, 0].square().sum()
        mixer.L.fill_(float(torch.expm1(torch.ones(())).log()))
        assert_close(mixer(first[:1]), plain(first[:1]), tolerance=1e-7)
        assert (mixer(x) - plain(x)).abs().max() > 1e-3


@pytest.mark.parametrize("config", [{"num_levels": 15}, {"num_groups": 2, "state_dim": 16, "expand": 3}], ids=str)
def test_the_parameter_count_is_the_closed_form(config: dict[str, int]) -> None:
    chosen = LogLinearMamba2Config(**config)
    d, c, levels = 128, chosen.expand * 128, chosen.num_levels or 7
    states, h = chosen.num_groups * chosen.state_dim, c // chosen.head_dim
    mamba2 = d * (2 * c + 2 * states + h) + (c + 2 * states) * 5 + 3 * h + c + c * d
    found = sum(p.numel() for p in build(LogLinearMamba2, chosen, 128).parameters())
    assert found == mamba2 + h * levels * (d + 1)


def test_all_levels_start_with_one_weight() -> None:
    mixer = build(LogLinearMamba2, LogLinearMamba2Config(head_dim=4))
    assert (mixer.L == 1).all() and (mixer.D == 1).all() and (mixer.norm.weight == 1).all()
    assert mixer.A_log.exp().min() >= 1 and mixer.A_log.exp().max() <= 16.001


def test_sizes_that_do_not_fit_are_refused_by_name() -> None:
    for key in ("expand", "state_dim", "head_dim", "num_groups", "conv_width"):
        with pytest.raises(ConfigError, match=f"{key} is 0"):
            LogLinearMamba2Config(**{key: 0})
    with pytest.raises(ConfigError, match="num_levels is -1"):
        LogLinearMamba2Config(num_levels=-1)
    with pytest.raises(ConfigError, match="24 channels are not 1 equal groups of heads of 5"):
        build(LogLinearMamba2, LogLinearMamba2Config(head_dim=5))
