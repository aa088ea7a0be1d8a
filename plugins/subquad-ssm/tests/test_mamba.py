"""Mamba against its paper: parameter count, initial values, the equations, and a carry of constant size."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.fx
from torch import Tensor, nn

from subquad import ConfigError, MixerContext
from subquad.registry import load_registry
from subquad_kernels.catalogue import load_attribute
from subquad_ssm.both_directions import BidirectionalMamba
from subquad_ssm.config import MambaConfig
from subquad_ssm.mamba import Mamba


def build(d_model: int = 12, *, seed: int = 0, std: float = 0.3, **config: int) -> Mamba:
    """A mixer whose projections are large enough that every path shows in the output."""
    torch.manual_seed(seed)
    mixer = Mamba(MambaConfig(**config), MixerContext(d_model=d_model, layer_index=0, num_layers=2, context_len=64))
    mixer.init_parameters(std)
    return mixer


def tokens(b: int, t: int, d: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(b, t, d, generator=torch.Generator().manual_seed(1), dtype=dtype)


def block_from_the_equations(mixer: Mamba, x: Tensor) -> np.ndarray[Any, Any]:
    """One sequence through the block of the paper in numpy, token by token; no code shared with the operators."""
    p = {name: value.detach().double().numpy() for name, value in mixer.named_parameters()}
    u = x.double().numpy()
    channels, states = p["A_log"].shape
    width, rank = p["conv.weight"].shape[2], p["dt_proj.weight"].shape[1]
    A = -np.exp(p["A_log"])
    h, recent, out = np.zeros((channels, states)), np.zeros((width, channels)), []
    for u_t in u:
        x_t, z_t = np.split(p["in_proj.weight"] @ u_t, 2)
        recent = np.concatenate([recent[1:], x_t[None]])
        x_t = (p["conv.weight"][:, 0].T * recent).sum(0) + p["conv.bias"]
        x_t = x_t / (1 + np.exp(-x_t))
        low_rank, B, C = np.split(p["x_proj.weight"] @ x_t, [rank, rank + states])
        dt = np.log1p(np.exp(p["dt_proj.weight"] @ low_rank + p["dt_proj.bias"]))
        h = np.exp(dt[:, None] * A) * h + (dt * x_t)[:, None] * B[None]
        y = h @ C + p["D"] * x_t
        out.append(p["out_proj.weight"] @ (y * z_t / (1 + np.exp(-z_t))))
    return np.stack(out)


@pytest.mark.oracle("mamba")
def test_its_bidirectional_form_is_two_blocks_one_of_them_on_the_reversed_sequence() -> None:
    torch.manual_seed(0)
    context = MixerContext(d_model=12, layer_index=0, num_layers=2, context_len=64)
    mixer = BidirectionalMamba(MambaConfig(bidirectional=True), context)
    mixer.init_parameters(0.3)
    mixer.double()
    x = tokens(1, 9)
    expected = block_from_the_equations(mixer, x[0]) + block_from_the_equations(mixer.back, x[0].flip(0))[::-1]
    np.testing.assert_allclose(mixer(x)[0].detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def test_it_is_discovered_under_its_name() -> None:
    spec = load_registry().mixer("mamba")
    assert spec.config is MambaConfig
    context = MixerContext(d_model=12, layer_index=0, num_layers=2, context_len=64)
    names = set[str]()
    for config, kind in ((MambaConfig(), Mamba), (MambaConfig(bidirectional=True), BidirectionalMamba)):
        mixer: Any = load_attribute(spec.build)(config, context)  # type: ignore[operator]
        assert type(mixer) is kind
        names |= {name for name, _ in mixer.named_parameters()}
    assert {*spec.no_decay, *spec.float32_parameters} <= names


@pytest.mark.parametrize(
    "config", [{}, {"expand": 3, "state_dim": 5, "conv_width": 2, "dt_rank": 7}], ids=["paper", "other"]
)
@pytest.mark.parametrize("d", [12, 64])
def test_the_parameter_count_is_the_closed_form(d: int, config: dict[str, int]) -> None:
    chosen = MambaConfig(**config)
    di, n, k = chosen.expand * d, chosen.state_dim, chosen.conv_width
    r = chosen.dt_rank or math.ceil(d / 16)
    expected = 2 * d * di + di * (k + 1) + di * (r + 2 * n) + (r + 1) * di + di * n + di + di * d
    assert sum(p.numel() for p in build(d, **config).parameters()) == expected


def test_the_parameters_start_where_the_paper_starts_them() -> None:
    mixer = build(64, std=0.02)
    assert torch.equal((-mixer.A_log.exp()).round().long(), -torch.arange(1, 17).expand(128, 16))
    assert (mixer.D == 1).all()
    step = nn.functional.softplus(mixer.dt_proj.bias)
    # Log-uniform over two decades: all inside, and both ends of the range met by 128 draws.
    assert 0.999e-3 < step.min() < 2e-3
    assert 0.5e-1 < step.max() < 1.001e-1
    assert mixer.dt_proj.weight.abs().max() <= mixer.dt_rank**-0.5
    assert mixer.dt_proj.weight.abs().max() > 0.9 * mixer.dt_rank**-0.5
    assert mixer.conv.weight.abs().max() <= 4**-0.5
    for linear in (mixer.in_proj, mixer.x_proj, mixer.out_proj):
        assert linear.bias is None
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_initialising_twice_draws_again_and_never_leaves_the_paper_s_ranges() -> None:
    mixer = build()
    before = mixer.dt_proj.weight.clone()
    mixer.init_parameters(5.0)
    assert not torch.equal(before, mixer.dt_proj.weight)
    assert mixer.dt_proj.weight.abs().max() <= mixer.dt_rank**-0.5


@pytest.mark.oracle("mamba")
@pytest.mark.parametrize("config", [{}, {"conv_width": 1, "state_dim": 1}, {"expand": 1, "conv_width": 2}], ids=str)
def test_the_mixer_equals_the_block_written_from_the_equations(config: dict[str, int]) -> None:
    mixer = build(**config).double()
    x = tokens(2, 37)
    y = mixer(x).detach()
    for sequence, output in zip(x, y):
        torch.testing.assert_close(output, torch.from_numpy(block_from_the_equations(mixer, sequence)))
    with torch.no_grad():
        mixer.D[0] += 0.01
    assert not torch.allclose(mixer(x), y)


@pytest.mark.parametrize("t", [1, 2, 21])
def test_decode_equals_prefill_equals_forward_at_every_split(t: int) -> None:
    mixer = build().double()
    x = tokens(2, t)
    with torch.no_grad():
        expected = mixer(x)
        for m in range(t + 1):
            carry, parts = mixer.empty_carry(2), []
            if m:
                y, carry = mixer.prefill(x[:, :m], carry)
                parts.append(y)
            for token in range(m, t):
                y_t, carry = mixer.decode(x[:, token], carry)
                parts.append(y_t.unsqueeze(1))
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lengths", [(5, 0, 1, 13), (16, 16), (1, 1, 1)], ids=str)
def test_packed_documents_equal_separate_ones_with_gradients(lengths: tuple[int, ...]) -> None:
    mixer = build().double()
    bounds = np.cumsum((0, *lengths))
    x = tokens(1, int(bounds[-1])).requires_grad_()
    packed = mixer(x, torch.tensor(bounds, dtype=torch.int32))
    pieces = [mixer(x[:, start:stop]) for start, stop in itertools.pairwise(bounds) if start < stop]
    separate = torch.cat(pieces, dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-10, atol=1e-12)
    inputs = [x, *mixer.parameters()]
    pull = tokens(1, int(bounds[-1]))
    for found, expected in zip(
        torch.autograd.grad(packed, inputs, pull), torch.autograd.grad(separate, inputs, pull), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_the_carry_has_one_size_however_long_the_sequence() -> None:
    """b (c n 4 + c (w-1) e) bytes: an fp32 state and the convolution's last inputs."""
    mixer = build()

    def carry_bytes(t: int) -> int:
        with torch.no_grad():
            _, carry = mixer.prefill(tokens(3, t, dtype=torch.float32), mixer.empty_carry(3))
        return sum(part.numel() * part.element_size() for part in carry)

    assert carry_bytes(1) == carry_bytes(50) == 3 * (24 * 16 * 4 + 24 * 3 * 4)
    assert sum(part.numel() * part.element_size() for part in mixer.empty_carry(3)) == carry_bytes(1)


def test_in_bfloat16_the_state_and_the_step_sizes_stay_float32() -> None:
    mixer, x = build(), tokens(2, 9, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, carry = mixer.prefill(x, mixer.empty_carry(2))
    assert carry.state.dtype == torch.float32
    # Five matrix products with inputs rounded to 8 bits, relative to the largest output.
    assert (y - mixer(x)).abs().max() < 4e-2 * mixer(x).abs().max()


def test_every_parameter_learns() -> None:
    mixer = build()
    mixer(tokens(2, 20, dtype=torch.float32)).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("key", ["expand", "state_dim", "conv_width"])
def test_a_size_of_zero_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is 0"):
        MambaConfig(**{key: 0})


def test_each_operator_is_one_node_of_the_traced_mixer() -> None:
    graph = torch.fx.Tracer().trace(build(), concrete_args={"cu_seqlens": None})
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets.count("subquad.causal_conv.default") == 1
    assert targets.count("subquad.selective_scan.default") == 1
