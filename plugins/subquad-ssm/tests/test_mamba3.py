"""Mamba-3 keeps the suite's promises, and is its paper: both forms, the complex state, lanes, sizes, initial values."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from subquad import ConfigError, MixerContext
from subquad.testing.mixer_suite import MixerSuite, assert_close, carry_bytes, gradients
from subquad_ssm.config import Mamba3Config
from subquad_ssm.data_rotation import CumulatedAngles
from subquad_ssm.mamba3 import Mamba3

D_MODEL = 12
SMALL: dict[str, Any] = {"state_dim": 6, "head_dim": 4}
GROUPED: dict[str, Any] = {"state_dim": 5, "head_dim": 4, "num_groups": 3, "rotated_share": 1.0, "out_norm": True}
LANES: dict[str, Any] = {"state_dim": 4, "head_dim": 8, "mimo_rank": 3, "rate_map": "heavy_tail", "out_norm": True}
TOLERANCE = 1e-9
"""Relative to the largest value: float64, sums of a hundred terms in another order, through a norm."""


cumulated_angles = CumulatedAngles()


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Su et al. 2021, equation 34: neighbours are turned by their angles.  Shapes:  x: ... n    angles: ... s"""
    turning, still = x.split([2 * angles.shape[-1], x.shape[-1] - 2 * angles.shape[-1]], dim=-1)
    a, b = turning.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2), still], -1)


class TestMamba3(MixerSuite):
    mixer = "mamba3"
    config: ClassVar = {"state_dim": 4, "head_dim": 8}


class TestMamba3WithLanes(MixerSuite):
    mixer = "mamba3"
    config: ClassVar = {
        "state_dim": 6, "head_dim": 4, "num_groups": 2, "expand": 1, "mimo_rank": 3, "rotated_share": 1.0,
        "rate_map": "heavy_tail", "out_norm": True,
    }  # fmt: skip


def build(d_model: int = D_MODEL, *, std: float = 0.3, **config: Any) -> Mamba3:
    context = MixerContext(d_model=d_model, layer_index=0, num_layers=2, context_len=64)
    mixer = Mamba3(Mamba3Config(**config), context)
    mixer.init_parameters(std)
    return mixer


def wide(**config: Any) -> Mamba3:
    """A float64 mixer with every parameter away from its initial value, so that each shows in the output."""
    mixer = build(**config).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def tokens(b: int, t: int) -> Tensor:
    return torch.randn(b, t, D_MODEL, dtype=torch.float64)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def unit(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def projected(m: Mamba3, x: Tensor) -> tuple[Tensor, ...]:
    """z: b t h p    U: b t r h p    B, C: b t r h n    dt, A, lambda: b t h    turns: b t h s"""
    h, p, g, n, r, c = m.num_heads, m.head_dim, m.num_groups, m.state_dim, m.lanes, m.channels
    parts = (x @ m.in_proj.weight.T).split([c, c, r * g * n, r * g * n, h, h, h, m.num_angles], dim=-1)
    z, u = (part.reshape(*x.shape[:2], h, p) for part in parts[:2])
    B, C = (
        (unit(part.reshape(*x.shape[:2], r, g, 1, n)) * norm.weight)
        .expand(-1, -1, -1, -1, h // g, -1)
        .reshape(*x.shape[:2], r, h, n)
        + bias.transpose(0, 1)
        for part, norm, bias in ((parts[2], m.B_norm, m.B_bias), (parts[3], m.C_norm, m.C_bias))
    )
    dt, raw = torch.log1p(torch.exp(parts[4] + m.dt_bias)), parts[5]
    rate = torch.where(raw >= 0, 1 + raw, 1 / (1 - raw)) if m.heavy_tail else torch.log1p(torch.exp(raw))
    U = u[:, :, None] * (m.mimo_x.transpose(0, 1) if r > 1 else 1.0)
    turns = math.pi * torch.tanh(parts[7])[:, :, None] * dt[..., None]
    return z, U, B, C, dt, -torch.maximum(rate, torch.tensor(1e-4)), 1 / (1 + torch.exp(-parts[6])), turns


def left(m: Mamba3, y: Tensor, U: Tensor, z: Tensor) -> Tensor:
    """D, the norm, the gate, the sum of lanes, the projection."""
    y = y + m.D[:, None] * U
    if m.out_norm is not None:
        y = unit(y) * m.out_norm.weight
    lanes = m.lanes > 1
    y = y * silu(z[:, :, None] * (m.mimo_z.transpose(0, 1) if lanes else 1.0))
    return (y * (m.mimo_o.transpose(0, 1) if lanes else 1.0)).sum(2).flatten(2) @ m.out_proj.weight.T


def complex_recurrence(m: Mamba3, x: Tensor) -> Tensor:
    """Lahoti et al. 2026: a complex diagonal A, by the trapezoidal rule, token by token; nothing is rotated."""
    z, U, B, C, dt, A, lam, turns = projected(m, x)
    n = m.state_dim
    pairs = -(-n // 2)  # an odd state is a pair with a zero

    def as_complex(rows: Tensor) -> Tensor:
        rows = nn.functional.pad(rows, (0, 2 * pairs - n)).unflatten(-1, (pairs, 2))
        return torch.complex(rows[..., 0], rows[..., 1])

    K, Q, turns = as_complex(B), as_complex(C), nn.functional.pad(turns, (0, pairs - m.num_angles))
    state = torch.zeros(x.shape[0], m.num_heads, pairs, m.head_dim, dtype=torch.complex128)
    before, outputs = torch.zeros_like(state), []
    for t in range(x.shape[1]):
        transition = torch.exp(torch.complex((dt[:, t] * A[:, t])[..., None].expand_as(turns[:, t]), -turns[:, t]))
        write = torch.einsum("brhn,brhp->bhnp", K[:, t], U[:, t].to(K.dtype))
        decayed = transition[..., None] * (state + ((1 - lam[:, t]) * dt[:, t])[..., None, None] * before)
        state, before = decayed + (lam[:, t] * dt[:, t])[..., None, None] * write, write
        outputs.append(torch.einsum("brhn,bhnp->brhp", Q[:, t].conj(), state).real)
    return left(m, torch.stack(outputs, 1), U, z)


def dual(m: Mamba3, x: Tensor) -> Tensor:
    """The quadratic form: y = (L W o Q K^T) U, L the decays, W two diagonals: own writes and those of the next."""
    z, U, B, C, dt, A, lam, turns = projected(m, x)
    t = x.shape[1]
    theta = torch.stack([turns[:, : i + 1].sum(1) for i in range(t)], 1)[:, :, None]
    decays = (dt * A).transpose(1, 2)
    later = torch.ones(t, t, dtype=torch.bool).tril()
    sums = torch.stack([torch.stack([decays[..., j + 1 : i + 1].sum(-1) for j in range(t)], -1) for i in range(t)], -2)
    L = torch.where(later, torch.exp(sums), 0.0)
    again = (1 - lam) * dt * torch.exp(dt * A)
    W = torch.diag_embed((lam * dt).transpose(1, 2)) + torch.diag_embed(again[:, 1:].transpose(1, 2), offset=-1)
    scores = torch.einsum("birhn,bjlhn->bhirjl", rotated(C, theta), rotated(B, theta))
    y = torch.einsum("bhij,bhirjl,bjlhp->birhp", L @ W, scores, U)
    return left(m, y, U, z)


@pytest.mark.oracle("mamba3")
@pytest.mark.parametrize(
    ("form", "config", "t"),
    [
        (form, config, t)
        for config in (SMALL, GROUPED, LANES)
        for form, t in ((complex_recurrence, 1), (complex_recurrence, 83), (dual, 17))
    ],
)
def test_the_mixer_equals_both_forms_of_the_paper_with_all_gradients(form: Any, config: dict[str, Any], t: int) -> None:
    torch.manual_seed(t)
    mixer = wide(**config)
    x, pull = tokens(2, t).requires_grad_(), tokens(2, t)
    y, expected = mixer(x), form(mixer, x)
    assert_close(y, expected, tolerance=TOLERANCE)
    right = gradients(expected, pull, x, mixer)
    for name, found in gradients(y, pull, x, mixer).items():
        assert_close(found, right[name], name, TOLERANCE)


def constants(mixer: Mamba3) -> dict[str, Tensor]:
    """The rows of W_in by name, to be set by hand."""
    names = ("z", "u", "B", "C", "dt", "rate", "trap", "angle")
    return dict(zip(names, mixer.in_proj.weight.split(mixer.parts)))


def test_with_euler_s_rule_and_no_angle_it_is_the_recurrence_of_mamba2() -> None:
    torch.manual_seed(0)
    mixer, x = wide(**SMALL), tokens(2, 70)
    x[..., 0] = 1
    with torch.no_grad():
        rows = constants(mixer)
        rows["trap"].zero_()[:, 0] = 50.0
        rows["angle"].zero_()
        z, U, B, C, dt, A, _, _ = projected(mixer, x)
        state, outputs = x.new_zeros(2, mixer.num_heads, mixer.head_dim, mixer.state_dim), []
        for t in range(70):
            write = (dt[:, t, :, None] * U[:, t, 0])[..., None] * B[:, t, 0, :, None, :]
            state = torch.exp(dt[:, t] * A[:, t])[..., None, None] * state + write
            outputs.append((state * C[:, t, 0, :, None, :]).sum(-1))
        euler = left(mixer, torch.stack(outputs, 1).unsqueeze(2), U, z)
        assert_close(mixer(x), euler, tolerance=TOLERANCE)
        rows["trap"].zero_()  # the trapezoid
        assert (mixer(x) - euler).abs().max() > 1e-2 * euler.abs().max()


def test_weights_set_by_hand_tell_the_parity_of_bits() -> None:
    """A half turn for every 1, none for a 0, and one value, written by the first token: its sign is the parity."""
    torch.manual_seed(0)
    mixer = build(4, state_dim=4, head_dim=8, rotated_share=1.0).double()
    bits = torch.randint(0, 2, (3, 200))
    x = torch.zeros(3, 201, 4, dtype=torch.float64)
    x[:, :, 0], x[:, 1:, 1], x[:, 0, 2] = 1, bits.double(), 1  # a constant, the bit, the mark of the first token
    with torch.no_grad():
        rows = constants(mixer)
        mixer.in_proj.weight.zero_()
        mixer.D.zero_()
        mixer.dt_bias.fill_(math.log(math.expm1(1.0)))  # dt = 1
        rows["angle"][:, 1] = 30.0
        rows["rate"][:, 0] = -30.0  # the slowest rate there is
        rows["trap"][:, 0] = 30.0
        rows["u"][:, 2] = 1.0
        rows["z"][:, 0] = 1.0
        mixer.out_proj.weight.fill_(1.0)
        y = mixer(x)[:, 1:, 0]
    assert torch.equal(y < 0, bits.cumsum(1) % 2 == 1)
    assert y.abs().min() > 0.9 * y.abs().max()


@pytest.mark.parametrize("config", [SMALL, LANES], ids=["one lane", "lanes"])
def test_outputs_depend_on_differences_of_angles_alone(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mixer, x = wide(**config), tokens(2, 20)
    with torch.no_grad():
        _, carry = mixer.prefill(x[:, :9], mixer.empty_carry(2))
        expected, _ = mixer.prefill(x[:, 9:], carry)
        shift = torch.randn_like(carry.angle)
        state = rotated(carry.state.transpose(-1, -2), shift.unsqueeze(2)).transpose(-1, -2)
        turned = carry._replace(angle=carry.angle + shift, state=state, key=rotated(carry.key, shift.unsqueeze(1)))
        assert_close(mixer.prefill(x[:, 9:], turned)[0], expected, tolerance=TOLERANCE)
        assert not torch.allclose(mixer.prefill(x[:, 9:], carry._replace(angle=carry.angle + shift))[0], expected)


def test_lanes_that_neither_write_nor_are_read_leave_the_mixer_of_one() -> None:
    torch.manual_seed(0)
    one, two, x = wide(**SMALL), wide(**SMALL, mimo_rank=2), tokens(2, 40)
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if name in ("B_bias", "C_bias"):
                two.get_parameter(name)[:, :1] = parameter
            elif name != "in_proj.weight":
                two.get_parameter(name).copy_(parameter)
        mine, theirs = constants(one), constants(two)
        for name, rows in mine.items():
            theirs[name][: len(rows)] = rows
        assert not torch.allclose(two(x), one(x))
        for lanes, first in ((two.mimo_x, 1.0), (two.mimo_z, 1.0), (two.mimo_o, 1.0)):
            lanes.zero_()[:, 0] = first
        assert_close(two(x), one(x), tolerance=TOLERANCE)


def test_angles_stay_exact_over_many_tokens_in_float32() -> None:
    torch.manual_seed(0)
    steps = math.pi * torch.rand(1, 30_000, 1, 3)
    exact = torch.remainder(steps.double().cumsum(1), 2 * math.pi)

    def worst(angles: Tensor) -> float:
        return float((torch.polar(torch.ones(()).double(), angles.double() - exact) - 1).abs().max())

    assert worst(cumulated_angles(steps, None, None)) < 1e-6
    assert worst(steps.cumsum(1)) > 1e-4, "a plain sum would do"
    first = cumulated_angles(steps[:, :9_999], None, None)
    assert worst(torch.cat([first, cumulated_angles(steps[:, 9_999:], first[:, -1], None)], 1)) < 1e-6


def test_packed_angles_begin_at_zero_and_owe_nothing_to_other_documents() -> None:
    torch.manual_seed(0)
    steps, cu_seqlens = torch.rand(1, 9, 2, 3, requires_grad=True), torch.tensor([0, 0, 4, 4, 5, 9, 9]).int()
    angles = cumulated_angles(steps, None, cu_seqlens)
    separate = torch.cat([cumulated_angles(part, None, None) for part in steps.split([4, 1, 4], dim=1)], 1)
    assert torch.allclose(angles, separate, atol=1e-6)
    (gradient,) = torch.autograd.grad(angles[:, 5:].sum(), steps)
    assert (gradient[:, :5] == 0).all()
    assert (gradient[:, 5:] == torch.tensor([4.0, 3, 2, 1])[:, None, None]).all()


def test_the_parameters_start_where_the_authors_start_them() -> None:
    torch.manual_seed(0)
    mixer = build(256, std=0.02, head_dim=4, mimo_rank=4, out_norm=True)
    step = nn.functional.softplus(mixer.dt_bias)
    assert 0.999e-3 < step.min() < 2e-3 and 0.5e-1 < step.max() < 1.001e-1
    assert mixer.out_norm is not None
    for ones in (mixer.D, mixer.B_bias, mixer.C_bias, mixer.mimo_z, *(norm.weight for norm in norms(mixer))):
        assert (ones == 1).all()
    assert (mixer.mimo_x == 0.25).all() and (mixer.mimo_o == 0.25).all()
    for linear in (mixer.in_proj, mixer.out_proj):
        assert linear.bias is None
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)


def norms(mixer: Mamba3) -> list[Any]:
    return [norm for norm in (mixer.B_norm, mixer.C_norm, mixer.out_norm) if norm is not None]


@pytest.mark.parametrize("config", [{}, {"num_groups": 2, "state_dim": 16, "expand": 3, "mimo_rank": 4}], ids=str)
def test_the_parameter_count_is_the_closed_form(config: dict[str, int]) -> None:
    chosen = Mamba3Config(**config)
    d, c, n, r = 128, chosen.expand * 128, chosen.state_dim, chosen.mimo_rank
    h = c // chosen.head_dim
    maps = d * (2 * c + 2 * r * chosen.num_groups * n + 3 * h + n // 4) + c * d
    expected = maps + 2 * h + 2 * h * r * n + 2 * n + (3 * r * c if r > 1 else 0)
    assert sum(p.numel() for p in build(128, **config).parameters()) == expected


@pytest.mark.parametrize("config", [SMALL, LANES], ids=["one lane", "lanes"])
def test_in_bfloat16_the_state_stays_float32_and_the_carry_has_one_size(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mixer, x = build(**config), tokens(3, 40).float()
    with torch.no_grad():
        expected = mixer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, carry = mixer.prefill(x, mixer.empty_carry(3))
        _, exact = mixer.prefill(x, mixer.empty_carry(3))
    assert carry.state.dtype == carry.angle.dtype == torch.float32
    # Four matrix products with factors rounded to 8 bits, relative to the largest output.
    assert (y - expected).abs().max() < 5e-2 * expected.abs().max()
    h, n, p, r, s = mixer.num_heads, mixer.state_dim, mixer.head_dim, mixer.lanes, mixer.num_angles
    assert carry_bytes(exact) == carry_bytes(mixer.empty_carry(3)) == 3 * 4 * h * (n * p + s + r * n + p)


def test_sizes_that_do_not_fit_are_refused_by_name() -> None:
    for key in ("expand", "state_dim", "head_dim", "num_groups", "mimo_rank"):
        with pytest.raises(ConfigError, match=f"{key} is 0"):
            Mamba3Config(**{key: 0})
    for config, message in (
        ({"rotated_share": 0.3}, "rotated_share is 0.3"),
        ({"state_dim": 3}, "0.5 of 3 states hold no pair"),
        ({"rate_map": "exp"}, "rate_map is 'exp'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Mamba3Config(**config)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="24 channels are not 1 equal groups of heads of 5"):
        build(head_dim=5)
