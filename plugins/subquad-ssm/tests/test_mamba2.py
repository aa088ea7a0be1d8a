"""Mamba-2 keeps the suite's promises, and is its paper: the recurrence, the dual form, sizes and initial values."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from subquad import ConfigError, MixerContext
from subquad.testing.mixer_suite import MixerSuite, assert_close, carry_bytes, gradients
from subquad_ssm.both_directions import BidirectionalMamba2, build_mamba2
from subquad_ssm.config import Mamba2Config
from subquad_ssm.mamba2 import Mamba2

D_MODEL = 12
SMALL = {"state_dim": 5, "head_dim": 4}
GROUPED = {"state_dim": 3, "head_dim": 4, "num_groups": 3, "conv_width": 2}
TOLERANCE = 1e-9
"""Relative to the largest value: float64, sums of a hundred terms in another order, through a norm."""


class TestMamba2(MixerSuite):
    mixer = "mamba2"
    config: ClassVar = {"state_dim": 4, "head_dim": 8}


class TestMamba2WithGroups(MixerSuite):
    mixer = "mamba2"
    config: ClassVar = {"state_dim": 4, "head_dim": 4, "num_groups": 2, "expand": 1, "conv_width": 1}


def build(d_model: int = D_MODEL, *, std: float = 0.3, **config: int) -> Mamba2:
    context = MixerContext(d_model=d_model, layer_index=0, num_layers=2, context_len=64)
    mixer = Mamba2(Mamba2Config(**config), context)
    mixer.init_parameters(std)
    return mixer


def wide(**config: int) -> Mamba2:
    """A float64 mixer with every parameter away from its initial value, so that each shows in the output."""
    mixer = build(**config).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def tokens(b: int, t: int) -> Tensor:
    return torch.randn(b, t, D_MODEL, dtype=torch.float64)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def projected(m: Mamba2, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z, u: b t h p    B, C: b t h n, repeated for the heads of a group    dt: b t h"""
    h, p, g, n, c = m.num_heads, m.head_dim, m.num_groups, m.state_dim, m.channels
    z, mixed, dt = (x @ m.in_proj.weight.T).split([c, c + 2 * g * n, h], dim=-1)
    width = m.conv.weight.shape[-1]
    padded = torch.cat([mixed.new_zeros(x.shape[0], width - 1, mixed.shape[-1]), mixed], dim=1)
    rows = [
        sum((padded[:, t + j] * m.conv.weight[:, 0, j] for j in range(width)), m.conv.bias) for t in range(x.shape[1])
    ]
    u, B, C = silu(torch.stack(rows, 1)).split([c, g * n, g * n], dim=-1)
    B, C = (
        part.reshape(*x.shape[:2], g, 1, n).expand(-1, -1, -1, h // g, -1).reshape(*x.shape[:2], h, n)
        for part in (B, C)
    )
    return z, u.reshape(*x.shape[:2], h, p), B, C, torch.log1p(torch.exp(dt + m.dt_bias))


def left(m: Mamba2, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
    """D, the gate, the norm of each group, the projection."""
    gated = (y + m.D[:, None] * u).flatten(2) * silu(z)
    groups = gated.reshape(*gated.shape[:2], m.num_groups, -1)
    normal = groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (normal.flatten(2) * m.norm.weight) @ m.out_proj.weight.T


def recurrence(m: Mamba2, x: Tensor) -> Tensor:
    """Dao and Gu 2024, equation 2 with the discretisation of section 2.1, token by token."""
    z, u, B, C, dt = projected(m, x)
    A = -torch.exp(m.A_log)
    state, outputs = x.new_zeros(x.shape[0], m.num_heads, m.head_dim, m.state_dim), []
    for t in range(x.shape[1]):
        write = (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None, :]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + write
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    return left(m, torch.stack(outputs, 1), u, z)


def dual(m: Mamba2, x: Tensor) -> Tensor:
    """Dao and Gu 2024, section 5: y = (L o C B^T) (dt u) with L_ij = exp(sum of dt A over j < l <= i)."""
    z, u, B, C, dt = projected(m, x)
    decays = (dt * -torch.exp(m.A_log)).transpose(1, 2)
    t = x.shape[1]
    later = torch.ones(t, t, dtype=torch.bool).tril()
    sums = torch.stack([torch.stack([decays[..., j + 1 : i + 1].sum(-1) for j in range(t)], -1) for i in range(t)], -2)
    L = torch.where(later, torch.exp(sums), 0.0)
    scores = L * torch.einsum("bihn,bjhn->bhij", C, B)
    return left(m, torch.einsum("bhij,bjhp->bihp", scores, dt[..., None] * u), u, z)


@pytest.mark.oracle("mamba2")
@pytest.mark.parametrize(
    ("form", "config", "t"),
    [(form, config, t) for config in (SMALL, GROUPED) for form, t in ((recurrence, 1), (recurrence, 83), (dual, 17))],
)
def test_the_mixer_equals_both_forms_of_the_paper_with_all_gradients(form: Any, config: dict[str, int], t: int) -> None:
    torch.manual_seed(t)
    mixer = wide(**config)
    x, pull = tokens(2, t).requires_grad_(), tokens(2, t)
    y, expected = mixer(x), form(mixer, x)
    assert_close(y, expected, tolerance=TOLERANCE)
    right = gradients(expected, pull, x, mixer)
    for name, found in gradients(y, pull, x, mixer).items():
        assert_close(found, right[name], name, TOLERANCE)


@pytest.mark.oracle("mamba2")
@pytest.mark.parametrize("t", [1, 33])
def test_its_bidirectional_form_is_two_blocks_one_of_them_on_the_reversed_sequence(t: int) -> None:
    torch.manual_seed(t)
    context = MixerContext(d_model=D_MODEL, layer_index=0, num_layers=2, context_len=64)
    mixer = build_mamba2(Mamba2Config(**SMALL, bidirectional=True), context).double()
    assert isinstance(mixer, BidirectionalMamba2)
    mixer.init_parameters(0.3)
    x, pull = tokens(2, t).requires_grad_(), tokens(2, t)
    y, expected = mixer(x), recurrence(mixer, x) + recurrence(mixer.back, x.flip(1)).flip(1)
    assert_close(y, expected, tolerance=TOLERANCE)
    right = gradients(expected, pull, x, mixer)
    for name, found in gradients(y, pull, x, mixer).items():
        assert_close(found, right[name], name, TOLERANCE)


def test_the_parameters_start_where_the_authors_start_them() -> None:
    torch.manual_seed(0)
    mixer = build(256, std=0.02, head_dim=4)
    rates, step = mixer.A_log.exp(), nn.functional.softplus(mixer.dt_bias)
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16
    assert 0.999e-3 < step.min() < 2e-3 and 0.5e-1 < step.max() < 1.001e-1
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()
    assert mixer.conv.weight.abs().max() <= 0.5
    for linear in (mixer.in_proj, mixer.out_proj):
        assert linear.bias is None
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("config", [{}, {"num_groups": 2, "state_dim": 16, "expand": 3, "conv_width": 3}], ids=str)
def test_the_parameter_count_is_the_closed_form(config: dict[str, int]) -> None:
    chosen = Mamba2Config(**config)
    d, c = 128, chosen.expand * 128
    states, h = chosen.num_groups * chosen.state_dim, c // chosen.head_dim
    expected = d * (2 * c + 2 * states + h) + (c + 2 * states) * (chosen.conv_width + 1) + 3 * h + c + c * d
    assert sum(p.numel() for p in build(128, **config).parameters()) == expected


def test_in_bfloat16_the_state_stays_float32_and_the_carry_has_one_size() -> None:
    torch.manual_seed(0)
    mixer, x = build(**SMALL), tokens(3, 40).float()
    with torch.no_grad():
        expected = mixer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, carry = mixer.prefill(x, mixer.empty_carry(3))
        _, exact = mixer.prefill(x, mixer.empty_carry(3))
    assert carry.state.dtype == torch.float32
    # Four matrix products with factors rounded to 8 bits, relative to the largest output.
    assert (y - expected).abs().max() < 5e-2 * expected.abs().max()
    assert carry_bytes(exact) == carry_bytes(mixer.empty_carry(3)) == 3 * 4 * (24 * 5 + 3 * (24 + 10))


def test_sizes_that_do_not_fit_are_refused_by_name() -> None:
    for key in ("expand", "state_dim", "head_dim", "num_groups", "conv_width"):
        with pytest.raises(ConfigError, match=f"{key} is 0"):
            Mamba2Config(**{key: 0})
    with pytest.raises(ConfigError, match="24 channels are not 1 equal groups of heads of 5"):
        build(head_dim=5)
    with pytest.raises(ConfigError, match="4 equal groups"):
        build(head_dim=4, num_groups=4)
